"""Small FLUX.2 klein pipelines in diffusers' layout, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Of the form of Qwen3's own: an answer without reasoning begins with an empty thought."""

SCHEDULER = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def tiny_qwen_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer that spells byte by byte, with Qwen's special tokens.

    Args:
        template: The chat template.
    """
    words = [*sorted(ByteLevel.alphabet()), *SPECIAL]
    spelled = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    spelled.pre_tokenizer = ByteLevel(add_prefix_space=False)
    spelled.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=spelled,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=[*SPECIAL[1:]],
        chat_template=template,
        model_max_length=1024,
    )


def tiny_qwen(tokenizer: PreTrainedTokenizerFast, layers: int = 28) -> Qwen3ForCausalLM:
    """Return a Qwen3 of width 16, of which hidden state 27 is not the last.

    Args:
        tokenizer: Its tokenizer.
        layers: Number of layers.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )
    return Qwen3ForCausalLM(config)


def tiny_flux2_transformer(**changes: object) -> Flux2Transformer2DModel:
    """Return a transformer of one double and two single blocks."""
    config = {
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return Flux2Transformer2DModel(**config | changes)


def tiny_flux2_vae(**changes: object) -> AutoencoderKLFlux2:
    """Return a VAE of 32 channels, 8 pixels to a latent, with statistics other than 0 and 1."""
    config = {
        "block_out_channels": (4, 4, 4, 4),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
        "sample_size": 32,
    }
    vae = AutoencoderKLFlux2(**config | changes)
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def tiny_flux2_pipeline(
    folder: Path,
    distilled: bool = False,
    template: str | None = TEMPLATE,
    layers: int = 28,
    **transformer: object,
) -> Path:
    """Write a whole FLUX.2 klein pipeline and return its folder.

    Args:
        folder: Where to write.
        distilled: Whether it is marked as distilled, as the models without "base" are.
        template: The tokenizer's chat template.
        layers: Number of layers of the text encoder.
        **transformer: Changes to the transformer.
    """
    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer(template)
    Flux2KleinPipeline(
        vae=tiny_flux2_vae(),
        text_encoder=tiny_qwen(tokenizer, layers),
        tokenizer=tokenizer,
        transformer=tiny_flux2_transformer(**transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        is_distilled=distilled,
    ).save_pretrained(folder)
    return folder
