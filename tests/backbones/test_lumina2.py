"""Lumina Image 2.0 against the stock diffusers pipeline: what is particular to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Lumina2Pipeline
from torch import Tensor

from lit_prefopt.backbones import LoRA, Lumina2, ZImage
from lit_prefopt.backbones.guidance import linear
from lit_prefopt.backbones.lumina2 import with_row_lengths
from lit_prefopt.cache_checks import check_latents
from lit_prefopt.conditioning import Prompt
from lit_prefopt.data.latents.manifest import LatentSet
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.processes.settings import Sampling
from tests.families.cases import load_stock
from tests.helpers.caching import cache
from tests.helpers.flow_backbones import adapter_gradients, changed, noised
from tests.helpers.tiny_lumina2 import tiny_lumina2_pipeline, tiny_lumina2_transformer

TEXTS = ["a red cat", "Ünder a tree", "dog " * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_lumina2_pipeline(tmp_path_factory.mktemp("lumina2")))


@pytest.fixture(scope="module")
def backbone(folder: str) -> Lumina2:
    return Lumina2(folder, reference="none").eval()


@pytest.fixture(scope="module")
def stock(folder: str) -> Lumina2Pipeline:
    return load_stock(Path(folder))


def both(
    backbone: Lumina2, stock: Lumina2Pipeline, how: Sampling, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return our images of two prompts and those of the stock pipeline, in [0, 1]."""
    seeds = torch.tensor([5, 6])
    ours = (sample(backbone, TEXTS[:2], seeds, how) + 1) / 2
    latents = draws.normal(seeds, backbone.sampling_shape(how), "start")
    size = {"height": how.height, "width": how.width, "num_inference_steps": how.steps}
    scale = {"guidance_scale": how.guidance, "output_type": "pt"}
    return ours, stock(TEXTS[:2], latents=latents, **size, **scale, **options).images


@torch.no_grad()
@pytest.mark.parametrize("system_prompt", [None, "Draw!", ""])
def test_prompts_are_the_stock_pipelines(
    system_prompt: str | None, folder: str, stock: Lumina2Pipeline
) -> None:
    """Rows of own lengths after the system prompt; the empty prompt has none."""
    backbone = Lumina2(folder, reference="none", system_prompt=system_prompt)
    theirs, mask, empty, empty_mask = stock.encode_prompt(TEXTS, system_prompt=system_prompt)
    ours = backbone.embed(TEXTS).ragged("hidden")
    assert ours.lengths == tuple(mask.sum(1).tolist())
    assert len({*ours.lengths}) == 3
    for mine, other, kept in zip(ours, theirs, mask.bool(), strict=True):
        assert torch.equal(mine, other[kept])
    (own,) = backbone.empty.ragged("hidden")
    torch.testing.assert_close(own, empty[0][empty_mask[0].bool()], atol=1e-5, rtol=0)
    assert len(own) == 1  # the token of the beginning
    for text, row in zip(TEXTS, ours, strict=True):
        (alone,) = backbone.embed([text]).ragged("hidden")
        torch.testing.assert_close(alone, row, atol=1e-5, rtol=0)


def test_images_are_those_of_an_unchanged_pipeline(
    backbone: Lumina2, stock: Lumina2Pipeline
) -> None:
    """Nothing depends on the states of padding, which ours has not."""
    how = Sampling(4, 4.0, batch_size=2, height=64, width=64)
    ours, theirs = both(backbone, stock, how)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("share", "steps"), [(0.25, 4), (0.5, 5), (0.0, 2)])
def test_guidance_of_the_first_steps(
    share: float, steps: int, backbone: Lumina2, stock: Lumina2Pipeline
) -> None:
    how = Sampling(steps, 4.0, batch_size=2, height=64, width=64, guided=share)
    assert [how.guides(n) for n in range(steps)].count(True) == int(share * steps)
    ours, theirs = both(backbone, stock, how, cfg_trunc_ratio=share)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    _, everywhere = both(backbone, stock, how)
    assert (theirs - everywhere).abs().max() > 1e-4


