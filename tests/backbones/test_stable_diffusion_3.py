"""Stable Diffusion 3 and 3.5 against the stock diffusers pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusion3, trained
from lit_prefopt.commands.export import export
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.families.stable_diffusion_3 import SD3
from lit_prefopt.generate.latent_cache import LatentCache
from lit_prefopt.processes.rectified_flow import RectifiedFlow
from lit_prefopt.processes.settings import LevelDraw, Sampling
from tests.helpers.flow_backbones import adapter_gradients, changed, noised
from tests.helpers.tiny import tiny_text_config, tiny_tokenizer
from tests.helpers.tiny_sd3 import load_stock_sd3, tiny_sd3_transformer

TEXTS = ["a red cat", "", "dog " * 30]


@pytest.fixture(scope="module", params=["sd3", "sd35", "without t5"])
def folder(
    request: pytest.FixtureRequest,
    tiny_sd3_folder: str,
    tiny_sd35_folder: str,
    tiny_sd35_without_t5_folder: str,
) -> str:
    folders = {"sd3": tiny_sd3_folder, "sd35": tiny_sd35_folder}
    return folders.get(request.param, tiny_sd35_without_t5_folder)


@pytest.fixture(scope="module")
def backbone(folder: str) -> StableDiffusion3:
    return StableDiffusion3(folder, reference="none").eval()


@pytest.fixture(scope="module")
def stock(folder: str) -> StableDiffusion3Pipeline:
    return load_stock_sd3(folder)


@torch.no_grad()
def test_prompts_are_the_stock_pipelines(
    backbone: StableDiffusion3, stock: StableDiffusion3Pipeline
) -> None:
    theirs, _, pooled, _ = stock.encode_prompt(
        TEXTS, TEXTS, TEXTS, do_classifier_free_guidance=False
    )
    ours = backbone.embed(TEXTS)
    assert ours["hidden"].shape == (3, 77 + 256, 64)
    assert torch.equal(ours["hidden"], theirs)
    assert torch.equal(ours["pooled"], pooled)
    assert (ours["hidden"][:, 77:] == 0).all() == (stock.text_encoder_3 is None)


@torch.no_grad()
def test_latents_are_shifted_and_scaled(
    backbone: StableDiffusion3, stock: StableDiffusion3Pipeline
) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, deviation = backbone.encode(images)
    posterior, config = stock.vae.encode(images).latent_dist, stock.vae.config
    torch.testing.assert_close(mean, (posterior.mean - config.shift_factor) * config.scaling_factor)
    torch.testing.assert_close(deviation, posterior.std * config.scaling_factor)
    rebuilt = stock.vae.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(backbone.decode(mean), rebuilt, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prediction_is_the_stock_transformers(
    backbone: StableDiffusion3, stock: StableDiffusion3Pipeline
) -> None:
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    theirs = stock.transformer(
        latents,
        timestep=torch.tensor([200.0, 1000.0]),
        encoder_hidden_states=prompt["hidden"],
        pooled_projections=prompt["pooled"],
    ).sample
    assert torch.equal(backbone.predict(latents, t, prompt), theirs)


def test_time_is_float32_in_any_precision(tiny_sd35_folder: str) -> None:
    backbone = StableDiffusion3(tiny_sd35_folder, lora=LoRA(2), dtype="bfloat16").eval()
    seen: dict[str, Any] = {}
    backbone.policy.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    latents, _ = noised()
    level = torch.tensor(0.857692, dtype=torch.float32).double().expand(2)
    backbone.predict(latents, level, backbone.embed(TEXTS[:2]))
    assert torch.equal(seen["timestep"], torch.full((2,), 857.692))
    floats = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    assert {seen[name].dtype for name in floats} == {torch.bfloat16}


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_images_are_the_stock_pipelines(
    backbone: StableDiffusion3, stock: StableDiffusion3Pipeline, guidance: float
) -> None:
    seeds = torch.tensor([5, 6])
    how = Sampling(steps=4, guidance=guidance, height=32, width=48)
    theirs = stock(
        TEXTS[:2],
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=draws.normal(seeds, (16, 8, 12), "start"),
        output_type="pt",
    ).images
    ours = (sample(backbone, TEXTS[:2], seeds, how) + 1) / 2
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_its_process_is_a_rectified_flow(tiny_sd3_folder: str) -> None:
    draw = LevelDraw("logit-normal", mean=0.5)
    process = StableDiffusion3(tiny_sd3_folder, reference="none", levels=draw).process
    assert isinstance(process, RectifiedFlow)
    assert (process.levels, process.shift((16, 8, 8))) == (draw, 3.0)


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["all weights", "lora"])
def test_the_reference_is_equal_before_the_first_step(
    tiny_sd35_folder: str, lora: LoRA | None
) -> None:
    backbone = StableDiffusion3(tiny_sd35_folder, lora=lora)
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    with backbone.as_reference():
        reference = backbone.predict(latents, t, prompt)
    assert not reference.requires_grad
    assert torch.equal(backbone.predict(latents, t, prompt), reference)


def test_the_adapter_has_the_attentions_of_image_and_text(tiny_sd35_folder: str) -> None:
    backbone = StableDiffusion3(tiny_sd35_folder, lora=LoRA(4))
    layers = {name.split(".lora_")[0] for name in trained(backbone.policy.denoiser)}
    ends = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    expected = {f"transformer_blocks.{i}.attn.{end}" for i in (0, 1) for end in ends}
    # the last block has no text beyond its attention, and the second attention of 3.5 is left out
    assert layers == expected | {"transformer_blocks.0.attn.to_add_out"}
    own = StableDiffusion3(tiny_sd35_folder, lora=LoRA(4, targets=["attn2.to_q"]))
    assert {name.split(".lora_")[0] for name in trained(own.policy.denoiser)} == {
        "transformer_blocks.0.attn2.to_q"
    }


def gradients(folder: str, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of a LoRA that is not the identity."""
    backbone = StableDiffusion3(folder, lora=LoRA(4), **options)
    return adapter_gradients(backbone, TEXTS[:2], *noised())


