"""A training step of a flow transformer at full size: seconds, memory, FLOPs, the floor.

    python -m benchmarks.flow_step --model sd35-medium --size tiny
    python -m benchmarks.flow_step --model sd35-medium --report true
    python -m benchmarks.flow_step --model z-image --quantization int8 --resolution 256

Diffusion-DPO with a LoRA, on the transformer alone: latents and embedded prompts are random, as
from a cache. Weights are random too, so it measures speed and memory, not quality. The floor is
the time that the device's fastest matrix product needs for the FLOPs of the step.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from benchmarks.common import default_dtype, write_report
from lit_prefopt.backbones import LoRA
from lit_prefopt.backbones.quantization import KINDS, Quantization
from lit_prefopt.estimate.memory import GIB
from lit_prefopt.estimate.pace import TERA, Pace
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.full_size import FULL_SIZE, random_backbone, random_pairs


def main(
    model: Literal[
        "sd35-medium",
        "flux2-klein-4b",
        "flux2-klein-9b",
        "z-image",
        "qwen-image",
        "lumina2",
        "flux1",
        "chroma",
    ],
    size: Literal["full", "tiny"] = "full",
    resolution: int = 512,
    pairs: int = 1,
    rank: int = 16,
    checkpointing: bool = True,
    quantization: Quantization | None = None,
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
    steps: int = 2,
    report: bool = False,
) -> None:
    """Train for a few steps and print their cost.

    Args:
        model: The transformer.
        size: A `tiny` one of its kind tries the script.
        resolution: Side of the images in pixels.
        pairs: Pairs in a batch, which is a step's.
        rank: Rank of the LoRA.
        checkpointing: Whether activations are computed twice.
        quantization: Quantization of the blocks below the LoRA.
        precision: Of the run and of the weights, which are quantized from bfloat16; a CPU without
            AVX-512 multiplies bfloat16 matrices up to a hundred times slower than float32 ones.
        steps: Timed optimizer steps, after a first one.
        report: Write a report as well.
    """
    changes = FULL_SIZE[model].tiny if size == "tiny" else {}
    dtype = "bfloat16" if precision.startswith("bf16") or quantization else "float32"
    before, start = resident(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        with default_dtype(getattr(torch, dtype)):
            backbone = random_backbone(
                model,
                Path(folder),
                changes,
                lora=LoRA(rank),
                gradient_checkpointing=checkpointing,
                dtype=dtype,
                quantization=quantization,
            )
        if precision == "32-true":
            backbone.float().dtype = torch.float32  # what is not quantized
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
        batches = [
            random_pairs(model, backbone, pairs, resolution, seed) for seed in range(steps + 1)
        ]
        return_freed_memory()
        loaded = time.process_time()
        trainer.fit(module, DataLoader(batches, batch_size=None))
    seconds = (time.process_time() - loaded) / (steps + 1)
    below = f", {KINDS[quantization]} below it" if quantization else ""
    text = (
        f"Diffusion-DPO on {model} ({size}), {parameters / 1e9:.3f} billion numbers in its "
        f"weights, LoRA rank {rank}{below}, {precision}, checkpointing "
        f"{'on' if checkpointing else 'off'}, {pairs} pairs of {resolution} x {resolution}, "
        f"cached; {torch.get_num_threads()} threads; {loaded - start:.0f} CPU seconds to make the "
        f"weights, {seconds:.0f} for each of {steps + 1} steps.\n\n{table(pace, before)}"
    )
    print(text)
    if report:
        detail = [model, quantization or "", "" if size == "full" else size]
        print(write_report("flow_step", text, "-".join(filter(None, detail))))


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


def return_freed_memory() -> None:
    """Return freed memory, such as unquantized weights, from the C library to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