def test_guidance_that_is_not_rescaled(folder: str, stock: Lumina2Pipeline) -> None:
    backbone = Lumina2(folder, reference="none", rescale_guidance=False).eval()
    how = Sampling(3, 4.0, batch_size=2, height=64, width=64)
    ours, theirs = both(backbone, stock, how, cfg_normalization=False)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    _, rescaled = both(backbone, stock, how)
    assert (theirs - rescaled).abs().max() > 1e-4


def test_rows_keep_the_length_of_the_prompted_prediction() -> None:
    one, other = torch.randn(2, 3, 4, 4, 5)
    guided = with_row_lengths(one, other, 4.0)
    torch.testing.assert_close(guided.norm(dim=-1), one.norm(dim=-1))
    parallel = torch.cosine_similarity(guided, linear(one, other, 4.0), dim=-1)
    torch.testing.assert_close(parallel, torch.ones_like(parallel))


@torch.no_grad()
def test_latents_of_images_are_those_of_the_stock_vae(
    backbone: Lumina2, stock: Lumina2Pipeline
) -> None:
    """There is no img2img pipeline: what the stock decoder undoes."""
    images = torch.rand(2, 3, 64, 80) * 2 - 1
    means, _ = backbone.encode(images)
    config = stock.vae.config
    undone = means / config.scaling_factor + config.shift_factor
    torch.testing.assert_close(undone, stock.vae.encode(images).latent_dist.mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [4, 7, 50])
@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_levels_are_those_of_the_stock_pipeline(
    backbone: Lumina2, stock: Lumina2Pipeline, size: tuple[int, int], steps: int
) -> None:
    height, width = size
    stock(["a"], width, height, steps, guidance_scale=1.0, output_type="latent")
    how = Sampling(steps, 1.0, height=height, width=width)
    levels = backbone.process.sampler(how, backbone.sampling_shape(how)).levels
    assert torch.equal(levels.float(), stock.scheduler.sigmas)


def test_levels_of_the_published_shift(backbone: Lumina2) -> None:
    found = backbone.process.sampler(Sampling(4, 1.0), (16, 8, 8)).levels
    known = torch.tensor([1, 18 / 19, 6 / 7, 2 / 3, 0]).double()
    torch.testing.assert_close(found, known, atol=1e-7, rtol=0)


@torch.no_grad()
def test_the_velocity_is_minus_the_stock_transformers(
    backbone: Lumina2, stock: Lumina2Pipeline
) -> None:
    """A prompt in a batch of longer ones has the prediction that it has alone, unpadded."""
    (latents, t), prompt = noised(3), backbone.embed(TEXTS)
    ours = backbone.predict(latents, t, prompt)
    for row in range(3):
        hidden = prompt.row(row)["hidden"][None]
        theirs = stock.transformer(
            latents[row : row + 1],
            torch.tensor([1 - t[row]], dtype=torch.float32),
            hidden,
            torch.ones(hidden.shape[:2], dtype=torch.int64),
        ).sample
        torch.testing.assert_close(ours[row], -theirs[0], atol=1e-5, rtol=0)


def test_every_adapter_has_a_gradient(folder: str) -> None:
    """All layers of attention and feed-forward, of the refiners too."""
    found = adapter_gradients(Lumina2(folder, lora=LoRA(4)), TEXTS[:2], *noised())
    layers = {name.split(".lora_")[0] for name in found}
    ends = [f"attn.{end}" for end in ("to_q", "to_k", "to_v", "to_out.0")]
    ends += [f"feed_forward.linear_{n}" for n in (1, 2, 3)]
    blocks = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
    assert layers == {f"{block}.{end}" for block in blocks for end in ends}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


# Refusals -------------------------------------------------------------------------------------


