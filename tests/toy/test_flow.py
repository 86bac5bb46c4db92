"""The flow twin: its parts, its start, its training, and the stock pipeline on what it writes."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModel, CLIPTokenizer

from lit_prefopt.cli import main
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.models import load_model
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.toy import ToyFlow, ToyPrompts
from lit_prefopt.toy import backbone as toy_backbone
from lit_prefopt.toy.assemble_flow import (
    TEXT_LENGTH,
    assemble_flow,
    clip_encoder,
    new_transformer,
    word_encoder,
)
from lit_prefopt.toy.backbone import CHECKPOINT
from lit_prefopt.toy.scenes import all_scenes

CONFIGS = Path(__file__).parents[2] / "configs" / "toy"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "parts"
    assemble_flow(str(CONFIGS / "flow.json"), output=str(folder))
    return folder


@pytest.fixture(scope="module")
def moved(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in half precision whose transformer is not at its start, where it predicts 0."""
    folder = tmp_path_factory.mktemp("moved")
    network = new_transformer(CONFIGS / "flow.json")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=draw))
    network.save_pretrained(folder / "transformer")
    assemble_flow(str(folder / "transformer"), output=str(folder / "pipeline"))
    return folder / "pipeline"


def stock(folder: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_caption_fits() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    lengths = [len(ids) for ids in tokenizer([s.caption() for s in all_scenes()]).input_ids]
    assert max(lengths) == 14 <= TEXT_LENGTH


def test_the_first_encoder_is_the_shipped_one() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    ids = tokenizer(["a red circle above a blue square on a white background"], return_tensors="pt")
    plain = CLIPTextModel.from_pretrained(CHECKPOINT / "text_encoder", dtype=torch.float32).eval()
    encoder = clip_encoder(CHECKPOINT / "text_encoder")
    with torch.no_grad():
        expected = plain(ids.input_ids, output_hidden_states=True)
        found = encoder(ids.input_ids, output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states[-2], expected.hidden_states[-2])
    torch.testing.assert_close(found.text_embeds, expected.pooler_output)
    torch.testing.assert_close(found.text_embeds[0], expected.last_hidden_state[0, -1])


def test_the_second_encoder_gives_words_and_places() -> None:
    config = clip_encoder(CHECKPOINT / "text_encoder").config
    encoder, again = word_encoder(config), word_encoder(config)
    for one, other in zip(encoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(next(encoder.parameters()), next(word_encoder(config, 1).parameters()))
    ids = torch.tensor([[603, 7, 300, 7, 604]])
    with torch.no_grad():
        rows = encoder(ids, output_hidden_states=True).hidden_states[-2][0]
    words, places = (
        encoder.get_parameter(f"text_model.embeddings.{name}_embedding.weight")
        for name in ("token", "position")
    )
    torch.testing.assert_close(rows, words[ids[0]] + places[:5])
    torch.testing.assert_close(rows[3] - rows[1], places[3] - places[1])


def test_the_start_predicts_nothing_and_is_drawn_by_its_seed() -> None:
    network, again = (new_transformer(CONFIGS / "flow.json") for _ in range(2))
    size = sum(weight.numel() for weight in network.parameters())
    assert 4e6 <= size <= 6e6
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    latents, prompt, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 192), torch.randn(2, 160)
    velocity = network(latents, prompt, pooled, torch.tensor([1000.0, 20.0])).sample
    assert velocity.abs().max() == 0
    velocity.sum().backward()  # the last layer learns from the first step on
    assert network.proj_out.bias.grad.abs().min() > 0


def test_the_stock_pipeline_draws_the_same(moved: Path) -> None:
    texts, seeds = ToyPrompts(count=2).texts(), torch.arange(2)
    backbone = ToyFlow(str(moved), reference="none").eval()
    assert backbone.latent_shape == (4, 8, 8)
    assert backbone.size_multiple == 8
    ours = sample(backbone, texts, seeds, Sampling(steps=3, guidance=2.0))
    theirs = stock(moved)(
        texts,
        num_inference_steps=3,
        guidance_scale=2.0,
        max_sequence_length=0,
        latents=draws.normal(seeds, (4, 8, 8), "start"),
        output_type="pt",
    ).images
    torch.testing.assert_close((ours.clamp(-1, 1) + 1) / 2, theirs, atol=1e-5, rtol=0)
    assert theirs.std() > 0.01


def test_a_trained_pipeline_is_small_and_runs_in_half_precision(moved: Path, start: Path) -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(moved) <= 15e6 < size(start)
    half = StableDiffusion3Pipeline.from_pretrained(
        moved, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float16
    )
    assert {part.dtype for part in (half.transformer, half.text_encoder, half.vae)} == {
        torch.float16
    }
    vae = AutoencoderKL.from_pretrained(moved / "vae")
    assert vae.config.shift_factor == 0
    assert (
        vae.config.scaling_factor
        == AutoencoderKL.from_pretrained(CHECKPOINT / "vae").config.scaling_factor
    )


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="neither a folder nor a file"):
        assemble_flow(str(tmp_path / "none"), output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="make toy-flow"):
        ToyFlow(str(tmp_path / "none"))
    monkeypatch.setattr(toy_backbone, "FLOW_CHECKPOINT", tmp_path / "none")
    with pytest.raises(InputError, match="make toy-flow"):
        ToyFlow()


