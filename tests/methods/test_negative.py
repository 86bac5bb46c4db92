"""Negative models: any method of pairs on their reverse order (Diffusion-NPO)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.batches import Steps
from lit_prefopt.cli import main
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion.swapped import swapped
from lit_prefopt.errors import InputError
from lit_prefopt.methods import SPO, DiffusionDPO, DiffusionKTO, SupervisedFineTuning
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import Sampling
from tests.helpers.batches import image_pairs
from tests.helpers.judges import SEEDS, SMALL_SPO, TEXTS, Brightness
from tests.helpers.runs import scalars
from tests.helpers.step_zero import moved


def dpo(backbone: StableDiffusion, **options: object) -> DiffusionDPO:
    return DiffusionDPO(backbone, AdamW(1e-3), beta=500.0, **options).train()


def without_trainer(module: DiffusionDPO) -> DiffusionDPO:
    """Return the method, to be called without a Trainer."""
    module.log = lambda *_, **__: None
    return module


def test_it_is_the_method_on_the_images_in_reverse_order(backbone: StableDiffusion) -> None:
    """Loss, log-ratios and errors of both sides, to the last bit."""
    moved(backbone, 0.02)
    batch = image_pairs()
    other = batch._replace(images=batch.images.flip(1))
    negative, plain = dpo(backbone, swapped=True, anchor=0.5), dpo(backbone, anchor=0.5)
    assert negative.training_step(batch, 0) == plain.training_step(other, 0)
    assert negative.training_step(batch, 0) != plain.training_step(batch, 0)
    for name in ("margin", "chosen_error", "rejected_reference_error"):
        assert negative.measured[name] != 0
        plain.training_step(other, 0)
        assert torch.equal(negative.measured[name], plain.measured[name])


def test_all_parts_of_pairs_are_reversed(backbone: StableDiffusion) -> None:
    pairs = (
        dpo(backbone)
        .form_pairs(image_pairs(2))
        ._replace(
            frames=torch.arange(24).view(2, 2, 6),
            reference_error=torch.arange(12.0).view(2, 3, 2),
            scores=torch.tensor([[2.0, 1.0], [5.0, 3.0]]),
            noise_seeds=torch.tensor([[1, 2], [3, 4]]),
        )
    )
    back = swapped(pairs)
    assert torch.equal(back.latents[:, 0], pairs.latents[:, 1])
    assert torch.equal(back.frames[:, 0], pairs.frames[:, 1])
    assert torch.equal(back.reference_error[:, :, 0], pairs.reference_error[:, :, 1])
    assert back.scores.tolist() == [[-1, -2], [-3, -5]]  # still the best side first
    assert back.noise_seeds.tolist() == [[2, 1], [4, 3]]
    assert torch.equal(back.labels, pairs.labels)
    again = swapped(back)
    assert all(
        torch.equal(getattr(again, name), getattr(pairs, name))
        for name in ("latents", "frames", "reference_error", "scores", "noise_seeds", "labels")
    )


def test_of_single_images_the_label_is_reversed(backbone: StableDiffusion) -> None:
    batch = image_pairs(sides=1)._replace(labels=torch.tensor([1.0, 0.0, 0.25]))
    other = batch._replace(labels=torch.tensor([0.0, 1.0, 0.75]))
    moved(backbone, 0.02)
    negative = DiffusionKTO(backbone, AdamW(1e-3), beta=500.0, swapped=True).train()
    plain = DiffusionKTO(backbone, AdamW(1e-3), beta=500.0).train()
    assert negative.training_step(batch, 0) == plain.training_step(other, 0)
    assert negative.training_step(batch, 0) != plain.training_step(batch, 0)


def test_advantages_of_single_roll_outs_are_negated() -> None:
    rows = torch.randn(2, 1, 3, 4, 8, 8)
    zeros, advantages = torch.zeros(2, 3), torch.tensor([[1.5], [-0.5]])
    prompt = Prompt({"hidden": torch.zeros(2, 5, 8)})
    steps = Steps(rows, rows + 1, zeros, zeros, prompt, *[torch.ones(2)] * 3)
    steps = steps._replace(logp=torch.randn(2, 1, 3), advantages=advantages)
    back = swapped(steps)
    assert back.advantages.tolist() == [[-1.5], [0.5]]
    assert torch.equal(back.children, steps.children)
    assert torch.equal(back.logp, steps.logp)


def test_steps_of_roll_outs_are_reversed(backbone: StableDiffusion) -> None:
    def spo(**options: object) -> SPO:
        how = Sampling(steps=4, guidance=2.0, eta=1.0, batch_size=4)
        more = {"judge": Brightness(), "sampling": how} | options
        return SPO(backbone, AdamW(1e-3), **SMALL_SPO, **more).train()

    plain, negative = spo(), spo(swapped=True)
    steps = plain.collect(TEXTS, SEEDS)
    moved(backbone, 0.02)
    assert len(steps.seeds) > 0
    other = steps._replace(children=steps.children.flip(1), parents=steps.parents.flip(1))
    assert negative.training_step(steps, 0) == plain.training_step(other, 0)
    assert negative.training_step(steps, 0) != plain.training_step(steps, 0)


def test_step_zero(backbone: StableDiffusion) -> None:
    module = dpo(backbone, swapped=True)
    assert module.training_step(image_pairs(), 0).item() == pytest.approx(math.log(2))
    assert module.measured["margin"] == 0


def test_methods_of_the_chosen_side_alone_refuse(backbone: StableDiffusion) -> None:
    with pytest.raises(InputError, match="chosen side alone.*such as DiffusionDPO"):
        SupervisedFineTuning(backbone, AdamW(1e-3), swapped=True)


def test_held_out_pairs_are_reversed_and_cached_errors_fit(
    recipe: list[str], tmp_path: Path
) -> None:
    """Losses with errors of the reference from caches are those without caches, bit for bit."""
    logged = {}
    for name, keeps in (("kept", "true"), ("fresh", "false"), ("plain", "true")):
        more = ["--model.swapped", str(name != "plain").lower(), "--data.keep_encodings", keeps]
        more += ["--data.draws", "1", "--trainer.max_steps", "14", "--model.optimizer.lr", "1e-3"]
        more += ["--trainer.default_root_dir", str(tmp_path / name), "--data.flip", "false"]
        main(["fit", *recipe, *more])
        logged[name] = scalars(tmp_path / name)
    for key in ("train/loss", "train/margin", "val/loss", "val/accuracy"):
        assert logged["kept"][key] == logged["fresh"][key], key
        assert len(logged["kept"][key]) > 2
    assert logged["kept"]["val/accuracy"][-1] > 0.5  # dark is preferred
    assert logged["kept"]["train/margin"] != logged["plain"]["train/margin"]
