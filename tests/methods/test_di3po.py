"""Di3PO is Diffusion-DPO where nothing is masked, and sees nothing outside a mask."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.cli import main
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError
from lit_prefopt.methods import Di3PO, DiffusionDPO
from lit_prefopt.optimizers import AdamW
from tests.helpers.batches import image_pairs
from tests.helpers.recipes import small_recipe

QUICK = ["--trainer.limit_val_batches", "0", "--trainer.max_steps", "2"]
OPTIONS = {"anchor": 0.3, "label_smoothing": 0.1, "gamma": 0.9, "chosen_protection": 0.9}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
def test_without_masks_it_is_diffusion_dpo(tiny_folder: str, options: dict[str, float]) -> None:
    """Same losses and same weights after three steps, bit for bit, masks or none in the pairs."""
    batch = image_pairs(4)._replace(masks=torch.rand(4, 1, 32, 32))
    losses: list[list[Tensor]] = []
    weights: list[Tensor] = []
    for kind in (DiffusionDPO, Di3PO):
        module = kind(StableDiffusion(tiny_folder), AdamW(1e-3), beta=100.0, **options).train()
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, 1e-2)
        losses.append([])
        for _ in range(3):
            pairs = module.form_pairs(batch)
            found = module.losses(module.log_ratios(pairs), pairs)
            optimizer.zero_grad()
            found.mean().backward()
            optimizer.step()
            losses[-1].append(found.detach())
        weights.append(torch.cat([p.detach().flatten() for p in trained]))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    assert not torch.equal(losses[0][0], losses[0][2])
    assert torch.equal(*weights)


def test_a_mask_hides_what_lies_outside(backbone: StableDiffusion) -> None:
    """The errors are the mean over the masked part, worked out by hand."""
    module = Di3PO(backbone, AdamW(1e-3), beta=100.0, masked=True).train()
    masks = torch.zeros(3, 1, 32, 32)
    masks[:, :, :16, 8:] = 1
    pairs = module.form_pairs(image_pairs()._replace(masks=masks))
    noised = module.add_noise(pairs)
    prediction = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
    residual = prediction.unflatten(0, (3, 2)) - noised.target
    expected = residual[..., :4, 2:].square().mean((2, 3, 4))
    torch.testing.assert_close(module.log_ratios(pairs).policy_error, expected)
    whole = module.form_pairs(image_pairs()._replace(masks=torch.ones(3, 1, 32, 32)))
    plain = Di3PO(backbone, AdamW(1e-3), beta=100.0)
    torch.testing.assert_close(module.log_ratios(whole).values, plain.log_ratios(whole).values)


def test_dilation_enlarges_masks_by_positions_of_latents(backbone: StableDiffusion) -> None:
    """One position in each direction, at the border as well, and half a position where it was."""
    module = Di3PO(backbone, AdamW(1e-3), beta=100.0, masked=True, mask_dilation=1).train()
    masks = torch.zeros(3, 1, 32, 32)
    masks[:, :, :8, 8:14] = 1  # two by one and a half positions of 4 pixels
    pairs = module.form_pairs(image_pairs()._replace(masks=masks))
    expected = torch.zeros(8, 8)
    expected[:3, 1:4] = 1
    expected[:3, 4] = 0.5
    noised = module.add_noise(pairs)
    assert noised.masks is not None
    assert torch.equal(noised.masks, expected.expand(3, 1, 8, 8))
    prediction = backbone.predict(noised.latents, noised.t_per_side, noised.prompt)
    residual = prediction.unflatten(0, (3, 2)) - noised.target
    weighted = (residual.square() * expected).sum((2, 3, 4)) / (4 * expected.sum())
    torch.testing.assert_close(module.log_ratios(pairs).policy_error, weighted)


def test_dilation_without_masks_is_refused(backbone: StableDiffusion) -> None:
    with pytest.raises(InputError, match="set `--model.masked true`"):
        Di3PO(backbone, AdamW(1e-3), beta=100.0, mask_dilation=2)
    with pytest.raises(InputError, match="mask_dilation"):
        Di3PO(backbone, AdamW(1e-3), beta=100.0, masked=True, mask_dilation=-1)


def test_masked_wants_masks_in_training_alone(backbone: StableDiffusion) -> None:
    module = Di3PO(backbone, AdamW(1e-3), beta=100.0, masked=True).train()
    with pytest.warns(UserWarning, match=r"--model\.masks true"):
        module.form_pairs(image_pairs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        module.form_pairs(image_pairs())
    assert module.eval().form_pairs(image_pairs()).masks is None


def shards(folder: Path, masks: bool) -> str:
    random = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for i in range(8):
            image = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            mask = np.zeros((32, 32), np.uint8)
            mask[8:16, 8:16] = 255
            other = image.copy()
            other[8:16, 8:16] = 0
            writer.add(f'a sign "{i}"', image, other, mask=mask if masks else None)
    return str(folder)


def test_a_run_learns_inside_the_masks(tiny_folder: str, tmp_path: Path) -> None:
    recipe = small_recipe(tiny_folder, shards(tmp_path / "pairs", True), tmp_path / "run")
    main(["fit", "--config", "toy-di3po", *recipe[2:], "--model.masked", "true", *QUICK])
    assert (tmp_path / "run" / "weights" / "unet").is_dir()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.flip", "true"], "Mirrored pairs mirror the text"),
        (["--model.masked", "true"], "no pair of a batch has a mask.png"),
    ],
)
def test_what_may_be_meant_is_a_warning(
    tiny_folder: str, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    recipe = small_recipe(tiny_folder, shards(tmp_path / "pairs", False), tmp_path / "run")
    with pytest.warns(UserWarning, match=sentence) as found:
        main(["fit", "--config", "toy-di3po", *recipe[2:], *arguments, *QUICK])
    assert sum(sentence in str(one.message) for one in found) == 1
    assert (tmp_path / "run" / "weights" / "unet").is_dir()
