"""What must hold for every method, and what each adds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_prefopt import losses
from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusionXL
from lit_prefopt.backbones.unet import UNetBackbone
from lit_prefopt.batches import LogRatios, Pairs
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO, SupervisedFineTuning
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.optimizers import AdamW
from tests.helpers.batches import image_pairs
from tests.helpers.runs import scalars

COARSE = {"lora": LoRA(4), "dtype": "bfloat16", "gradient_checkpointing": True}
BACKBONES = {
    "full": (StableDiffusion, {}),
    "full, checkpointing": (StableDiffusion, {"gradient_checkpointing": True}),
    "lora": (StableDiffusion, {"lora": LoRA(4)}),
    "lora, bfloat16, checkpointing": (StableDiffusion, COARSE),
    "lora over four bits": (StableDiffusion, {"lora": LoRA(4), "quantization": "nf4"}),
    "lora over eight bits": (StableDiffusion, {"lora": LoRA(4), "quantization": "int8"}),
    "full, bfloat16": (StableDiffusion, {"policy_dtype": "bfloat16"}),
    "sdxl, full": (StableDiffusionXL, {}),
    "sdxl, lora, bfloat16, checkpointing": (StableDiffusionXL, COARSE),
}


@pytest.fixture(params=BACKBONES, ids=str)
def any_backbone(
    request: pytest.FixtureRequest, tiny_folder: str, tiny_xl_folder: str
) -> UNetBackbone:
    """Each family, and each way to hold a reference."""
    family, options = BACKBONES[request.param]
    folder = tiny_xl_folder if family is StableDiffusionXL else tiny_folder
    return family(folder, **options)


def dpo(backbone: StableDiffusion, beta: float = 5000.0, **options: object) -> DiffusionDPO:
    return DiffusionDPO(backbone, AdamW(1e-3), beta=beta, **options)


def one_step(module: PreferenceDiffusionModule, lr: float = 1e-3) -> None:
    """Take one optimizer step as the Trainer would."""
    module.train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr)
    pairs = module.form_pairs(image_pairs())
    module.losses(module.log_ratios(pairs), pairs).mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("link", "at_zero"),
    [
        (losses.sigmoid, math.log(2)),
        (losses.ipo, 1 / (4 * 5000.0**2)),
        (losses.hinge, 1.0),
    ],
)
def test_step_zero(
    any_backbone: UNetBackbone, link: Callable[[Tensor, float], Tensor], at_zero: float
) -> None:
    """Policy and reference agree to the last bit, so the margin is zero and not nearly zero."""
    module = dpo(any_backbone, link=link).train()
    pairs = module.form_pairs(image_pairs())
    ratios = module.log_ratios(pairs)
    assert (ratios.values == 0).all()
    assert module.losses(ratios, pairs).tolist() == pytest.approx([at_zero] * 3, rel=1e-6)


def test_the_reference_never_moves(any_backbone: UNetBackbone) -> None:
    module = dpo(any_backbone)
    before = copy.deepcopy(any_backbone.state_dict())
    frozen = {n for n, p in any_backbone.named_parameters() if not p.requires_grad}
    pairs = module.form_pairs(image_pairs())
    first = module.log_ratios(pairs)
    for _ in range(2):
        one_step(module)
    later = module.log_ratios(pairs)
    assert torch.equal(first.reference_error, later.reference_error)
    assert not torch.equal(first.policy_error, later.policy_error)
    after = any_backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert frozen
    for name, part in any_backbone.named_children():
        assert part.training == (name == "policy")
    if any_backbone.policy.frozen is not None:
        assert not any(part.training for part in any_backbone.policy.frozen.modules())


def test_gradients_reach_all_that_is_trained_and_nothing_else(
    any_backbone: UNetBackbone,
) -> None:
    module = dpo(any_backbone, beta=10.0)
    pairs = module.form_pairs(image_pairs())
    module.losses(module.log_ratios(pairs), pairs).mean().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_dpo_raises_the_margin(any_backbone: UNetBackbone) -> None:
    module = dpo(any_backbone, beta=100.0)
    pairs = module.form_pairs(image_pairs())
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(6):
        optimizer.zero_grad()
        module.losses(module.log_ratios(pairs), pairs).mean().backward()
        optimizer.step()
    ratios = module.log_ratios(pairs)
    assert (ratios.chosen - ratios.rejected).mean() > 0


def test_draws_do_not_depend_on_the_batch(backbone: StableDiffusion) -> None:
    module = dpo(backbone)
    pairs = module.form_pairs(image_pairs(4))
    together = module.log_ratios(pairs)
    alone = module.form_pairs(
        image_pairs(4)._replace(
            images=image_pairs(4).images[2:3],
            texts=image_pairs(4).texts[2:3],
            seeds=pairs.seeds[2:3],
        )
    )
    torch.testing.assert_close(
        module.log_ratios(alone).policy_error, together.policy_error[2:3], atol=1e-5, rtol=1e-5
    )


def test_anchor_adds_the_chosen_error(backbone: StableDiffusion) -> None:
    plain, anchored = dpo(backbone), dpo(backbone, anchor=2.0)
    pairs = plain.form_pairs(image_pairs())
    ratios = plain.log_ratios(pairs)
    torch.testing.assert_close(
        anchored.losses(ratios, pairs),
        plain.losses(ratios, pairs) + 2 * ratios.policy_error[:, 0],
    )


def test_chosen_protection_changes_the_gradient_and_not_the_loss(backbone: StableDiffusion) -> None:
    def gradient(module: DiffusionDPO) -> tuple[Tensor, Tensor]:
        module.zero_grad()
        pairs = module.form_pairs(image_pairs())
        loss = module.losses(module.log_ratios(pairs), pairs).mean()
        loss.backward()
        return loss.detach(), module.backbone.policy.denoiser.conv_out.weight.grad.clone()

    loss, grad = gradient(dpo(backbone))
    spared_loss, spared_grad = gradient(dpo(backbone, chosen_protection=1.0))
    assert loss == spared_loss
    assert not torch.allclose(grad, spared_grad)


def test_sft_learns_the_chosen_side_alone(any_backbone: UNetBackbone) -> None:
    module = SupervisedFineTuning(any_backbone, AdamW(1e-3)).train()
    batch = image_pairs()
    pairs = module.form_pairs(batch)
    assert pairs.sides == 1
    ratios = module.log_ratios(pairs)
    assert ratios.reference_error is None
    other = batch._replace(images=torch.cat([batch.images[:, :1], batch.images[:, 1:] * 0], 1))
    again = module.losses(module.log_ratios(module.form_pairs(other)), pairs)
    assert torch.equal(module.losses(ratios, pairs), again)


def test_sft_is_validated_like_every_other_method(backbone: StableDiffusion) -> None:
    sft, other = SupervisedFineTuning(backbone, AdamW(1e-3)).eval(), dpo(backbone).eval()
    pairs = sft.form_pairs(image_pairs())
    assert torch.equal(sft.log_ratios(pairs).values, other.log_ratios(pairs).values)
    assert pairs.sides == 2


def test_without_a_reference_there_is_none(tiny_folder: str) -> None:
    module = dpo(StableDiffusion(tiny_folder, reference="none"))
    ratios = module.log_ratios(module.form_pairs(image_pairs()))
    assert ratios.reference_error is None
    assert torch.equal(ratios.values, -0.5 * ratios.policy_error)


def test_weights_scale_their_pair_alone(backbone: StableDiffusion) -> None:
    """A single pair of weight 2 costs twice, and a batch of weight 0 costs nothing."""
    module = dpo(backbone, anchor=1.0)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.log = lambda *_, **__: None
    pairs = module.form_pairs(image_pairs(1))
    one, two, none = (
        module.training_step(pairs._replace(weights=torch.tensor([weight])), 0)
        for weight in (1.0, 2.0, 0.0)
    )
    assert two == 2 * one
    assert none == 0


def test_masks_count_only_where_a_method_says_so(backbone: StableDiffusion) -> None:
    batch = image_pairs()
    masked = batch._replace(masks=torch.zeros(3, 1, 32, 32))
    masked.masks[:, :, :16] = 1
    plain, module = dpo(backbone), dpo(backbone)
    module.masked = True
    errors = [
        m.log_ratios(m.form_pairs(b)).policy_error
        for m, b in ((plain, batch), (plain, masked), (module, masked))
    ]
    assert torch.equal(errors[0], errors[1])
    assert not torch.allclose(errors[0], errors[2], atol=1e-3)


def test_ranked_lists_pass(backbone: StableDiffusion) -> None:
    module = dpo(backbone)
    pairs = module.form_pairs(image_pairs(sides=3))
    ratios = module.log_ratios(pairs)
    assert ratios.values.shape == (3, 3)
    assert module.losses(ratios, pairs).shape == (3,)


class WithoutErrors(DiffusionDPO):
    """A method whose log-ratios come without errors."""

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        return super().log_ratios(pairs)._replace(policy_error=None, overlap=None)


@pytest.mark.parametrize("option", ["anchor", "chosen_protection"])
def test_losses_that_need_errors_say_so(backbone: StableDiffusion, option: str) -> None:
    module = WithoutErrors(backbone, AdamW(1e-3), beta=1.0, **{option: 0.5})
    with pytest.raises(InputError, match=f"`{option}` needs `policy_error`.*`log_ratios`"):
        module.training_step(image_pairs(), 0)
    plain = WithoutErrors(backbone, AdamW(1e-3), beta=1.0)
    assert math.isfinite(plain.training_step(image_pairs(), 0))


def test_a_subclass_keeps_the_cache_of_reference_errors() -> None:
    assert WithoutErrors.takes_reference_errors


def test_options_go_by_name(backbone: StableDiffusion) -> None:
    with pytest.raises(TypeError, match="beta"):
        DiffusionDPO(backbone, AdamW(1e-3), 1.0)
    with pytest.raises(TypeError, match="betta"):
        DiffusionDPO(backbone, AdamW(1e-3), beta=1.0, betta=1.0)


@pytest.mark.parametrize(
    ("beta", "warned"), [("0.1", True), ("9", True), ("200", False), ("5000", False)]
)
def test_a_language_models_beta_gets_one_warning(
    beta: str, warned: bool, recipe: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    main(["fit", *recipe, "--model.beta", beta, "--trainer.max_steps", "1"])
    texts = [str(one.message) for one in recwarn if "beta" in str(one.message)]
    assert len(texts) == warned
    assert all(f"beta is {beta}," in text and "`--model.beta 2000`" in text for text in texts)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_method_that_needs_a_reference_is_refused_without_one(
    command: str, recipe: list[str], tmp_path: Path
) -> None:
    message = "DiffusionDPO compares .*set `--backbone.reference initial`.*--data CachedPairs"
    with pytest.raises(SystemExit, match=message):
        main([command, *recipe, "--backbone.reference", "none"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_method_that_needs_none_trains_without_one(recipe: list[str], tmp_path: Path) -> None:
    """Held-out loss is then the denoising error of the chosen side."""
    more = ["--config", "toy-sft", *recipe[2:], "--backbone.reference", "none"]
    main(["fit", *more, "--trainer.max_steps", "2"])
    logged = scalars(tmp_path / "run")
    assert logged["val/loss"][0] > 0
    assert "val/reference_error" not in logged
