#!/usr/bin/env bash
# SD3 warns that T5 lost a part of the prompt which T5 read, and is silent about where it was cut.
#
# Versions and date: diffusers 0.42.1, transformers 5.23.0, torch 2.13.0; 2026-11-30.
# One would guess: "The following part of your input was truncated because `max_sequence_length`
#   is set to 256 tokens: [...]" quotes what comes after the first 256 tokens.
# What happens: it quotes what comes after CLIP's first 76 tokens (`tokenizer_max_length`). Of a
#   prompt of 66 words, 265 tokens, the warning names 46 words as lost, 43 of which T5 has read.
#   FluxPipeline has the same line, with 512 tokens in the place of 256.
# Why it matters: long captions are what T5 is there for. Whoever shortens prompts, filters a data
#   set or chooses max_sequence_length by this message throws away text that the model reads, and
#   cannot see where its reading ends.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 \
    transformers==5.23.0 accelerate==1.15.0
cd "$work"
venv/bin/python - 2> stderr.log <<'PY' || { code=$?; tail -n 5 stderr.log >&2; exit "$code"; }
import json
import logging
import re
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


class Messages(logging.Handler):
    """Keeps the messages of a logger."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


messages = Messages()
logging.getLogger("diffusers").addHandler(messages)
print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
      f"torch {torch.__version__}")
prompt = " ".join(f"w{i:02d}" for i in range(66))  # a blank's sign and three letters
ids = t5(prompt).input_ids
read = t5.decode(t5(prompt, max_length=256, truncation=True).input_ids, skip_special_tokens=True)
pipeline.encode_prompt(prompt, None, None)
(message,) = [text for text in messages.texts if "max_sequence_length" in text]
quoted = re.search(r"\['(.*)'\]", message)[1]
known = quoted.split()[1:]  # the first may be cut
lost = [word for word in prompt.split() if word not in read.split()]
wrong = [word for word in known if word in read.split()]
print(f"a prompt of {len(prompt.split())} words, {len(ids)} tokens; T5 reads words up to "
      f"{read.split()[-1]}")
print(f"the warning: {message[:150]}...")
print(f"it quotes {len(known)} words, of which T5 has read {len(wrong)}")

same = known[0] == "w20" and (len(known), len(wrong)) == (46, 43) and set(lost) <= set(known)
print("as seen" if same else "changed: the warning began with the words after CLIP's 76 tokens")
sys.exit(not same)
PY
