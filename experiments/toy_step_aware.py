"""The toy world's step-aware judge against the CLIP that it started from, by timestep.

    lit-prefopt fit --config configs/toy/clip.yaml
    python -m experiments.toy_step_aware --report true

Between the two stands a control: the same CLIP trained on the same pairs in the same way, but on
clean images alone (`--model.noisiest 0`), and told that all images are clean. What the step-aware
judge is better at than this one is what it has learned of the noise. Runs are kept: one that has
its weights already is not made again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor

from experiments.common import write_report
from lit_prefopt.cli import main as lit_prefopt
from lit_prefopt.diffusion.encoding import encode_pairs
from lit_prefopt.evaluate.statistics import bootstrap_interval
from lit_prefopt.judges import StepAware, StepAwarePreference
from lit_prefopt.judges.step_aware_training import FILE, agreement
from lit_prefopt.optimizers import AdamW
from lit_prefopt.toy import ToyDiffusion, ToyPairs

TIMES = (0, 251, 501, 701, 951)
RUNS = {"on clean images": ["--model.noisiest", "0"], "step-aware": []}
CLIP = "runs/toy/clip"


def trained_judge(name: str, options: list[str], seed: int, folder: Path) -> StepAware:
    """Return the judge of one run, made now if it is not there yet."""
    root = folder / f"{name.replace(' ', '-')}-seed{seed}"
    weights = root / "weights" / FILE
    if not weights.exists():
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
        where = ["--trainer.default_root_dir", str(root)]
        lit_prefopt(["fit", "--config", "toy-step-aware-preference", *options, *seeds, *where])
    return StepAware(str(weights), CLIP, None)


@torch.no_grad()
def right(judges: dict[str, StepAware], draws: int) -> dict[str, Tensor]:
    """Return by judge how often it prefers the chosen image, (timesteps, pairs).

    Args:
        judges: By name; only the one named `step-aware` is told the timestep.
        draws: Draws of noise for each held-out pair.
    """
    backbone = ToyDiffusion(reference="none")
    # for its predictions alone
    eyes = StepAwarePreference(
        backbone,
        AdamW(0.0),
        pretrained=CLIP,
        processor=None,
        guidance=backbone.sampling.guidance,
    )
    data = ToyPairs(64, caption_dropout=0)
    data.setup("validate")
    found: dict[str, list[Tensor]] = {name: [] for name in judges}
    for batch in data.val_dataloader():
        pairs = encode_pairs(backbone, batch)
        rows = {name: torch.zeros(len(TIMES), len(batch.texts)) for name in judges}
        for draw in range(draws):
            seeded = pairs._replace(seeds=pairs.seeds + draw)
            for row, number in enumerate(TIMES):
                t = torch.full_like(batch.seeds, number)
                images = eyes.predicted(seeded, t)
                for name, judge in judges.items():
                    times = t if name == "step-aware" else None
                    first, last = (
                        judge.score(images[:, side], batch.texts, times) for side in (0, 1)
                    )
                    rows[name][row] += agreement(first - last, batch.labels) / draws
        for name in judges:
            found[name].append(rows[name])
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


def main(
    seed: int = 0, draws: int = 4, folder: str = "runs/toy-step-aware", report: bool = False
) -> None:
    """Measure.

    Args:
        seed: Seed of both runs.
        draws: Draws of noise for each of the 256 held-out pairs.
        folder: Where the runs lie.
        report: Write a report as well.
    """
    judges = {"CLIP": StepAware(None, CLIP, None)}
    for name, options in RUNS.items():
        judges[name] = trained_judge(name, options, seed, Path(folder))
    found = right(judges, draws)
    lines = [
        f"| t | {' | '.join(judges)} | step-aware less CLIP | step-aware less on clean images |",
        f"|---|{'---|' * (len(judges) + 2)}",
    ]
    means = {name: torch.cat([x, x.mean(0, keepdim=True)]) for name, x in found.items()}
    for row, t in enumerate([*map(str, TIMES), "mean"]):
        cells = [f"{x[row].mean():.3f}" for x in means.values()]
        for other in ("CLIP", "on clean images"):
            apart = (means["step-aware"][row] - means[other][row]).double().numpy()
            low, high = bootstrap_interval(np.asarray(apart))
            cells.append(f"{apart.mean():+.3f} ({low:+.3f} to {high:+.3f})")
        lines.append(f"| {t} | {' | '.join(cells)} |")
    text = "\n".join(
        [
            f"Share of {found['CLIP'].shape[1]} held-out pairs in which a judge prefers the chosen "
            f"side, seeing what the denoiser predicts at t; {draws} draws of noise for each, 95 % "
            "intervals over pairs.",
            "",
            *lines,
        ]
    )
    print(text)
    if report:
        print(write_report("toy_step_aware", text))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
