"""HPSv2, the aesthetic predictor and CLIPScore: published layouts against independent models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from lit_prefopt.errors import InputError
from lit_prefopt.judges import Aesthetic, CLIPScore, HPSv2
from lit_prefopt.judges.hps import from_open_clip
from lit_prefopt.judges.pixels import pad_to_square
from tests.helpers.published import (
    head_weights,
    open_clip_model,
    open_clip_weights,
    small_clip_config,
)

TEXTS = ["a cat", "a dog in the rain", "the sea"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP's architecture, tokenizer and image processor, without weights."""
    return str(small_clip_config(tmp_path_factory.mktemp("hps")))


def pictures(*size: int) -> torch.Tensor:
    return torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_scores_are_those_of_open_clip(small: str, tmp_path: Path) -> None:
    theirs = open_clip_model()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "HPS.pt")
    assert not any(name.split(".")[0] in ("open_clip", "torchvision") for name in sys.modules)
    judge = HPSv2(str(tmp_path / "HPS.pt"), pretrained=small, batch_size=2)
    images = pictures(32, 32)
    pixels = judge.pixels(images)
    tokens = judge.tokenizer(TEXTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        image, text = theirs.encode_image(pixels, True), theirs.encode_text(tokens, True)
    torch.testing.assert_close(
        judge.score(images, TEXTS), 100 * (image * text).sum(1), atol=1e-4, rtol=1e-4
    )
    # and the places in the common space themselves, which a cosine may hide
    ours = F.normalize(judge.image_features(images, None), dim=-1)
    torch.testing.assert_close(ours, image, atol=1e-4, rtol=0)
    ours = F.normalize(judge.text_features(TEXTS, images.device), dim=-1)
    torch.testing.assert_close(ours, text, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["nested.pt", "bare.pt", "half.pt", "bare.safetensors"])
def test_published_layout(small: str, tmp_path: Path, form: str) -> None:
    state, file = open_clip_weights(), tmp_path / form
    if form.startswith("half"):
        state = {name: value.half() for name, value in state.items()}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if form.startswith("nested") else state, file)
    judge = HPSv2(str(file), pretrained=small)
    judge.prepare()
    loaded = judge.clip.state_dict()
    assert set(loaded) == set(from_open_clip(state))
    fused = state["visual.transformer.resblocks.1.attn.in_proj_weight"].float()
    layer = "vision_model.encoder.layers.1.self_attn"
    ours = torch.cat([loaded[f"{layer}.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(ours, fused)
    assert judge.score(pictures(40, 24), TEXTS).isfinite().all()


def test_the_longer_side_counts_and_the_rest_is_black() -> None:
    bytes_ = np.random.default_rng(0).integers(0, 256, (20, 44, 3), np.uint8)
    images = torch.from_numpy(bytes_).permute(2, 0, 1)[None] / 127.5 - 1
    seen = pad_to_square(images, 22)
    assert seen.shape == (1, 3, 22, 22)
    assert not seen[..., :6, :].any()
    assert not seen[..., 16:, :].any()
    theirs = np.asarray(Image.fromarray(bytes_).resize((22, 10), Image.Resampling.BICUBIC)) / 255
    ours = seen[0, :, 6:16].clamp(0, 1).permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() < 1e-2  # PIL rounds to bytes on its way
    assert pad_to_square(images, 22, antialias=False).sub(seen).abs().max() > 0.05
    assert torch.equal(pad_to_square(images[..., :20], 20), (images[..., :20] + 1) / 2)


def test_what_is_no_hps_is_refused(small: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no file .*none.pt: name the weights, which hu"):
        HPSv2(str(tmp_path / "none.pt"), pretrained=small).prepare()
    with pytest.raises(
        InputError, match=r"HPS_v2_compressed.pt of huggingface.co/xswu/HPSv2 is not"
    ):
        HPSv2(version="v2", pretrained=small).prepare()
    state = open_clip_weights()
    del state["ln_final.bias"]
    torch.save(state, tmp_path / "without.pt")
    with pytest.raises(InputError, match=r"final_layer_norm.bias is missing and should be \(32,\)"):
        HPSv2(str(tmp_path / "without.pt"), pretrained=small).prepare()
    deeper = open_clip_weights()
    deeper["transformer.resblocks.2.ln_1.bias"] = torch.zeros(32)
    torch.save(deeper, tmp_path / "deeper.pt")
    with pytest.raises(InputError, match=r"layer_norm1.bias is \(32,\) and should be absent"):
        HPSv2(str(tmp_path / "deeper.pt"), pretrained=small).prepare()
    (tmp_path / "broken.pt").write_bytes(b"PK" + bytes(100))
    with pytest.raises(InputError, match=r"broken.pt cannot be read as weights"):
        HPSv2(str(tmp_path / "broken.pt"), pretrained=small).prepare()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match=r"list.pt cannot be read as weights"):
        HPSv2(str(tmp_path / "list.pt"), pretrained=small).prepare()
    torch.save(open_clip_weights(), tmp_path / "whole.pt")
    with pytest.raises(InputError, match=r"nowhere has no CLIP"):
        HPSv2(str(tmp_path / "whole.pt"), pretrained=str(tmp_path / "nowhere")).prepare()


def test_facts_name_the_weights(small: str, tmp_path: Path) -> None:
    torch.save(open_clip_weights(), tmp_path / "a.pt")
    facts = HPSv2(str(tmp_path / "a.pt"), pretrained=small).settings()
    assert (facts["class"], facts["antialias"]) == ("HPSv2", True)
    [(name, first)] = facts["versions"].items()
    assert name == str(tmp_path / "a.pt")
    assert first.startswith("sha256:")
    torch.save(open_clip_weights(), tmp_path / "a.pt")  # other random numbers
    [second] = HPSv2(str(tmp_path / "a.pt"), pretrained=small).versions().values()
    assert second.startswith("sha256:")
    assert second != first
    assert HPSv2(pretrained=small).versions() == {"xswu/HPSv2/HPS_v2.1_compressed.pt": None}


def test_the_commit_is_that_of_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache as the hub's client writes it."""
    home = tmp_path / "models--xswu--HPSv2"
    snapshot = home / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(snapshot.name)
    (snapshot / "HPS_v2.1_compressed.pt").write_bytes(b"x")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert HPSv2().versions() == {"xswu/HPSv2/HPS_v2.1_compressed.pt": f"commit:{snapshot.name}"}


def test_aesthetic_is_open_clips_tower_and_five_layers(tmp_path: Path) -> None:
    theirs = open_clip_model("quick_gelu")  # as OpenAI's ViT-L/14 has it
    folder = small_clip_config(tmp_path / "clip", "quick_gelu")
    save_file(
        {k: v.contiguous() for k, v in from_open_clip(theirs.state_dict()).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    head = head_weights(24)
    torch.save(head, tmp_path / "head.pth")
    judge = Aesthetic(str(tmp_path / "head.pth"), str(folder), batch_size=2)
    judge.prepare()
    images = pictures(32, 32)
    with torch.no_grad():
        x = theirs.encode_image(judge.pixels(images), True)
    for number in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{number}.weight"].T + head[f"layers.{number}.bias"]
    scores = judge.score(images, TEXTS)
    torch.testing.assert_close(scores, x[:, 0], atol=1e-4, rtol=1e-4)
    assert torch.equal(judge.score(images, ["another"] * 3), scores)
    assert len(judge.settings()["versions"]) == 2


def test_a_head_of_another_clip_is_refused(tiny_clip_folder: str, tmp_path: Path) -> None:
    torch.save(head_weights(16), tmp_path / "head.pth")
    with pytest.raises(InputError, match=r"does not fit an aesthetic predictor of this CLIP"):
        Aesthetic(str(tmp_path / "head.pth"), tiny_clip_folder).prepare()
    with pytest.raises(InputError, match=r"aesthetic-model.pth of huggingface.co/trl-lib"):
        Aesthetic(pretrained=tiny_clip_folder).prepare()


def test_clip_score_is_that_of_torchmetrics(tiny_clip_folder: str) -> None:
    judge = CLIPScore(tiny_clip_folder)
    bytes_ = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    scores = judge.score(bytes_ / 127.5 - 1, TEXTS)

    class Told(CLIPModel):
        """torchmetrics 1.9 expects tensors of transformers before version 5."""

        def get_image_features(self, *args: torch.Tensor) -> torch.Tensor:
            return super().get_image_features(*args).pooler_output

        def get_text_features(self, *args: torch.Tensor) -> torch.Tensor:
            return super().get_text_features(*args).pooler_output

    def parts() -> tuple[CLIPModel, CLIPProcessor]:
        look = CLIPImageProcessor.from_pretrained(tiny_clip_folder)
        return Told.from_pretrained(tiny_clip_folder), CLIPProcessor(look, judge.tokenizer)

    for i in range(3):  # of one image, its mean is its score
        theirs = clip_score(bytes_[i], TEXTS[i], parts)
        torch.testing.assert_close(scores[i], theirs, atol=1e-3, rtol=1e-4)
    assert (scores >= 0).all()
    below = judge.logits(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]))
    assert below.item() == 0
