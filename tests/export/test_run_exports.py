"""Runs and their checkpoints on their way out, and what a stranger's checkpoint may not do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from safetensors.torch import load_file

from lit_prefopt.cli import main
from tests.helpers.exporting import Family, export, picture, refused, write_lora
from tests.helpers.tiny import tiny_unet, tiny_vae

LORA = ["--backbone.lora.rank", "4", "--backbone.lora.alpha", "6"]
FAST = ["--model.optimizer.lr", "0.01", "--trainer.limit_val_batches", "0"]


def checkpoint_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("extra", [[], LORA], ids=["full", "lora"])
def test_a_run_and_its_checkpoint_export_the_same(
    recipe: list[str], extra: list[str], tmp_path: Path, tiny_folder: str
) -> None:
    main(["fit", *recipe, *extra, *FAST])
    run = tmp_path / "run"
    last = run / "checkpoints" / "last.ckpt"
    stock = Family(StableDiffusionPipeline, tiny_folder)
    if extra:
        expected = picture(stock.pipeline(run / "weights" / "pytorch_lora_weights.safetensors"))
    else:
        trained = stock.pipeline()
        trained.unet = UNet.from_pretrained(run / "weights" / "unet")
        expected = picture(trained)
    assert (expected - picture(stock.pipeline())).abs().max() > 1e-3
    sources = {"run": run, "weights": run / "weights", "checkpoint": last}
    for name, source in sources.items():
        out = export(source, "pipeline", tmp_path / f"{name}-pipeline")
        ours = picture(Family(StableDiffusionPipeline, str(out)).pipeline())
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0, msg=name)
    if extra:
        out = export(last, "kohya", tmp_path / "kohya.safetensors")
        ours = picture(stock.pipeline(out))
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
        assert {float(v) for k, v in load_file(out).items() if k.endswith(".alpha")} == {6}
    else:
        (run / "weights").rename(run / "moved")  # then the last checkpoint speaks
        out = export(run, "unet", tmp_path / "unet")
        ours, theirs = UNet.from_pretrained(out), UNet.from_pretrained(run / "moved" / "unet")
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("extra", [[], LORA], ids=["full", "lora"])
def test_a_run_that_started_from_a_lora_takes_it_along(
    recipe: list[str], extra: list[str], tmp_path: Path, tiny_folder: str
) -> None:
    stock = Family(StableDiffusionPipeline, tiny_folder)
    start = write_lora(stock, tmp_path / "start", text=True)
    main(["fit", *recipe, *extra, *FAST, "--backbone.start_lora", str(start)])
    run = tmp_path / "run"
    pipeline = stock.pipeline(start)
    if extra:
        trained = run / "weights" / "pytorch_lora_weights.safetensors"
        pipeline.load_lora_weights(trained.parent, weight_name=trained.name, adapter_name="own")
        pipeline.unet.set_adapters(["default_0", "own"])
        out = export(run, "kohya", tmp_path / "kohya.safetensors")
        ours = stock.pipeline(out)
    else:
        pipeline.unet = UNet.from_pretrained(run / "weights" / "unet")
        out = export(run, "pipeline", tmp_path / "pipeline")
        ours = Family(StableDiffusionPipeline, str(out)).pipeline()
    torch.testing.assert_close(picture(ours), picture(pipeline), atol=1e-4, rtol=0)
    start.rename(tmp_path / "moved.safetensors")
    to = ("--source", run, "--to", "pipeline", "--output", tmp_path / "again")
    assert "which does not exist: name its file with `--plus`" in refused(*to)
    again = export(run, "pipeline", tmp_path / "a", "--plus", str(tmp_path / "moved.safetensors"))
    ours = Family(StableDiffusionPipeline, str(again)).pipeline()
    torch.testing.assert_close(picture(ours), picture(pipeline), atol=1e-4, rtol=0)


def test_the_recipe_tells_denoiser_vae_and_prediction(tiny_folder: str, tmp_path: Path) -> None:
    """The LoRA was trained on another UNet than the pipeline's, with another VAE."""
    family = Family(StableDiffusionPipeline, tiny_folder)
    lora = write_lora(family, tmp_path / "run" / "weights")
    torch.manual_seed(4)
    unet, vae = tiny_unet(), tiny_vae()
    unet.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    places = {"denoiser": str(tmp_path / "unet"), "vae": str(tmp_path / "vae")}
    arguments = {"pretrained": tiny_folder, **places, "prediction": "v_prediction"}
    recipe = {"backbone": {"class_path": "StableDiffusion", "init_args": arguments}}
    (lora.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = export(tmp_path / "run", "pipeline", tmp_path / "out")
    expected = family.pipeline()
    expected.unet, expected.vae = unet, vae
    expected.scheduler.register_to_config(prediction_type="v_prediction")
    expected.load_lora_weights(lora.parent, weight_name=lora.name)
    ours = Family(StableDiffusionPipeline, str(out)).pipeline()
    assert ours.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(picture(ours), picture(expected), atol=1e-4, rtol=0)


def test_the_toy_world_is_its_own_base(tmp_path: Path) -> None:
    """Its recipes name no pipeline."""
    recipe = {"backbone": {"class_path": "lit_prefopt.toy.ToyDiffusion", "init_args": {}}}
    toy = Path(sys.modules["lit_prefopt"].__file__ or "").parent / "toy" / "checkpoint"
    state = UNet.from_pretrained(toy / "unet").state_dict()
    state = {f"backbone.policy.denoiser.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": state, "recipe": yaml.safe_dump(recipe)}, tmp_path / "toy.ckpt")
    out = export(tmp_path / "toy.ckpt", "unet", tmp_path / "unet")
    assert UNet.from_pretrained(out).config.sample_size == 8


