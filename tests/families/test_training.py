"""Training of every flow family: step 0, gradients, caches, resuming, and the trained weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_prefopt import load
from lit_prefopt.backbones import LoRA, trained
from lit_prefopt.backbones.transformer import TransformerBackbone
from lit_prefopt.batches import ImagePairs
from lit_prefopt.cli import main
from lit_prefopt.conditioning import Prompt
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.datamodules import PairShards
from lit_prefopt.datamodules.image_sizes import check_image_sizes
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.base_check import check_base
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.families.all_cases import CASES, FIRST
from tests.families.cases import TEXTS, Case, sampled
from tests.helpers.batches import image_pairs
from tests.helpers.caching import data, errors
from tests.helpers.recipes import OWN_COUNTS, SMALL
from tests.helpers.runs import assert_same_end, scalars
from tests.helpers.step_zero import check_step_zero, moved

BETA = 1000.0


@pytest.fixture(
    scope="session",
    params=[
        name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def family(request: pytest.FixtureRequest) -> str:
    """Name of a case; by default the first of each family."""
    return str(request.param)


@pytest.fixture
def case(family: str) -> Case:
    """The family's case."""
    return CASES[family]


@pytest.fixture
def flow(case: Case, folder: Path) -> TransformerBackbone:
    """The family's backbone with a LoRA."""
    return case.ours(folder, lora=LoRA(4))


def dpo(backbone: TransformerBackbone) -> DiffusionDPO:
    return DiffusionDPO(backbone, AdamW(1e-3), beta=BETA).train()


def pairs_of(case: Case) -> ImagePairs:
    """Return three pairs of the case's square, with prompts of three lengths."""
    pairs = image_pairs()
    height, width = case.sizes[0]
    images = torch.nn.functional.interpolate(pairs.images.flatten(0, 1), (height, width))
    return pairs._replace(images=images.unflatten(0, (3, 2)), texts=[*TEXTS])


