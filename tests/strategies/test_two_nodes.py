"""Two "machines" on loopback, each with a torchrun of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.forked import ForkedPopen
from tests.helpers.recipes import small_recipe
from tests.helpers.runs import (
    assert_same_end,
    finished,
    kill,
    launch,
    lines,
    ranks_of,
    same,
    wait_until,
)
from tests.helpers.strategy_runs import CPU, PATIENCE

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nodes(
    arguments: list[str], popen: type[subprocess.Popen] = ForkedPopen
) -> list[subprocess.Popen[str]]:
    """Start both machines, as one would by hand."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    torchrun += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    torchrun += ["--master-port", str(free_port())]
    return [
        launch(["fit", *arguments], [*torchrun, *node, "-m", "lit_prefopt.cli"], popen)
        for node in (["--node-rank", "0"], ["--node-rank", "1"])
    ]


def both_end(processes: list[subprocess.Popen[str]]) -> None:
    said = [finished(process, PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)


@pytest.fixture(scope="module")
def whole(tiny_folder: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stops, in new interpreters: the others are forks."""
    folder = tmp_path_factory.mktemp("two-nodes") / "whole"
    both_end(nodes(two_nodes(tiny_folder, shards, folder), subprocess.Popen))
    return folder


@pytest.fixture
def recipe(tiny_folder: str, shards: str, tmp_path: Path) -> list[str]:
    """Arguments of a run on both, with a checkpoint after every step."""
    return two_nodes(tiny_folder, shards, tmp_path / "run")


def two_nodes(pipeline: str, shards: str, folder: Path) -> list[str]:
    return [
        *small_recipe(pipeline, shards, folder),
        *("--trainer", "hardware/two-nodes.yaml", "--trainer.devices", "1"),
        *("--trainer.limit_val_batches", "0", "--trainer.max_steps", "5"),
        *("--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.save_last", "true"),
        *("--trainer.callbacks.every_n_train_steps", "1"),
        *("--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"),
        *("--trainer.callbacks+", f"{CPU}.Seen", "--trainer.callbacks.folder", str(folder)),
    ]


def beating(folder: Path) -> list[str]:
    """Arguments that let a run write down its batches, slowly."""
    beat = ["--trainer.callbacks+", "tests.helpers.runs.Beat"]
    return [*beat, "--trainer.callbacks.path", str(folder / "beats")]


def test_batches_are_disjoint_and_weights_equal(whole: Path) -> None:
    a, b = (torch.load(whole / f"seen-{r}.pt", weights_only=True) for r in (0, 1))
    assert len(a["keys"]) == len(b["keys"]) == 5
    epoch = [key for seen in (a, b) for batch in seen["keys"][:3] for key in batch]
    assert len(set(epoch)) == len(epoch) == 24
    assert a["losses"] == b["losses"]
    assert a["weights"]
    assert same(a["weights"], b["weights"])


def test_when_one_is_gone_the_other_says_so_and_both_go_on(
    recipe: list[str], whole: Path, tmp_path: Path
) -> None:
    first, second = nodes([*recipe, *beating(tmp_path)])
    wait_until(lambda: "batch 3" in lines(tmp_path / "beats"), first, PATIENCE)
    kill(second)
    said = finished(first, PATIENCE)
    assert first.returncode != 0
    assert "lit-prefopt: Another rank has ended or does not answer" in said
    assert "`--ckpt_path last`" in said
    both_end(nodes([*recipe, "--ckpt_path", "last"]))
    assert_same_end(whole, tmp_path / "run")


def test_one_that_hangs_is_given_up_after_the_timeout(recipe: list[str], tmp_path: Path) -> None:
    short = ["--trainer.strategy.timeout", "0:00:45"]
    first, second = nodes([*recipe, *beating(tmp_path), *short])
    wait_until(lambda: "batch 2" in lines(tmp_path / "beats"), first, PATIENCE)
    for pid in ranks_of(second.pid):
        os.kill(pid, signal.SIGSTOP)
    said = finished(first, PATIENCE)
    kill(second)
    assert first.returncode != 0
    assert "lit-prefopt: Another rank has ended or does not answer" in said
    assert "imed out" in said
