"""CPU seconds from the start of a command to its answer, and the packages that take them."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from jsonargparse import auto_cli

COMMANDS = {
    "shards convert --help": 0,
    "shards validate --help": 0,
    "shards preview --help": 0,
    "shards index --help": 0,
    "shards stages --help": 0,
    "shards convret": 2,
    "report --help": 0,
    "export --help": 0,
    "rounds --help": 0,
    "fit --help": 0,
    "fit --model.help DiffusionDPO": 0,
    "fit --backbone.help StableDiffusion": 0,
    "fit --config toy-diffusion-dpo --model.betta 3": 2,
    "fit --config toy-diffusion-dpo --print_config": 0,
}  # and the exit code
LARGEST = 5  # packages


def cpu_seconds(args: list[str], code: int, environment: dict[str, str]) -> float:
    """Return user and system time of a command and its children.

    Args:
        args: Arguments of lit-prefopt.
        code: Exit code that it must end with.
        environment: Environment variables.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lit_prefopt.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(args)} ended with {done.returncode}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def largest_packages(args: list[str], environment: dict[str, str]) -> str:
    """Return the packages whose own modules take longest to import, with seconds.

    Args:
        args: Arguments of lit-prefopt.
        environment: Environment variables.
    """
    command = [sys.executable, "-X", "importtime", "-m", "lit_prefopt.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    spent: dict[str, float] = defaultdict(float)
    for line in done.stderr.splitlines():
        own, _, name = line.removeprefix("import time:").partition("|")
        if line.startswith("import time:") and own.strip().isdigit():
            spent[name.split("|")[-1].strip().split(".")[0]] += int(own) / 1e6
    largest = sorted(spent.items(), key=lambda item: -item[1])[:LARGEST]
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in largest if seconds >= 0.01)


def main(repeats: int = 3, report: bool = False) -> None:
    """Print a table of the commands.

    The first `fit --help` of an installation writes the table of help pages; it has a line of its
    own, and the others are measured after it.

    Args:
        repeats: Times that a command is run; the median is printed.
        report: Write a dated report.
    """
    lines = ["| command | CPU seconds | largest packages by import time |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        first = cpu_seconds(["fit", "--help"], 0, environment)
        size = sum(file.stat().st_size for file in Path(cache).rglob("*.json")) / 2**20
        lines.append(f"| `fit --help`, the first time ({size:.1f} MiB kept) | {first:.2f} | |")
        for command, code in COMMANDS.items():
            args = command.split()
            times = [cpu_seconds(args, code, environment) for _ in range(repeats)]
            packages = largest_packages(args, environment)
            lines.append(f"| `{command}` | {statistics.median(times):.2f} | {packages} |")
            print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    if report:
        from benchmarks.common import write_report  # heavy

        print(write_report("startup", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