def gradients(backbone: TransformerBackbone, case: Case) -> dict[str, Tensor]:
    """Return the gradients of a step of Diffusion-DPO by name."""
    module = dpo(backbone)
    pairs = module.form_pairs(pairs_of(case))
    loss = module.losses(module.log_ratios(pairs), pairs).mean()
    assert loss.isfinite()
    loss.backward()
    found = {name: weight.grad for name, weight in trained(backbone).items()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    return found


def test_step_zero(flow: TransformerBackbone, case: Case) -> None:
    """Margin 0 in every bit, loss ln 2, finite gradients of the LoRA, a still reference."""
    module = dpo(flow)
    check_step_zero(module, module.form_pairs(pairs_of(case)), torch.full((3,), math.log(2)))


def test_gradient_checkpointing_changes_no_gradient(case: Case, folder: Path) -> None:
    plain, saving = (
        gradients(moved(case.ours(folder, lora=LoRA(4), gradient_checkpointing=on)), case)
        for on in (False, True)
    )
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        assert torch.equal(saving[name], gradient), name
    assert any(gradient.abs().max() > 0 for gradient in plain.values())


@pytest.mark.parametrize(
    "base",
    [{"dtype": "bfloat16"}, {"quantization": "nf4"}, {"quantization": "int8"}],
    ids=["bf16", "nf4", "int8"],
)
def test_a_base_of_fewer_bits(base: dict[str, Any], case: Case, folder: Path) -> None:
    """A float32 LoRA gets finite gradients, and policy and reference are equal at first."""
    backbone = case.ours(folder, lora=LoRA(4), **base)
    module = dpo(backbone)
    pairs = module.form_pairs(pairs_of(case))
    with torch.autocast("cpu", torch.bfloat16):
        ratios = module.log_ratios(pairs)
        loss = module.losses(ratios, pairs).mean()
    assert (ratios.values == 0).all()
    loss.backward()
    weights = trained(backbone).values()
    assert all(weight.dtype == torch.float32 for weight in weights)
    assert all(weight.grad.isfinite().all() for weight in weights)
    assert any(weight.grad.abs().max() > 0 for weight in weights)


# Caches ------------------------------------------------------------------------------------------


def same_prompt(one: Prompt, other: Prompt) -> None:
    """Assert that two prompts are equal in every bit."""
    a, b = one.tensors(), other.tensors()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_training_from_caches_is_training_from_images(
    flow: TransformerBackbone, case: Case, cached: str, few: str
) -> None:
    """The same draws, latents, prompts and losses in every bit; a dropped caption among them."""
    side = case.sizes[0][0]
    options = {"batch_size": 1, "workers": 0, "seed": 1, "caption_dropout": 0.3}
    images = PairShards(few, resolution=side, **options)
    images.setup("fit")
    module, texts = dpo(moved(flow)), []
    latents = data(cached, **options)
    stored = latents.latents.settings
    assert {name: stored[name] for name in flow.latent_settings()} == flow.latent_settings()
    batches = zip(images.train_dataloader(), latents.train_dataloader(), strict=True)
    for one, other in batches:
        assert (one.texts, one.keys) == (other.texts, other.keys)
        texts += one.texts
        ours, theirs = (module.form_pairs(batch) for batch in (one, other))
        for name in ("latents", "seeds", "labels", "weights", "frames"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        same_prompt(ours.prompt, theirs.prompt)
        mine, cachedly = (module.log_ratios(pairs) for pairs in (ours, theirs))
        assert torch.equal(mine.values, cachedly.values)
        assert mine.values.abs().max() > 0
        assert torch.equal(module.losses(mine, ours), module.losses(cachedly, theirs))
    assert "" in texts
    assert len({*texts}) == 4


def test_a_batch_from_caches_is_near_one_from_images(
    flow: TransformerBackbone, case: Case, cached: str, few: str
) -> None:
    """Prompts of unequal lengths, encoded one by one and used together."""
    images = PairShards(few, 6, resolution=case.sizes[0][0], workers=0, seed=1)
    images.setup("fit")
    module = dpo(moved(flow))
    [one], [other] = images.train_dataloader(), data(cached, batch_size=6).train_dataloader()
    errors = []
    for batch in (one, other):
        with torch.no_grad():
            errors.append(module.log_ratios(module.form_pairs(batch)).policy_error)
    torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-5)


def test_the_references_errors_are_cached(
    flow: TransformerBackbone, case: Case, cached: str, folder: Path, tmp_path: Path
) -> None:
    """The stored errors are those of the reference in every bit, so that the margin starts at 0."""
    table = errors(case.ours(folder, lora=LoRA(4)), cached, tmp_path / "errors", batch_size=1)
    module = dpo(flow)
    loader = data(cached, batch_size=1, reference=table, seed=0).train_dataloader()
    for _ in range(2):
        for batch in loader:
            pairs = module.form_pairs(batch)
            assert pairs.reference_error.shape == (1, 1, 2)
            ratios = module.log_ratios(pairs)
            own = module.log_ratios(pairs._replace(reference_error=None))
            assert torch.equal(ratios.reference_error, own.reference_error)
            assert (ratios.values == 0).all()


# Sizes -------------------------------------------------------------------------------------------


def bucketed(folder: Path, step: int, resolution: int, size: tuple[int, int]) -> PairShards:
    """Return a data module of four pairs of one size, in buckets, that is set up.

    Args:
        folder: Where to write the pairs.
        step: Widths and heights of the buckets are multiples of it.
        resolution: Width and height of the square bucket.
        size: Width and height of the images.
    """
    random = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for number in range(4):
            images = random.integers(0, 256, (2, size[1], size[0], 3), dtype=np.uint8)
            writer.add(f"picture number {number}", *images, {})
    options = {"aspect_buckets": True, "bucket_step": step, "workers": 0}
    module = PairShards(str(folder), 2, resolution=resolution, **options)
    module.setup("fit")
    return module


def test_aspect_buckets_are_of_the_familys_multiples(
    flow: TransformerBackbone, tmp_path: Path
) -> None:
    """A wide bucket is trained; a step of half a token is refused before the first batch."""
    unit = flow.size_multiple
    pairs = bucketed(tmp_path / "wide", unit, 4 * unit, (5 * unit, 3 * unit))
    assert pairs.image_sizes == [(5 * unit, 3 * unit)]
    check_image_sizes(flow, pairs)
    module = dpo(moved(flow))
    for batch in pairs.train_dataloader():
        encoded = module.form_pairs(batch)
        side = unit // flow.pixels_per_latent
        assert encoded.latents.shape[3:] == (3 * side, 5 * side)
        assert module.losses(module.log_ratios(encoded), encoded).isfinite().all()
    size = 9 * unit // 2, 7 * unit // 2
    finer = bucketed(tmp_path / "finer", unit // 2, 4 * unit, size)
    assert finer.image_sizes == [size]
    with pytest.raises(InputError, match=rf"`--data.bucket_step` as multiples of {unit}"):
        check_image_sizes(flow, finer)


# Runs --------------------------------------------------------------------------------------------


def run_of(case: Case, folder: Path, run: Path, *data: str) -> list[str]:
    """Return the arguments of a training of four steps.

    The check of the base is off: random weights predict nothing.

    Args:
        case: The family's case.
        folder: Folder of its pipeline.
        run: Folder of the run.
        data: Arguments of the data module.
    """
    return [
        *("--config", "toy-diffusion-dpo", "--config", SMALL, *case.arguments_of(folder)),
        *("--backbone.lora.rank", "4", *data, "--data.validation", "null"),
        *("--data.batch_size", "2", "--data.workers", "0", "--data.caption_dropout", "0.2"),
        *("--model.optimizer.lr", "5e-2", "--model.optimizer.warmup_steps", "0"),
        *("--model.check_base", "false"),
        *("--trainer.default_root_dir", str(run), "--trainer.max_steps", "4", *OWN_COUNTS),
        *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
        *("--trainer.callbacks", "Checkpoints", "--trainer.callbacks.save_last", "true"),
        *("--trainer.callbacks.every_n_train_steps", "2", "--trainer.callbacks.save_top_k", "-1"),
        *("--trainer.callbacks.filename", "{step}"),
    ]


def from_cache(case: Case, folder: Path, cached: str, run: Path) -> list[str]:
    """Return the arguments of a training of four steps on a cache, without the encoders."""
    data = ["--data", "CachedPairs", "--data.shards", cached, "--backbone.encoders", "false"]
    return run_of(case, folder, run, *data)


def test_a_run_resumes_in_every_bit_and_its_weights_load(
    case: Case, folder: Path, cached: str, tmp_path: Path
) -> None:
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    main(["fit", *from_cache(case, folder, cached, whole)])
    middle = whole / "checkpoints" / "step=2.ckpt"
    main(["fit", *from_cache(case, folder, cached, rest), "--ckpt_path", str(middle)])
    assert_same_end(whole, rest)
    logged = scalars(whole)
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["train/margin"][0] == 0
    assert logged["train/margin"][-1] != 0
    file = whole / "checkpoints" / "last.ckpt"
    saved = torch.load(file, weights_only=True)["state_dict"]
    own = trained(load(file))
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[name], weight) for name, weight in saved.items())


