"""Two real processes that accept different numbers of pairs take the same steps, or both stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.collecting import TWO, pairs_of_rounds, spo, write_prompts
from tests.helpers.runs import TWO_RANKS, assert_same_end, finished, kill, same, start, wait_until
from tests.helpers.strategy_runs import run_cases

pytestmark = pytest.mark.slow
NEEDED = 12  # pairs of a rank's collection


def learned(folder: Path) -> list[dict]:
    """Return what both ranks wrote down."""
    return [torch.load(folder / f"learned-{r}.pt", weights_only=True) for r in (0, 1)]


def recipe(pipeline: str, prompts: Path, folder: Path, *more: str, flow: bool = False) -> list[str]:
    """Return the arguments of a run on two ranks that write down what they learned from."""
    witness = ["--trainer.callbacks+", "tests.helpers.collecting.Learned"]
    witness += ["--trainer.callbacks.folder", str(folder.parent)]
    return [*spo(pipeline, prompts, folder, flow=flow), *TWO, *witness, *more]


SAVING = [
    *("--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.save_last", "true"),
    *("--trainer.callbacks.every_n_train_steps", "1"),
    *("--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"),
    *("--trainer.max_steps", "3"),
]


@pytest.fixture(scope="module")
def runs(tiny_folder: str, toy_flow_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs that nothing stops, one after the other in the same two processes."""
    root = tmp_path_factory.mktemp("collections")

    def case(name: str, opens: int, shut: int, *more: str, flow: bool = False) -> list[str]:
        (root / name).mkdir()
        prompts = write_prompts(root / name / "prompts.txt", opens=opens, shut=shut)
        folder = toy_flow_folder if flow else tiny_folder
        return ["fit", *recipe(folder, prompts, root / name / "run", *more, flow=flow)]

    moods = ["--model.judge.moods", "['1111110', '1001001001001001']"]
    cases = [
        case("different", 9, 14),
        case("flow", 9, 14, flow=True),
        case("starving", 20, 0, *moods, "--data.patience", "2", "--trainer.max_steps", "4"),
        case("whole", 9, 5, *SAVING),
    ]
    run_cases(cases, root / "cases.json")
    return root


@pytest.mark.parametrize("name", ["different", "flow"])
def test_ranks_that_accept_different_numbers_take_the_same_steps(name: str, runs: Path) -> None:
    one, two = (pairs_of_rounds(runs / name / f"judged-{r}.jsonl") for r in (0, 1))
    assert len(one) == len(two)  # they collect together
    apart = list(zip(one, two, strict=True))
    assert sum(one) != sum(two)
    # in some rounds only one of them has anything, either of them
    assert any(a > b == 0 for a, b in apart)
    assert any(b > a == 0 for a, b in apart)
    a, b = learned(runs / name)
    assert a["steps"] == b["steps"] == 12
    assert len(a["pairs"]) == len(b["pairs"]) == 3 * NEEDED
    both = [tuple(pair) for pair in a["pairs"] + b["pairs"]]
    assert len(set(both)) == len(both)  # none twice, on either rank
    assert same(a["weights"], b["weights"])


def test_a_rank_that_has_enough_may_starve(runs: Path) -> None:
    """Rank 0 has all of its pairs after two rounds, then none, while rank 1 goes on slowly."""
    folder = runs / "starving"
    assert pairs_of_rounds(folder / "judged-0.jsonl") == [6, 6, 0, 0, 0, 0]
    assert pairs_of_rounds(folder / "judged-1.jsonl") == [2, 2, 2, 2, 2, 6]
    a, b = learned(folder)
    assert len(a["pairs"]) == len(b["pairs"]) == NEEDED
    assert same(a["weights"], b["weights"])


@pytest.mark.parametrize(
    "moods",
    ["['0', '0']", "['1', '0']", "['1110', '1']"],
    ids=["both", "one", "one that had some"],
)
def test_a_rank_that_never_has_enough_stops_the_run(
    moods: str, tiny_folder: str, tmp_path: Path
) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", opens=20, shut=0)
    more = ["--model.judge.moods", moods, "--data.patience", "3"]
    process = start(recipe(tiny_folder, prompts, tmp_path / "run", *more), command=TWO_RANKS)
    said = finished(process)
    assert process.returncode != 0
    assert "lit-prefopt: 3 rounds of 2 prompts gave no pair" in said
    assert "`threshold`" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint_is_there_once_the_buffers_of_all_ranks_are(
    runs: Path, tiny_folder: str, tmp_path: Path
) -> None:
    """Rank 1 comes late to the checkpoint; the power fails as soon as that has its name."""
    prompts = write_prompts(tmp_path / "prompts.txt", opens=9, shut=5)
    (tmp_path / "parts").mkdir()
    parts = recipe(tiny_folder, prompts, tmp_path / "parts" / "run", *SAVING)
    late = ["--trainer.callbacks+", "tests.helpers.collecting.Late"]
    late += ["--trainer.callbacks.pause", "3"]
    process = start([*parts, *late], command=TWO_RANKS)
    folder = tmp_path / "parts" / "run" / "checkpoints"
    wait_until(lambda: bool([*folder.glob("[!.]*.ckpt")]), process)
    kill(process)
    said = process.communicate()[0]
    again = start([*parts, "--ckpt_path", "last"], command=TWO_RANKS)
    said = finished(again)
    assert again.returncode == 0, said
    assert_same_end(runs / "whole" / "run", tmp_path / "parts" / "run")
