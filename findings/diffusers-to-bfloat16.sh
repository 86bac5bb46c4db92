#!/usr/bin/env bash
# `pipeline.to(torch.bfloat16)` is not the pipeline loaded in bfloat16: its prompts are others.
#
# Versions and date: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0; 2026-11-30.
# One would guess: a float32 pipeline cast by `.to(torch.bfloat16)` computes what
#   `from_pretrained(folder, dtype=torch.bfloat16)` does; its weights are equal to the last bit.
# What happens: `.to` casts buffers as well, and the rotary frequencies of a language model are a
#   buffer that loading leaves in float32. Rounded to 8 bits, they turn later tokens by angles that
#   are off by up to 0.2 per cent of the position: the embeddings of a prompt differ, and the more
#   the longer it is. No warning names it; the one that is given (modules "that should be kept in
#   float32: []") lists none.
# Why it matters: this runs Qwen-Image; other pipelines with a language model as text encoder have
#   the same buffer. Prompts cached by a script that casts are not those of a pipeline that loads:
#   here 800 letters have an error of 4.0 per cent, and of 2.6 per cent loaded in bfloat16.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0
cd "$work"
venv/bin/python - <<'PY'
import sys

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

torch.manual_seed(0)
words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
text = {
    "vocab_size": len(words),
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
vision = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [0],
}
encoder = Qwen2_5_VLForConditionalGeneration(
    Qwen2_5_VLConfig(text_config=text, vision_config=vision)
).to(torch.bfloat16)  # published weights are in bfloat16
QwenImagePipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1),
    text_encoder=encoder,
    tokenizer=tokenizer,
    transformer=QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(8, 4, 4),
    ),
).save_pretrained("tiny")


def loaded(dtype):
    return QwenImagePipeline.from_pretrained("tiny", dtype=dtype)


@torch.no_grad()
def embedded(pipeline, prompt):
    return pipeline.encode_prompt(prompt)[0].float()


own, cast, exact = loaded(torch.bfloat16), loaded(torch.float32).to(torch.bfloat16), loaded(torch.float32)
weights, others = own.text_encoder.state_dict(), cast.text_encoder.state_dict()
equal = all(torch.equal(weights[name], others[name]) for name in weights)
print(
    f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
    f"torch {torch.__version__}"
)
print(f"all weights of both text encoders are equal: {equal}")
buffers = {
    kind: pipeline.text_encoder.model.language_model.rotary_emb.inv_freq
    for kind, pipeline in (("loaded", own), ("cast", cast))
}
print("rotary frequencies:", {kind: str(x.dtype) for kind, x in buffers.items()})
grows = []
for length in (20, 200, 800):
    prompt = ("a red cube left of a blue ball, " * 30)[:length]
    true = embedded(exact, prompt)
    errors = [(embedded(pipeline, prompt) - true).norm() / true.norm() for pipeline in (own, cast)]
    print(f"prompt of {length:3} letters: relative error of loaded {errors[0]:.4f}, of cast {errors[1]:.4f}")
    grows.append(float(errors[1] / errors[0]))
same = equal and buffers["cast"].dtype == torch.bfloat16 and buffers["loaded"].dtype == torch.float32
same = same and grows[-1] > 1.3
print("as seen" if same else "changed: frequencies were rounded by `.to`, and prompts differed")
sys.exit(not same)
PY