def test_the_stock_pipeline_loads_the_trained_weights(
    family: str, folder: Path, tmp_path: Path
) -> None:
    """The same images, by the LoRA of our file and by the stock pipeline's loader."""
    case = CASES[family]
    models = case.models(folder, lora=LoRA(4))
    plain = sampled(models, TEXTS[:1], case.unguided).images
    moved(models.backbone)
    models.backbone.save(tmp_path)
    models.stock.load_lora_weights(tmp_path)
    record = sampled(models, TEXTS[:1], case.unguided)
    torch.testing.assert_close(record.images, record.expected, atol=1e-5, rtol=0)
    assert (record.images - plain).abs().max() > 1e-3


# The check of the base --------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_the_base_is_checked(
    sign: int, flow: TransformerBackbone, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that predicts the velocity is trained, and one with the wrong sign is not."""
    pairs = dpo(flow).form_pairs(pairs_of(case))
    noise = draws.normal(pairs.seeds, pairs.latents.shape[2:], "base check")
    velocity = noise.repeat_interleave(2, 0) - pairs.latents.flatten(0, 1)
    random = torch.Generator().manual_seed(2)
    error = velocity.std() * torch.randn(velocity.shape, generator=random)

    def predicted(latents: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        return sign * (velocity + 0.3 * error)

    monkeypatch.setattr(flow, "velocity", predicted)
    if sign == 1:
        check_base(flow, pairs)
    else:
        with pytest.raises(InputError, match="does not predict velocity.* negate the prediction"):
            check_base(flow, pairs)
