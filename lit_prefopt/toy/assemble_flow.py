"""Assemble the toy world's flow twin: a Stable Diffusion 3 folder around the shipped VAE and CLIP.

    python -m lit_prefopt.toy.assemble_flow --transformer configs/toy/flow.json --output FOLDER

writes its start, a new transformer included, which `configs/toy/flow.yaml` trains; with the folder
of the trained transformer it writes what ships.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from jsonargparse import auto_cli
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from lit_prefopt.errors import InputError
from lit_prefopt.export.pipeline_folder import write_pipeline
from lit_prefopt.toy.backbone import CHECKPOINT, FLOW_CHECKPOINT

TEXT_LENGTH = 16
"""Tokens of a text; every caption has at most 14, and each costs as much as one of the image."""

WORDS = {"hidden_size": 64, "num_attention_heads": 2, "projection_dim": 32}
"""The second text encoder."""

SHIFT = 1.0
"""Shift of the noise levels: none. Published shifts, such as the 3 of Stable Diffusion 3, belong to
large images: the more latents, the more noise it takes to hide them."""


def clip_encoder(folder: Path) -> CLIPTextModelWithProjection:
    """Return the toy CLIP's text encoder with the identity as its projection.

    The shipped encoder has none: what Stable Diffusion 3 takes as the text's pooled vector is then
    the encoder's final state at the end of the text.
    """
    encoder = CLIPTextModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    config = CLIPTextConfig(
        **{**encoder.config.to_dict(), "projection_dim": encoder.config.hidden_size}
    )
    projected = CLIPTextModelWithProjection(config)
    state = projected.state_dict()
    state.update({f"text_model.{name}": value for name, value in encoder.state_dict().items()})
    state["text_projection.weight"] = torch.eye(config.hidden_size)
    projected.load_state_dict(state)
    return projected.eval()


def word_encoder(like: CLIPTextConfig, seed: int = 0) -> CLIPTextModelWithProjection:
    """Return a text encoder of one random layer, the second of the two that the pipeline needs.

    Its penultimate states, those that Stable Diffusion 3 takes, are token plus position embeddings:
    each word and its place, unmixed, beside what the CLIP makes of the whole text.

    Args:
        like: Configuration of the first encoder, for the vocabulary.
        seed: Seed of the weights, which are never trained.
    """
    shared = {name: getattr(like, name) for name in ("vocab_size", "max_position_embeddings")}
    ends = {name: getattr(like, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    width = WORDS["hidden_size"]
    config = CLIPTextConfig(
        **shared, **ends, **WORDS, intermediate_size=2 * width, num_hidden_layers=1
    )
    encoder = CLIPTextModelWithProjection(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if weight.ndim < 2:
                continue  # biases and norms stay at 0 and 1
            scale = 1.0 if "embedding" in name else 1 / math.sqrt(weight.shape[1])
            weight.copy_(scale * torch.randn(weight.shape, generator=draw))
    return encoder.eval()


def new_transformer(config: Path, seed: int = 0) -> SD3Transformer2DModel:
    """Return an untrained transformer that predicts 0 and whose blocks are the identity.

    diffusers draws the weights that modulate and gate each block and the last layer at random;
    trainings from scratch start them at 0 (adaLN-Zero, arXiv 2212.09748).

    Args:
        config: JSON file of the network's configuration.
        seed: Seed of the other weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(config))
    gates: list[nn.Linear] = [network.proj_out, network.norm_out.linear]
    for block in network.transformer_blocks:
        gates += [block.norm1.linear, block.norm1_context.linear]
    for layer in gates:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network


def assemble_flow(
    transformer: str, parts: str = str(CHECKPOINT), output: str = str(FLOW_CHECKPOINT)
) -> None:
    """Write a Stable Diffusion 3 pipeline without T5, in half precision if it is trained.

    Args:
        transformer: Folder of the trained transformer, or a JSON file of the configuration of a new
            one.
        parts: Folder with `vae/`, `text_encoder/` and `tokenizer/`.
        output: The pipeline's folder.
    """
    source, trained = Path(parts), Path(transformer).is_dir()
    if not trained and not Path(transformer).is_file():
        raise InputError(
            f"{transformer} is neither a folder nor a file: give the folder of a trained"
            " transformer, or configs/toy/flow.json to start a training."
        )
    denoiser = (
        SD3Transformer2DModel.from_pretrained(transformer)
        if trained
        else new_transformer(Path(transformer))
    )
    clip = clip_encoder(source / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(
        source / "tokenizer", model_max_length=TEXT_LENGTH, trust_remote_code=False
    )
    vae = AutoencoderKL.from_pretrained(source / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)  # the stock pipeline adds it, and refuses None
    pipeline = StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=word_encoder(clip.config),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    pipeline.to(dtype=torch.float16 if trained else torch.float32)
    write_pipeline(pipeline, Path(output))


if __name__ == "__main__":
    auto_cli(assemble_flow, as_positional=False)
