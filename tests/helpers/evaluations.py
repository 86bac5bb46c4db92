"""Folders as evaluations leave them, of both formats, with pictures of toy scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_prefopt.data.images import to_pil
from lit_prefopt.evaluate.console import picture_name
from lit_prefopt.evaluate.statistics import paired_statistics
from lit_prefopt.toy.render import render
from lit_prefopt.toy.scenes import parse, prompts

HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"> 'q' \"d\" & ${1} {{ 7 * 7 }} -->"
CATEGORIES = ("colour", "counting", HOSTILE)
JUDGES = ("Exact", "Second")


def write_evaluation(
    folder: Path, count: int = 12, pictures: int | None = None, gain: float = 0.1
) -> Path:
    """Write an evaluation of format 2; its fourth prompt would like to break the page.

    Args:
        folder: Is made.
        count: Number of prompts, one image each.
        pictures: How many of them have pictures; all where it is not given.
        gain: By how much the policy is better on average, by the first judge.
    """
    random = np.random.default_rng(count)
    captions = prompts(count)
    rows: list[dict[str, Any]] = []
    for place, text in enumerate(captions):
        change = float(gain + random.normal(0, 0.1))
        shown = pictures is None or place < pictures
        scores = ({"Exact": 0.5, "Second": 20.0}, {"Exact": 0.5 + change, "Second": 20 - change})
        row: dict[str, Any] = {"text": HOSTILE if place == 3 else text, "seed": place}
        row |= {"prompt": place, "image": 0, "category": CATEGORIES[place % 3]}
        for model, own in zip(("reference", "policy"), scores, strict=True):
            row[f"reward_{model}"] = own["Exact"]
            row[f"scores_{model}"] = own
            row[f"attributes_{model}"] = {"shape": own["Exact"], "size": None}
            row[f"picture_{model}"] = f"images/{place:05d}-{model}.png" if shown else None
        rows.append(row)
    (folder / "images").mkdir(parents=True)
    for model, images in zip(
        ("reference", "policy"), toy_pictures(captions[:pictures]), strict=True
    ):
        for place, image in enumerate(images):
            to_pil(image).save(folder / "images" / picture_name(f"{place:05d}", model))
    summary = {
        "format": 2,
        "prompts": count,
        "images_per_prompt": 1,
        "models": {"reference": "the base", "policy": HOSTILE},
        "judges": {name: _judged(rows, name) for name in JUDGES},
        "categories": {
            category: {"prompts": len(own)} | {name: _judged(own, name) for name in JUDGES}
            for category in CATEGORIES
            if (own := [row for row in rows if row["category"] == category])
        },
        "held_out_accuracy": [[10, 0.55], [20, 0.6]],
        "drift": {"what": "CLIP similarity", "value": 0.91, "ci": [0.9, 0.92]},
        "diversity": None,
        "pinned": {"sampler": {"steps": 20}, "note": HOSTILE},
    }
    summary["judges"]["Exact"]["attributes"] = {"shape": _judged(rows, "Exact")}
    return write_folder(folder, summary, rows)


def write_folder(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write the two files of an evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(summary))
    (folder / "per_prompt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_noise(path: Path, size: int, seed: int = 0) -> Path:
    """Write a picture that does not compress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def toy_pictures(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two samples of every caption's scene, (P, 3, 32, 32) in [-1, 1] each."""
    scenes = [parse(caption) for caption in captions]
    generator = torch.Generator().manual_seed(0)
    return render(scenes, generator), render(scenes, generator)


def _judged(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    sides = [[row[f"scores_{model}"][name] for row in rows] for model in ("reference", "policy")]
    reference, policy = (np.array(side) for side in sides)
    means = {"reference": float(reference.mean()), "policy": float(policy.mean())}
    return means | paired_statistics(policy - reference)._asdict()
