#!/usr/bin/env bash
# A pipeline saved in float16 loads with a float16 text encoder beside a float32 UNet.
#
# Versions and date: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0; 2026-11-30.
# One would guess: from_pretrained without a dtype gives one dtype to all parts, float32 as
#   torch's default, or the file's; the pipeline runs.
# What happens: parts of diffusers (UNet, VAE) become float32, parts of transformers (text
#   encoder) keep the dtype of their file. The first call ends in a dtype error. Naming
#   torch_dtype cures it.
# Why it matters: fine-tuned pipelines are often saved in float16 to halve the file. A training
#   script that loads part after part under autocast sees no error at all: its text encoder has
#   the file's rounded weights in float16, and would be trained in float16 where it is trained.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0
cd "$work"
venv/bin/python - 2> stderr.log <<'PY' || { code=$?; tail -n 5 stderr.log >&2; exit "$code"; }
import json
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# a tokenizer that spells words letter by letter
letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
Path("vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
Path("merges.txt").write_text("#version: 0.2\n")
tokenizer = CLIPTokenizer("vocab.json", "merges.txt", model_max_length=16)
text_encoder = CLIPTextModel(
    CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
)
vae = AutoencoderKL(
    block_out_channels=(8, 8, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=4,
    sample_size=32,
)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
StableDiffusionPipeline(
    vae=vae,
    text_encoder=text_encoder,
    tokenizer=tokenizer,
    unet=unet,
    scheduler=DDIMScheduler(),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
).to(torch.float16).save_pretrained("saved")


def load(**options):
    """Return the dtypes of the loaded parts and what the first call gives."""
    pipeline = StableDiffusionPipeline.from_pretrained("saved", **options)
    dtypes = {name: getattr(pipeline, name).dtype for name in ("text_encoder", "unet", "vae")}
    try:
        outcome = str(pipeline("a cat", num_inference_steps=1, output_type="np").images.shape)
    except RuntimeError as error:
        outcome = f"RuntimeError: {error}"
    return dtypes, outcome


print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
      f"torch {torch.__version__}")
plain, error = load()
named, images = load(torch_dtype=torch.float32)
print(f"from_pretrained(folder): {plain}\n  first call: {error}")
print(f"from_pretrained(folder, torch_dtype=torch.float32): {named}\n  first call: {images}")
half, single = torch.float16, torch.float32
same = (
    plain == {"text_encoder": half, "unet": single, "vae": single}
    and "same dtype" in error
    and set(named.values()) == {single}
    and images == "(1, 32, 32, 3)"
)
print("as seen" if same else "changed: the text encoder was float16, the rest float32")
sys.exit(not same)
PY
