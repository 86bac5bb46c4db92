"""Z-Image against the stock diffusers pipeline: what is particular to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion3, ZImage, trained
from lit_prefopt.backbones.guidance import linear
from lit_prefopt.backbones.z_image import beyond
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.base_check import base_errors, check_base
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.families.cases import load_stock
from tests.helpers.batches import image_pairs
from tests.helpers.flow_backbones import adapter_gradients, changed, noised
from tests.helpers.tiny_z_image import tiny_z_image_pipeline, tiny_z_image_transformer

TEXTS = ["a red cat", "", "dog " * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_z_image_pipeline(tmp_path_factory.mktemp("z-image")))


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_z_image_pipeline(tmp_path_factory.mktemp("turbo"), shift=3.0))


@pytest.fixture(scope="module")
def backbone(folder: str) -> ZImage:
    return ZImage(folder, reference="none").eval()


@pytest.fixture(scope="module")
def stock(folder: str) -> ZImagePipeline:
    return load_stock(Path(folder))


@torch.no_grad()
def test_prompts_are_the_stock_pipelines(backbone: ZImage, stock: ZImagePipeline) -> None:
    """Rows of own lengths, the template with room for reasoning; alone they are the same."""
    theirs, _ = stock.encode_prompt([*TEXTS], do_classifier_free_guidance=False)
    ours = backbone.embed(TEXTS).ragged("hidden")
    assert ours.lengths == tuple(len(row) for row in theirs)
    assert len({*ours.lengths}) == 3
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert "<think>" not in backbone.texts["text_encoder"].message("a")
    for text, row in zip(TEXTS, ours, strict=True):
        (alone,) = backbone.embed([text]).ragged("hidden")
        torch.testing.assert_close(alone, row, atol=1e-5, rtol=0)


@torch.no_grad()
def test_latents_of_images_are_those_of_the_stock_img2img_pipeline(
    backbone: ZImage, stock: ZImagePipeline
) -> None:
    """Without noise: at the scheduler's last level, 0."""
    images = torch.rand(2, 3, 32, 40) * 2 - 1
    img2img = ZImageImg2ImgPipeline(**stock.components)
    img2img.scheduler.set_timesteps(4)
    img2img.scheduler.timesteps = torch.cat([img2img.scheduler.timesteps, torch.zeros(1)])
    img2img.scheduler.set_begin_index(4)
    theirs = img2img.prepare_latents(
        images, torch.zeros(2), 2, 16, 32, 40, torch.float32, "cpu", torch.manual_seed(0)
    )
    mean, deviation = backbone.encode(images)
    noise = torch.randn(mean.shape, generator=torch.manual_seed(0))
    torch.testing.assert_close(mean + deviation * noise, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [4, 7, 50])
@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_levels_are_those_of_the_stock_pipeline(
    backbone: ZImage, stock: ZImagePipeline, size: tuple[int, int], steps: int
) -> None:
    height, width = size
    stock(["a"], height, width, steps, guidance_scale=0.0, output_type="latent")
    how = Sampling(steps, 0.0, height=height, width=width)
    levels = backbone.process.sampler(how, backbone.sampling_shape(how)).levels
    assert levels.dtype == torch.float64
    assert torch.equal(levels.float(), stock.scheduler.sigmas)


def test_levels_of_the_published_shift(turbo: str) -> None:
    process = ZImage(turbo, reference="none", distilled=True).process
    found = process.sampler(Sampling(4, 0.0), (16, 8, 8)).levels
    torch.testing.assert_close(
        found, torch.tensor([1, 0.9, 0.75, 0.5, 0]).double(), atol=1e-7, rtol=0
    )


def test_levels_of_a_dynamic_shift(folder: str, tmp_path: Path) -> None:
    """The stock pipeline has such a shift for schedulers that ask for it."""
    dynamic = changed(
        folder, tmp_path / "dynamic", "scheduler/scheduler_config.json", use_dynamic_shifting=True
    )
    stock = load_stock(Path(dynamic))
    stock(["a"], 40, 24, 5, guidance_scale=0.0, output_type="latent")
    process = ZImage(dynamic, reference="none").process
    levels = process.sampler(Sampling(5, 0.0), (16, 10, 6)).levels
    assert torch.equal(levels.float(), stock.scheduler.sigmas)


