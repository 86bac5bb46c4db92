"""Ranked lists and likes from a CSV file to a trained toy model, by the command line alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_prefopt.cli import main
from lit_prefopt.toy.scenes import prompts
from tests.helpers.caching import logged
from tests.helpers.recipes import OWN_COUNTS, SMALL

PROMPTS = 12


def pictures(folder: Path, count: int) -> list[str]:
    """Write random pictures of 32 x 32 pixels, and return their names."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def table(path: Path, rows: list[dict[str, object]]) -> str:
    """Write a CSV file and return its path."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def fit(config: str, folder: Path, *data: str) -> dict[str, list[float]]:
    """Train the toy model for four steps, and return what was logged."""
    steps = ["--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1", *OWN_COUNTS]
    steps += ["--trainer.val_check_interval", "1", "--trainer.enable_progress_bar", "false"]
    root = ["--trainer.default_root_dir", str(folder)]
    main(["fit", "--config", config, "--config", SMALL, *data, *root, *steps])
    assert (folder / "weights" / "unet" / "config.json").exists()
    return logged(folder)


def checked(folder: Path, capsys: pytest.CaptureFixture) -> str:
    """Validate, draw and index a folder of shards; return what validation printed."""
    index = (folder / "index.json").read_bytes()
    capsys.readouterr()
    main(["shards", "validate", "--shards", str(folder), "--resolution", "32"])
    printed = capsys.readouterr().out
    assert "Training would not stop." in printed
    sheet = folder.with_suffix(".png")
    main(["shards", "preview", "--shards", str(folder), "--output", str(sheet), "--count", "4"])
    assert Image.open(sheet).width > 500
    main(["shards", "index", "--folder", str(folder)])
    assert (folder / "index.json").read_bytes() == index
    return printed


def test_ranked_lists_from_a_table_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Lists are converted, checked, cached with the reference's errors, and trained on."""
    names = iter(pictures(tmp_path, 4 * PROMPTS))
    rows = [
        {"prompt": text, **{f"rank{rank}": next(names) for rank in range(1, 5)}}
        for text in prompts(PROMPTS, "train")
    ]
    source = table(tmp_path / "ranked.csv", rows)
    convert = ["shards", "convert", "--source", source, "--output", str(tmp_path / "lists")]
    main([*convert, "--samples", "lists", "--hold_out", "0.3"])
    summary = json.loads((tmp_path / "lists" / "summary.json").read_text())
    assert summary["lists_by_length"] == {"4": PROMPTS}
    parts = {name: str(tmp_path / "lists" / name) for name in ("train", "validation")}
    assert "images in a list: 8 of 4" in checked(tmp_path / "lists" / "train", capsys)
    cpu = ["--trainer.default_root_dir", str(tmp_path / "predict"), "--trainer.logger", "false"]
    for name, folder in parts.items():
        groups = ["--data", "SampleGroups", "--data.shards", folder]
        output = ["--model.output", str(tmp_path / "cache" / name)]
        main(["predict", "--config", "toy-cache", *groups, *output, *cpu])
    cached = {name: str(tmp_path / "cache" / name) for name in parts}
    errors = ["--data.shards", cached["train"], "--model.output", str(tmp_path / "errors")]
    errors += ["--model.batch_size", "4", "--model.draws", "2"]
    main(["predict", "--config", "toy-reference-cache", *errors, *cpu])
    data = ["--data", "CachedPairs", "--data.shards", cached["train"], "--data.batch_size", "4"]
    data += ["--data.validation", cached["validation"], "--data.workers", "0"]
    data += ["--data.caption_dropout", "0.1", "--data.reference", str(tmp_path / "errors")]
    ours = fit("toy-diffusion-dpo", tmp_path / "from-cache", *data)
    assert ours["train/loss"][0] == pytest.approx(0.693147, abs=1e-3)  # policy = reference
    assert len({*ours["train/loss"]}) > 2
    assert len(ours["val/accuracy"]) >= 1
    # and from the images, whose encodings are kept
    data = ["--data", "PairShards", "--data.shards", parts["train"], "--data.batch_size", "4"]
    data += ["--data.validation", parts["validation"], "--data.workers", "0"]
    data += ["--data.resolution", "32", "--data.draws", "1"]
    images = fit("toy-diffusion-dpo", tmp_path / "from-images", *data)
    assert images["train/loss"][0] == pytest.approx(0.693147, abs=1e-5)
    assert len({*images["train/loss"]}) > 2


def test_likes_from_a_table_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Single images are converted, checked, cached, and the liked ones trained on."""
    names = pictures(tmp_path, 2 * PROMPTS)
    texts = [text for text in prompts(PROMPTS, "train") for _ in range(2)]
    rows = [
        {"prompt": text, "image": name, "label": number % 2}
        for number, (text, name) in enumerate(zip(texts, names, strict=True))
    ]
    source = table(tmp_path / "likes.csv", rows)
    convert = ["shards", "convert", "--source", source, "--output", str(tmp_path / "likes")]
    with pytest.raises(SystemExit, match="single images with likes are written by `--samples lik"):
        main(convert)
    main([*convert, "--samples", "likes", "--hold_out", "0.3"])
    train, validation = (tmp_path / "likes" / name for name in ("train", "validation"))
    assert "8 liked, 8 disliked" in checked(train, capsys)
    data = ["--data", "PairShards", "--data.shards", str(train), "--data.batch_size", "4"]
    data += ["--data.validation", str(validation), "--data.resolution", "32", "--data.workers", "0"]
    numbers = fit("toy-sft", tmp_path / "run", *data)
    assert len({*numbers["train/loss"]}) > 2
    assert numbers["train/loss"][0] < numbers["train/error"][0]  # disliked images have no weight
    assert "val/accuracy" not in numbers
    with pytest.raises(SystemExit, match="DiffusionDPO compares images of one prompt, and .*likes"):
        fit("toy-diffusion-dpo", tmp_path / "pairs", *data)
    output = ["--model.output", str(tmp_path / "cache")]
    groups = ["--data", "SampleGroups", "--data.shards", str(train)]
    cpu = ["--trainer.default_root_dir", str(tmp_path / "predict"), "--trainer.logger", "false"]
    main(["predict", "--config", "toy-cache", *groups, *output, *cpu])
    data = ["--data", "CachedPairs", "--data.shards", str(tmp_path / "cache")]
    data += ["--data.batch_size", "4", "--data.workers", "0"]
    cached = fit("toy-sft", tmp_path / "from-cache", *data)
    assert len({*cached["train/loss"]}) > 2
