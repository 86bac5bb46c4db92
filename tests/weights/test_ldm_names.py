"""Layer names at the real sizes (on the meta device, hence without weights)."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.utils import convert_unet_state_dict_to_peft

from lit_prefopt import families
from lit_prefopt.families.ldm_names import unet_names
from lit_prefopt.weights.component_files import original_state
from lit_prefopt.weights.lora_files import flat_name

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SD1 = {"cross_attention_dim": 768}
SD2 = {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
KNOWN = {
    "sd1": {
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
        "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
    },
    "sd2": {
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.1.proj_out.weight": (320, 320),
    },
    "sdxl": {
        "label_emb.0.0.weight": (1280, 2816),
        "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "out.2.weight": (4, 320, 3, 3),
    },
}
"""What stands in the released files."""


@pytest.mark.parametrize(("name", "config"), [("sd1", SD1), ("sd2", SD2), ("sdxl", SDXL)])
def test_unet_of_real_size(name: str, config: dict[str, object]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    original = original_state(unet, families.SD1.denoiser)
    shapes = {key.removeprefix(UNET): tuple(tensor.shape) for key, tensor in original.items()}
    assert KNOWN[name].items() <= shapes.items()
    back = convert_ldm_unet_checkpoint(original, unet.config)
    state = unet.state_dict()
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}


def test_vae_of_real_size() -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "latent_channels": 4}
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            up_block_types=("UpDecoderBlock2D",) * 4,
            **blocks,
        )
    full = original_state(vae, families.SD1.vae)
    original = {key.removeprefix(VAE): tensor for key, tensor in full.items()}
    assert original["decoder.mid.attn_1.proj_out.weight"].shape == (512, 512, 1, 1)
    assert original["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert original["encoder.down.2.block.1.conv2.weight"].shape == (512, 512, 3, 3)
    back = convert_ldm_vae_checkpoint(full, vae.config)
    state = vae.state_dict()
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}


def test_diffusers_reads_sdxl_layers_in_the_original_spelling() -> None:
    """At the real size its reading has more blocks to count than a tiny model has."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    names = unet_names(name for name, _ in unet.named_modules())
    attention = [n for n in names if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert len(attention) == 70 * 8
    assert "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_q" in attention
    half = torch.ones(1, 1)
    kohya = {
        f"lora_unet_{flat_name(names[name])}.lora_{side}.weight": half
        for name in attention
        for side in ("down", "up")
    }
    read, _ = StableDiffusionXLPipeline.lora_state_dict(kohya, unet_config=unet.config)
    read = convert_unet_state_dict_to_peft(read)
    expected = {f"unet.{name}.lora_{side}.weight" for name in attention for side in "AB"}
    assert {key.replace(".processor", "") for key in read} == expected
