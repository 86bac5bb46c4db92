"""Memory of a step that trains all weights of a flow transformer, from tensor shapes alone.

    python -m benchmarks.full_memory --report true

Each row adds options to those of the row above. Nothing is allocated, as in `flow_memory.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common import write_report
from benchmarks.flow_memory import METHODS
from lit_prefopt.backbones.policy import round_weights
from lit_prefopt.estimate.memory import GIB
from lit_prefopt.estimate.switches import Switches, SwitchSearch
from tests.helpers.full_size import random_backbone, random_pairs

ROWS = (
    Switches(),
    Switches(checkpointing=True),
    Switches(checkpointing=True, eight_bit=True),
    Switches(checkpointing=True, eight_bit=True, errors=True),
    Switches(checkpointing=True, eight_bit=True, bf16_weights=True),
)


def main(
    model: str = "sd35-medium",
    method: str = "Diffusion-DPO",
    resolutions: tuple[int, ...] = (512, 1024),
    report: bool = False,
) -> None:
    """Estimate.

    Args:
        model: Name of a model of `tests/helpers/full_size.py`.
        method: A method of `flow_memory.py`.
        resolutions: Sides of the images in pixels.
        report: Write a report as well.
    """
    lines = [
        "| options | pixels | weights | gradients | states | reference | activations | total "
        "| TFLOP |",
        "|---" * 9 + "|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        backbone = random_backbone(model, Path(folder))
        module = METHODS[method](backbone).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
        round_weights(backbone.policy.frozen, torch.bfloat16)  # as mixed precision does
    for side in resolutions:
        batch = random_pairs(model, backbone, 1, side, 0)
        search = SwitchSearch(module, batch, lambda: torch.autocast("cpu", torch.bfloat16))
        for switches in ROWS:
            trial = search.trial(switches)
            parts = trial.parts
            sizes = (
                parts.trained + parts.frozen,
                parts.gradients,
                parts.states,
                parts.reference,
                parts.activations,
                trial.total,
            )
            numbers = " | ".join(f"{size / GIB:.2f}" for size in sizes)
            lines.append(
                f"| {switches.names} | {side} | {numbers} | {trial.pair_flops / 1e12:.0f} |"
            )
            print(lines[-1], flush=True)
    text = (
        f"GiB of a step of one pair of {model}, {method}, all weights, AdamW, bf16-mixed, from "
        "caches, estimated from tensor shapes.\n\n" + "\n".join(lines)
    )
    if report:
        print(write_report("full_memory", text, model))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
