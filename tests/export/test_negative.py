"""A negative model in guidance: its weights, its prediction, and evaluations with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lit_prefopt.backbones import LatentConsistency, LoRA, StableDiffusion, StableDiffusion3
from lit_prefopt.cli import main
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.diffusion.sampling import check_sampling, sample
from lit_prefopt.errors import InputError
from lit_prefopt.export.negative import attach_negative
from lit_prefopt.judges import Judge
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.weights.lora_files import read_lora
from tests.helpers.step_zero import moved

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = "denoiser", LAYER.replace(".", "_")
HOW = Sampling(steps=2, guidance=3.0, eta=0.0, batch_size=2)


class Mean(Judge):
    """Prefers bright images."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def lora(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of a LoRA that changes every layer that it adapts."""
    torch.manual_seed(0)
    backbone = moved(StableDiffusion(tiny_folder, lora=LoRA(4)), 0.3)
    return backbone.save(tmp_path_factory.mktemp("negative") / "weights")


@pytest.fixture
def policy(tiny_folder: str) -> StableDiffusion:
    """A model whose weights differ from its checkpoint's, to be sampled."""
    backbone = moved(StableDiffusion(tiny_folder), 0.02)
    backbone.freeze()
    return backbone


def weights(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("merge", [0.0, 0.3, 1.0])
def test_a_lora_is_added_between_policy_and_base(
    policy: StableDiffusion, tiny_folder: str, lora: Path, merge: float
) -> None:
    base = weights(StableDiffusion(tiny_folder).policy.denoiser)
    own = weights(policy.policy.denoiser)
    attach_negative(policy, str(lora), merge)
    found = weights(policy.policy.negative)
    changed = read_lora(lora).layers[FLAT].delta
    assert changed.abs().max() > 0.01
    for name in (f"{LAYER}.weight", "conv_in.weight"):
        expected = own[name] + merge * (base[name] - own[name])
        expected = expected + (changed if name.startswith(LAYER) else 0)
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)
    assert all(
        torch.equal(value, own[name]) for name, value in weights(policy.policy.denoiser).items()
    )
    assert not any(p.requires_grad for p in policy.parameters())


def test_of_a_whole_denoiser_the_base_is_subtracted(
    policy: StableDiffusion, tiny_folder: str, tmp_path: Path
) -> None:
    base = weights(StableDiffusion(tiny_folder).policy.denoiser)
    own = weights(policy.policy.denoiser)
    torch.manual_seed(3)
    other = StableDiffusion(tiny_folder)
    with torch.no_grad():
        for weight in other.policy.denoiser.parameters():
            weight += 0.05 * torch.randn_like(weight)
    other.save(tmp_path)
    attach_negative(policy, str(tmp_path / "unet"), 0.25)
    changed = weights(other.policy.denoiser)
    for name, value in weights(policy.policy.negative).items():
        expected = 0.75 * own[name] + 0.25 * base[name] + (changed[name] - base[name])
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_guidance_points_away_from_it(policy: StableDiffusion, lora: Path) -> None:
    """The formula of the paper, from two predictions of two networks by hand."""
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    t, prompt = torch.tensor([500, 20]), policy.embed(["a fox", "the sea"])
    plain = guided(policy, latents, t, prompt, 3.0)
    attach_negative(policy, str(lora))
    with_prompt = policy.predict(latents, t, prompt)
    empty = policy.empty.repeat(2)["hidden"]
    without = policy.policy.negative(latents, t, encoder_hidden_states=empty).sample
    got = guided(policy, latents, t, prompt, 3.0)
    torch.testing.assert_close(got, without + 3.0 * (with_prompt - without))
    assert not torch.allclose(got, plain, atol=1e-3)
    assert torch.equal(policy.predict(latents, t, prompt), with_prompt)
    assert torch.equal(guided(policy, latents, t, prompt, 1.0), with_prompt)


