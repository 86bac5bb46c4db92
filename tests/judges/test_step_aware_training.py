"""The step-aware judge's training, against formulas by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPModel

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusionXL, trained
from lit_prefopt.batches import ImagePairs
from lit_prefopt.callbacks import Guard
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.encoding import encode_pairs
from lit_prefopt.errors import InputError
from lit_prefopt.judges import CLIPJudge, Judge, StepAwarePreference
from lit_prefopt.judges.step_aware_training import agreement
from tests.helpers.runs import TORCHRUN, finished, launch
from tests.helpers.step_aware import Make, batch, cut


class Brightness(Judge):
    """The brighter the better."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return images.mean((1, 2, 3))


def fit(module: StepAwarePreference, batches: list[ImagePairs], *callbacks, **options) -> None:
    """Train on these batches once."""
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, DataLoader(batches, batch_size=None))


# What it sees -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_predictions_by_hand(make: Make, tiny_folder: str, guidance: float) -> None:
    """With the stock pipeline's parts: noised once, guided, and diffusers' own clean image."""
    module, pairs = make(guidance=guidance), batch(2)
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    latents = encode_pairs(module.backbone, pairs)
    t = torch.tensor([701, 20])
    ours = module.predicted(latents, t)
    assert ours.shape == (2, 2, 3, 32, 32)
    noise = draws.normal(pairs.seeds, (4, 8, 8), "noise")
    with torch.no_grad():
        for row in range(2):
            words = [pairs.texts[row], ""]
            said_words = [stock.encode_prompt(w, "cpu", 1, False)[0] for w in words]
            for side in range(2):
                noised = scheduler.add_noise(
                    latents.latents[row, side][None], noise[row][None], t[row][None]
                )
                said, without = (stock.unet(noised, t[row], w).sample for w in said_words)
                said = without + guidance * (said - without)
                clean = scheduler.step(said, t[row], noised).pred_original_sample
                image = stock.vae.decode(clean / stock.vae.config.scaling_factor).sample
                torch.testing.assert_close(
                    ours[row, side], image[0].clamp(-1, 1), atol=1e-4, rtol=1e-4
                )


def test_both_sides_get_one_timestep_and_one_noise(make: Make) -> None:
    """Two equal images stay equal; another pair has a timestep of its own, in any company."""
    module, pairs = make(), batch(3)
    equal = pairs._replace(images=pairs.images[:, :1].repeat(1, 2, 1, 1, 1))
    seen: list[Tensor] = []
    module.backbone.policy.denoiser.register_forward_pre_hook(
        lambda _, args: seen.append(args[1].clone())
    )
    loss = module.training_step(equal, 0)
    assert module.measured["margin"] == 0
    assert loss.item() == pytest.approx(0.6931472)
    (times,) = seen
    assert times.shape == (12,)  # guidance doubles
    first, second, third = times[:6:2].tolist()
    assert times.tolist() == [first, first, second, second, third, third] * 2
    assert len({first, second, third}) == 3
    module.training_step(cut(equal, slice(1, 2)), 0)
    assert seen[1].tolist() == [second] * 4


def test_noisiest_bounds_what_is_drawn(make: Make) -> None:
    module = make(noisiest=0)
    module.training_step(batch(4), 0)
    assert module.measured["t"] == 0
    module = make(noisiest=10)
    seen: list[float] = []
    for seed in range(8):
        module.training_step(batch(1, seed), 0)
        seen.append(module.measured["t"].item())
    assert max(seen) <= 10
    assert len(set(seen)) > 3


# What it learns ---------------------------------------------------------------------------------


