"""A training step of Stable Diffusion 3.5 medium at full size: seconds, memory, FLOPs, the floor.

    python -m benchmarks.sd35_step --size tiny
    python -m benchmarks.sd35_step --report true

Diffusion-DPO with a LoRA in mixed precision, on the transformer alone: latents and embedded prompts
are random, as from a cache. Weights are random too, so it measures speed and memory, not quality.
The floor is the time that the device's fastest matrix product needs for the step's FLOPs.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from benchmarks.common import default_dtype, write_report
from lit_prefopt.backbones import LoRA, StableDiffusion3
from lit_prefopt.estimate.memory import GIB
from lit_prefopt.estimate.pace import TERA, Pace
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.sd35_medium import random_pairs, sd35_configs

TINY = {
    **{"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 128},
    **{"joint_attention_dim": 64, "pooled_projection_dim": 32, "dual_attention_layers": (0,)},
}


def main(
    size: Literal["medium", "tiny"] = "medium",
    resolution: int = 512,
    pairs: int = 1,
    rank: int = 16,
    checkpointing: bool = True,
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
    steps: int = 2,
    report: bool = False,
) -> None:
    """Train for a few steps and print their cost.

    Args:
        size: Of the transformer; `tiny` tries the script.
        resolution: Side of the images in pixels.
        pairs: Pairs in a batch, which is a step's.
        rank: Rank of the LoRA.
        checkpointing: Whether activations are computed twice.
        precision: Of the run and of the weights; a CPU without AVX-512 multiplies bfloat16 matrices
            up to a hundred times slower than float32 ones.
        steps: Timed optimizer steps, after a first one.
        report: Write a report as well.
    """
    changes = TINY if size == "tiny" else {}
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        backbone = random_backbone(
            Path(folder), changes, rank, precision=precision, checkpointing=checkpointing
        )
        parameters = sum(p.numel() for p in backbone.policy.parameters())
        module = DiffusionDPO(backbone, AdamW(1e-5), beta=2000.0, check_base=False)
        pace = Pace(steps)
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            precision=precision,
            max_steps=steps + 1,
            callbacks=[pace],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        side = resolution // backbone.pixels_per_latent
        batches = [random_pairs(changes, pairs, side, seed) for seed in range(steps + 1)]
        trainer.fit(module, DataLoader(batches, batch_size=None))
    text = (
        f"Diffusion-DPO on Stable Diffusion 3.5 {size}, {parameters / 1e9:.3f} billion parameters, "
        f"LoRA rank {rank}, {precision}, checkpointing {'on' if checkpointing else 'off'}, "
        f"{pairs} pairs of {resolution} x {resolution}, cached; {torch.get_num_threads()} threads."
        f"\n\n{table(pace, before)}"
    )
    print(text)
    if report:
        print(write_report("sd35_step", text, "" if size == "medium" else size))


def random_backbone(
    folder: Path, changes: dict[str, object], rank: int, *, precision: str, checkpointing: bool
) -> StableDiffusion3:
    """Return the family's backbone with random weights, without encoders.

    Args:
        folder: Where its configurations are written.
        changes: Changes to the transformer.
        rank: Rank of the LoRA.
        precision: Of the run.
        checkpointing: Whether activations are computed twice.
    """
    dtype = "bfloat16" if precision.startswith("bf16") else "float32"
    configs = sd35_configs(folder, **changes)
    with default_dtype(getattr(torch, dtype)):
        return StableDiffusion3(
            str(configs),
            denoiser=str(configs / "transformer" / "config.json"),
            lora=LoRA(rank),
            gradient_checkpointing=checkpointing,
            dtype=dtype,
            encoders=False,
        )


def table(pace: Pace, before: int) -> str:
    """Return the figures.

    Args:
        pace: The finished measurement.
        before: Bytes of the process before the model was loaded.
    """
    assert pace.parts is not None
    recomputed = pace.recomputation.flops if pace.checkpointed else 0
    seconds = [batch.worked for batch in pace.timed]
    floor = (pace.flops + recomputed) / TERA / pace.matmul
    parts = "; ".join(f"{name} {size / GIB:.3f}" for name, size in pace.parts.named().items())
    rows = {
        "seconds per step": ", ".join(f"{s:.1f}" for s in seconds),
        f"floor: {(pace.flops + recomputed) / TERA:.1f} TFLOP at {pace.matmul:.2f} TFLOP/s": (
            f"{floor:.1f} s"
        ),
        "of these FLOPs, recomputation": f"{recomputed / TERA:.1f} TFLOP",
        "peak memory": f"{pace.peak_bytes / GIB:.2f} GiB",
        "before the model was loaded": f"{before / GIB:.2f} GiB",
        "computed from shapes": f"{pace.parts.total / GIB:.2f} GiB ({parts})",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| figure | value |", "|---|---|", *lines])


def resident() -> int:
    """Return the bytes of this process in memory, or on a GPU zero."""
    if torch.cuda.is_available():
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
