"""Diffusion-DPO on a full-size architecture, from ranked images to a LoRA in use.

    python -m benchmarks.full_size_step --family sdxl --source ranking.json --ranking human_ranking

Weights are random. The floor beside the figure is the step's FLOPs over the matmul peak that this
machine reaches in the same minute.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.common import random_sd15, random_sdxl, write_report
from lit_prefopt.cli import main as lit_prefopt
from lit_prefopt.utils.device import matmul_peak


class Family(NamedTuple):
    """A full-size architecture."""

    pipeline: type[DiffusionPipeline]
    make: Callable[[Path], Path]  # writes it with random weights
    resolution: int  # pixels that it was made for
    forward: float  # TFLOP of the UNet for one image of that size, measured on meta tensors
    encode: float  # of the VAE


FAMILIES = {
    "sd15": Family(StableDiffusionPipeline, random_sd15, 512, 0.80, 1.12),
    "sdxl": Family(StableDiffusionXLPipeline, random_sdxl, 1024, 6.76, 4.88),
}


class Clock(Callback):
    """Takes the time of every optimizer step."""

    seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start."""
        self.start = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.monotonic() - self.start)


def peak_gib() -> float:
    """Return the peak memory of the device, or of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def lora_changes_the_stock_pipeline(family: Family, pipeline: Path, weights: Path) -> float:
    """Return the largest change of the stock pipeline's image by the exported LoRA."""
    stock = family.pipeline.from_pretrained(pipeline, torch_dtype=torch.bfloat16)
    stock.set_progress_bar_config(disable=True)
    make = {"prompt": "the sea", "num_inference_steps": 2, "guidance_scale": 1.0}
    make |= {"height": 256, "width": 256, "output_type": "pt"}
    before = stock(**make, generator=torch.manual_seed(0)).images
    stock.load_lora_weights(weights, weight_name="pytorch_lora_weights.safetensors")
    after = stock(**make, generator=torch.manual_seed(0)).images
    return float((after - before).abs().max())


def main(
    source: str,
    family: Literal["sd15", "sdxl"] = "sd15",
    resolution: int | None = None,
    ranking: str = "ranking",
    folder: str = "runs/full-size",
    steps: int = 3,
    lr: float = 1e-3,
    report: bool = False,
) -> None:
    """Measure.

    Args:
        source: Ranked images, as `lit-prefopt shards convert` takes them.
        family: The architecture.
        resolution: Width and height of the images; the family's own where it is not given.
        ranking: Key of the ranks.
        folder: Where the pipeline, the shards and the run are written.
        steps: Optimizer steps of one pair each.
        lr: Learning rate; random weights need a high one to show a change in three steps.
        report: Write a report as well.
    """
    root, full = Path(folder), FAMILIES[family]
    size = resolution or full.resolution
    pipeline = full.make(root / family)
    shards, run = root / "shards", root / f"run-{time.strftime('%Y%m%d-%H%M%S')}"
    if not shards.exists():
        convert = ["--source", source, "--output", str(shards), "--ranking", ranking]
        lit_prefopt(["shards", "convert", *convert])
    recipe = [
        *("--config", f"{family}-diffusion-dpo", "--backbone", f"backbone/{family}-lora.yaml"),
        *("--backbone.pretrained", str(pipeline), "--backbone.vae", str(pipeline)),
        *("--data.shards", str(shards), "--data.batch_size", "1", "--data.workers", "0"),
        *("--data.resolution", str(size), "--trainer.log_every_n_steps", "1"),
        *("--batch.pairs", "1", "--trainer.max_steps", str(steps)),
        *("--trainer.default_root_dir", str(run)),
        *("--trainer.callbacks+", "benchmarks.full_size_step.Clock"),
        *("--model.optimizer.lr", str(lr), "--model.optimizer.warmup_steps", "0"),
    ]
    lit_prefopt(["fit", *recipe])
    from benchmarks.full_size_step import Clock as Used  # the class that the recipe named

    peak, memory = matmul_peak(), peak_gib()
    change = lora_changes_the_stock_pipeline(full, pipeline, run / "weights")
    # of both sides: encoding, reference, policy, its recomputation, backward
    share = (size / full.resolution) ** 2  # but for attention, work grows with the area
    flops = 2 * share * (full.encode + full.forward * (1 + 1 + 1 + 2))
    text = "\n".join(
        [
            f"Diffusion-DPO on {family}, LoRA rank 16, bf16, gradient checkpointing, one pair of "
            f"{size} x {size}.",
            "",
            "| figure | value |",
            "|---|---|",
            f"| seconds per step | {', '.join(f'{s:.1f}' for s in Used.seconds)} |",
            f"| floor: {flops:.1f} TFLOP at {peak:.2f} TFLOP/s | {flops / peak:.1f} s |",
            f"| peak memory | {memory:.2f} GiB |",
            f"| largest change of the stock pipeline's pixels by the LoRA | {change:.4f} |",
        ]
    )
    print(text)
    if report:
        print(write_report("full_size_step", text, family))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
