"""Peak memory of training: estimated from tensor shapes, and measured.

    python -m benchmarks.memory main --families '[tiny]'
    python -m benchmarks.memory main --families '[sd15,sdxl]' --measured false
    python -m benchmarks.memory main --families '[sdxl]' --trains '[lora]' --optimizers '[AdamW]'
    python -m benchmarks.memory main --families '[sdxl]' --trains '[full]' --savings '[none,cached]'
    python -m benchmarks.memory main --families '[sd35]' --trains '[lora]' --measured false

Estimated are weights, gradients, optimizer states and whatever else is alive at the most in a step,
from shapes alone, so also for models that fit nowhere. Measured is the peak of a process
of its own that takes three optimizer steps: of the GPU's tensors, or without a GPU of the whole
process, reported with its memory before the model was loaded. Stable Diffusion 3.5, whose T5 alone
has 9 GB, is only estimated; `flow_step.py` measures its transformer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse import auto_cli
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common import write_report
from benchmarks.made import made_backbone, without_numbers
from benchmarks.recipes import KINDS, Data, Train, recipe
from lit_prefopt import optimizers as configs
from lit_prefopt.backbones import LoRA
from lit_prefopt.backbones.policy import round_weights
from lit_prefopt.batches import Batch, ImagePairs, LatentPairs
from lit_prefopt.conditioning import Prompt, Text
from lit_prefopt.estimate.memory import GIB, MemoryFootprint, footprint
from lit_prefopt.estimate.step_cost import StepCost, step_cost
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers.eight_bit import LEAST_SIZE

OptimizerName = Literal["AdamW", "AdamW8bit", "Lion8bit", "Adafactor"]
Sized = Literal["tiny", "tiny-xl", "tiny-sd35", "sd15", "sdxl", "sd35"]
Saving = Literal["none", "bf16_weights", "cached"]
BF16_WEIGHTS = (
    "--backbone.policy_dtype bfloat16 --model.optimizer.stochastic_rounding true "
    "--model.optimizer.release_gradients true --trainer.gradient_clip_val null"
)
SAVINGS = {
    "none": "",
    "bf16_weights": BF16_WEIGHTS,
    "cached": f"{BF16_WEIGHTS} --backbone.encoders false --backbone.reference none",
}
"""Savings in a full fine-tune with an 8-bit optimizer: bf16 weights with stochastic rounding and
gradients released in backward; and additionally caches, without encoders and reference."""
LIMIT = 1800  # seconds for one measurement


class Case(NamedTuple):
    """One way to train."""

    family: str
    train: str
    optimizer: str
    checkpointing: bool
    batch: int
    saving: str = "none"

    @property
    def least_size(self) -> int:
        """Elements from which on moments have 8 bits: a tiny network has none of the usual size."""
        return 1024 if self.family.startswith("tiny") else LEAST_SIZE


def estimated(case: Case, folder: Path) -> MemoryFootprint:
    """Return the bytes by part, from shapes alone."""
    return estimated_step(case, folder)[0]


def estimated_step(case: Case, folder: Path) -> tuple[MemoryFootprint, StepCost]:
    """Return the bytes by part and the cost of a step, from shapes alone."""
    kind = KINDS[case.family]
    config = getattr(configs, case.optimizer)
    options: dict[str, Any] = {}
    if "8bit" in case.optimizer:
        options["least_size"] = case.least_size
    network: dict[str, Any] = {"lora": LoRA(16) if case.train == "lora" else None}
    if case.saving != "none":
        options |= {"stochastic_rounding": True, "release_gradients": True}
        network["policy_dtype"] = "bfloat16"
    if case.saving == "cached":
        network |= {"encoders": False, "reference": "none"}
    mixed = kind.precision == "bf16-mixed"

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=mixed)

    batch, side = case.batch, kind.resolution
    backbone = made_backbone(
        case.family,
        folder,
        **network,
        gradient_checkpointing=case.checkpointing,
        dtype="bfloat16",
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_numbers(backbone)
        if mixed:
            round_weights(backbone.policy.frozen, torch.bfloat16)
        module = DiffusionDPO(backbone, config(1e-6, **options), beta=5000.0)
        module.train()
    rest = [torch.arange(batch), *[torch.ones(batch)] * 2, ["key"] * batch]
    made: Batch
    if case.saving == "cached":
        at = side // backbone.pixels_per_latent
        latents = torch.zeros(batch, 2, backbone.latent_shape[0], at, at, dtype=torch.bfloat16)
        known = torch.zeros(batch, 1, 2)
        made = LatentPairs(latents, latents, _prompt(case, batch), ["a"] * batch, *rest)
        made = made._replace(reference_error=known)
    else:
        made = ImagePairs(torch.zeros(batch, 2, 3, side, side), ["a"] * batch, *rest)
    cost = step_cost(module, made, context)
    return footprint(module, cost.activations), cost


def _prompt(case: Case, batch: int) -> Prompt:
    """Return embedded prompts of the family's shape."""
    sizes = {
        "tiny": {"hidden": (16, 32)},
        "tiny-xl": {"hidden": (16, 56), "pooled": (20,)},
        "tiny-sd35": {"hidden": (77 + 256, 64), "pooled": (36,)},
        "sd15": {"hidden": (77, 768)},
        "sdxl": {"hidden": (77, 2048), "pooled": (1280,)},
        "sd35": {"hidden": (77 + 256, 4096), "pooled": (2048,)},
    }[case.family]
    text: dict[str, Text] = {
        name: torch.zeros(batch, *shape, dtype=torch.bfloat16) for name, shape in sizes.items()
    }
    return Prompt(text)


