"""What the toy world's diptych base draws: each panel against its own caption, and what is kept.

    lit-prefopt fit --config configs/toy/diptych.yaml
    python -m experiments.toy_diptychs --report true

Prompts, corruption, sampling and filters are those of `configs/generate/toy-diptychs.yaml`, but on
held-out captions. Beside it stand single pictures of the same captions by the shipped base.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, auto_cli

from experiments.common import write_report
from lit_prefopt.configs import CONFIGS
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.evaluate.statistics import bootstrap_interval, wilson_interval
from lit_prefopt.generate.change_mask import ChangeMask
from lit_prefopt.generate.corruptions import Corruption
from lit_prefopt.generate.diptych import split_panels
from lit_prefopt.generate.diptych_sheet import DiptychSheet
from lit_prefopt.generate.filters import Diptych, Filter, first_rejections
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.toy import ToyDiffusion, ToyJudge
from lit_prefopt.toy.backbone import TOY_SAMPLING
from lit_prefopt.toy.scenes import prompts

RECIPE = CONFIGS / "generate" / "toy-diptychs.yaml"
PARTS = {
    "corruption": Corruption,
    "filters": list[Filter],
    "sampling": Sampling,
    "change": ChangeMask,
}


def parts_of_the_recipe() -> Any:
    """Return corruption, filters, sampling and change of the recipe, built."""
    settings = yaml.safe_load(RECIPE.read_text())["model"]["init_args"]
    parser = ArgumentParser(exit_on_error=False)
    for name, kind in PARTS.items():
        parser.add_argument(f"--{name}", type=kind)
    return settings, parser.instantiate(
        parser.parse_object({name: settings[name] for name in PARTS})
    )


@torch.no_grad()
def main(
    denoiser: str = "runs/toy/diptych/weights/unet",
    count: int = 256,
    sheet: str | None = None,
    report: bool = False,
) -> None:
    """Measure the diptych base on held-out captions.

    Args:
        denoiser: Its UNet.
        count: How many captions.
        sheet: Draw the first diptychs to this picture.
        report: Write a dated report.
    """
    settings, parts = parts_of_the_recipe()
    requests = []
    for seed, text in enumerate(prompts(count, "held-out")):
        panels = parts.corruption.corrupt(text, draws.generator(seed, "corruption"))
        if panels is not None:  # no neighbour of the caption is held out
            requests.append((seed, panels))
    seeds = torch.tensor([seed for seed, _ in requests])
    backbone = ToyDiffusion(denoiser=denoiser, reference="none").eval()
    texts = [settings["template"].format(left=p.left, right=p.right) for _, p in requests]
    left, right = split_panels(sample(backbone, texts, seeds, parts.sampling))
    changed = parts.change(left, right)
    diptychs = [
        Diptych(*panels, *images)
        for (_, panels), *images in zip(requests, left, right, changed, strict=True)
    ]
    reasons = first_rejections(parts.filters, diptychs)
    if sheet is not None:
        DiptychSheet(Path(sheet), settings["sheet"]).add(diptychs, reasons)

    judge, own = ToyJudge(), [d.prompt for d in diptychs]
    others = [d.other for d in diptychs]
    single = sample(ToyDiffusion(reference="none").eval(), own, seeds, TOY_SAMPLING)
    rows = {
        "single pictures of the shipped base, left captions": judge.score(single, own),
        "left panels, left captions": judge.score(left, own),
        "right panels, right captions": judge.score(right, others),
        "right panels, left captions": judge.score(right, own),
    }
    lines = [f"{len(diptychs)} diptychs, {denoiser}", "", "| | reward | 95 % interval |"]
    lines += ["|---|---|---|"]
    for name, scores in rows.items():
        low, high = bootstrap_interval(scores.double().numpy())
        lines.append(f"| {name} | {scores.mean():.3f} | {low:.3f} to {high:.3f} |")
    lines += ["", "| | diptychs | share |", "|---|---|---|"]
    for name, number in Counter(reason or "kept" for reason in reasons).most_common():
        low, high = wilson_interval(number, len(diptychs))
        share = f"{number / len(diptychs):.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {number} | {share} |")
    print("\n".join(lines))
    if report:
        print(f"Report: {write_report('toy_diptychs', chr(10).join(lines))}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
