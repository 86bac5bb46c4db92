"""Policy against reference: the same prompts, settings and seeds for both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.diffusion.sampling import Sampling, sample
from lit_prefopt.evaluate.statistics import bootstrap_interval, wilson_interval
from lit_prefopt.judges import Judge


@dataclass
class Compared:
    """One prompt, both models' images and what the judge said of them."""

    text: str
    seed: int
    reward_reference: float
    reward_policy: float
    attributes_reference: dict[str, float]
    attributes_policy: dict[str, float]


@torch.no_grad()
def compare(
    backbone: Backbone,
    judge: Judge,
    texts: list[str],
    seeds: Tensor,
    how: Sampling,
    reference_seeds: Tensor | None = None,
) -> tuple[list[Compared], Tensor, Tensor]:
    """Sample both models on every prompt and judge the images.

    Args:
        backbone: Holds policy and reference.
        judge: Scores the images.
        texts: N prompts.
        seeds: (N,) int64.
        how: Settings of the sampler.
        reference_seeds: Other seeds for the reference; the same where not given.

    Returns:
        A row per prompt, the reference's images and the policy's, (N, 3, H, W) in [-1, 1].
    """
    with backbone.as_reference():
        other = seeds if reference_seeds is None else reference_seeds
        before = sample(backbone, texts, other, how)
    after = sample(backbone, texts, seeds, how)
    scores = [judge.score(images, texts).tolist() for images in (before, after)]
    attributes = [
        _by_prompt(judge.attributes(images, texts), len(texts)) for images in (before, after)
    ]
    rows = zip(texts, seeds.tolist(), *scores, *attributes, strict=True)
    return [Compared(*row) for row in rows], before, after


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
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
