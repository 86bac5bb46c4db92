"""Run one benchmark with the package of a checkout, and print its cost as JSON.

`against.py` starts this file with a checkout as PYTHONPATH, whose `lit_prefopt` and `benchmarks` it
then imports: first `arguments`, which writes networks and shards and prints the commands, and then
`run`, once a round. What it uses of a checkout has been the same since commit 03633d8:
`lit_prefopt.cli.main`, `callbacks.Evaluation.run`, `benchmarks.recipes.recipe`, and `toy` and
`full_size` of `benchmarks.spo_epoch`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARK = "RESULT "
"""What the line begins with that `against.py` reads."""

EPOCHS = 2  # of SPO; the last one is counted
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0"]
BARE = ["--trainer.enable_checkpointing", "false", "--trainer.callbacks", "LearningRateMonitor"]
CLOCK = ["--trainer.callbacks+", "clock.Clock"]


def arguments(kind: str, family: str, steps: int, folder: Path) -> list[list[str]]:
    """Return the commands of a benchmark; what they need is written once.

    Args:
        kind: The benchmark's name.
        family: `tiny`, `toy` or `sd15`.
        steps: Timed steps, after a first one.
        folder: Where networks and shards are.
    """
    if not (Path(os.environ["PYTHONPATH"].split(os.pathsep)[0]) / "benchmarks").is_dir():
        raise ImportError("the checkout has no folder `benchmarks`")
    if kind == "spo_epoch":
        from benchmarks import spo_epoch

        known = family == "toy"
        made = spo_epoch.toy(EPOCHS) if known else spo_epoch.full_size(family, folder, EPOCHS)  # type: ignore[arg-type]
        return [["fit", *made, *QUIET, *BARE, *CLOCK]]
    from benchmarks.recipes import KINDS, recipe

    train = "full" if family == "toy" and kind in ("evaluation", "start") else "lora"
    rows = 4 if kind == "start" else KINDS[family].batch
    pairs = rows * (1 if kind == "later_step" else max(steps + 1, 8))
    if kind == "later_step" and family == "toy":
        raise ValueError("the toy world has 1,024 pairs, and no step visits one again")
    fit = recipe(family, train, "images", folder, batch=rows, pairs=pairs)  # type: ignore[arg-type]
    known = [*fit.arguments, *QUIET, "--data.cache", "{root}/cache"]
    if kind == "evaluation":
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"picture {number}\n" for number in range(8)))
        known += [
            *("--data.validation", str(fit.shards), "--trainer.limit_test_batches", "1"),
            *("--trainer.callbacks+", "Evaluation"),
            *("--trainer.callbacks.judge", "brightness.Brightness"),
            *("--trainer.callbacks.prompts", "PromptFile"),
            *("--trainer.callbacks.prompts.path", str(prompts)),
            *("--trainer.callbacks.sampling.steps", "2" if family == "sd15" else "20"),
        ]
        return [
            ["fit", *known, "--trainer.max_steps", "1"],
            ["test", *known, "--ckpt_path", "{root}/checkpoints/last.ckpt"],
        ]
    if kind == "start":
        return [["fit", *known, *CLOCK, "--trainer.max_steps", "1"]]
    doubled = ["--backbone.gradient_checkpointing", "true"] if kind == "memory" else []
    return [["fit", *known, *doubled, *BARE, *CLOCK, "--trainer.max_steps", str(steps + 1)]]


def run(commands: list[list[str]], options: list[str]) -> dict[str, Any]:
    """Run the commands in a new folder and return what they cost.

    Args:
        commands: Of lit-prefopt.
        options: Further arguments of each.
    """
    evaluations: list[dict[str, float]] = []
    from lit_prefopt.cli import main

    if "test" in [command[0] for command in commands]:
        _time_evaluations(evaluations)
    with tempfile.TemporaryDirectory() as root:
        for command in commands:
            own = [part.replace("{root}", root) for part in command]
            main([*own, "--trainer.default_root_dir", root, *options])
    import lit_prefopt

    result: dict[str, Any] = {"package": lit_prefopt.__file__, "evaluations": evaluations}
    if "clock" in sys.modules:
        result |= sys.modules["clock"].Clock.result()
    return result


def _time_evaluations(found: list[dict[str, float]]) -> None:
    """Put a timer around the evaluation of a run."""
    from lit_prefopt.callbacks import Evaluation

    plain: Any = Evaluation.run

    def timed(*args: Any, **kwargs: Any) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        plain(*args, **kwargs)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        found.append({"cpu": cpu, "wall": wall})

    Evaluation.run = timed  # type: ignore[method-assign]


def program() -> None:
    """Read one JSON object of `do` and the arguments, and print the result."""
    given = json.loads(sys.argv[1])
    do = given.pop("do")
    if do == "arguments":
        result: Any = arguments(**given | {"folder": Path(given["folder"])})
    else:
        result = run(**given)
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    program()