def test_the_loss_by_hand(make: Make, tiny_clip_folder: str) -> None:
    """At its start with transformers' own CLIP: hard labels, a tie and a soft label, weighted."""
    module = make()
    labels, weights = torch.tensor([1.0, 0.5, 0.0, 0.8]), torch.tensor([1.0, 0.25, 0.5, 2.0])
    pairs = batch(4, labels=labels, weights=weights)
    loss = module.training_step(pairs, 0)
    t = (draws.uniform(pairs.seeds, "t") * 1000).long()
    images = module.predicted(encode_pairs(module.backbone, pairs), t)
    clip, judge = CLIPModel.from_pretrained(tiny_clip_folder).eval(), CLIPJudge(tiny_clip_folder)
    judge.crop, expected = "tensor", 0.0
    for row in range(4):
        tokens = judge.tokenizer(pairs.texts[row], padding="max_length", return_tensors="pt")
        with torch.no_grad():
            output = clip(tokens.input_ids, judge.pixels(images[row]))
        chosen = output.logits_per_text[0].softmax(0).double().tolist()
        told = [labels[row].item(), 1 - labels[row].item()]
        kl = sum(p * math.log(p / q) for p, q in zip(told, chosen, strict=True) if p)
        expected += weights[row].item() * kl / 4
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_it_starts_as_the_clip_at_every_timestep(make: Make, tiny_clip_folder: str) -> None:
    module, pairs = make(), batch(1)
    judge = CLIPJudge(tiny_clip_folder)
    judge.crop = "tensor"
    plain = judge.score(pairs.images.flatten(0, 1), pairs.texts * 2)
    for t in range(0, 1000, 37):
        margin = module.margin(pairs.images, pairs.texts, torch.tensor([t]))
        torch.testing.assert_close(margin[0], plain[0] - plain[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_gradients_reach_the_whole_clip_and_nothing_else(
    make: Make, family: type, tiny_xl_folder: str, tiny_folder: str
) -> None:
    module = make(family, tiny_xl_folder if family is StableDiffusionXL else tiny_folder)
    optimizer = torch.optim.SGD(module.clip.parameters(), 1.0)
    for step in range(2):  # nothing flows through a modulation whose weights are still zero
        module.zero_grad()
        module.training_step(batch(3), step).backward()
        if not step:
            optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == name.startswith("clip."), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if "adaLN" in name or "t_embedder" in name:
            assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_gradient(make: Make) -> None:
    gradients, computed = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = make(gradient_checkpointing=checkpointing)
        with torch.no_grad():
            for name, parameter in module.clip.named_parameters():
                if "adaLN" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.01)
        calls: list[int] = []
        norm = module.clip.vision_model.encoder.layers[0].layer_norm1
        norm.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        module.training_step(batch(3), 0).backward()
        computed.append(len(calls))
        gradients.append({n: p.grad for n, p in trained(module).items()})
    assert computed == [2, 4]  # once a side, and once more on the way back
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_weights_are_shares_of_an_optimizer_step(make: Make, size: int) -> None:
    """Four pairs in any number of accumulated batches: sum of weighted losses over the weights."""
    weights = torch.tensor([1.0, 0.2, 0.5, 0.05])
    pairs = batch(4, weights=weights, labels=torch.tensor([1.0, 0.0, 1.0, 0.5]))
    torch.manual_seed(0)
    module = make()
    by_hand = copy.deepcopy(dict(module.clip.state_dict()))
    alone = [module.training_step(cut(pairs, slice(i, i + 1)), 0) for i in range(4)]
    module.weights.clear()
    (sum(alone) / weights.sum()).backward()  # each of them is its weight times its loss
    by_hand = {n: by_hand[n] - 0.1 * p.grad for n, p in module.clip.named_parameters()}
    module.zero_grad()
    batches = [cut(pairs, slice(i, i + size)) for i in range(0, 4, size)]
    fit(module, batches, accumulate_grad_batches=len(batches))
    for name, parameter in module.clip.named_parameters():
        torch.testing.assert_close(parameter.detach(), by_hand[name], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_weights_are_shares_over_ranks(
    make: Make, tiny_folder: str, tiny_clip_folder: str, tmp_path: Path
) -> None:
    """Two processes with a pair each step as one process with both pairs."""
    torch.manual_seed(0)
    module = make()
    torch.save(module.clip.state_dict(), tmp_path / "start.pt")
    pairs = batch(2, weights=torch.tensor([1.0, 0.05]))
    arguments = [str(tmp_path), tiny_folder, tiny_clip_folder]
    process = launch(arguments, [*TORCHRUN, "-m", "tests.helpers.two_ranks_judge"])
    said = finished(process)
    assert process.returncode == 0, said
    fit(module, [pairs])
    a, b = (torch.load(tmp_path / f"rank-{r}.pt", weights_only=True) for r in (0, 1))
    for name, value in module.clip.state_dict().items():
        assert torch.equal(a["clip"][name], b["clip"][name])
        torch.testing.assert_close(a["clip"][name], value, atol=1e-6, rtol=1e-5)
    held_out = make(validation_timesteps=(0, 500)).eval()
    held_out.clip.load_state_dict(a["clip"])
    held_out.validation_step(batch(2), 0)
    for name, mean in held_out.held_out.compute().items():
        assert a["logged"][f"val/{name}"] == b["logged"][f"val/{name}"]
        assert a["logged"][f"val/{name}"].item() == pytest.approx(mean.item(), abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, math.nan], ids=["nothing", "left out by the guard"])
def test_a_step_of_no_weight_moves_nothing(make: Make, weight: float) -> None:
    module = make()
    before = copy.deepcopy(module.clip.state_dict())
    fit(module, [batch(3, weights=torch.full((3,), weight))], Guard(on_spike="skip"))
    after = module.clip.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_clip_moves_and_the_guard_watches(make: Make) -> None:
    module, guard = make(), Guard(on_spike="skip")
    before = copy.deepcopy(module.state_dict())
    fit(module, [batch(3, seed) for seed in range(3)], guard)
    after = module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("adaLN" in name for name in moved)
    assert all(name.startswith("clip.") for name in moved)
    assert not any(part.training for part in module.backbone.modules())
    assert len(guard.watch.loss.values) == 3


def test_labels_of_a_judge(make: Make) -> None:
    """The difference of two probabilities is tanh(d / 2): 0.0997 at 0.2, 0.1194 at 0.24."""
    gaps = torch.tensor([0.24, -0.24, 0.2, 0.0])
    images = torch.zeros(4, 2, 3, 32, 32)
    images[:, 0] += gaps.view(-1, 1, 1, 1)
    pairs = batch(4, images=images, labels=torch.full((4,), 0.9))
    assert make().labels(pairs).tolist() == pytest.approx([0.9] * 4)
    assert make(judge=Brightness()).labels(pairs).tolist() == [1.0, 0.0, 0.5, 0.5]
    scaled = make(judge=Brightness(), judge_scale=10.0, threshold=0.9)
    assert scaled.labels(pairs).tolist() == [0.5] * 4  # tanh(1.2) = 0.83
    scaled = make(judge=Brightness(), judge_scale=10.0, threshold=0.8)
    assert scaled.labels(pairs).tolist() == [1.0, 0.0, 0.5, 0.5]  # tanh(1) = 0.76


def test_agreement() -> None:
    margin = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0, 3.0, 1.0])
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.5, 0.8])
    assert agreement(margin, labels).tolist() == [1, 0, 0, 1, 0.5, 0.5, 1]


def test_a_backbone_of_any_kind_is_frozen(make: Make) -> None:
    coarse = {"lora": LoRA(4), "dtype": "bfloat16"}
    for options in ({}, {"dtype": "bfloat16"}, coarse):
        module = make(backbone=options)
        assert not module.backbone.has_reference
        assert not any(p.requires_grad for p in module.backbone.parameters())
        kinds = {p.dtype for p in module.backbone.parameters()}
        assert kinds == {torch.bfloat16 if options else torch.float32}
        assert torch.isfinite(module.training_step(batch(2), 0))


def test_a_judge_that_gives_nonsense(make: Make) -> None:
    class Broken(Judge):
        def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
            return torch.full((len(images),), torch.nan)

    with pytest.raises(InputError, match="fix the judge"):
        make(judge=Broken()).training_step(batch(2), 0)
