"""The check of the base on the first batch: what it stops, and what it must not stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.batches import Pairs, Steps
from lit_prefopt.cli import main
from lit_prefopt.diffusion.base_check import (
    BaseErrors,
    base_errors,
    check_base,
    check_base_errors,
    check_noise_shares,
    noise_shares,
)
from lit_prefopt.errors import InputError
from lit_prefopt.methods import DiffusionDPO
from lit_prefopt.optimizers import AdamW
from lit_prefopt.toy import ToyDiffusion
from lit_prefopt.toy.pairs import ToyPairs
from tests.helpers.batches import image_pairs
from tests.helpers.converted_flow import ConvertedFlow
from tests.helpers.recipes import OWN_COUNTS
from tests.helpers.tiny import tiny_unet

RUN = [
    *("--config", "toy-diffusion-dpo", "--data.batch_size", "4", "--data.workers", "0"),
    *("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", *OWN_COUNTS),
    *("--trainer.enable_progress_bar", "false"),
]


class Converted(ToyDiffusion):
    """The toy model with its prediction converted to another type, exactly."""

    to = "epsilon"

    def predict(self, latents: Tensor, t: Tensor, prompt: Any) -> Tensor:
        """Return v, the clean latents or the negative noise of the predicted noise."""
        noise = super().predict(latents, t, prompt)
        level = self.process.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        signal, rest = level.sqrt(), (1 - level).sqrt()
        clean = (latents - rest * noise) / signal
        return {"v": signal * noise - rest * clean, "sample": clean, "-": -noise}.get(
            self.to, noise
        )


def toy_pairs(count: int) -> Pairs:
    """Return encoded pairs of the toy world."""
    data = ToyPairs(batch_size=count, workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    backbone = ToyDiffusion(reference="none")
    return DiffusionDPO(backbone, AdamW(1e-3), beta=10.0).form_pairs(batch)


def shares(found: BaseErrors) -> dict[str, float]:
    return dict(zip(found.names, (found.errors / found.variances).tolist(), strict=True))


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return toy_pairs(4)


@pytest.fixture(scope="module")
def one() -> Pairs:
    return toy_pairs(1)


@pytest.mark.parametrize("reference", ["initial", "none"])
def test_the_shipped_model_predicts_epsilon(pairs: Pairs, reference: str) -> None:
    backbone = ToyDiffusion(reference=reference)
    found = base_errors(backbone, pairs)
    assert shares(found)["epsilon"] < 0.05
    assert shares(found)["v_prediction"] > 1
    check_base_errors(found, "epsilon")
    with pytest.raises(InputError, match=r"does not predict v_.*--backbone.prediction epsilon"):
        check_base_errors(found, "v_prediction")


@pytest.mark.parametrize(
    ("to", "stated", "message"),
    [
        ("v", "epsilon", "if it is read as v_prediction: set `--backbone.prediction v_pred"),
        ("sample", "epsilon", "name a base that predicts epsilon or v"),
        ("sample", "v_prediction", "name a base that predicts epsilon or v"),
        ("-", "epsilon", "cannot predict epsilon: .* is 3"),
        ("-", "v_prediction", "cannot predict v_prediction"),
    ],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_another_prediction_is_recognised(
    to: str, stated: str, message: str, rows: int, pairs: Pairs, one: Pairs
) -> None:
    backbone = Converted(reference="none")
    backbone.to = to
    found = base_errors(backbone, pairs if rows > 1 else one)
    with pytest.raises(InputError, match=message):
        check_base_errors(found, stated)


@pytest.mark.parametrize("stated", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("size", [0.05, 1.0, 3.0])
def test_random_weights_may_be_trained(stated: str, size: float, tiny_folder: str) -> None:
    """On latents of any variance; a network of zeros has an error of exactly one."""
    backbone = StableDiffusion(tiny_folder, reference="none")
    for seed in range(6):
        torch.manual_seed(seed)
        backbone.policy.denoiser = tiny_unet()
        if seed == 0:
            torch.nn.init.zeros_(backbone.policy.denoiser.conv_out.weight)
            torch.nn.init.zeros_(backbone.policy.denoiser.conv_out.bias)
        pairs = DiffusionDPO(backbone, AdamW(1e-3), beta=10.0).form_pairs(image_pairs(1))
        pairs = pairs._replace(latents=size**0.5 * torch.randn_like(pairs.latents))
        found = base_errors(backbone, pairs)
        if seed == 0:
            assert shares(found)[stated] == pytest.approx(1)
        check_base_errors(found, stated)


def steps(pairs: Pairs, rows: int) -> Steps:
    """Return steps with the prompts of pairs; the latents count only for their size."""
    latents = torch.zeros(rows, 2, 1, 4, 8, 8)
    t = torch.ones(rows, 1, dtype=torch.int64)
    prompt, seeds = pairs.prompt.rows(torch.arange(rows)), pairs.seeds[:rows]
    return Steps(latents, latents, t, t, prompt, seeds, *torch.ones(2, rows))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("to", ["epsilon", "v"])
def test_roll_outs_are_checked_on_noise_alone(to: str, rows: int, pairs: Pairs) -> None:
    backbone = Converted(reference="none")
    backbone.to = to
    found = noise_shares(backbone, steps(pairs, rows))
    right, wrong = ("epsilon", "v_prediction")[:: 1 if to == "epsilon" else -1]
    check_noise_shares(found, right)
    with pytest.raises(InputError, match=f"not predict {wrong}.*--backbone.prediction {right}"):
        check_noise_shares(found, wrong)


@pytest.mark.parametrize("stated", ["epsilon", "v_prediction"])
def test_random_weights_return_no_noise(stated: str, tiny_folder: str, pairs: Pairs) -> None:
    backbone = StableDiffusion(tiny_folder, reference="none")
    prompts = backbone.embed(["a cat", "", "rain", "the sea"])
    for seed in range(6):
        torch.manual_seed(seed)
        backbone.policy.denoiser = tiny_unet()
        found = noise_shares(backbone, steps(pairs, 4)._replace(prompt=prompts))
        assert found.clear.abs() < 0.3
        check_noise_shares(found, stated)


def test_random_numbers_and_modes_stay_as_they_are(pairs: Pairs) -> None:
    backbone = ToyDiffusion(lora=LoRA(2, dropout=0.5)).train()
    modes = [module.training for module in backbone.modules()]
    before = torch.get_rng_state()
    base_errors(backbone, pairs)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in backbone.modules()] == modes


def test_a_run_stops_before_its_first_step(tmp_path: Path) -> None:
    run = [*RUN, "--trainer.default_root_dir", str(tmp_path / "run")]
    wrong = ["--backbone.prediction", "v_prediction"]
    with pytest.raises(SystemExit, match="untouched base does not predict v_prediction"):
        main(["fit", *run, *wrong])
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    main(["fit", *run, *wrong, "--model.check_base", "false"])
    assert list((tmp_path / "run").rglob("*.ckpt"))


def test_a_trained_flow_passes(pairs: Pairs) -> None:
    backbone = ConvertedFlow(reference="none")
    found = base_errors(backbone, pairs)
    assert found.shares["velocity"] < 0.15
    assert found.shares["negative velocity"] > 3
    check_base(backbone, pairs)
    check_base(backbone, steps(pairs, 4))


def test_the_wrong_sign_of_a_flow_is_named(pairs: Pairs) -> None:
    backbone = ConvertedFlow(reference="none")
    backbone.sign = -1.0
    with pytest.raises(InputError, match="read as negative velocity: negate the prediction in `pr"):
        check_base(backbone, pairs)
    shares_of_noise = noise_shares(backbone, steps(pairs, 4))
    with pytest.raises(InputError, match="predict velocity.*: negate the prediction in `predict`"):
        check_noise_shares(shares_of_noise, "velocity")


@pytest.mark.parametrize(
    ("own_time", "named"),
    [
        (lambda t: 1 - t, "1 - t"),
        (lambda t: t / 1000, "1000 t"),
        (lambda t: 1000 * t, "t / 1000"),
    ],
)
def test_the_wrong_time_of_a_flow_is_named(own_time: Any, named: str, pairs: Pairs) -> None:
    backbone = ConvertedFlow(reference="none")
    backbone.own_time = own_time
    with pytest.raises(InputError, match=f"given a wrong time.* with the time of {named}: correct"):
        check_base(backbone, pairs)


class RandomFlow(ConvertedFlow):
    """A flow whose velocity is what its UNet returns."""

    def predict(self, latents: Tensor, t: Tensor, prompt: Any) -> Tensor:
        """Return the UNet's prediction at timestep 1000 sigma."""
        return StableDiffusion.predict(self, latents, self.process.timestep(t), prompt)


def test_random_weights_of_a_flow_may_be_trained(tiny_folder: str) -> None:
    backbone = RandomFlow(tiny_folder, reference="none")
    own = DiffusionDPO(backbone, AdamW(1e-3), beta=10.0).form_pairs(image_pairs(2))
    own = own._replace(latents=torch.randn_like(own.latents))
    for seed in range(6):
        torch.manual_seed(seed)
        backbone.policy.denoiser = tiny_unet()
        assert base_errors(backbone, own).shares["velocity"] > 0.7
        check_base(backbone, own)
        check_base(backbone, steps(own, 2))
