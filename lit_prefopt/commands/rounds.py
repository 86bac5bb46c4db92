"""`lit-prefopt rounds`: alternate generation and training, each round from the previous policy.

Every step runs as a command in its own process, so that its memory is freed afterwards and
several devices are started as for that command alone. Finished steps are not repeated.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_prefopt.commands.step_process import run_step
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.utils.atomic_files import remove_partial, write_atomic
from lit_prefopt.utils.output_lock import OutputLock, check_free_space

ARGUMENTS, DONE = "arguments.json", "done"
WAIT = 0.5  # seconds between two checks of a rank for the first rank's output


@dataclass
class Round:
    """One round: its folder and its commands.

    Args:
        folder: Folder of the round.
        generate: Arguments of `lit-prefopt predict`.
        fit: Arguments of `lit-prefopt fit`.
        denoiser: Name of the denoiser's folder, such as `unet`.
    """

    folder: Path
    generate: list[str]
    fit: list[str]
    denoiser: str

    @property
    def pairs(self) -> Path:
        """Folder of the generated pairs."""
        return self.folder / "pairs"

    @property
    def done(self) -> bool:
        """Whether the round is finished."""
        return (self.folder / DONE).exists()

    @property
    def policy(self) -> Path:
        """Folder of the round's trained denoiser, with merged weights."""
        own = self.folder / "weights" / self.denoiser
        return own if own.exists() else self.folder / self.denoiser

    @property
    def steps(self) -> Iterator[list[str]]:
        """The remaining commands; an interrupted fit is resumed."""
        if not (self.pairs / "index.json").exists():
            yield ["predict", *self.generate]
        last = self.folder / "checkpoints" / "last.ckpt"
        yield ["fit", *self.fit, *(["--ckpt_path", "last"] if last.exists() else [])]
        if not self.policy.exists():  # a LoRA: the next round starts from it, merged
            to = ["--to", self.denoiser, "--output", str(self.folder / self.denoiser)]
            yield ["export", "--source", str(self.folder), *to]

    @property
    def arguments(self) -> list[list[str]]:
        """Arguments of both commands, independent of the rounds' folder."""
        root = str(self.folder.parent)
        return [[one.replace(root, "OUTPUT") for one in own] for own in (self.generate, self.fit)]

    def check(self) -> None:
        """Raise InputError if the folder contains a round of another recipe."""
        file = self.folder / ARGUMENTS
        if file.exists() and file.read_bytes() != json.dumps(self.arguments).encode():
            raise InputError(
                f"{self.folder} is a round of another run, with other arguments: resume it with the"
                " same arguments, or choose another folder with `--output FOLDER`."
            )
        if not file.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(
                f"{self.folder} was not written by `lit-prefopt rounds`: choose another folder "
                "with `--output FOLDER`."
            )


def _is_first_rank() -> bool:
    from lightning.fabric.utilities.rank_zero import _get_rank

    return not _get_rank()


@dataclass
class RoundRunner:
    """Runs commands in this process's rank of torchrun or SLURM, or alone."""

    first: bool = field(default_factory=_is_first_rank)
    steps: int = 0

    def run(self, command: Sequence[str]) -> None:
        """Run a command of this program and wait for its end."""
        environment = dict(os.environ)
        if "TORCHELASTIC_RUN_ID" in environment:  # each process group gets its own rendezvous
            self.steps += 1
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + self.steps)
        code = run_step([sys.executable, "-m", "lit_prefopt.cli", *command], environment)
        if code > 128:
            print(
                f"lit-prefopt: Stopped in `{command[0]}`: start `lit-prefopt rounds` again with "
                "the same arguments to resume.",
                file=sys.stderr,
            )
        if code:  # the command has printed the reason
            sys.exit(code)

    def make(self, one: Round) -> None:
        """Run a round, or wait until the first rank has recorded its end."""
        if self.first:
            remove_partial(one.folder, ARGUMENTS)
            one.check()
            one.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(one.folder / ARGUMENTS, json.dumps(one.arguments))
        for command in one.steps:
            if self.first or command[0] != "export":
                self.run(command)
        if self.first:
            write_atomic(one.folder / DONE, "")
        while not one.done:
            time.sleep(WAIT)


