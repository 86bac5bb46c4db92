"""Latent consistency models against the stock pipeline, and their teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from torch import Tensor

from lit_prefopt.backbones import LatentConsistency, LoRA, StableDiffusion, trained
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.processes.settings import Sampling
from tests.helpers.tiny import tiny_lcm, tiny_pipeline

LATENTS = (4, 8, 8)


@pytest.fixture
def lcm(tiny_lcm_folder: str, tiny_folder: str) -> LatentConsistency:
    """A full fine-tune with a teacher."""
    return LatentConsistency(tiny_lcm_folder, teacher=tiny_folder)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_images_are_the_stock_pipelines(prediction: str, steps: int, tmp_path: Path) -> None:
    """The stock pipeline draws noise of its own between steps; it is handed ours instead."""
    folder = tiny_lcm(tmp_path / "lcm", prediction)
    stock = LatentConsistencyModelPipeline.from_pretrained(folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    seeds = torch.tensor([5])

    def our_noise(pipe: Any, number: int, t: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        if number + 1 == steps:
            return {}
        noise = draws.normal(seeds, LATENTS, f"step {number}")
        following = pipe.scheduler.timesteps[number + 1 : number + 2]
        return {"latents": pipe.scheduler.add_noise(kept["denoised"], noise, following)}

    theirs = stock(
        "a cat",
        num_inference_steps=steps,
        guidance_scale=3.0,
        latents=draws.normal(seeds, LATENTS, "start"),
        callback_on_step_end=our_noise,
        callback_on_step_end_tensor_inputs=["latents", "denoised"],
        output_type="pt",
    ).images
    how = Sampling(steps=steps, guidance=3.0)
    ours = sample(LatentConsistency(str(folder)), ["a cat"], seeds, how)
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=1e-5, rtol=1e-5)


def test_an_image_does_not_depend_on_its_batch(lcm: LatentConsistency) -> None:
    texts, seeds = ["a cat", "two dogs", "the sea"], torch.tensor([1, 2, 3])
    together = sample(lcm, texts, seeds, Sampling(steps=4, batch_size=3))
    alone = sample(lcm, texts[1:2], seeds[1:2], Sampling(steps=4))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_the_teacher_is_frozen_and_nobody_elses(tiny_lcm_folder: str, tiny_folder: str) -> None:
    lcm = LatentConsistency(
        tiny_lcm_folder, teacher=f"{tiny_folder}/unet", lora=LoRA(4), dtype="bfloat16"
    )
    lcm.train()
    assert not lcm.teacher.training
    assert {p.dtype for p in lcm.teacher.parameters()} == {torch.bfloat16}
    assert not any(name.startswith("teacher") for name in trained(lcm))
    assert trained(lcm)
    lcm.freeze()
    assert lcm.teacher is None


def test_a_step_of_the_teacher_in_double_precision(lcm: LatentConsistency) -> None:
    """What it takes for noise and what it takes for clean are guided alike, in the LCMs' form."""
    t, t_next = torch.tensor([999, 19]), torch.tensor([979, 0])
    latents, prompt = torch.randn(2, *LATENTS), lcm.embed(["a cat", "the sea"])
    w = torch.tensor([7.0, 0.5])
    told = prompt.replace(guidance=w + 1)
    ours = lcm.teacher_step(latents, t, t_next, told)
    with torch.no_grad():
        cond, uncond = (
            lcm.teacher(latents, t, encoder_hidden_states=hidden).sample.double()
            for hidden in (prompt["hidden"], lcm.embed(["", ""])["hidden"])
        )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    here, there = (abar[x].view(-1, 1, 1, 1) for x in (t, t_next))
    clean_cond, clean_uncond = (
        (latents.double() - (1 - here).sqrt() * eps) / here.sqrt() for eps in (cond, uncond)
    )
    scale = w.double().view(-1, 1, 1, 1)
    clean = clean_cond + scale * (clean_cond - clean_uncond)
    noise = cond + scale * (cond - uncond)
    expected = there.sqrt() * clean + (1 - there).sqrt() * noise
    torch.testing.assert_close(ours.double(), expected, atol=1e-3, rtol=1e-4)
    assert not ours.requires_grad


def test_a_student_starts_as_its_teacher(tiny_folder: str) -> None:
    student = LatentConsistency(tiny_folder, teacher=tiny_folder, guidance_width=16)
    inputs = torch.randn(2, *LATENTS), torch.tensor([19, 999])
    prompt = student.embed(["a cat", "rain"])
    told = prompt.replace(guidance=torch.tensor([1.0, 9.0]))
    said = student.predict(*inputs, told)
    theirs = StableDiffusion(tiny_folder, reference="none").predict(*inputs, prompt)
    assert torch.equal(said, theirs)
    with student.as_reference():
        assert torch.equal(student.predict(*inputs, told), theirs)
    said.sum().backward()
    assert student.policy.denoiser.time_embedding.cond_proj.weight.grad.abs().sum() > 0
    frozen = student.policy.frozen.time_embedding.cond_proj.weight
    assert not frozen.requires_grad


def test_a_student_is_saved_as_a_unet_that_takes_guidance(tiny_folder: str, tmp_path: Path) -> None:
    student = LatentConsistency(tiny_folder, guidance_width=16, reference="none")
    with torch.no_grad():
        student.policy.denoiser.time_embedding.cond_proj.weight.normal_()
    student.save(tmp_path)
    again = LatentConsistency(tiny_folder, denoiser=str(tmp_path / "unet"), reference="none")
    inputs = torch.randn(1, *LATENTS), torch.tensor([5]), student.embed(["a"])
    assert torch.equal(student.predict(*inputs), again.predict(*inputs))


def test_what_is_no_lcm_is_refused(
    tiny_folder: str, tiny_lcm_folder: str, tiny_xl_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no guidance embedding.*guidance_width 256"):
        LatentConsistency(tiny_folder)
    with pytest.raises(InputError, match="guidance embedding already"):
        LatentConsistency(tiny_lcm_folder, guidance_width=16)
    with pytest.raises(InputError, match="leave `--backbone.lora` out"):
        LatentConsistency(tiny_folder, guidance_width=16, lora=LoRA(4))
    with pytest.raises(InputError, match="guidance-distilled model itself"):
        LatentConsistency(tiny_lcm_folder, teacher=tiny_lcm_folder)
    with pytest.raises(InputError, match="belongs to another family"):
        LatentConsistency(tiny_lcm_folder, teacher=f"{tiny_xl_folder}/unet")
    with pytest.raises(InputError, match="The reference .* has no guidance embedding"):
        LatentConsistency(tiny_lcm_folder, reference=tiny_folder)
    other = tiny_pipeline(tmp_path / "v", "v_prediction")
    with pytest.raises(InputError, match="predicts v_prediction and .* epsilon"):
        LatentConsistency(tiny_lcm_folder, teacher=str(other))
    lcm = LatentConsistency(tiny_lcm_folder)
    prompt = lcm.embed(["a"]).replace(guidance=torch.ones(1))
    with pytest.raises(InputError, match="--backbone.teacher"):
        lcm.teacher_step(torch.zeros(1, *LATENTS), torch.tensor([19]), torch.tensor([0]), prompt)
