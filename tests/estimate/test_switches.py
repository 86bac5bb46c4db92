"""What a set of options needs is what a backbone that is built with them needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_prefopt.backbones import LoRA, StableDiffusion3
from lit_prefopt.batches import ImagePairs
from lit_prefopt.estimate.memory import first_row, footprint
from lit_prefopt.estimate.step_cost import checkpointing, step_cost
from lit_prefopt.estimate.switches import Switches, SwitchSearch
from lit_prefopt.methods import DiffusionDPO, SupervisedFineTuning
from lit_prefopt.optimizers import AdamW, AdamW8bit
from tests.helpers.batches import images


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def built(folder: str, optimizer: Any = None, **options: Any) -> DiffusionDPO:
    backbone = StableDiffusion3(folder, **options)
    return DiffusionDPO(backbone, optimizer or AdamW(1e-3), beta=5000.0).train()


def needed(module: DiffusionDPO, batch: Any, *, recompute: bool = False) -> Any:
    """Return the bytes that a method needs as it is built, of which the peak varies by 1 %."""
    with checkpointing(module, recompute):
        cost = step_cost(module, batch, autocast)
    return pytest.approx(footprint(module, cost.activations).total, rel=0.02)


@pytest.fixture
def batch() -> ImagePairs:
    """A batch of four pairs."""
    return images(4)


def test_options_of_a_lora(tiny_sd35_folder: str, batch: ImagePairs) -> None:
    base = {"lora": LoRA(4), "dtype": "bfloat16"}
    module = built(tiny_sd35_folder, **base)
    search = SwitchSearch(module, batch, autocast)

    def total(**switches: Any) -> int:
        return search.trial(Switches(**switches)).total

    assert step_cost(module, batch, autocast) == step_cost(module, batch, autocast)
    assert total() == needed(module, batch)
    assert total(checkpointing=True) == needed(module, batch, recompute=True)
    assert total(one_pair=True) == needed(module, first_row(batch))
    cached = built(tiny_sd35_folder, encoders=False, **base)
    encoded = search.encoded()
    assert total(cached=True) == needed(cached, encoded)
    both = needed(cached, first_row(encoded), recompute=True)
    assert total(cached=True, one_pair=True, checkpointing=True) == both
    int8 = built(tiny_sd35_folder, quantization="int8", **base)
    assert total(quantization="int8") == needed(int8, batch)
    weights = search.weights(Switches(quantization="int8"))
    assert weights.frozen == footprint(int8).frozen
    assert not any(one.errors or one.bf16_weights for one in search.offers())


def test_options_of_all_weights(tiny_sd35_folder: str, batch: ImagePairs) -> None:
    module = built(tiny_sd35_folder)
    search = SwitchSearch(module, batch, autocast)
    before = {name: p.data_ptr() for name, p in module.named_parameters()}

    eight = built(tiny_sd35_folder, AdamW8bit(1e-3))
    assert search.trial(Switches(eight_bit=True)).total == needed(eight, batch)
    rounds = AdamW8bit(1e-3, stochastic_rounding=True)
    half = built(tiny_sd35_folder, rounds, policy_dtype="bfloat16")
    switches = Switches(eight_bit=True, bf16_weights=True)
    assert search.trial(switches).total == needed(half, batch)

    none = built(tiny_sd35_folder, encoders=False, reference="none")
    known = search.encoded()._replace(reference_error=torch.zeros(4, 1, 2))
    trial = search.trial(Switches(cached=True, errors=True))
    assert trial.total == needed(none, known)
    assert trial.pair_flops * 4 == step_cost(none, known, autocast).flops
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == before
    offers = search.offers()
    assert not any(one.quantization for one in offers)
    assert all(one.cached for one in offers if one.errors)
    assert all(one.eight_bit for one in offers if one.bf16_weights)


def test_the_first_set_that_fits_changes_no_loss_if_one_does(
    tiny_sd35_folder: str, batch: ImagePairs
) -> None:
    module = built(tiny_sd35_folder, lora=LoRA(4), dtype="bfloat16")
    search = SwitchSearch(module, batch, autocast)
    plain = search.trial(Switches()).total
    assert [one.switches for one in search.fit(plain)] == [Switches()]
    least_exact = search.trial(Switches(checkpointing=True, one_pair=True, cached=True)).total
    best = search.fit(least_exact)[-1].switches
    assert best.cost[0] == 0
    below = search.fit(least_exact - 1)[-1]
    assert below.switches.cost[0] > 0
    assert below.switches.quantization == "int8"  # before NF4, which rounds more
    assert below.total < least_exact
    trials = search.fit(1000)
    assert trials[-1].total == min(one.total for one in trials if one.pair_flops)
    assert trials[-1].total > 1000
    assert trials[-1].switches.quantization == "nf4"


def test_what_a_recipe_has_is_not_offered(tiny_sd35_folder: str, batch: ImagePairs) -> None:
    backbone = StableDiffusion3(tiny_sd35_folder, lora=LoRA(4), encoders=False)
    module = SupervisedFineTuning(backbone, AdamW8bit(1e-3)).train()
    offers = SwitchSearch(module, first_row(batch), base="int8").offers()
    assert set(offers) == {Switches(on, quantization="int8") for on in (False, True)}