def test_its_training_runs_and_what_it_trained_is_assembled(start: Path, tmp_path: Path) -> None:
    arguments = {
        "backbone.pretrained": start,
        "data.batch_size": 4,
        "data.steps": 2,
        "data.val_steps": 1,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.logger": "false",
        "model.optimizer.warmup_steps": 1,
    }
    main(
        ["fit", "--config", str(CONFIGS / "flow.yaml")]
        + [f"--{key}={value}" for key, value in arguments.items()]
    )
    evaluated = load_model(str(tmp_path / "run")).backbone  # as `evaluate --model.policy`
    assert evaluated.embed(["a"])["hidden"].shape == (1, TEXT_LENGTH, 192)
    weights = tmp_path / "run" / "weights" / "transformer"
    trained = SD3Transformer2DModel.from_pretrained(weights)
    assert torch.equal(evaluated.policy.denoiser.proj_out.bias, trained.proj_out.bias)
    assemble_flow(str(weights), output=str(tmp_path / "pipeline"))
    pipeline = stock(tmp_path / "pipeline")
    assert pipeline.transformer.proj_out.bias.abs().max() > 0
    assert pipeline.scheduler.config.shift == 1


ROLLOUTS = {"data.round_size": 2, "data.count": 4, "data.batches": 2, "model.sampling.steps": 5}
KEPT = ROLLOUTS | {"data.collection": 2, "data.keep": 4}
SMALL = {
    "sft": {},
    "diffusion-dpo": {},
    "di3po": {"data.shards": "null"},
    "spin": {"data.shards": "null"},
    "spo": ROLLOUTS | {"model.threshold": 0},  # samples of such a model differ little
    "d3po": KEPT,
    "dense-reward": KEPT,
    "grpo": ROLLOUTS | {"model.noisy_steps": 5},
    "nft": ROLLOUTS | {"data.collection": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", SMALL)
def test_every_method_learns(method: str, moved: Path, tmp_path: Path) -> None:
    """Two steps of each recipe that needs no generation beforehand; the first loss is ln 2."""
    arguments = {
        "backbone.pretrained": moved,
        "model.check_base": "false",  # a transformer that was not trained predicts no velocity
        "data.batch_size": 4,
        "batch.pairs": 4,
        "batch.validate_every": "null",
        "trainer.limit_val_batches": 0,
        "trainer.max_steps": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": tmp_path,
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": tmp_path,
        "trainer.enable_progress_bar": "false",
        **SMALL[method],
    }
    main(
        ["fit", "--config", f"toy-flow-{method}"]
        + [f"--{key}={value}" for key, value in arguments.items()]
    )
    (table,) = tmp_path.rglob("metrics.csv")
    rows = [*csv.DictReader(table.open())]
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    if method not in ("sft", "grpo", "nft"):
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    trained = SD3Transformer2DModel.from_pretrained(tmp_path / "weights" / "transformer")
    base = SD3Transformer2DModel.from_pretrained(moved / "transformer")
    assert any(
        not torch.equal(one, other)
        for one, other in zip(trained.parameters(), base.parameters(), strict=True)
    )