def measure(
    family: Sized,
    train: Train,
    optimizer: OptimizerName,
    checkpointing: bool,
    batch: int,
    folder: str,
    saving: Saving = "none",
    steps: int = 2,
) -> None:
    """Train for a few steps in this process and print its peak memory as JSON.

    Args:
        family: The model.
        train: All weights of the denoiser, or a LoRA.
        optimizer: The optimizer.
        checkpointing: Whether activations are computed twice.
        batch: Pairs in a batch.
        folder: Where pipelines and shards are written.
        saving: What else saves memory.
        steps: Optimizer steps, after a first one.
    """
    from lit_prefopt.commands.estimate import estimate

    case = Case(family, train, optimizer, checkpointing, batch, saving)
    data: Data = "reference" if saving == "cached" else "images"
    made = recipe(
        family, train, data, Path(folder), batch=batch, pairs=16, bf16_weights=saving == "cached"
    )
    place = made.arguments.index("--model.optimizer") + 1
    arguments = [*made.arguments[:place], optimizer, *made.arguments[place + 1 :]]
    if "8bit" in optimizer:
        arguments += ["--model.optimizer.least_size", str(case.least_size)]
    doubled = str(checkpointing).lower()
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    before = 0 if torch.cuda.is_available() else int(found[1]) * 1024
    result = estimate(
        [
            *(*arguments, *SAVINGS[saving].split()),
            *("--backbone.gradient_checkpointing", doubled, "--steps", str(steps)),
        ]
    )
    print(json.dumps({"peak": result.peak, "before": before}))


def in_a_process(case: Case, folder: str) -> dict[str, float]:
    """Run `measure` in a subprocess and return its result; empty after an error or time-out."""
    options = {**case._asdict(), "checkpointing": str(case.checkpointing).lower()}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.memory", "measure", "--folder", folder, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    except subprocess.TimeoutExpired:
        return {}
    except subprocess.CalledProcessError as error:
        print(f"{case}: {error.stderr.strip().splitlines()[-1][:200]}")
        return {}
    run: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return run


def main(
    families: list[Sized] | None = None,
    trains: list[Train] | None = None,
    optimizers: list[OptimizerName] | None = None,
    checkpointing: list[bool] | None = None,
    batch: int | None = None,
    savings: list[Saving] | None = None,
    measured: bool = True,
    folder: str = "runs/step-time",
    report: bool = False,
) -> None:
    """Estimate and measure.

    Args:
        families: The models; by default the tiny one.
        trains: All weights of the denoiser, or a LoRA; by default both.
        optimizers: Their names; by default all.
        checkpointing: Whether to use gradient checkpointing; by default both.
        batch: Pairs in a batch; by default the family's own number.
        savings: Further savings, in full fine-tunes with 8-bit optimizers.
        measured: Measure as well.
        folder: Where pipelines and shards are written.
        report: Write a report as well.
    """
    lines = [
        "| model | trained | optimizer | saved by | checkpointing | pairs | weights | gradients "
        "| states | frozen | activations | estimated, GiB | measured, GiB | before the model |",
        "|---" * 14 + "|",
    ]
    print("\n".join(lines), flush=True)
    for family in families or ["tiny"]:
        for train in trains or ["full", "lora"]:
            for optimizer in optimizers or ["AdamW", "AdamW8bit", "Lion8bit", "Adafactor"]:
                able = train == "full" and "8bit" in optimizer
                for saving in (savings or ["none"]) if able else ["none"]:
                    for twice in checkpointing or [False, True]:
                        rows = batch or KINDS[family].batch
                        case = Case(family, train, optimizer, twice, rows, saving)
                        lines.append(_row(case, folder, measure_too=measured))
                        print(lines[-1], flush=True)
    text = "\n".join(lines)
    if report:
        print(write_report("memory", text, "-".join(families or ["tiny"])))


def _row(case: Case, folder: str, *, measure_too: bool) -> str:
    with tempfile.TemporaryDirectory() as made:
        parts = estimated(case, Path(made))
    frozen = parts.reference + parts.frozen + sum(parts.others.values())
    sizes = (parts.trained, parts.gradients, parts.states, frozen, parts.activations, parts.total)
    run = in_a_process(case, folder) if measure_too and case.family != "sd35" else {}
    seen = f"{run['peak'] / GIB:.2f} | {run['before'] / GIB:.2f}" if run else " | "
    numbers = " | ".join(f"{size / GIB:.3f}" for size in sizes)
    doubled = "yes" if case.checkpointing else "no"
    return (
        f"| {case.family} | {case.train} | {case.optimizer} | {case.saving} | {doubled} "
        f"| {case.batch} | {numbers} | {seen} |"
    )


if __name__ == "__main__":
    auto_cli({"main": main, "measure": measure}, as_positional=False)
