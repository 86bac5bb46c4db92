"""What single savings of a training step give, each beside the way without it.

    python -m benchmarks.step_savings --families '[sd15,sdxl]' --report true

Activations and FLOPs are computed from tensor shapes (LoRA of rank 16, bf16, one pair); times are
CPU time of this process on one thread, turn about. AdamW steps the toy world's weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from jsonargparse import auto_cli

from benchmarks.common import write_report
from benchmarks.made import MADE, on_meta
from benchmarks.memory import Case, Sized, estimated_step
from lit_prefopt.backbones import LoRA, trained
from lit_prefopt.backbones.adapter_layers import KeepInputs
from lit_prefopt.backbones.policy import Policy
from lit_prefopt.optimizers import AdamW
from lit_prefopt.toy.backbone import ToyDiffusion

GIB = 2**30


def timed(work: Callable[[], object], repeats: int) -> float:
    """Return the median CPU time of a call, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - start))
    return median(times)


def switches(family: Sized, repeats: int) -> Iterator[str]:
    """Yield the row of switching a LoRA off and on."""
    net = on_meta(MADE[family].denoiser, torch.bfloat16)
    LoRA(16).add_to(net)
    policy = Policy(net, "adapter-off")

    def by_diffusers() -> None:
        net.disable_adapters()
        net.enable_adapters()

    def own() -> None:
        with policy.as_reference():
            pass

    own()  # finds the layers
    before, after = (timed(work, repeats) for work in (by_diffusers, own))
    yield f"| {family}: LoRA off and on, ms | {before:.2f} | {after:.3f} |"


@contextmanager
def peft_casts() -> Iterator[None]:
    """Let peft cast the inputs of a LoRA."""
    with patch.object(KeepInputs, "__call__", lambda *_: None):
        yield


def steps_by_shapes(family: Sized) -> Iterator[str]:
    """Yield the rows of a step's activations and FLOPs."""
    for saving, how in (("none", "from images"), ("cached", "from caches")):
        optimizer = "AdamW8bit" if saving == "cached" else "AdamW"
        costs = []
        for checkpointing in (True, False):
            case = Case(family, "lora", optimizer, checkpointing, 1, saving)
            with tempfile.TemporaryDirectory() as folder:
                with peft_casts():
                    before = estimated_step(case, Path(folder))[1]
                after = estimated_step(case, Path(folder))[1]
            costs.append(after)
            twice = "with" if checkpointing else "without"
            sizes = f"{before.activations / GIB:.3f} | {after.activations / GIB:.3f}"
            yield f"| {family} {how}, {twice} checkpointing: inputs uncast, GiB | {sizes} |"
        on, off = costs
        flops = f"{on.flops / 1e12:.2f} | {off.flops / 1e12:.2f}"
        yield f"| {family} {how}: no checkpointing, TFLOP | {flops} |"


def steps(repeats: int) -> Iterator[str]:
    """Yield the rows of AdamW's steps."""
    for lora in (None, LoRA(8)):
        optimizers = []
        for fused in (False, True):
            weights = [*trained(ToyDiffusion(lora=lora)).values()]
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizers.append(AdamW(1e-4, fused=fused).build(weights))
            optimizers[-1].step()
        rounds = [[timed(one.step, repeats) for one in optimizers] for _ in range(3)]
        before, after = (median(times) for times in zip(*rounds, strict=True))
        title = "LoRA" if lora else "all weights"
        yield f"| toy: AdamW in one kernel, {title}, ms | {before:.2f} | {after:.2f} |"


def main(families: list[Sized] | None = None, repeats: int = 15, report: bool = False) -> None:
    """Measure.

    Args:
        families: The models; by default Stable Diffusion 1.5.
        repeats: How often each is timed.
        report: Write a report as well.
    """
    torch.set_num_threads(1)
    lines = ["| saving | without | with |", "|---|---|---|", *steps(repeats)]
    for family in families or ["sd15"]:
        lines += switches(family, repeats)
        lines += steps_by_shapes(family)
    text = "\n".join(lines)
    print(text)
    if report:
        print(write_report("step_savings", text, "-".join(families or ["sd15"])))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