def test_pipelines_of_other_families_are_refused(folder: str, tiny_sd3_folder: str) -> None:
    with pytest.raises(InputError, match="is a StableDiffusion3Pipeline and not a Lumina2Pipeline"):
        Lumina2(tiny_sd3_folder)
    with pytest.raises(InputError, match="is a Lumina2Pipeline and not"):
        ZImage(folder)
    with pytest.raises(InputError, match="transformer of .* is a SD3Transformer2DModel"):
        Lumina2(folder, denoiser=f"{tiny_sd3_folder}/transformer")


def test_the_former_name_of_the_pipeline_is_known(folder: str, tmp_path: Path) -> None:
    older = changed(folder, tmp_path / "older", _class_name="Lumina2Text2ImgPipeline")
    assert Lumina2(older, reference="none", encoders=False).process.shift((16, 8, 8)) == 6.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cap_feat_dim": 24}, "has cap_feat_dim 24 where Lumina2 and its text encoders need 16"),
        ({"patch_size": 4}, "has patch_size 4 where Lumina2"),
        ({"in_channels": 4}, "16 latent channels and the denoiser 4"),
        ({"axes_lens": (200, 64, 64)}, "positions for 199 tokens of a prompt: set .*text_tokens"),
    ],
)
def test_transformers_that_do_not_fit_are_refused(
    folder: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tiny_lumina2_transformer(**change).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        Lumina2(folder, denoiser=str(tmp_path))


def test_a_shift_by_the_resolution_is_refused(folder: str, tmp_path: Path) -> None:
    """The stock pipeline would compute it from the number of channels."""
    file = "scheduler/scheduler_config.json"
    dynamic = changed(folder, tmp_path / "dynamic", file, use_dynamic_shifting=True)
    with pytest.raises(InputError, match="use_dynamic_shifting, a shift by the resolution"):
        Lumina2(dynamic)


def test_prompts_beyond_the_encoders_length_are_counted(backbone: Lumina2) -> None:
    """256 tokens, of which the system prompt takes most of the tiny tokenizer's."""
    before = backbone.embed(["a"]).ragged("hidden").lengths[0] - 1
    assert 0 < before < 256
    assert backbone.fits_context("a" * (256 - before))
    assert not backbone.fits_context("a" * (257 - before))
    assert backbone.embed(["a" * 600]).ragged("hidden").lengths == (256,)


def test_a_cache_of_other_prompts_is_refused(
    folder: str, backbone: Lumina2, shards: str, tmp_path: Path
) -> None:
    made = cache(backbone, shards, tmp_path / "cache", resolution=64)
    latents = LatentSet.from_shards(read_index(made))
    check_latents(Lumina2(folder, reference="none", encoders=False), latents)
    for name, value in {"system_prompt": "Draw!", "text_tokens": 255}.items():
        other = Lumina2(folder, reference="none", encoders=False, **{name: value})
        with pytest.raises(InputError, match=rf"cached for another model \(.*{name[-6:]}"):
            check_latents(other, latents)


@pytest.mark.parametrize(("side", "how"), [(72, "a multiple of 16"), (2064, "up to 2048")])
def test_sizes_that_are_no_whole_tokens_are_refused(backbone: Lumina2, side: int, how: str) -> None:
    with pytest.raises(InputError, match=how):
        backbone.posterior(torch.zeros(1, 3, side, 64))
    with pytest.raises(InputError, match=how):
        sample(backbone, ["a"], torch.tensor([1]), Sampling(steps=1, width=side))
    prompt, level = backbone.embed([""]), torch.ones(1, dtype=torch.float64)
    with pytest.raises(InputError, match=how):
        backbone.predict(torch.zeros(1, 16, 8, side // 8), level, prompt)


def test_prompts_of_another_family_and_a_guidance_scale_are_refused(backbone: Lumina2) -> None:
    latents, t = noised()
    with pytest.raises(InputError, match="`hidden` has rows of one length"):
        backbone.predict(latents, t, Prompt({"hidden": torch.zeros(2, 77, 16)}))
    prompt = backbone.embed(TEXTS[:2]).replace(guidance=torch.ones(2))
    with pytest.raises(InputError, match="Lumina2 is not conditioned on"):
        backbone.predict(latents, t, prompt)