def stranger(folder: Path, recipe: str, state: dict[str, Any]) -> Path:
    torch.save({"state_dict": state, "recipe": recipe}, folder / "stranger.ckpt")
    return folder / "stranger.ckpt"


def test_nothing_that_a_recipe_names_is_imported(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_backbone.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = {"pretrained": tiny_folder, "lora": {"class_path": "evil_backbone.L", "rank": 2}}
    backbone = {"class_path": "evil_backbone.Backbone", "init_args": arguments}
    key = "backbone.policy.denoiser.mid_block.attentions.0.proj_in"
    state = {
        f"{key}.lora_A.default.weight": torch.ones(2, 32, 1, 1),
        f"{key}.lora_B.default.weight": torch.ones(32, 2, 1, 1),
    }
    source = stranger(tmp_path, yaml.safe_dump({"backbone": backbone}), state)
    out = export(source, "kohya", tmp_path / "out.safetensors")
    assert len(load_file(out)) == 3
    assert "evil_backbone" not in sys.modules

    (tmp_path / "recipe.yaml").write_text("backbone: !!python/object/apply:os.getcwd []")
    lora = ("--source", out, "--to", "kohya", "--output", tmp_path / "again.safetensors")
    assert "names no backbone; it is damaged" in refused(*lora)


class Payload:
    """What a pickle does to those who open it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("opened"),))


def test_checkpoints_that_are_none_are_refused(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_dump({"backbone": {"class_path": "X", "init_args": {}}})
    to = ("--to", "unet", "--output", tmp_path / "out", "--source")
    source = stranger(tmp_path, recipe, {"payload": Payload()})
    assert "no pickled code" in refused(*to, source)
    assert not Path("opened").exists()
    source.write_text("no checkpoint")
    assert "is not a checkpoint of `lit-prefopt fit`" in refused(*to, source)
    source = stranger(tmp_path, recipe, {"backbone.vae.x": torch.ones(1)})
    assert "contains backbone.vae.x, which cannot be exported" in refused(*to, source)
    weights = {"backbone.policy.denoiser.conv_in.weight": torch.ones(1)}
    source = stranger(tmp_path, recipe, weights)
    assert "name it as `--base`" in refused(*to, source)
    assert "name the pipeline that was trained" in refused(*to, source, "--base", tiny_folder)


def test_a_base_that_names_its_own_code_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for path in Path(tiny_folder).iterdir():
        (tmp_path / "base" / path.name).symlink_to(path)
    index = tmp_path / "base" / "model_index.json"
    text = index.read_text().replace('"transformers"', '"evil_library"')
    index.unlink()
    index.write_text(text)
    to = ("--to", "single-file", "--output", tmp_path / "x.safetensors")
    assert "needs code of evil_library" in refused("--source", index.parent, *to)
    index.write_text(text.replace('"evil_library"', '"transformers"'))
    (index.parent / "own").mkdir()
    (index.parent / "own" / "transformers.py").write_text("raise SystemExit('imported')")
    assert "own/transformers.py, which is not executed" in refused("--source", index.parent, *to)
    index.write_text('{"_class_name": "KolorsPipeline"}')
    assert "is a KolorsPipeline; supported are" in refused("--source", index.parent, *to)
