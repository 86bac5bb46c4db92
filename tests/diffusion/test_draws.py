from __future__ import annotations

import torch

from lit_prefopt.diffusion import draws


def test_draws_depend_on_the_seed_alone() -> None:
    seeds = torch.tensor([3, 5, 2**62 + 1])
    together = draws.normal(seeds, (4, 2, 2), "noise")
    alone = torch.cat([draws.normal(seed[None], (4, 2, 2), "noise") for seed in seeds])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


def test_purposes_are_independent() -> None:
    seeds = torch.arange(2000)
    noise, other = (draws.normal(seeds, (), purpose) for purpose in ("noise", "vae"))
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.08


def test_uniform_draws_are_uniform() -> None:
    u = draws.uniform(torch.arange(4000), "t")
    assert u.min() >= 0
    assert u.max() < 1
    shares = torch.histc(u.float(), 4, 0, 1) / len(u)
    assert (shares - 0.25).abs().max() < 0.03  # four standard deviations