def test_a_negative_model_that_has_learnt_nothing_changes_nothing(
    policy: StableDiffusion, tiny_folder: str, tmp_path: Path
) -> None:
    untrained = StableDiffusion(tiny_folder, lora=LoRA(4)).save(tmp_path)
    seeds = torch.tensor([1, 2])
    before = sample(policy, ["a fox", "the sea"], seeds, HOW)
    attach_negative(policy, str(untrained))
    after = sample(policy, ["a fox", "the sea"], seeds, HOW)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_flow_has_one_too(tiny_sd35_folder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = moved(StableDiffusion3(tiny_sd35_folder, lora=LoRA(4)), 0.3).save(tmp_path)
    flow = StableDiffusion3(tiny_sd35_folder)
    flow.freeze()
    how, seeds = Sampling(2, guidance=3.0, batch_size=2), torch.tensor([1, 2])
    plain = sample(flow, ["a fox", "the sea"], seeds, how)
    attach_negative(flow, str(trained))
    assert not torch.allclose(sample(flow, ["a fox", "the sea"], seeds, how), plain, atol=1e-3)


def test_what_has_no_place_for_it_is_refused(
    policy: StableDiffusion, tiny_folder: str, tiny_xl_folder: str, tiny_lcm_folder: str, lora: Path
) -> None:
    with pytest.raises(InputError, match="LatentConsistency samples without a branch"):
        attach_negative(LatentConsistency(tiny_lcm_folder), str(lora))
    with pytest.raises(InputError, match="has a LoRA to be trained"):
        attach_negative(StableDiffusion(tiny_folder, lora=LoRA(4)), str(lora))
    with pytest.raises(InputError, match="trained on the same base"):
        attach_negative(policy, str(Path(tiny_xl_folder) / "unet"))
    with pytest.raises(InputError, match="negative_merge"):
        attach_negative(policy, str(lora), 1.5)
    attach_negative(policy, str(lora))
    with pytest.raises(InputError, match="there is no guidance: set `sampling.guidance`"):
        check_sampling(policy, Sampling(2, guidance=1.0))


def test_an_evaluation_with_it(tiny_folder: str, lora: Path, tmp_path: Path) -> None:
    """The policy is the reference with a negative model, and the samples differ."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\nthe sea\n")
    found = {}
    for name, more in (("plain", []), ("negative", ["--model.negative", str(lora)])):
        main(
            [
                *("evaluate", "--config", "toy", "--model.policy", tiny_folder, *more),
                *("--model.reference", tiny_folder, "--model.output", str(tmp_path / name)),
                *("--model.judge", "tests.export.test_negative.Mean"),
                *("--data.prompts", "PromptFile", "--data.prompts.path", str(prompts)),
                *("--model.sampling.steps", "2", "--trainer.enable_progress_bar", "false"),
            ]
        )
        rows = (tmp_path / name / "per_prompt.jsonl").read_text().splitlines()
        found[name] = [json.loads(row) for row in rows]
    text = (tmp_path / "negative" / "evaluation.json").read_text()
    assert json.loads(text)["pinned"]["policy"]["negative"] == str(lora)
    for plain, row in zip(found["plain"], found["negative"], strict=True):
        assert plain["reward_policy"] == plain["reward_reference"] == row["reward_reference"]
        assert row["reward_policy"] != row["reward_reference"]


def test_the_merged_negative_can_be_exported(tiny_folder: str, lora: Path, tmp_path: Path) -> None:
    """`plus_scale` of the aligned model's LoRA is 1 less `negative_merge`."""
    torch.manual_seed(1)
    aligned = moved(StableDiffusion(tiny_folder, lora=LoRA(2)), 0.2).save(tmp_path / "aligned")
    more = ["--base", tiny_folder, "--plus", str(aligned), "--plus_scale", "0.25"]
    main(
        ["export", "--source", str(lora), *more, "--to", "unet", "--output", str(tmp_path / "net")]
    )
    policy = StableDiffusion(tiny_folder, start_lora=str(aligned))
    policy.freeze()
    attach_negative(policy, str(lora), 0.75)
    written = UNet2DConditionModel.from_pretrained(tmp_path / "net").state_dict()
    own = weights(policy.policy.denoiser)
    assert any(not torch.allclose(own[name], value, atol=1e-3) for name, value in written.items())
    for name, value in weights(policy.policy.negative).items():
        torch.testing.assert_close(value, written[name], atol=1e-6, rtol=1e-5)


def test_a_run_that_began_with_a_lora_is_compared_with_it(
    tiny_folder: str, lora: Path, tmp_path: Path
) -> None:
    """The base of a whole denoiser contains the LoRA that its training started from."""
    trained = moved(StableDiffusion(tiny_folder, start_lora=str(lora)), 0.02)
    trained.save(tmp_path)
    names = f"{{pretrained: {tiny_folder}, start_lora: {lora}}}"
    text = f"backbone: {{class_path: StableDiffusion, init_args: {names}}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    policy = StableDiffusion(tiny_folder)
    policy.freeze()
    before = weights(StableDiffusion(tiny_folder, start_lora=str(lora)).policy.denoiser)
    attach_negative(policy, str(tmp_path))
    name = f"{LAYER}.weight"
    change = weights(trained.policy.denoiser)[name] - before[name]
    expected = weights(policy.policy.denoiser)[name] + change
    torch.testing.assert_close(weights(policy.policy.negative)[name], expected)
    assert change.abs().max() > 0.01
