#!/usr/bin/env bash
# prompt_3="" gives T5 the whole prompt, and prompt_3=[""] gives it none.
#
# Versions and date: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0; 2026-11-30.
# One would guess: StableDiffusion3Pipeline(prompt, prompt_3="") gives T5 the empty text, as
#   prompt_3=" " gives it a blank; "if not defined, prompt is used" is said of None.
# What happens: `prompt_3 or prompt` takes an empty string for none, so T5 reads the prompt. The
#   same text in a list, [""], is taken as it is. So are prompt_2 and the negative prompts, there
#   and in the pipelines of SDXL and FLUX.
# Why it matters: SD3 was trained with each text encoder left out at times, and prompt_3="" is what
#   one writes to see or to train what T5 adds. Both columns of such a comparison are the same
#   image, and a code that turns a list of one into a string changes the result.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0
cd "$work"
venv/bin/python - 2> stderr.log <<'PY' || { code=$?; tail -n 5 stderr.log >&2; exit "$code"; }
import json
import string
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

# tokenizers that spell words letter by letter
letters = list(string.ascii_lowercase + string.digits)
words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
Path("vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
Path("merges.txt").write_text("#version: 0.2\n")
clip = CLIPTokenizer("vocab.json", "merges.txt", model_max_length=77)
pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
pieces += [(letter, -3.0) for letter in letters]
t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def clip_encoder():
    """Return a CLIP text encoder with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


torch.manual_seed(0)
pipeline = StableDiffusion3Pipeline(
    transformer=None,
    scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    vae=None,
    text_encoder=clip_encoder(),
    tokenizer=clip,
    text_encoder_2=clip_encoder(),
    tokenizer_2=clip,
    text_encoder_3=T5EncoderModel(
        T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    ).eval(),
    tokenizer_3=t5,
)


@torch.no_grad()
def embedded(prompt_3, **options):
    """Return the embedded prompt and the embedded negative prompt."""
    prompt, negative, *_ = pipeline.encode_prompt("a red cat", None, prompt_3, **options)
    return prompt, negative


print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
      f"torch {torch.__version__}")
given, negative = embedded(None)
empty_string, _ = embedded("")
empty_list, _ = embedded([""])
blank, _ = embedded(" ")
found = {
    '""': torch.equal(empty_string, given),
    '[""]': torch.equal(empty_list, given),
    '" "': torch.equal(blank, given),
}
for name, equal in found.items():
    print(f"prompt_3={name}: T5 reads {'the prompt' if equal else 'another text'}")
_, other = embedded(None, negative_prompt="blurry", negative_prompt_3="")
_, same_list = embedded(None, negative_prompt="blurry", negative_prompt_3=[""])
_, blurry = embedded(None, negative_prompt="blurry")
print(f"negative_prompt_3=\"\": T5 reads "
      f"{'the negative prompt' if torch.equal(other, blurry) else 'another text'}")
print(f"negative_prompt_3=[\"\"]: T5 reads "
      f"{'the negative prompt' if torch.equal(same_list, blurry) else 'another text'}")

same = found == {'""': True, '[""]': False, '" "': False}
same = same and torch.equal(other, blurry) and not torch.equal(same_list, blurry)
same = same and torch.equal(empty_list[:, 77:], negative[:, 77:])
print("as seen" if same else 'changed: "" was the prompt and [""] was empty')
sys.exit(not same)
PY
