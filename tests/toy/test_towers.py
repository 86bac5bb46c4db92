from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from lit_prefopt.cli import main
from lit_prefopt.toy.clip import ToyCLIPTraining, contrastive_loss
from lit_prefopt.toy.scenes import all_scenes, parse
from lit_prefopt.toy.tokenizer import save_tokenizer, toy_tokenizer
from lit_prefopt.toy.vae import rims
from lit_prefopt.toy.web import web_pictures

CONFIGS = Path(__file__).parents[2] / "configs" / "toy"
CAPTION = "a large red triangle on the left of a black background"


def test_every_word_of_the_grammar_is_one_token(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(32)
    texts = [scene.caption() for scene in all_scenes()]
    ids = tokenizer(texts).input_ids
    assert [len(row) - 2 for row in ids] == [len(text.split()) for text in texts]
    assert max(map(len, ids)) <= 24
    assert len({tuple(row) for row in ids}) == len(texts)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == ids[0][-1]
    assert tokenizer("a zebra, übrigens").input_ids.count(tokenizer.unk_token_id) == 1
    save_tokenizer(tokenizer, tmp_path)
    read = CLIPTokenizer.from_pretrained(tmp_path)
    assert read.model_max_length == 32
    assert read(texts[:50]).input_ids == ids[:50]
    # older readers know the two other files only
    (tmp_path / "tokenizer.json").unlink()
    assert CLIPTokenizer.from_pretrained(tmp_path)(texts[:50]).input_ids == ids[:50]


def test_rims_are_where_the_objects_end() -> None:
    picture = torch.full((1, 3, 32, 32), -1.0)
    assert rims(picture).sum() == 0
    picture[:, 0, 10:20, 10:20] = 1
    found = rims(picture)[0, 0]
    assert found.sum() == 14**2 - 6**2  # two pixels to either side of the square's outline
    assert found[15, 15] == 0


def test_equal_scenes_are_no_negatives() -> None:
    logits = torch.tensor([[2.0, 5.0, 0.0], [5.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    same = torch.eye(3, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    # rows and columns 0 and 1 hold (2, 0) once the 5 is gone, the last holds (0, 0, 2)
    e2 = torch.tensor(2.0).exp()
    pair, last = -(e2 / (e2 + 1)).log(), -(e2 / (e2 + 2)).log()
    torch.testing.assert_close(contrastive_loss(logits, same), (2 * pair + last) / 3)
    one = parse("a red circle above a blue square on a white background")
    assert parse("a blue square below a red circle on a white background").upright() == one


@pytest.mark.parametrize("name", ["vae", "clip"])
def test_the_recipes_run_and_their_results_load(name: str, tmp_path: Path) -> None:
    output = tmp_path / "parts" / "vae" if name == "vae" else tmp_path / "parts"
    arguments = {
        "model.output": output,
        "data.batch_size": 4,
        "data.steps": 2,
        "data.val_steps": 1,
        "trainer.val_check_interval": 2,
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.callbacks": "null",
    }
    main(
        ["fit", "--config", str(CONFIGS / f"{name}.yaml")]
        + [f"--{key}={value}" for key, value in arguments.items()]
    )
    if name == "vae":
        vae = AutoencoderKL.from_pretrained(output)
        assert vae.config.scaling_factor > 0
        assert vae.config.scaling_factor != 0.18215
        latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode()
        assert latents.shape == (1, 4, 8, 8)
        assert vae.decode(latents).sample.shape == (1, 3, 32, 32)
        return
    tokens = CLIPTokenizer.from_pretrained(output / "tokenizer")(
        [CAPTION], padding="max_length", return_tensors="pt"
    )
    encoder = CLIPTextModel.from_pretrained(output / "text_encoder")
    clip = CLIPModel.from_pretrained(output / "clip")
    whole = clip.text_model(tokens.input_ids)
    alone = encoder(tokens.input_ids)
    assert torch.equal(whole.last_hidden_state, alone.last_hidden_state)
    # the pooled output is the end token's
    length = len(CAPTION.split()) + 1
    assert torch.equal(alone.pooler_output, alone.last_hidden_state[:, length])


def test_a_few_steps_lower_the_contrastive_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ToyCLIPTraining(hidden=32, layers=1, patch=8, length=16)
    monkeypatch.setattr(model, "log", lambda *args, **more: None)  # there is no trainer
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batch = web_pictures(0, 16, seed=1)
    losses = []
    for _ in range(15):
        loss = model.training_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_the_unet_fits_the_other_parts() -> None:
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet.json"))
    assert 3.5e6 < unet.num_parameters() < 4.5e6
    clip = yaml.safe_load((CONFIGS / "clip.yaml").read_text())["model"]["init_args"]
    assert unet.config.cross_attention_dim == clip["hidden"]
    prompt = torch.randn(2, clip["length"], clip["hidden"])
    out = unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 999]), prompt).sample
    assert out.shape == (2, 4, 8, 8)