def test_gradients_are_finite_and_equal_with_checkpointing(tiny_sd35_folder: str) -> None:
    plain = gradients(tiny_sd35_folder)
    assert all(gradient.isfinite().all() for gradient in plain.values())
    still = {name.split(".lora_")[0] for name, x in plain.items() if not x.any()}
    # nothing follows the last block's text, so that its queries change no image
    assert still == {"transformer_blocks.1.attn.add_q_proj"}
    saved = gradients(tiny_sd35_folder, gradient_checkpointing=True)
    assert plain.keys() == saved.keys()
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_a_lora_is_saved_for_the_stock_pipeline(tiny_sd35_folder: str, tmp_path: Path) -> None:
    backbone = StableDiffusion3(tiny_sd35_folder, lora=LoRA(4, alpha=8)).eval()
    with torch.no_grad():
        for parameter in trained(backbone.policy.denoiser).values():
            parameter.normal_(std=0.1)
    file = backbone.save(tmp_path)
    assert all(key.startswith("transformer.") for key in load_file(file))
    stock = load_stock_sd3(tiny_sd35_folder)
    stock.load_lora_weights(str(file))
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    with torch.no_grad():
        theirs = stock.transformer(
            latents, prompt["hidden"], prompt["pooled"], (1000 * t).float()
        ).sample
        ours = backbone.predict(latents, t, prompt)
        untouched = StableDiffusion3(tiny_sd35_folder).predict(latents, t, prompt)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert (ours - untouched).abs().max() > 1e-3
    started = StableDiffusion3(tiny_sd35_folder, start_lora=str(file)).eval()
    torch.testing.assert_close(started.predict(latents, t, prompt), ours, atol=1e-5, rtol=1e-5)


def test_a_transformer_is_saved_and_is_a_reference(tiny_sd35_folder: str, tmp_path: Path) -> None:
    backbone = StableDiffusion3(tiny_sd35_folder, reference="none")
    with torch.no_grad():
        backbone.policy.denoiser.proj_out.bias.add_(1.0)
    assert backbone.save(tmp_path) == tmp_path / "transformer"
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    ours = backbone.policy.denoiser.state_dict()
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)
    other = StableDiffusion3(tiny_sd35_folder, reference=str(tmp_path / "transformer"))
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    with other.as_reference(), torch.no_grad():
        assert torch.equal(other.predict(latents, t, prompt), backbone.predict(latents, t, prompt))


# Without T5 -----------------------------------------------------------------------------------


def test_without_t5_its_tokens_are_zeros(
    tiny_sd35_folder: str, tiny_sd35_without_t5_folder: str
) -> None:
    left_out = StableDiffusion3(tiny_sd35_folder, reference="none", t5=False)
    saved_without = StableDiffusion3(tiny_sd35_without_t5_folder, reference="none")
    ours, theirs = (one.embed(TEXTS) for one in (left_out, saved_without))
    assert torch.equal(ours["hidden"], theirs["hidden"])
    assert sorted(left_out.encoders) == ["text_encoder", "text_encoder_2", "vae"]
    with_t5 = StableDiffusion3(tiny_sd35_folder, reference="none")
    assert not left_out.latent_settings()["t5"]
    assert not saved_without.latent_settings()["t5"]
    assert with_t5.latent_settings()["t5"]


