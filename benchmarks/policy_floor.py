"""CPU seconds of the toy UNet's forward and backward alone: what a training step cannot go below.

    python -m benchmarks.policy_floor --report true
    python -m benchmarks.policy_floor --compiled false --rounds 1

Both sides of 16 pairs, float32. The same with weights in channels-last layout and with the whole
UNet compiled, which change the rounding. Runs alternate.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from jsonargparse import auto_cli
from torch import Tensor, nn

import lit_prefopt.toy
from benchmarks.common import write_report

CHECKPOINT = Path(lit_prefopt.toy.__file__).parent / "checkpoint"


def seconds(network: nn.Module, latents: Tensor, t: Tensor, prompt: Tensor) -> float:
    """Return the CPU seconds of a forward and a backward."""
    start = time.process_time()
    network(latents, t, prompt).sample.square().mean().backward()
    network.zero_grad(set_to_none=True)
    return time.process_time() - start


def main(rows: int = 32, rounds: int = 9, compiled: bool = True, report: bool = False) -> None:
    """Measure.

    Args:
        rows: Rows of latents, twice the pairs.
        rounds: How often each is run, in turn, after a first time.
        compiled: Compile a copy of the UNet, which takes two minutes.
        report: Write a report as well.
    """
    torch.set_num_threads(1)
    plain, last = (
        UNet2DConditionModel.from_pretrained(CHECKPOINT, subfolder="unet").train() for _ in range(2)
    )
    last.to(memory_format=torch.channels_last)
    sizes = plain.config
    latents = torch.randn(rows, sizes.in_channels, sizes.sample_size, sizes.sample_size)
    t, prompt = torch.randint(0, 1000, (rows,)), torch.randn(rows, 16, sizes.cross_attention_dim)
    runs: dict[str, tuple[nn.Module, Tensor]] = {
        "as it is": (plain, latents),
        "channels-last": (last, latents.to(memory_format=torch.channels_last)),
    }
    if compiled:
        runs["compiled"] = (torch.compile(plain), latents)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + rounds):
        for name, (network, rows_of) in runs.items():
            found[name].append(seconds(network, rows_of, t, prompt))
    medians = {name: median(values[1:]) for name, values in found.items()}
    lines = [
        f"{rows} rows, medians of {rounds} rounds in turn, one thread.",
        "",
        "| toy UNet, forward and backward | CPU s | lowest to highest | times as fast |",
        "|---|---|---|---|",
    ]
    for name, values in found.items():
        low, high, faster = min(values[1:]), max(values[1:]), medians["as it is"] / medians[name]
        lines.append(f"| {name} | {medians[name]:.3f} | {low:.3f} to {high:.3f} | {faster:.3f} |")
    text = "\n".join(lines)
    print(text)
    if report:
        print(write_report("policy_floor", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
