"""A frozen copy that is stored as autocast rounds it is the same reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion, StableDiffusion3
from lit_prefopt.backbones.latent import LatentBackbone
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.estimate.memory import footprint
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.strategies.precision import apply_precision
from tests.helpers.batches import images

BF16 = torch.bfloat16


def dpo(backbone: LatentBackbone) -> DiffusionDPO:
    return DiffusionDPO(backbone, AdamW(1e-3), beta=500.0).train()


def reference_errors(module: DiffusionDPO) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", BF16):
        pairs = module.form_pairs(images(2))
        found = module.reference_error(pairs, module.add_noise(pairs))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", [StableDiffusion, StableDiffusion3], ids=["unet", "transformer"])
def test_errors_are_the_same_bits_at_half_of_the_memory(
    kind: type[LatentBackbone], tiny_folder: str, tiny_sd35_folder: str
) -> None:
    folder = tiny_folder if kind is StableDiffusion else tiny_sd35_folder
    module = dpo(kind(folder))
    policy: Any = module.backbone.policy
    before, settings = reference_errors(module), module.backbone.reference_settings()
    size = footprint(module).reference
    policy.round_reference(BF16)
    assert torch.equal(reference_errors(module), before)
    assert footprint(module).reference < 0.6 * size
    assert {p.dtype for p in policy.frozen.parameters()} == {BF16, torch.float32}  # norms stay
    assert {p.dtype for p in policy.denoiser.parameters()} == {torch.float32}
    assert module.backbone.reference_settings() == settings  # tables of its errors still fit


def test_a_run_in_mixed_precision_stores_it_so_with_the_same_losses(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[bool, list[float]] = {True: [], False: []}
    dtypes: list[set[torch.dtype]] = []
    step = DiffusionDPO.training_step

    def noted(self: DiffusionDPO, batch: Any, batch_idx: int) -> Tensor:
        loss = step(self, batch, batch_idx)
        losses[rounds].append(loss.item())
        dtypes.append({p.dtype for p in self.backbone.policy.frozen.parameters()})
        return loss

    monkeypatch.setattr(DiffusionDPO, "training_step", noted)
    arguments = ["fit", *recipe, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "3"]
    arguments += ["--model.optimizer.lr", "1e-3"]
    for rounds in (True, False):
        if not rounds:
            policy = "lit_prefopt.backbones.policy.Policy.round_reference"
            monkeypatch.setattr(policy, lambda *_: None)
        main([*arguments, "--trainer.default_root_dir", str(tmp_path / str(rounds))])
    assert losses[True] == losses[False]
    assert len(set(losses[True])) > 1
    assert dtypes[0] == {BF16, torch.float32}
    assert dtypes[-1] == {torch.float32}


class Run:
    """A Trainer's precision and strategy."""

    strategy = None

    def __init__(self, precision: str) -> None:
        self.precision = precision


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_in_another_precision_it_is_refused(precision: str, tiny_folder: str) -> None:
    module: Any = dpo(StableDiffusion(tiny_folder))
    module.backbone.policy.round_reference(BF16)
    module._trainer = Run("bf16-mixed")
    apply_precision(module)
    module._trainer = Run(precision)
    with pytest.raises(InputError, match=f"{precision}`: build the backbone again"):
        apply_precision(module)