def test_guidance_is_the_usual_scale_less_one() -> None:
    one, other = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(beyond(one, other, 4.0), linear(one, other, 5.0))
    assert torch.equal(beyond(one, other, 0.0), one)


@torch.no_grad()
def test_the_velocity_is_minus_the_stock_transformers(
    backbone: ZImage, stock: ZImagePipeline
) -> None:
    """A prompt in a batch of longer ones has the prediction that it has alone."""
    (latents, t), prompt = noised(3), backbone.embed(TEXTS)
    ours = backbone.predict(latents, t, prompt)
    for row in range(3):
        theirs = stock.transformer(
            [latents[row, :, None]],
            torch.tensor([1 - t[row]], dtype=torch.float32),
            [prompt.row(row)["hidden"]],
        ).sample[0]
        torch.testing.assert_close(ours[row], -theirs[:, 0], atol=1e-5, rtol=0)


# Training -------------------------------------------------------------------------------------


def gradients(folder: str, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of a LoRA that is not the identity."""
    return adapter_gradients(ZImage(folder, lora=LoRA(4), **options), TEXTS[:2], *noised())


def test_every_adapter_has_a_gradient_with_and_without_checkpointing(folder: str) -> None:
    """All layers of attention and feed-forward, of the refiners too."""
    plain, saved = gradients(folder), gradients(folder, gradient_checkpointing=True)
    layers = {name.split(".lora_")[0] for name in plain}
    ends = [f"attention.{end}" for end in ("to_q", "to_k", "to_v", "to_out.0")]
    ends += [f"feed_forward.w{n}" for n in (1, 2, 3)]
    blocks = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
    assert layers == {f"{block}.{end}" for block in blocks for end in ends}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in plain.values())
    assert plain.keys() == saved.keys()
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_a_lora_is_saved_for_the_stock_pipeline(folder: str, tmp_path: Path) -> None:
    backbone = ZImage(folder, lora=LoRA(4, alpha=8)).eval()
    with torch.no_grad():
        for parameter in trained(backbone.policy.denoiser).values():
            parameter.normal_(std=0.1)
    stock = load_stock(Path(folder))
    arguments: dict[str, Any] = {"height": 32, "width": 32, "guidance_scale": 0.0}
    arguments |= {"num_inference_steps": 4, "output_type": "pt"}
    seeds = torch.tensor([5])
    start = draws.normal(seeds, (16, 8, 8), "start")
    untouched = stock(["a cat"], latents=start, **arguments).images
    stock.load_lora_weights(str(backbone.save(tmp_path)))
    theirs = stock(["a cat"], latents=start, **arguments).images
    how = Sampling(4, 0.0, height=32, width=32)
    ours = (sample(backbone, ["a cat"], seeds, how) + 1) / 2
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs - untouched).abs().max() > 1e-3


class Oracle:
    """The forward of a transformer that knows the latents of every image.

    Args:
        latents: (C, H, W).
        sign: 1 for image - noise, as Z-Image's; -1 for noise - image.
        time: Whether it is given 1 - sigma, as Z-Image's, or sigma.
    """

    def __init__(self, latents: Tensor, sign: float = 1.0, time: str = "1 - sigma") -> None:
        self.latents, self.sign, self.time = latents[:, None], sign, time

    def __call__(self, x: list[Tensor], t: Tensor, *rest: Any, **named: Any) -> tuple[list[Tensor]]:
        """Return what it predicts of each image."""
        sigma = (1 - t if self.time == "1 - sigma" else t).clamp(0.05, 1)
        images = zip(x, sigma, strict=True)
        return ([self.sign * (self.latents - one) / level for one, level in images],)


def test_a_wrong_sign_and_a_wrong_time_are_recognised(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = ZImage(folder, reference="none")
    pairs = DiffusionDPO(backbone, AdamW(1e-3), beta=10.0).form_pairs(image_pairs(4))
    pairs = pairs._replace(latents=pairs.latents[:1, :1].expand_as(pairs.latents))
    known = pairs.latents[0, 0]
    check_base(backbone, pairs)  # random weights may be trained

    def predict_by(oracle: Oracle) -> None:
        monkeypatch.setattr(backbone.policy.denoiser, "forward", oracle)

    predict_by(Oracle(known))
    check_base(backbone, pairs)
    assert base_errors(backbone, pairs).shares["velocity"] < 1e-6
    predict_by(Oracle(known, sign=-1.0))
    with pytest.raises(InputError, match="read as negative velocity: negate the prediction in `pr"):
        check_base(backbone, pairs)
    predict_by(Oracle(known, time="sigma"))
    with pytest.raises(InputError, match="given a wrong time.* with the time of 1 - t: correct"):
        check_base(backbone, pairs)


# Refusals -------------------------------------------------------------------------------------


def test_the_turbo_model_is_refused_before_its_weights_are_read(turbo: str, tmp_path: Path) -> None:
    message = "is distilled to sample in few steps .its scheduler has shift 3.*backbone.distilled"
    with pytest.raises(InputError, match=message):
        ZImage(turbo)
    shutil.copytree(turbo, tmp_path / "without")
    for file in (tmp_path / "without").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match=message):
        ZImage(str(tmp_path / "without"))
    assert ZImage(turbo, distilled=True).process.shift((16, 8, 8)) == 3.0


def test_pipelines_of_other_families_are_refused(folder: str, tiny_sd3_folder: str) -> None:
    with pytest.raises(InputError, match="is a StableDiffusion3Pipeline and not a ZImagePipeline"):
        ZImage(tiny_sd3_folder)
    with pytest.raises(InputError, match="is a ZImagePipeline and not"):
        StableDiffusion3(folder)
    with pytest.raises(InputError, match="transformer of .* is a SD3Transformer2DModel"):
        ZImage(folder, denoiser=f"{tiny_sd3_folder}/transformer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cap_feat_dim": 24}, "has cap_feat_dim 24 where ZImage and its text encoders need 16"),
        ({"siglip_feat_dim": 8}, "has siglip_feat_dim 8 where ZImage"),
        ({"all_patch_size": (4,)}, "has tokens of .*4.* latents, and ZImage has squares of 2"),
        ({"in_channels": 4}, "16 latent channels and the denoiser 4"),
    ],
)
def test_transformers_that_do_not_fit_are_refused(
    folder: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tiny_z_image_transformer(**change).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        ZImage(folder, denoiser=str(tmp_path))


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = tiny_z_image_pipeline(tmp_path, template=None)
    with pytest.raises(InputError, match="has no chat template"):
        ZImage(str(folder))


def test_prompts_beyond_the_encoders_length_are_counted(backbone: ZImage) -> None:
    """512 tokens, of which the template takes some."""
    template = len(backbone.embed([""]).row(0)["hidden"])
    assert 0 < template < 40
    assert backbone.fits_context("a" * (512 - template))
    assert not backbone.fits_context("a" * (513 - template))
    assert backbone.embed(["a" * 600]).ragged("hidden").lengths == (512,)


@pytest.mark.parametrize(("side", "how"), [(36, "a multiple of 8"), (1032, "up to 1024")])
def test_sizes_that_are_no_whole_tokens_are_refused(backbone: ZImage, side: int, how: str) -> None:
    with pytest.raises(InputError, match=how):
        backbone.posterior(torch.zeros(1, 3, side, 32))
    with pytest.raises(InputError, match=how):
        sample(backbone, ["a"], torch.tensor([1]), Sampling(steps=1, width=side))
    prompt, level = backbone.embed([""]), torch.ones(1, dtype=torch.float64)
    with pytest.raises(InputError, match=how):
        backbone.predict(torch.zeros(1, 16, 8, side // 4), level, prompt)


def test_prompts_of_another_family_and_a_guidance_scale_are_refused(backbone: ZImage) -> None:
    latents, t = noised()
    with pytest.raises(InputError, match="`hidden` has rows of one length"):
        backbone.predict(latents, t, Prompt({"hidden": torch.zeros(2, 77, 16)}))
    prompt = backbone.embed(TEXTS[:2]).replace(guidance=torch.ones(2))
    with pytest.raises(InputError, match="ZImage is not conditioned on"):
        backbone.predict(latents, t, prompt)
