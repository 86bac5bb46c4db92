"""`lit-prefopt rounds`: generate and fit in turn, each round from the policy of the one before.

Every step runs as a command in a process of its own, so that its memory is free afterwards and
several devices are started as for that command alone. What a round has done is not done again.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import _get_rank

from lit_prefopt.errors import InputError, check_number
from lit_prefopt.utils.atomic_files import write_atomic

ARGUMENTS, DONE = "arguments.json", "done"
WAIT = 0.5  # seconds between two looks of a rank for what the first rank has written


@dataclass
class Round:
    """One round: its folder and the commands that make it.

    Args:
        folder: Where everything of the round lies.
        generate: Arguments of `lit-prefopt predict`.
        fit: Arguments of `lit-prefopt fit`.
    """

    folder: Path
    generate: list[str]
    fit: list[str]

    @property
    def pairs(self) -> Path:
        """What was generated."""
        return self.folder / "pairs"

    @property
    def done(self) -> bool:
        """Whether the round is over."""
        return (self.folder / DONE).exists()

    @property
    def policy(self) -> Path:
        """The denoiser that the round has trained, whole."""
        own = self.folder / "weights" / "unet"
        return own if own.exists() else self.folder / "unet"

    @property
    def steps(self) -> Iterator[list[str]]:
        """The commands that are still to be run; a fit that was stopped goes on."""
        if not (self.pairs / "index.json").exists():
            yield ["predict", *self.generate]
        last = self.folder / "checkpoints" / "last.ckpt"
        yield ["fit", *self.fit, *(["--ckpt_path", "last"] if last.exists() else [])]
        if not self.policy.exists():  # a LoRA: the next round starts from it, merged
            output = ["--output", str(self.folder / "unet")]
            yield ["export", "--source", str(self.folder), "--to", "unet", *output]

    @property
    def arguments(self) -> list[list[str]]:
        """Both commands' arguments, wherever the rounds lie."""
        root = str(self.folder.parent)
        return [[one.replace(root, "OUTPUT") for one in own] for own in (self.generate, self.fit)]

    def check(self) -> None:
        """Refuse a folder in which another recipe has made a round."""
        file = self.folder / ARGUMENTS
        if file.exists() and json.loads(file.read_text()) != self.arguments:
            raise InputError(
                f"{self.folder} is a round of another run, with other arguments: give the same ones"
                " to go on with it, or name another folder by `--output FOLDER`."
            )
        if not file.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(
                f"{self.folder} was not made by `lit-prefopt rounds`: name another folder by "
                "`--output FOLDER`."
            )


@dataclass
class RoundRunner:
    """This process among those that torchrun or SLURM started; alone as a rule."""

    first: bool = field(default_factory=lambda: not _get_rank())
    steps: int = 0

    def run(self, command: Sequence[str]) -> None:
        """Run a command of this program to its end."""
        environment = dict(os.environ)
        if "TORCHELASTIC_RUN_ID" in environment:  # each process group gets a meeting point
            self.steps += 1
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + self.steps)
        code = subprocess.run([sys.executable, "-m", "lit_prefopt.cli", *command], env=environment)
        if code.returncode:  # the command has told why
            sys.exit(code.returncode)

    def make(self, one: Round) -> None:
        """Make a round, or wait until the first rank has put its end on record."""
        if self.first:
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
    """Generate and fit in turn; the reference of a round is the policy of the one before.

    OUTPUT/round-0, round-1, ... hold pairs, checkpoints, weights and evidence. A run that was
    stopped goes on where it stood, and a larger `count` adds rounds. At the end a table and a plot
    show the reward by round, if the fits evaluate themselves (callback `Evaluation`).

    Args:
        fit: Recipe of `lit-prefopt fit`: a path or the name of a shipped one.
        generate: Recipe of `lit-prefopt predict`.
        output: Folder of the rounds.
        count: Number of rounds.
        each: Further arguments of each round's fit; the last ones serve for all that follow.
        fit_arguments: Further arguments of every fit, such as `--trainer.max_steps=100`.
        generate_arguments: Further arguments of every generation.
    """
    check_number("count", count, 1)
    rank, root = RoundRunner(), Path(output)
    every, changing = fit_arguments or [], each or [[]]
    _check_recipe("predict", ["--config", generate, *(generate_arguments or [])])
    for arguments in changing:
        _check_recipe("fit", ["--config", fit, *every, *arguments])
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
        )
        if not one.done:
            rank.make(one)
        made.append(one)
    if rank.first:
        from lit_prefopt.evaluate.report.by_round import write_round_report

        write_round_report([one.folder for one in made], root)


def _check_recipe(command: str, arguments: list[str]) -> dict[str, Any]:
    """Parse a recipe now, so that what is wrong with the last step is told before the first."""
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
            "merge it once by `lit-prefopt export --to pipeline`, and start from that pipeline."
        )
    return config
