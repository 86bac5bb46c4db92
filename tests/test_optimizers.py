from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.optimizers import Adafactor, AdamW, AdamW8bit, Lion8bit, OptimizerConfig
from lit_prefopt.optimizers.rounding import stochastic_round
from tests.helpers.quantized import COARSE
from tests.helpers.runs import assert_same_end


def test_warmup_rises_to_the_learning_rate() -> None:
    config = AdamW(0.4, schedule="constant_with_warmup", warmup_steps=4)
    optimizer = config.build([torch.nn.Parameter(torch.zeros(1))])
    schedule = config.build_schedule(optimizer, max_steps=-1)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_a_decaying_schedule_needs_an_end() -> None:
    config = AdamW(0.4, schedule="cosine")
    optimizer = config.build([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(InputError, match="--trainer.max_steps"):
        config.build_schedule(optimizer, max_steps=-1)


def test_adafactor_keeps_rows_and_columns_and_bounds_its_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 8))
    optimizer = Adafactor(0.01, clip_threshold=0.5, weight_decay=0.0).build([weight])
    weight.grad = torch.randn(16, 8) * torch.logspace(-3, 3, 8)
    optimizer.step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.01 * 0.5, rel=1e-4)
    kept = [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.dim()]
    assert sorted(tuple(v.shape) for v in kept) == [(8,), (16,)]


BIG, SMALL = (64, 128), (64,)


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=random) * 0.05 for shape in (BIG, SMALL))
    return [torch.nn.Parameter(weight.to(dtype)) for weight in drawn]


