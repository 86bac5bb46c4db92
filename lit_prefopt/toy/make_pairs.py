"""Generate the toy world's preference pairs: the base's own samples, ranked by the exact judge.

    python -m lit_prefopt.toy.make_pairs --output FOLDER

regenerates the shipped shards.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli
from rich.progress import track

from lit_prefopt.backbones import Backbone, StableDiffusion
from lit_prefopt.data.images import to_pil
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.toy.backbone import CHECKPOINT, TOY_SAMPLING
from lit_prefopt.toy.judge import ToyJudge
from lit_prefopt.toy.scenes import Split, prompts


def make_pairs(
    backbone: Backbone, output: Path, of: Split, count: int, samples: int = 4, seed: int = 0
) -> None:
    """Write the best and the worst of some samples for each caption.

    Args:
        backbone: The sampled model.
        output: Output folder of shards.
        of: Split of the captions: `train` or `held-out`.
        count: Number of captions, and of pairs.
        samples: Samples per caption.
        seed: Seed of the first sample, incremented for each further one.
    """
    judge, texts = ToyJudge(), prompts(count, of)
    at_once = TOY_SAMPLING.batch_size // samples
    with ShardWriter(output) as writer:
        for first in track(range(0, count, at_once), f"{output.name} pairs"):
            some = texts[first : first + at_once]
            repeated = [text for text in some for _ in range(samples)]
            seeds = torch.arange(len(repeated)) + seed + first * samples
            images = sample(backbone, repeated, seeds, TOY_SAMPLING).unflatten(0, (-1, samples))
            rewards = judge.score(images.flatten(0, 1), repeated).unflatten(0, (-1, samples))
            for i, text in enumerate(some):
                best, worst = int(rewards[i].argmax()), int(rewards[i].argmin())
                scores = [round(float(rewards[i, side]), 5) for side in (best, worst)]
                meta = {
                    "gap": round(scores[0] - scores[1], 5),
                    "scores": {"chosen": scores[0], "rejected": scores[1]},
                    "seeds": [int(seeds[i * samples + side]) for side in (best, worst)],
                    "source": "toy base",
                }
                writer.add(text, to_pil(images[i, best]), to_pil(images[i, worst]), meta)


def main(
    output: str,
    checkpoint: str = str(CHECKPOINT),
    train: int = 1024,
    validation: int = 256,
) -> None:
    """Generate the toy world's pairs.

    Args:
        output: Folder for `train/` and `validation/`.
        checkpoint: Folder of the sampled pipeline.
        train: Pairs on training captions.
        validation: Pairs on held-out captions.
    """
    backbone = StableDiffusion(checkpoint, reference="none").eval()
    make_pairs(backbone, Path(output) / "validation", "held-out", validation, seed=10_000_000)
    make_pairs(backbone, Path(output) / "train", "train", train)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
