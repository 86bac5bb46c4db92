"""The toy world's LCM against the model it was distilled from, by number of steps.

    make toy-lcm
    python -m experiments.toy_lcm --report true

The same 256 held-out captions, seeds and guidance for all; the exact judge's mean true reward. An
LCM asks its UNet once a step, the base twice, since guidance needs the empty prompt too.
"""

from __future__ import annotations

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor

from experiments.common import write_report
from lit_prefopt.backbones import Backbone
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.evaluate.statistics import bootstrap_interval
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.toy import ToyConsistency, ToyDiffusion, ToyJudge, ToyPrompts
from lit_prefopt.toy.backbone import TOY_SAMPLING

FULL = TOY_SAMPLING.steps
BASE = ((FULL, 1.0), (FULL, 0.0), (8, 1.0), (8, 0.0), (4, 1.0), (4, 0.0), (2, 0.0), (1, 0.0))
LCM = (8, 4, 2, 1)


def rewards(backbone: Backbone, how: Sampling, prompts: int) -> Tensor:
    """Return the true reward of one image for each held-out caption, (prompts,)."""
    texts, seeds = ToyPrompts(prompts, "held-out").texts(), torch.arange(prompts)
    return ToyJudge().score(sample(backbone.eval(), texts, seeds, how), texts)


def main(
    pipeline: str = "runs/toy/lcm/pipeline",
    prompts: int = 256,
    guidance: float = TOY_SAMPLING.guidance,
    report: bool = False,
) -> None:
    """Measure.

    Args:
        pipeline: Folder of the LCM.
        prompts: Number of held-out captions.
        guidance: Guidance scale of both.
        report: Write a report as well.
    """
    lines = ["| model | steps | UNet forwards | mean true reward |", "|---|---|---|---|"]

    def measure(name: str, backbone: Backbone, steps: int, eta: float, forwards: int) -> None:
        how = Sampling(steps, guidance, eta, TOY_SAMPLING.batch_size)
        found = rewards(backbone, how, prompts).double().numpy()
        low, high = bootstrap_interval(np.asarray(found))
        cells = f"{steps} | {forwards} | {found.mean():.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {name} | {cells} |")
        print(lines[-1], flush=True)

    base = ToyDiffusion(reference="none")
    for steps, eta in BASE:
        measure(f"base, DDIM, eta {eta:g}", base, steps, eta, 2 * steps)
    lcm = ToyConsistency(pipeline, reference="none")
    for steps in LCM:
        measure("LCM", lcm, steps, 0.0, steps)
    text = "\n".join(
        [
            f"Mean true reward on {prompts} held-out captions, guidance {guidance:g}; 95 % "
            "intervals over captions.",
            "",
            *lines,
        ]
    )
    if report:
        print(write_report("toy_lcm", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