def rounds(
    fit: str,
    generate: str,
    output: str,
    count: int = 3,
    each: list[list[str]] | None = None,
    fit_arguments: list[str] | None = None,
    generate_arguments: list[str] | None = None,
) -> None:
    """Alternate generation and training; the reference of a round is the previous round's policy.

    OUTPUT/round-0, round-1, ... contain pairs, checkpoints, weights and evaluations. An interrupted
    run resumes, and a larger `count` adds rounds. At the end a table and a plot show the reward by
    round, if the fit recipe has the callback `Evaluation`.

    Args:
        fit: Recipe of `lit-prefopt fit`: a path or the name of a shipped one.
        generate: Recipe of `lit-prefopt predict`.
        output: Folder of the rounds.
        count: Number of rounds.
        each: Further arguments of each round's fit; the last ones apply to all following rounds.
        fit_arguments: Further arguments of every fit, such as `--trainer.max_steps=100`.
        generate_arguments: Further arguments of every generation.
    """
    check_number("count", count, 1)
    rank, root = RoundRunner(), Path(output)
    every, changing = fit_arguments or [], each or [[]]
    _check_recipe("predict", ["--config", generate, *(generate_arguments or [])])
    for arguments in changing:
        recipe = _check_recipe("fit", ["--config", fit, *every, *arguments])
    denoiser = _denoiser_name(recipe)
    if rank.first:
        lock = OutputLock(root, "choose another folder with `--output FOLDER`", inside=True)
        lock.acquire()  # until the command ends
        check_free_space(root)
    made: list[Round] = []
    for number in range(count):
        folder = root / f"round-{number}"
        start = [f"--backbone.denoiser={made[-1].policy}"] if made else []
        one = Round(
            folder,
            ["--config", generate, *(generate_arguments or []), *start]
            + [f"--model.output={folder / 'pairs'}", f"--model.opponent_round={number}"],
            ["--config", fit, *every, *changing[min(number, len(changing) - 1)], *start]
            + [f"--data.shards={folder / 'pairs'}", f"--trainer.default_root_dir={folder}"],
            denoiser,
        )
        if not one.done:
            rank.make(one)
        made.append(one)
    if rank.first:
        from lit_prefopt.evaluate.report.by_round import write_round_report

        write_round_report([one.folder for one in made], root)


def _check_recipe(command: str, arguments: list[str]) -> dict[str, Any]:
    """Parse a recipe in advance, so that its errors are raised before the first step."""
    from lit_prefopt.lightning_cli import run_lightning
    from lit_prefopt.recipe_files import named_recipes

    stderr = io.StringIO()
    try:
        with redirect_stdout(stderr):
            run_lightning(named_recipes([command, *arguments, "--print_config"]))
    except SystemExit as stop:
        if stop.code:
            raise
    config: dict[str, Any] = yaml.safe_load(stderr.getvalue())
    backbone = (config.get("backbone") or {}).get("init_args", {})
    if backbone.get("start_lora"):
        raise InputError(
            f"The recipe of `{command}` starts from a LoRA, which every round would merge again: "
            "merge it once with `lit-prefopt export --source FILE --to pipeline --output FOLDER`, "
            "and start from that pipeline."
        )
    return config


def _denoiser_name(recipe: dict[str, Any]) -> str:
    """Return the name of the folder in which the backbone of a recipe saves its denoiser."""
    module, _, name = str((recipe.get("backbone") or {}).get("class_path")).rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if not hasattr(kind, "FAMILY"):
        raise InputError(
            f"The backbone {name} belongs to no family of models, so its weights cannot be "
            "exported between rounds: give the class a FAMILY of `lit_prefopt.families`."
        )
    folder: str = kind.FAMILY.denoiser.name
    return folder
