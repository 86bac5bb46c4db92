"""Memory of a LoRA step on flow transformers by method, from tensor shapes alone.

    python -m benchmarks.flow_memory --report true

Nothing is allocated: the models are made on the meta device and turned into fake tensors of a CPU,
whose attention keeps no scores, as on a GPU; that of the meta device does. Latents and prompts come
from caches, so that VAE and text encoders are not loaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common import write_report
from lit_prefopt.backbones import LoRA
from lit_prefopt.backbones.quantization import saved_bytes
from lit_prefopt.estimate.memory import GIB, footprint
from lit_prefopt.estimate.step_cost import step_cost
from lit_prefopt.methods import DiffusionDPO, SupervisedFineTuning
from lit_prefopt.optimizers import AdamW
from tests.helpers.full_size import FULL_SIZE, random_backbone, random_pairs

METHODS: dict[str, Any] = {
    "SFT": lambda backbone: SupervisedFineTuning(backbone, AdamW(1e-5)),
    "Diffusion-DPO": lambda backbone: DiffusionDPO(backbone, AdamW(1e-5), beta=2000.0),
}


def main(resolutions: tuple[int, ...] = (512, 1024), rank: int = 16, report: bool = False) -> None:
    """Estimate.

    Args:
        resolutions: Sides of the images in pixels.
        rank: Rank of the LoRA.
        report: Write a report as well.
    """
    lines = [
        "| model | billion parameters | method | pixels | base, bf16 | base, int8 | base, NF4 | "
        "trained | activations | total, bf16 | total, int8 | total, NF4 | TFLOP |",
        "|---" * 13 + "|",
    ]
    print("\n".join(lines), flush=True)
    for name in FULL_SIZE:
        for method in METHODS:
            for side in resolutions:
                lines.append(_row(name, method, side, rank))
                print(lines[-1], flush=True)
    text = (
        f"GiB of a step of one pair, LoRA of rank {rank}, AdamW, gradient checkpointing, from "
        "caches, estimated from tensor shapes.\n\n" + "\n".join(lines)
    )
    if report:
        print(write_report("flow_memory", text))


def _row(name: str, method: str, side: int, rank: int) -> str:
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        backbone = random_backbone(
            name, Path(folder), lora=LoRA(rank), gradient_checkpointing=True, dtype="bfloat16"
        )
        module = METHODS[method](backbone).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
    batch = random_pairs(name, backbone, 1, side, 0)
    cost = step_cost(module, batch, lambda: torch.autocast("cpu", torch.bfloat16))
    parts = footprint(module, cost.activations)
    own = parts.trained + parts.gradients + parts.states
    net = backbone.policy.denoiser
    bases = (
        parts.frozen,
        parts.frozen - saved_bytes(net, "int8"),
        parts.frozen - saved_bytes(net, "nf4"),
    )
    count = sum(p.numel() for p in backbone.policy.parameters() if not p.requires_grad)
    totals = (size + own + parts.activations for size in bases)
    sizes = (*bases, own, parts.activations, *totals)
    numbers = " | ".join(f"{size / GIB:.2f}" for size in sizes)
    return (
        f"| {name} | {count / 1e9:.2f} | {method} | {side} | {numbers} | {cost.flops / 1e12:.0f} |"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
