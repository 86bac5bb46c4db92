"""Starting from an existing LoRA: it belongs to the policy and to the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from lit_prefopt import load
from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_prefopt.backbones.unet import UNetBackbone
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.batches import image_pairs


def made(backbone: UNetBackbone, folder: Path) -> str:
    """Save a LoRA with random weights and return its file."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return str(backbone.save(folder))


@pytest.fixture(params=["1.x", "sdxl"])
def start(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_folder: str, tiny_xl_folder: str
) -> tuple[type[UNetBackbone], str, str]:
    """A family, its checkpoint, and a LoRA for it."""
    family, folder = {
        "1.x": (StableDiffusion, tiny_folder),
        "sdxl": (StableDiffusionXL, tiny_xl_folder),
    }[request.param]
    return family, folder, made(family(folder, lora=LoRA(3, alpha=6)), tmp_path / "start")


@pytest.mark.parametrize("lora", [None, LoRA(4)], ids=["full", "lora"])
def test_policy_and_reference_start_from_it(
    start: tuple[type[UNetBackbone], str, str], lora: LoRA | None
) -> None:
    family, folder, file = start
    stock = {StableDiffusion: StableDiffusionPipeline, StableDiffusionXL: StableDiffusionXLPipeline}
    pipeline = stock[family].from_pretrained(folder)
    pipeline.load_lora_weights(file)
    backbone = family(folder, lora=lora, start_lora=file)
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=10.0)
    pairs = module.form_pairs(image_pairs())
    noised = module.add_noise(pairs)
    told = backbone.denoiser_kwargs(noised.prompt, noised.latents)
    theirs = pipeline.unet(noised.latents, noised.t_per_side, **told).sample
    ours = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    with backbone.as_reference():
        reference = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
    assert torch.equal(reference, ours)
    assert (module.log_ratios(pairs).values == 0).all()


def test_a_resumed_run_keeps_its_reference(
    recipe: list[str], tmp_path: Path, tiny_folder: str
) -> None:
    """Other projects load the starting adapter a second time into what was trained from it."""
    file = made(StableDiffusion(tiny_folder, lora=LoRA(3)), tmp_path / "start")
    options = ["--backbone.start_lora", file, "--backbone.lora.rank", "4"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    main(["fit", *recipe, *options, "--trainer.default_root_dir", whole])
    stop = ["--trainer.max_steps", "2", "--trainer.default_root_dir", parts]
    main(["fit", *recipe, *options, *stop])
    go_on = ["--trainer.default_root_dir", parts, "--ckpt_path", "last"]
    main(["fit", *recipe, *options, *go_on])
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([300])
    spoken = []
    for run in (whole, parts):
        backbone = load(Path(run) / "checkpoints" / "last.ckpt").eval().backbone
        prompt = backbone.embed(["a cat"])
        with torch.no_grad():
            policy = backbone.predict(*inputs, prompt)
            with backbone.as_reference():
                spoken.append((policy, backbone.predict(*inputs, prompt)))
    for ours, theirs in zip(*spoken, strict=True):
        assert torch.equal(ours, theirs)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipeline.load_lora_weights(file)
    with torch.no_grad():
        started = pipeline.unet(*inputs, prompt["hidden"]).sample
    torch.testing.assert_close(spoken[0][1], started, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(spoken[0][0], started, atol=1e-5)


def test_text_encoders_start_from_it_without_the_denoiser(tmp_path: Path, tiny_folder: str) -> None:
    """The prompts of a cache are those of the training, of which the cache reads no denoiser."""
    file = made(StableDiffusion(tiny_folder, lora=LoRA(3)), tmp_path / "start")
    layers, width = load_file(file), 32
    query = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_"
    layers |= {f"{query}A.weight": torch.randn(3, width), f"{query}B.weight": torch.randn(width, 3)}
    save_file(layers, file)
    plain = StableDiffusion(tiny_folder).embed(["a cat"])["hidden"]
    whole = StableDiffusion(tiny_folder, start_lora=file).embed(["a cat"])["hidden"]
    alone = StableDiffusion(tiny_folder, start_lora=file, denoiser_weights=False)
    assert torch.equal(alone.embed(["a cat"])["hidden"], whole)
    assert not torch.allclose(whole, plain, atol=1e-3)


def test_a_lora_of_another_family_is_refused(
    tmp_path: Path, tiny_folder: str, tiny_xl_folder: str
) -> None:
    file = made(StableDiffusionXL(tiny_xl_folder, lora=LoRA(3)), tmp_path / "start")
    with pytest.raises(InputError, match="LoRA of another model family"):
        StableDiffusion(tiny_folder, start_lora=file)


def test_a_training_adapter_is_in_policy_and_reference_and_not_in_the_export(
    recipe: list[str], tmp_path: Path, tiny_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = made(StableDiffusion(tiny_folder, lora=LoRA(3)), tmp_path / "adapter")
    with_it = StableDiffusion(tiny_folder, lora=LoRA(4), training_adapter=file)
    merged = StableDiffusion(tiny_folder, start_lora=file)
    weights = with_it.policy.reference_weights
    assert weights.keys() == merged.policy.reference_weights.keys()
    for name, weight in merged.policy.reference_weights.items():
        assert torch.equal(weights[name], weight)
    run = tmp_path / "run"
    main(
        ["fit", *recipe, "--backbone.training_adapter", file, "--backbone.lora.rank", "4"]
        + ["--trainer.default_root_dir", str(run)]
    )
    caplog.clear()
    main(["export", "--source", str(run), "--to", "pipeline", "--output", str(tmp_path / "whole")])
    assert f"trained with the adapter {file}, which is left out" in caplog.text
    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "whole").unet.state_dict()
    plain = StableDiffusionPipeline.from_pretrained(tiny_folder)
    plain.load_lora_weights(str(run / "weights"))
    plain.fuse_lora()
    plain.unload_lora_weights()
    for name, weight in plain.unet.state_dict().items():
        torch.testing.assert_close(exported[name], weight, atol=1e-6, rtol=0)


def test_a_training_adapter_without_a_lora_is_refused(tmp_path: Path, tiny_folder: str) -> None:
    file = made(StableDiffusion(tiny_folder, lora=LoRA(3)), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"would contain the `training_adapter`: train a LoRA"):
        StableDiffusion(tiny_folder, training_adapter=file)


def test_the_start_can_be_loaded_again(start: tuple[type[UNetBackbone], str, str]) -> None:
    """The denoiser of the checkpoint with the LoRA, frozen, to the last bit."""
    family, folder, file = start
    backbone = family(folder, start_lora=file)
    again = backbone.start.load()
    expected = backbone.policy.frozen.state_dict()
    assert expected.keys() == again.state_dict().keys()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert not any(weight.requires_grad for weight in again.parameters())
    assert not again.training
