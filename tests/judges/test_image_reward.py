"""ImageReward against a restatement of its layout in plain functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizer

from lit_prefopt.errors import InputError
from lit_prefopt.judges import ImageReward
from tests.helpers.published import WORDS, image_reward_weights

TEXTS = ["a cat", "a dog in the rain", "the sea"]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT tokenizer of letters."""
    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "cat", "##o", "##e"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def norm(s: State, name: str, x: Tensor, eps: float) -> Tensor:
    apart = x - x.mean(-1, keepdim=True)
    scaled = apart / (apart.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * s[f"{name}.weight"] + s[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of one sample (N, D) with heads of 64."""
    heads = []
    for part in range(q.shape[-1] // 64):
        some = slice(64 * part, 64 * part + 64)
        weights = q[:, some] @ k[:, some].T / 8
        if mask is not None:
            weights = weights.masked_fill(mask == 0, -torch.inf)
        heads.append(weights.softmax(-1) @ v[:, some])
    return torch.cat(heads, -1)


def tower(s: State, pixels: Tensor) -> Tensor:
    """The tokens (N, D) of one image (3, S, S)."""
    place = "blip.visual_encoder"
    patches = F.unfold(pixels[None], 16, stride=16)[0].T  # (N, 3 * 16 * 16)
    flat = s[f"{place}.patch_embed.proj.weight"].flatten(1)
    x = patches @ flat.T + s[f"{place}.patch_embed.proj.bias"]
    x = torch.cat([s[f"{place}.cls_token"][0], x]) + s[f"{place}.pos_embed"][0]
    for n in range(2):
        block = f"{place}.blocks.{n}"
        q, k, v = linear(s, f"{block}.attn.qkv", norm(s, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(s, f"{block}.attn.proj", attend(q, k, v))
        y = F.gelu(linear(s, f"{block}.mlp.fc1", norm(s, f"{block}.norm2", x, 1e-6)))
        x = x + linear(s, f"{block}.mlp.fc2", y)
    return norm(s, f"{place}.norm", x, 1e-6)


def reward(s: State, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    seen, place = tower(s, pixels), "blip.text_encoder"
    x = s[f"{place}.embeddings.word_embeddings.weight"][ids]
    x = x + s[f"{place}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(s, f"{place}.embeddings.LayerNorm", x, 1e-12)
    for n in range(2):
        layer = f"{place}.encoder.layer.{n}"
        for kind, other, visible in (("attention", None, mask), ("crossattention", seen, None)):
            source = x if other is None else other
            q = linear(s, f"{layer}.{kind}.self.query", x)
            k, v = (linear(s, f"{layer}.{kind}.self.{name}", source) for name in ("key", "value"))
            y = linear(s, f"{layer}.{kind}.output.dense", attend(q, k, v, visible))
            x = norm(s, f"{layer}.{kind}.output.LayerNorm", x + y, 1e-12)
        y = F.gelu(linear(s, f"{layer}.intermediate.dense", x))
        y = linear(s, f"{layer}.output.dense", y)
        x = norm(s, f"{layer}.output.LayerNorm", x + y, 1e-12)
    x = x[0]
    for number in (0, 2, 4, 6, 7):
        x = linear(s, f"mlp.layers.{number}", x)
    return (x[0] - 0.16717362830052426) / 1.0333394966054072


def test_scores_are_those_of_its_layout(words: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = image_reward_weights()
    torch.save(state, tmp_path / "ImageReward.pt")
    judge = ImageReward(str(tmp_path / "ImageReward.pt"), words, batch_size=2)
    judge.prepare()
    images = (torch.rand(3, 3, 32, 32) * 255).round() / 127.5 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    tokens = judge.bert_tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt")
    assert tokens.input_ids[0, 0] == judge.bert_tokenizer.cls_token_id
    expected = [
        reward(state, ((image + 1) / 2 - mean) / deviation, ids, mask)
        for image, ids, mask in zip(images, tokens.input_ids, tokens.attention_mask, strict=True)
    ]
    scores = judge.score(images, TEXTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert scores.std() > 1e-2  # they tell images and prompts apart


def test_long_prompts_are_cut(words: str, tmp_path: Path) -> None:
    torch.save(image_reward_weights(), tmp_path / "a.pt")
    judge = ImageReward(str(tmp_path / "a.pt"), words)
    image = torch.zeros(1, 3, 48, 32)
    assert torch.equal(judge.score(image, ["a " * 200]), judge.score(image, ["a " * 300]))


def test_what_is_no_image_reward_is_refused(words: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"ImageReward.pt of huggingface.co/THUDM/ImageReward is not"
    ):
        ImageReward(tokenizer=words).prepare()
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other.pt is not ImageReward \(without 'blip.visual_enc"):
        ImageReward(str(tmp_path / "other.pt"), words).prepare()
    state = image_reward_weights()
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    torch.save(state, tmp_path / "without.pt")
    with pytest.raises(InputError, match=r"crossattention.self.key.weight is missing"):
        ImageReward(str(tmp_path / "without.pt"), words).prepare()
    state = image_reward_weights()
    name = "blip.text_encoder.embeddings.word_embeddings.weight"
    state[name] = state[name][: WORDS // 2]
    torch.save(state, tmp_path / "few.pt")
    with pytest.raises(InputError, match=r"has no tokenizer .*it has 34 tokens, and the model"):
        ImageReward(str(tmp_path / "few.pt"), words).prepare()
    torch.save(image_reward_weights(), tmp_path / "whole.pt")
    with pytest.raises(InputError, match=r"nowhere has no tokenizer"):
        ImageReward(str(tmp_path / "whole.pt"), str(tmp_path / "nowhere")).prepare()
