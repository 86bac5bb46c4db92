"""Original names of Stable Diffusion 3 and 3.5 at the real sizes, on the meta device."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    infer_diffusers_model_type,
)

from lit_prefopt.families import SD3
from lit_prefopt.weights.component_files import original_state
from tests.helpers.tiny_sd3 import SD35, tiny_sd3_transformer, tiny_sd3_vae

MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SIZES = {
    "sd3": MEDIUM,
    "sd35_medium": MEDIUM
    | {
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
        "pos_embed_max_size": 384,
    },
    "sd35_large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
START = "model.diffusion_model."


@pytest.mark.parametrize("size", SIZES)
def test_diffusers_recognises_and_reads_the_real_sizes(size: str) -> None:
    with torch.device("meta"):
        network = SD3Transformer2DModel(**SIZES[size])
    original = original_state(network, SD3.denoiser)
    last = SIZES[size]["num_layers"] - 1
    assert f"{START}joint_blocks.{last}.context_block.attn.proj.weight" not in original
    width = SIZES[size]["caption_projection_dim"]
    qkv = original[f"{START}joint_blocks.{last}.context_block.attn.qkv.weight"]
    assert qkv.shape == (3 * width, width)
    assert infer_diffusers_model_type(original) == size
    back = convert_sd3_transformer_checkpoint_to_diffusers(original)
    state = network.state_dict()
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("changes", [{}, SD35, {"qk_norm": "rms_norm"}])
def test_diffusers_reads_every_tensor_back(changes: dict[str, object]) -> None:
    network = tiny_sd3_transformer(num_layers=3, **changes)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    back = convert_sd3_transformer_checkpoint_to_diffusers(original_state(network, SD3.denoiser))
    assert back.keys() == state.keys()
    assert [key for key in state if not torch.equal(back[key], state[key])] == []


def test_diffusers_reads_the_vae_back() -> None:
    vae: AutoencoderKL = tiny_sd3_vae(mid_block_add_attention=True)
    back = convert_ldm_vae_checkpoint(original_state(vae, SD3.vae), vae.config)
    state = vae.state_dict()
    assert back.keys() == state.keys()
    assert [key for key in state if not torch.equal(back[key], state[key])] == []