def test_a_pipeline_without_t5_is_reported(
    tiny_sd35_without_t5_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        StableDiffusion3(tiny_sd35_without_t5_folder, reference="none")
    assert "has no text_encoder_3: prompts are embedded without it" in caplog.text


def test_a_t5_that_is_not_on_disk_is_reported(tiny_sd35_folder: str, tmp_path: Path) -> None:
    partial = changed(tiny_sd35_folder, tmp_path / "partial")
    shutil.rmtree(tmp_path / "partial" / "text_encoder_3")
    with pytest.raises(InputError, match="has no text_encoder_3 .* `--backbone.t5 false`"):
        StableDiffusion3(partial)
    backbone = StableDiffusion3(partial, reference="none", t5=False)
    assert (backbone.embed(TEXTS)["hidden"][:, 77:] == 0).all()


def test_the_number_of_t5s_tokens(tiny_sd35_folder: str) -> None:
    whole = StableDiffusion3(tiny_sd35_folder, reference="none")
    short = StableDiffusion3(tiny_sd35_folder, reference="none", text_tokens=40)
    assert short.embed([""])["hidden"].shape == (1, 77 + 40, 64)
    assert (whole.latent_settings()["tokens"], short.latent_settings()["tokens"]) == (333, 117)
    # a letter is a token; beside it stand T5's word mark and end, and CLIP's start and end
    assert [whole.fits_context("a" * n) for n in (75, 76)] == [True, False]
    assert [short.fits_context("a" * n) for n in (38, 39)] == [True, False]


# Single files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The single file of a folder."""
    out = str(tmp_path_factory.mktemp("file") / "whole.safetensors")
    export(folder, "single-file", out)
    return out


def states_equal(one: StableDiffusion3, other: StableDiffusion3) -> bool:
    """Whether all weights are equal."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_single_file_is_the_model_of_its_folder(
    backbone: StableDiffusion3, folder: str, file: str
) -> None:
    single = StableDiffusion3(file, config=folder, reference="none")
    assert states_equal(single, backbone)
    prompts = (one.embed(TEXTS) for one in (single, backbone))
    assert len({prompt["hidden"].sum().item() for prompt in prompts}) == 1


def test_encoders_that_a_file_lacks_come_from_its_configuration(
    backbone: StableDiffusion3, folder: str, file: str, tmp_path: Path
) -> None:
    """Files of 3.5 have no text encoders."""
    alone = {k: v for k, v in load_file(file).items() if k.startswith("model.diffusion_model.")}
    save_file(alone, tmp_path / "alone.safetensors")
    single = StableDiffusion3(str(tmp_path / "alone.safetensors"), config=folder, reference="none")
    assert states_equal(single, backbone)


def test_the_transformer_of_another_file(tiny_sd35_folder: str, tmp_path: Path) -> None:
    other = tiny_sd3_transformer(qk_norm="rms_norm", dual_attention_layers=(0,))
    other.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    for source in (tmp_path / "folder", file):
        backbone = StableDiffusion3(tiny_sd35_folder, denoiser=str(source), reference="none")
        ours = backbone.policy.denoiser.state_dict()
        assert all(torch.equal(ours[name], x) for name, x in other.state_dict().items())


# Refusals -------------------------------------------------------------------------------------


def test_pipelines_of_other_families_are_refused(
    tiny_sd3_folder: str, tiny_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a StableDiffusionPipeline and not a StableDiff.*3"):
        StableDiffusion3(tiny_folder)
    with pytest.raises(InputError, match="is a StableDiffusion3Pipeline and not"):
        StableDiffusion(tiny_sd3_folder)
    flux = changed(tiny_sd3_folder, tmp_path / "flux", _class_name="FluxPipeline")
    with pytest.raises(InputError, match="is a FluxPipeline and not"):
        StableDiffusion3(flux)
    with pytest.raises(InputError, match="transformer of .* is a UNet2DConditionModel"):
        StableDiffusion3(tiny_sd3_folder, denoiser=f"{tiny_folder}/unet")


@pytest.mark.parametrize(
    ("name", "value"),
    [("pooled_projection_dim", 40), ("joint_attention_dim", 80), ("out_channels", 8)],
)
def test_transformers_that_do_not_fit_are_refused(
    tiny_sd3_folder: str, tmp_path: Path, name: str, value: int
) -> None:
    tiny_sd3_transformer(**{name: value}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"has {name} {value} where StableDiffusion3"):
        StableDiffusion3(tiny_sd3_folder, denoiser=str(tmp_path))


def test_clips_that_are_too_wide_are_refused(
    tiny_sd35_without_t5_folder: str, tmp_path: Path
) -> None:
    tiny_sd3_transformer(joint_attention_dim=48).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="takes tokens of width 48 and its two CLIPs have 56"):
        StableDiffusion3(tiny_sd35_without_t5_folder, denoiser=str(tmp_path))


def test_sizes_that_are_no_whole_tokens_are_refused(tiny_sd3_folder: str) -> None:
    backbone = StableDiffusion3(tiny_sd3_folder, reference="none").eval()
    prompt = backbone.embed([""])
    level = torch.ones(1, dtype=torch.float64)
    for side, how in ((36, "a multiple of 8"), (104, "up to 96")):
        with pytest.raises(InputError, match=how):
            backbone.posterior(torch.zeros(1, 3, side, 32))
        with pytest.raises(InputError, match=how):
            sample(backbone, ["a"], torch.tensor([1]), Sampling(steps=1, width=side))
        with pytest.raises(InputError, match=how):
            backbone.predict(torch.zeros(1, 16, 8, side // 4), level, prompt)


@pytest.mark.parametrize(("side", "how"), [(36, "a multiple of 8"), (104, "up to 96")])
def test_caches_of_such_sizes_are_refused(
    tiny_sd3_folder: str, tmp_path: Path, side: int, how: str
) -> None:
    backbone = StableDiffusion3(tiny_sd3_folder, reference="none")
    with pytest.raises(InputError, match=how):
        LatentCache(backbone, str(tmp_path), resolution=side)


def test_the_cache_keeps_the_vaes_own_scale(tiny_sd3_folder: str) -> None:
    backbone = StableDiffusion3(tiny_sd3_folder, reference="none")
    mean, deviation = backbone.posterior(torch.rand(1, 3, 32, 32) * 2 - 1)
    assert torch.equal(backbone.scaled(mean), (mean - 0.0609) * 1.5305)
    assert torch.equal(backbone.scaled_deviation(deviation), deviation * 1.5305)
    settings = backbone.latent_settings()
    assert (settings["scaling_factor"], settings["shift_factor"]) == (1.5305, 0.0609)
    assert settings["text"] == {"hidden": 64, "pooled": 36}


def test_a_guidance_scale_in_the_prompts_is_refused(tiny_sd3_folder: str) -> None:
    backbone = StableDiffusion3(tiny_sd3_folder, reference="none")
    (latents, t), prompt = noised(), backbone.embed(TEXTS[:2])
    with pytest.raises(InputError, match="StableDiffusion3 is not conditioned on"):
        backbone.predict(latents, t, prompt.replace(guidance=torch.ones(2)))


def test_prompts_of_another_family_are_refused(tiny_sd3_folder: str) -> None:
    backbone = StableDiffusion3(tiny_sd3_folder, reference="none")
    with pytest.raises(InputError, match="pooled"):
        backbone.predict(*noised(), Prompt({"hidden": torch.zeros(2, 77, 64)}))


def test_a_tokenizer_without_its_vocabulary_is_refused(
    tiny_sd3_folder: str, tmp_path: Path
) -> None:
    broken = changed(tiny_sd3_folder, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "tokenizer")
    small = tiny_tokenizer(tmp_path / "made")
    small.add_tokens([f"<extra{i}>" for i in range(20)])
    small.save_pretrained(tmp_path / "broken" / "tokenizer")
    assert len(small) > tiny_text_config(small).vocab_size - 20
    with pytest.raises(InputError, match="A tokenizer of .* has"):
        StableDiffusion3(broken)


def test_frozen_for_inference(tiny_sd35_folder: str) -> None:
    backbone = StableDiffusion3(tiny_sd35_folder, dtype="bfloat16")
    backbone.freeze()
    assert not backbone.has_reference
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in backbone.parameters())


def test_its_components_are_its_familys(tiny_sd35_folder: str) -> None:
    backbone = StableDiffusion3(tiny_sd35_folder, reference="none", encoders=False)
    assert not backbone.has_encoders
    assert backbone.encoders == {}
    assert type(backbone.policy.denoiser).__name__ == SD3.denoiser.class_name
    assert {*StableDiffusion3.ENCODERS} == {part.name for part in SD3.encoders}
