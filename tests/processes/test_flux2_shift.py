"""The shift of FLUX.2's noise levels against that of its stock pipeline."""

from __future__ import annotations

import pytest
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from lit_prefopt.processes.flow_shift import flux2_shift

TOKENS = (4, 256, 1024, 2304, 4000, 4096, 4300, 4301, 9216, 16384)


@pytest.mark.parametrize("steps", [1, 4, 10, 28, 50, 200])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_shift_of_the_stock_pipeline(tokens: int, steps: int) -> None:
    assert flux2_shift({}, tokens, steps) == compute_empirical_mu(tokens, steps)


def test_known_values() -> None:
    """4096 tokens are 1024 x 1024 pixels; above 4300 the steps do not count, and it jumps."""
    found = [flux2_shift({}, 4096, steps) for steps in (4, 28, 50)]
    assert found == pytest.approx([2.2912, 2.1514, 2.0234], abs=5e-5)
    assert flux2_shift({}, 4300, 50) == pytest.approx(2.0447, abs=5e-5)
    assert flux2_shift({}, 4301, 50) == pytest.approx(1.1847, abs=5e-5)
    assert flux2_shift({}, 4301, 4) == flux2_shift({}, 4301, 50)
