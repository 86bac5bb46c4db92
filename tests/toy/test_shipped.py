"""What ships: a real pipeline that is good and not perfect, and pairs whose captions are apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline

from lit_prefopt.datamodules import PairShards
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.evaluate.summary import summarise
from lit_prefopt.toy import ToyDiffusion, ToyFlow, ToyJudge, ToyPairs, ToyPrompts
from lit_prefopt.toy.backbone import CHECKPOINT, FLOW_CHECKPOINT, TOY_SAMPLING
from lit_prefopt.toy.pairs import PAIRS
from lit_prefopt.toy.scenes import split
from tests.helpers.comparing import compared


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_checkpoints_are_small() -> None:
    assert size(CHECKPOINT) <= 12e6
    assert size(FLOW_CHECKPOINT) <= 15e6


def test_the_stock_pipeline_draws_what_it_is_told() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        CHECKPOINT, safety_checker=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    texts = ToyPrompts(count=8).texts()
    images = pipeline(
        texts,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=torch.manual_seed(0),
        output_type="np",
    ).images
    pixels = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) * 2 - 1
    assert ToyJudge().score(pixels, texts).mean() > 0.6


def test_the_stock_flow_pipeline_draws_what_it_is_told() -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        FLOW_CHECKPOINT, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    texts = ToyPrompts(count=8).texts()
    pixels = pipeline(
        texts,
        num_inference_steps=20,
        guidance_scale=2.0,
        max_sequence_length=0,
        generator=torch.manual_seed(0),
        output_type="pt",
    ).images
    assert ToyJudge().score(2 * pixels - 1, texts).mean() > 0.6


@pytest.mark.parametrize("kind", [ToyDiffusion, ToyFlow])
def test_the_base_is_good_and_not_perfect(kind: type[ToyDiffusion | ToyFlow]) -> None:
    texts, seeds = ToyPrompts(count=32).texts(), torch.arange(32)
    backbone = kind(reference="none").eval()
    images = sample(backbone, texts, seeds, backbone.sampling)
    assert 0.6 < ToyJudge().score(images, texts).mean() < 0.97


def pairs(folder: str) -> PairShards:
    data = PairShards(str(PAIRS / folder), batch_size=64, resolution=32, flip=False, workers=0)
    data.setup("fit")
    return data


@pytest.mark.parametrize(("folder", "count"), [("train", 1024), ("validation", 256)])
def test_pairs_are_ranked_by_the_judge(folder: str, count: int) -> None:
    reader = pairs(folder).reader
    assert sum(len(shard.offsets) for shard in reader.shards) == count
    judge = ToyJudge()
    batch = next(iter(pairs(folder).train_dataloader())).scaled()
    scores = [judge.score(batch.images[:, side], batch.texts) for side in (0, 1)]
    assert (scores[0] >= scores[1]).all()
    stored = [reader(0, i) for i in range(5)]
    for sample_ in stored:
        assert sample_.meta["gap"] == pytest.approx(
            sample_.meta["scores"]["chosen"] - sample_.meta["scores"]["rejected"], abs=2e-5
        )


def test_captions_of_training_and_validation_are_apart() -> None:
    sides = {}
    for folder in ("train", "validation"):
        reader = pairs(folder).reader
        counts = [len(shard.offsets) for shard in reader.shards]
        sides[folder] = {reader(s, i).text for s, n in enumerate(counts) for i in range(n)}
    assert not sides["train"] & sides["validation"]
    assert {split(text) for text in sides["train"]} == {"train"}
    assert {split(text) for text in sides["validation"]} == {"held-out"}
    assert not sides["train"] & set(ToyPrompts(count=256).texts())


def test_toy_pairs_name_the_shipped_folders() -> None:
    data = ToyPairs()
    data.setup("fit")
    assert json.loads((PAIRS / "train" / "index.json").read_text())["shards"]
    assert len(data.train_dataloader()) == 16


@pytest.mark.slow
def test_the_base_against_itself() -> None:
    """With the same seeds nothing differs; with others neither side wins."""
    backbone, judge = ToyDiffusion().eval(), ToyJudge()
    texts = ToyPrompts(count=96).texts()
    same = summarise(compared(backbone, judge, texts, TOY_SAMPLING))
    assert same["difference"] == 0
    assert same["win_rate"] == 0.5
    other = summarise(compared(backbone, judge, texts, TOY_SAMPLING, reference_seed=5000))
    assert other["win_rate_ci"][0] < 0.5 < other["win_rate_ci"][1]
    assert other["difference_ci"][0] < 0 < other["difference_ci"][1]
