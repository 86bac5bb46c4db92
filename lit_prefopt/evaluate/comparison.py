"""Policy against reference: the same prompts, settings and seeds for both."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.diffusion.settings import Sampling
from lit_prefopt.evaluate.statistics import bootstrap_interval, wilson_interval
from lit_prefopt.judges.judge import Judge, full_precision
from lit_prefopt.whole_files import write_whole


@dataclass
class Compared:
    """One prompt, both models' images and what the judge said of them."""

    text: str
    seed: int
    reward_reference: float
    reward_policy: float
    attributes_reference: dict[str, float]
    attributes_policy: dict[str, float]


class Comparison(NamedTuple):
    """What a comparison leaves behind."""

    rows: list[Compared]
    before: Tensor  # the reference's first images, (P, 3, H, W) in [-1, 1], on the CPU
    after: Tensor  # the policy's


@torch.no_grad()
def compare(
    backbone: Backbone,
    judge: Judge,
    texts: list[str],
    seeds: Tensor,
    how: Sampling,
    reference_seeds: Tensor | None = None,
    pictures: int = 8,
) -> Comparison:
    """Sample both models on every prompt and judge the images, a batch at a time.

    Args:
        backbone: Holds policy and reference.
        judge: Scores the images.
        texts: N prompts.
        seeds: (N,) int64.
        how: Settings of the sampler.
        reference_seeds: Other seeds for the reference; the same where not given.
        pictures: How many images of each model are kept.
    """
    other = seeds if reference_seeds is None else reference_seeds
    rows: list[Compared] = []
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, len(texts), how.batch_size):
        part = slice(start, start + how.batch_size)
        with backbone.as_reference():
            before = sample(backbone, texts[part], other[part], how)
        after = sample(backbone, texts[part], seeds[part], how)
        rows += _judged(judge, texts[part], seeds[part], before, after)
        for images, keep in zip((before, after), kept, strict=True):
            keep += list(images[: max(0, pictures - len(keep))].cpu())
    return Comparison(rows, torch.stack(kept[0]), torch.stack(kept[1]))


def _judged(
    judge: Judge, texts: list[str], seeds: Tensor, before: Tensor, after: Tensor
) -> list[Compared]:
    scores, attributes = [], []
    for images in (before, after):
        with full_precision(images) as seen:
            scores.append(judge.score(seen, texts).tolist())
            attributes.append(_by_prompt(judge.attributes(seen, texts), len(texts)))
    columns = zip(texts, seeds.tolist(), *scores, *attributes, strict=True)
    return [Compared(*column) for column in columns]


def _by_prompt(attributes: dict[str, Tensor], count: int) -> list[dict[str, float]]:
    columns = {name: values.tolist() for name, values in attributes.items()}
    return [{name: values[i] for name, values in columns.items()} for i in range(count)]


def summarise(rows: list[Compared]) -> dict[str, Any]:
    """Return means, paired difference and win rate, with 95 % intervals over the prompts.

    A tie counts one half in the win rate. Attributes are left out of prompts that they do not
    apply to.
    """
    reference = np.array([row.reward_reference for row in rows], dtype=np.float64)
    policy = np.array([row.reward_policy for row in rows], dtype=np.float64)
    wins = float(((np.sign(policy - reference) + 1) / 2).sum())
    return {
        "prompts": len(rows),
        "reward_reference": float(reference.mean()),
        "reward_policy": float(policy.mean()),
        "difference": float((policy - reference).mean()),
        "difference_ci": bootstrap_interval(policy - reference),
        "win_rate": wins / len(rows),
        "win_rate_ci": wilson_interval(wins, len(rows)),
        "attributes": _attributes(rows),
    }


def _attributes(rows: list[Compared]) -> dict[str, dict[str, Any]]:
    result = {}
    for name in rows[0].attributes_reference:
        reference = np.array([row.attributes_reference[name] for row in rows], dtype=np.float64)
        policy = np.array([row.attributes_policy[name] for row in rows], dtype=np.float64)
        applies = ~np.isnan(reference + policy)
        if applies.any():
            difference = (policy - reference)[applies]
            result[name] = {
                "reference": float(reference[applies].mean()),
                "policy": float(policy[applies].mean()),
                "difference": float(difference.mean()),
                "difference_ci": bootstrap_interval(difference),
            }
    return result


def write_rows(rows: list[Compared], path: Path) -> None:
    """Write one JSON object a line; an attribute that does not apply to a prompt is null."""
    lines = []
    for row in rows:
        record = asdict(row)
        for key in ("attributes_reference", "attributes_policy"):
            record[key] = {k: None if math.isnan(v) else v for k, v in record[key].items()}
        lines.append(json.dumps(record, allow_nan=False) + "\n")
    write_whole(path, "".join(lines))