def stepped(
    config: OptimizerConfig, steps: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Return how far the weights have moved under gradients that lean to one side."""
    parameters, random = weights(dtype), torch.Generator().manual_seed(1)
    before = [p.detach().clone() for p in parameters]
    optimizer = config.build(parameters)
    for _ in range(steps):
        for p in parameters:
            p.grad = (torch.randn(p.shape, generator=random) + 0.5).to(dtype)
        optimizer.step()
    return [p.detach() - b for p, b in zip(parameters, before, strict=True)]


@pytest.mark.parametrize("kind", [AdamW8bit, Lion8bit])
def test_moments_of_large_tensors_are_8_bit(kind: type[AdamW8bit] | type[Lion8bit]) -> None:
    large, small = weights()
    optimizer = kind(1e-3, least_size=1000).build([large, small])
    for p in (large, small):
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = {p: optimizer.state[p]["state1"] for p in (large, small)}
    assert moments[large].dtype == torch.uint8
    assert moments[large].shape == large.shape
    assert moments[small].dtype == torch.float32
    kept = kind(1e-3).build([large])
    kept.step()
    assert kept.state[large]["state1"].dtype == torch.float32  # below the default size


@pytest.mark.parametrize(
    ("config", "full"),
    [
        (AdamW8bit(1e-3, least_size=0, weight_decay=0.1), AdamW(1e-3, weight_decay=0.1)),
        (AdamW(1e-3, weight_decay=0.1), AdamW(1e-3, weight_decay=0.1, fused=False)),
    ],
)
def test_other_adamws_go_where_adamw_goes(config: OptimizerConfig, full: AdamW) -> None:
    moved, expected = (torch.cat([x.flatten() for x in stepped(c, 40)]) for c in (config, full))
    assert torch.cosine_similarity(moved, expected, 0) > 0.999
    assert moved.norm() / expected.norm() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("config", [AdamW8bit(1e-6, least_size=0), Lion8bit(1e-6, least_size=0)])
def test_full_weights_move_at_a_very_small_learning_rate(config: OptimizerConfig) -> None:
    """Every weight does, and as far as it should; in pure bfloat16 hardly one of them does."""
    moved = torch.cat([x.flatten() for x in stepped(config, 50)])
    assert (moved != 0).float().mean() > 0.99
    assert -50e-6 < moved.mean() < -10e-6
    coarse = torch.cat([x.flatten() for x in stepped(config, 50, torch.bfloat16)])
    assert (coarse != 0).float().mean() < 0.1


@pytest.mark.parametrize("kind", [AdamW8bit, Lion8bit])
def test_rounded_at_random_coarse_weights_move_as_far(
    kind: type[AdamW8bit] | type[Lion8bit],
) -> None:
    exact = stepped(kind(1e-6, least_size=0, weight_decay=0.0), 50)
    config = kind(1e-6, least_size=0, weight_decay=0.0, stochastic_rounding=True)
    coarse = stepped(config, 50, torch.bfloat16)
    # a weight of 0.05 has a neighbour 2e-4 away: about 80 of 8,192 go that far for 50 steps of 1e-6
    assert coarse[0].float().mean().item() == pytest.approx(exact[0].mean().item(), rel=0.3)
    again = stepped(config, 50, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(coarse, again, strict=True))


@pytest.mark.parametrize("rounding", [False, True])
def test_released_gradients_take_the_same_steps(rounding: bool) -> None:
    dtype = torch.bfloat16 if rounding else torch.float32

    def learned(release: bool) -> list[torch.nn.Parameter]:
        parameters = weights(dtype)
        large, small = parameters
        config = AdamW8bit(
            1e-3, least_size=0, stochastic_rounding=rounding, release_gradients=release
        )
        optimizer = config.build(parameters)
        for number in range(3):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(number)).to(dtype)
            (((x * small) @ large).square().sum() + large.sum()).backward()
            assert all((p.grad is None) == release for p in parameters)
            optimizer.step()
            optimizer.zero_grad()
        return parameters

    pairs = zip(learned(False), learned(True), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--trainer.accumulate_grad_batches", "2"], "several batches"),
        (["--trainer.gradient_clip_val", "1.0"], "clipped"),
        (["--trainer.callbacks+", "Guard"], "Guard"),
    ],
)
def test_released_gradients_cannot_wait(change: list[str], reason: str, recipe: list[str]) -> None:
    release = ["--model.optimizer", "AdamW8bit", "--model.optimizer.release_gradients", "true"]
    with pytest.raises(SystemExit, match=f"{reason}.*release_gradients false"):
        main(["fit", *recipe, *release, *change])


def test_rounding_at_random_keeps_the_mean_and_what_is_exact() -> None:
    random = torch.Generator().manual_seed(0)
    exact = torch.tensor([1.0, -1.0, 0.0, 3e-39, torch.inf, -torch.inf])
    assert torch.equal(stochastic_round(exact[:3], random), exact[:3].bfloat16())
    assert torch.equal(stochastic_round(exact[4:], random), exact[4:].bfloat16())
    assert stochastic_round(torch.tensor([torch.nan]), random).isnan().all()
    for number in (1 + 2**-9, -(1 + 2**-9), 1 + 3 * 2**-9):  # neighbours are 2**-7 apart
        drawn = stochastic_round(torch.full((20_000,), number), random).double()
        assert len(drawn.unique()) == 2
        share = (abs(number) - 1) / 2**-7
        deviation = 2**-7 * (share * (1 - share) / 20_000) ** 0.5
        assert (drawn.mean() - number).abs() < 4 * deviation


def test_coarse_weights_want_an_optimizer_that_learns_them(recipe: list[str]) -> None:
    coarse = [*recipe, "--backbone.policy_dtype", "bfloat16"]
    with pytest.raises(SystemExit, match="--model.optimizer.stochastic_rounding true"):
        main(["fit", *coarse])


def test_coarse_weights_have_no_average(recipe: list[str]) -> None:
    with pytest.raises(SystemExit, match="remove PolicyAveraging"):
        main(["fit", *recipe, *COARSE, "--trainer.callbacks+", "PolicyAveraging"])


@pytest.mark.parametrize("release", ["false", "true"])
def test_a_run_with_coarse_weights_resumes_exactly(
    release: str, recipe: list[str], tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    place = recipe.index("--trainer.default_root_dir") + 1

    def run(folder: Path, *arguments: str) -> None:
        more = [*COARSE, "--model.optimizer.release_gradients", release]
        more += ["--model.optimizer.lr", "1e-5", "--trainer.max_steps", *arguments]
        main(["fit", *recipe[:place], str(folder), *recipe[place + 1 :], *more])

    run(whole, "4")
    run(halves, "2")
    run(halves, "4", "--ckpt_path", "last")
    assert_same_end(whole, halves)
    state = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "change",
    [
        ["--model.optimizer", "AdamW8bit", "--model.optimizer.least_size", "0"],
        pytest.param(
            ["--model.optimizer", "Lion8bit", "--model.optimizer.least_size", "0"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--model.optimizer.fused", "false"], marks=pytest.mark.slow),
    ],
    ids=["AdamW8bit", "Lion8bit", "not fused"],
)
def test_a_clipped_run_in_mixed_precision_resumes_exactly(
    change: list[str], recipe: list[str], tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    place = recipe.index("--trainer.default_root_dir") + 1
    more = [*change, "--model.optimizer.lr", "1e-3", "--trainer.precision", "bf16-mixed"]
    more += ["--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"]
    more += ["--trainer.gradient_clip_val", "1.0", "--trainer.max_steps"]

    def run(folder: Path, *arguments: str) -> None:
        main(["fit", *recipe[:place], str(folder), *recipe[place + 1 :], *more, *arguments])

    run(whole, "4")
    run(halves, "2")
    run(halves, "4", "--ckpt_path", "last")
    assert_same_end(whole, halves)
    state = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    kept = "uint8" in str(dtypes(state["optimizer_states"][0]["state"]))
    assert kept == ("--model.optimizer" in change)


def dtypes(state: Any) -> Any:
    """Return the dtypes of all tensors of a nested state."""
    if isinstance(state, dict):
        return [dtypes(inner) for inner in state.values()]
    return state.dtype if torch.is_tensor(state) else None


@pytest.mark.parametrize(
    "config",
    [
        AdamW(1e-3),
        AdamW8bit(1e-3, least_size=1000),
        Lion8bit(1e-3, least_size=1000),
        Adafactor(0.1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_states_take_as_many_bytes_as_foretold(config: OptimizerConfig) -> None:
    parameters = [*weights(), torch.nn.Parameter(torch.zeros(8, 4, 3, 3))]
    optimizer = config.build(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in parameters:
        kept = [v for v in optimizer.state[p].values() if torch.is_tensor(v) and v.dim()]
        kept = [v for v in kept if v.shape != (256,)]  # bitsandbytes' tables, shared by all
        assert sum(v.numel() * v.element_size() for v in kept) == config.state_bytes(p)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match=r"pip install lit-prefopt\[bitsandbytes\]"):
        AdamW8bit(1e-3).build(weights())
