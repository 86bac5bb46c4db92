"""The toy world's flow model beside its UNet: true reward by guidance, steps, noise, zeros of T5.

    make toy-flow
    python -m experiments.toy_flow --report true

The same held-out captions and seeds for all; the exact judge's mean true reward and three of its
attributes. `zeros` is the number of zero tokens in the place of T5: the stock pipeline puts 256
there unless it is called with `max_sequence_length=0`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli

from experiments.common import write_report
from lit_prefopt.backbones import Backbone, StableDiffusion3
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.evaluate.statistics import bootstrap_interval
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.toy import ToyDiffusion, ToyFlow, ToyJudge, ToyPrompts
from lit_prefopt.toy.backbone import FLOW_CHECKPOINT, TOY_FLOW_SAMPLING, TOY_SAMPLING

ATTRIBUTES = ("colour", "shape", "cleanness")
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    *({"guidance": scale} for scale in (1.0, 1.5, 3.0, 4.0)),
    *({"steps": steps} for steps in (5, 10, 50)),
    *({"eta": 0.7, "stochastic": form} for form in ("flow", "cps")),
    {"eta": 0.3, "stochastic": "dance"},
)
ZEROS = (1, 16, 256)


def main(pipeline: str | None = None, prompts: int = 256, report: bool = False) -> None:
    """Measure.

    Args:
        pipeline: Folder of the flow model; the shipped one if not given.
        prompts: Number of held-out captions.
        report: Write a report as well.
    """
    texts, seeds, judge = ToyPrompts(prompts, "held-out").texts(), torch.arange(prompts), ToyJudge()
    head = ("model", "setting", "mean true reward", *ATTRIBUTES)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]

    def measure(name: str, setting: str, backbone: Backbone, how: Sampling) -> None:
        images = sample(backbone.eval(), texts, seeds, how)
        found = judge.score(images, texts).double().numpy()
        low, high = bootstrap_interval(np.asarray(found))
        seen = judge.attributes(images, texts)
        cells = [f"{seen[each].nanmean():.3f}" for each in ATTRIBUTES]
        reward = f"{found.mean():.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {' | '.join((name, setting, reward, *cells))} |")
        print(lines[-1], flush=True)

    measure("UNet", "its own", ToyDiffusion(reference="none"), TOY_SAMPLING)
    flow = ToyFlow(pipeline, reference="none")
    for changes in CHANGES:
        setting = ", ".join(f"{name} {value}" for name, value in changes.items())
        measure("flow", setting or "its own", flow, replace(TOY_FLOW_SAMPLING, **changes))
    folder = str(pipeline or FLOW_CHECKPOINT)
    for zeros in ZEROS:
        padded = StableDiffusion3(folder, t5=False, text_tokens=zeros, reference="none")
        measure("flow", f"zeros {zeros}", padded, TOY_FLOW_SAMPLING)
    own = TOY_FLOW_SAMPLING
    text = "\n".join(
        [
            f"Mean true reward on {prompts} held-out captions, 95 % intervals over captions. The "
            f"flow's own settings: {own.steps} Euler steps, guidance {own.guidance:g}, no noise, "
            "no zeros in the place of T5.",
            "",
            *lines,
        ]
    )
    if report:
        print(write_report("toy_flow", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
