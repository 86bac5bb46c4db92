"""What Stable Diffusion 3 hands to its networks against the stock pipeline, by recording both."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from lit_prefopt.backbones import StableDiffusion3
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.processes.settings import Sampling
from tests.helpers.recorder import Recorder, first_difference, parts_of
from tests.helpers.tiny_sd3 import load_stock_sd3

STEPS = 4
TEXTS = ["a cat", "A red cube, left of a blue ball; 35mm", "x " * 300]


@pytest.fixture(
    scope="module",
    params=["tiny_sd3_folder", "tiny_sd35_folder", "tiny_sd35_without_t5_folder"],
)
def folder(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def stock(folder: str) -> StableDiffusion3Pipeline:
    return load_stock_sd3(folder)


@pytest.fixture(scope="module")
def backbone(folder: str) -> StableDiffusion3:
    return StableDiffusion3(folder, t5="without" not in folder)


def our_parts(backbone: StableDiffusion3) -> dict[str, tuple[object, str]]:
    return {
        "transformer": (backbone.policy.denoiser, "forward"),
        "vae.decode": (backbone.vae, "decode"),
    }


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "several"])
def test_the_transformer_gets_what_the_stock_pipeline_gives(
    backbone: StableDiffusion3,
    stock: StableDiffusion3Pipeline,
    texts: list[str],
    guidance: float,
) -> None:
    seeds = torch.arange(5, 5 + len(texts))
    how = Sampling(steps=STEPS, guidance=guidance, batch_size=len(texts))
    with Recorder(our_parts(backbone)) as ours:
        images = sample(backbone, texts, seeds, how)
    with Recorder(parts_of(stock)) as theirs:
        expected = stock(
            texts,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            latents=draws.normal(seeds, (16, 8, 8), "start"),
            output_type="pt",
            height=32,
            width=32,
        ).images
    ours.calls = [c for c in ours.calls]
    assert len(ours.of("transformer")) == STEPS
    assert ours.of("transformer")[0].arguments["timestep"].dtype == torch.float32
    print(len(theirs.of("transformer")))
    for a, b in zip(ours.of("transformer"), theirs.of("transformer")):
        for k in a.arguments:
            x, y = a.arguments[k], b.arguments[k]
            if isinstance(x, torch.Tensor): print(k, x.dtype, y.dtype, x.shape == y.shape, torch.equal(x, y), (x-y).abs().max())
            else: print(k,x,y)
    torch.testing.assert_close((images + 1) / 2, expected, atol=1e-5, rtol=0)
