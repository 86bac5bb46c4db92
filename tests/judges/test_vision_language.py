"""A vision-language judge on a small LLaVA with random weights, its processor and its template."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lit_prefopt.errors import InputError
from lit_prefopt.judges import VisionLanguage

TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)
ASKED = "USER : ASSISTANT Does this figure show Please answer yes or no Yes No"
WORDS = [*ASKED.split(), *'"?.', "a", "cat", "dog", "in", "the", "rain", "sea"]
TEXTS = ["a cat", "a dog in the rain", "the sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA of two layers."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    numbers = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    plain = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 32, "width": 32}
    look = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    LlavaProcessor(
        look,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, num_hidden_layers=2, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **small, num_hidden_layers=2, vocab_size=len(numbers), initializer_range=0.3
        ),
        image_token_index=numbers["<image>"],
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def test_it_is_the_log_odds_of_the_first_token(folder: str) -> None:
    judge = VisionLanguage(folder, dtype="float32", batch_size=2)
    judge.prepare()
    bytes_ = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    images = torch.from_numpy(bytes_).permute(0, 3, 1, 2) / 127.5 - 1
    scores = judge.score(images, TEXTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    for i, text in enumerate(TEXTS):
        asked = f'USER: <image> Does this figure show "{text}"? Please answer yes or no. ASSISTANT:'
        one = processor(images=Image.fromarray(bytes_[i]), text=asked, return_tensors="pt")
        with torch.no_grad():
            logp = model(**one).logits[0, -1].log_softmax(-1)
        yes, no = processor.tokenizer.convert_tokens_to_ids(["Yes", "No"])
        torch.testing.assert_close(scores[i], logp[yes] - logp[no], atol=1e-4, rtol=1e-4)
    assert scores.std() > 1e-3
    assert judge.settings()["versions"][folder].startswith("sha256:")


def test_bad_input_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not contain the prompt: write \{text\}"):
        VisionLanguage(folder, question="Is it nice?")
    with pytest.raises(InputError, match=r"'Yes' and 'Yes' have the same first token"):
        VisionLanguage(folder, denied="Yes", dtype="float32").prepare()
    with pytest.raises(InputError, match=r"nowhere has no vision-language model"):
        VisionLanguage(str(tmp_path / "nowhere")).prepare()
    LlavaProcessor.from_pretrained(folder).tokenizer.save_pretrained(tmp_path)
    LlavaConfig.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no vision-language model"):
        VisionLanguage(str(tmp_path)).prepare()
