"""The command line, in-process: one small run from the recipe to the weights, and its refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from lit_prefopt import load
from lit_prefopt.cli import main
from tests.helpers.recipes import SMALL
from tests.helpers.runs import LORA, scalars


# At a smaller learning rate the first losses of a tiny LoRA round to log 2 on some processors.
@pytest.mark.parametrize(
    "extra", [[], [*LORA, "--model.optimizer.lr", "1e-2"]], ids=["full", "lora"]
)
def test_fit_from_recipe_to_weights(
    recipe: list[str], extra: list[str], tmp_path: Path, tiny_folder: str
) -> None:
    main(["fit", *recipe, *extra])
    run = tmp_path / "run"
    logged = scalars(run)
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["train/accuracy"][0] == 0.5
    assert logged["train/margin"][0] == 0
    assert logged["train/loss"][-1] != logged["train/loss"][0]
    assert len(logged["val/accuracy"]) == 2
    assert {"train/chosen_log_ratio", "train/rejected_log_ratio", "train/error"} <= set(logged)
    assert {f"val/accuracy_t{b}" for b in range(4)} <= set(logged)

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all("policy.denoiser" in name for name in checkpoint["state_dict"])
    assert all(("lora" in name) == bool(extra) for name in checkpoint["state_dict"])
    stored = yaml.safe_load(checkpoint["recipe"])
    assert stored == yaml.safe_load((run / "recipe.yaml").read_text())
    assert stored["backbone"]["init_args"]["pretrained"] == tiny_folder
    assert (run / "weights" / "recipe.yaml").is_file()

    module = load(run / "checkpoints" / "last.ckpt").eval()
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    if extra:
        stock.load_lora_weights(run / "weights", weight_name="pytorch_lora_weights.safetensors")
    else:
        stock.unet = UNet2DConditionModel.from_pretrained(run / "weights" / "unet")
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    prompt = module.backbone.embed(["a cat", "a dog"])
    with torch.no_grad():
        ours = module.backbone.predict(latents, t, prompt)
        theirs = stock.unet(latents, t, prompt["hidden"]).sample
        with module.backbone.as_reference():
            before = module.backbone.predict(latents, t, prompt)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("sdxl-diffusion-dpo", LORA),
        ("sdxl-sft", []),
        pytest.param("sdxl-diffusion-dpo", [], marks=pytest.mark.slow),
        pytest.param("sdxl-sft", LORA, marks=pytest.mark.slow),
    ],
)
def test_fit_on_sdxl(
    recipe: list[str], name: str, extra: list[str], tmp_path: Path, tiny_xl_folder: str
) -> None:
    """The shipped recipes, brought to the size of a test: down to weights that load elsewhere."""
    small = ["--backbone", f"backbone/{'sdxl-lora' if extra else 'sdxl'}.yaml"]
    small += ["--backbone.pretrained", tiny_xl_folder, "--backbone.vae", tiny_xl_folder]
    small += ["--trainer.accumulate_grad_batches", "1", "--model.optimizer.warmup_steps", "0"]
    data = recipe[recipe.index("--data") :]
    main(["fit", "--config", name, "--config", SMALL, *small, *data])
    run = tmp_path / "run"
    module = load(run / "checkpoints" / "last.ckpt").eval()
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_xl_folder)
    if extra:
        stock.load_lora_weights(run / "weights", weight_name="pytorch_lora_weights.safetensors")
    else:
        stock.unet = UNet2DConditionModel.from_pretrained(run / "weights" / "unet")
    inputs, prompt = (torch.randn(2, 4, 8, 8), torch.tensor([9, 700])), module.backbone.embed(["a"])
    ids = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
    told = {"text_embeds": prompt["pooled"].repeat(2, 1).float(), "time_ids": ids}
    with torch.no_grad():
        ours = module.backbone.predict(*inputs, prompt.repeat(2)).float()
        with module.backbone.as_reference():
            before = module.backbone.predict(*inputs, prompt.repeat(2)).float()
        hidden = prompt["hidden"].repeat(2, 1, 1).float()
        theirs = stock.unet(*inputs, hidden, added_cond_kwargs=told).sample
    tolerance = 3e-2 if extra else 1e-2  # text encoders (and, under LoRA, the UNet) are bfloat16
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    assert not torch.equal(ours, before)


@pytest.mark.parametrize(
    ("options", "at_zero"),
    [
        (["--model.link", "lit_prefopt.losses.ipo", "--model.beta", "2"], 1 / (4 * 2**2)),
        pytest.param(["--model.link", "lit_prefopt.losses.hinge"], 1.0, marks=pytest.mark.slow),
        (["--model.label_smoothing", "0.1", "--model.chosen_protection", "0.9"], math.log(2)),
    ],
)
def test_options_of_the_loss(
    recipe: list[str], options: list[str], at_zero: float, tmp_path: Path
) -> None:
    main(["fit", *recipe, *options])
    assert scalars(tmp_path / "run")["train/loss"][0] == pytest.approx(at_zero, abs=1e-6)


class Modes(Callback):
    """Notes what is in training mode at each step, before and after a validation."""

    seen: list[dict[str, bool]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        parts = dict(pl_module.backbone.named_children())
        parts |= {"reference": parts["policy"].frozen, "denoiser": parts["policy"].denoiser}
        self.seen.append({name: part.training for name, part in parts.items()})


def test_the_policy_trains_and_all_else_stays_in_evaluation(recipe: list[str]) -> None:
    Modes.seen.clear()
    main(["fit", *recipe, "--trainer.callbacks+", "tests.test_cli.Modes"])
    assert len(Modes.seen) == 4  # with a validation after the second
    for modes in Modes.seen:
        assert {name for name, training in modes.items() if training} == {"policy", "denoiser"}


def test_a_stopped_run_goes_on_to_the_same_weights(recipe: list[str], tmp_path: Path) -> None:
    averaging = ["--trainer.callbacks+", "PolicyAveraging", "--trainer.callbacks.decay", "0.5"]
    steps = ["--trainer.max_steps", "7", "--trainer.val_check_interval", "3"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    main(["fit", *recipe, *averaging, *steps, "--trainer.default_root_dir", whole])
    stop = ["--trainer.max_steps", "4"]
    main(["fit", *recipe, *averaging, *steps, *stop, "--trainer.default_root_dir", parts])
    resume = ["--trainer.default_root_dir", parts, "--ckpt_path", "last"]
    main(["fit", *recipe, *averaging, *steps, *resume])
    a, b = (
        torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (whole, parts)
    )
    assert a["global_step"] == b["global_step"] == 7
    for key in ("state_dict", "running_state"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key]), key
    assert any(not torch.equal(a["state_dict"][n], a["running_state"][n]) for n in a["state_dict"])


def test_a_resolved_recipe_runs_again_to_the_same_weights(
    recipe: list[str], tmp_path: Path
) -> None:
    main(["fit", *recipe, *LORA])
    again = str(tmp_path / "again")
    stored = str(tmp_path / "run" / "recipe.yaml")
    main(["fit", "--config", stored, "--trainer.default_root_dir", again])
    a, b = (
        load_file(tmp_path / run / "weights" / "pytorch_lora_weights.safetensors")
        for run in ("run", "again")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    for run in ("run", "again"):
        assert [path.name for path in (tmp_path / run / "checkpoints").glob("*")] == ["last.ckpt"]
        assert len([*(tmp_path / run / "logs").glob("events*")]) == 1


def test_parts_of_recipes_go_by_name_too(
    recipe: list[str], tmp_path: Path, tiny_folder: str
) -> None:
    part = ["--backbone", "backbone/sd15-lora.yaml", "--backbone.pretrained", tiny_folder]
    main(["fit", *recipe, *part])
    assert (tmp_path / "run" / "weights" / "pytorch_lora_weights.safetensors").is_file()


def test_the_last_checkpoint_is_the_last_state(recipe: list[str], tmp_path: Path) -> None:
    every = ["--trainer.callbacks+", "Checkpoints", "--trainer.callbacks.every_n_train_steps", "2"]
    every += ["--trainer.callbacks.save_last", "true", "--trainer.max_steps", "3"]
    main(["fit", *recipe, *every])
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 3


def test_mixed_precision_with_clipped_gradients(recipe: list[str], tmp_path: Path) -> None:
    mixed = ["--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", "1.0"]
    main(["fit", *recipe, *mixed])
    logged = scalars(tmp_path / "run")
    assert logged["train/margin"][0] == 0
    assert logged["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["train/loss"][-1] != logged["train/loss"][0]


def test_logs_are_means_over_the_micro_batches(recipe: list[str], tmp_path: Path) -> None:
    """Without an effective learning rate, six batches logged by twos average to all six alone."""
    still = ["--model.optimizer.lr", "1e-12", "--trainer.val_check_interval", "6"]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    main(["fit", *recipe, *still, "--trainer.max_steps", "6", "--trainer.default_root_dir", one])
    accumulate = ["--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "3"]
    main(["fit", *recipe, *still, *accumulate, "--trainer.default_root_dir", two])
    each, pairs = (scalars(Path(run))["train/chosen_error"] for run in (one, two))
    assert len(each) == 6
    assert pairs == pytest.approx([(a + b) / 2 for a, b in zip(each[::2], each[1::2], strict=True)])


def test_a_run_without_a_logger(recipe: list[str], tmp_path: Path) -> None:
    main(["fit", *recipe, "--trainer.logger", "false"])
    assert (tmp_path / "run" / "weights" / "unet" / "config.json").is_file()
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--ckpt_path", "last"], "contains no checkpoint: name"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--backbone.pretrained", "no/such-model"], "no/such-model is no local folder"),
        (["--data.shards", "nowhere"], "nowhere"),
        (["--data.batch_size", "25"], "lower `batch_size` or give more pairs"),
        (["--data.resolution", "30"], "set `--data.resolution` to a multiple of 4"),
        (["--data.workers", "-1"], "workers is -1; give a number from 0"),
        (["--model.beta", "0"], "beta is 0.*; give a number above 0"),
        (["--model.optimizer.lr", "-1"], "lr is -1.*; give a number from 0"),
        (["--trainer.accumulate_grad_batches", "0"], "give a number from 1"),
        (["--trainer.max_steps", "-5"], "max_steps.*must be a non-negative integer or -1"),
        (["--trainer.precision", "transformer-engine"], "cannot be used: .*transformer"),
        (["--trainer.strategy", "teleport"], "cannot be used: You selected an invalid strategy"),
    ],
)
def test_bad_input_is_answered_by_a_sentence(
    recipe: list[str], change: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        main(["fit", *recipe, *change])


def test_another_runs_directory_is_refused(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *recipe, "--trainer.max_steps", "1"])
    with pytest.raises(SystemExit, match="contains another run.*--ckpt_path last"):
        main(["fit", *recipe])


def test_a_checkpoint_of_another_backbone_is_refused(recipe: list[str], tmp_path: Path) -> None:
    main(["fit", *recipe, "--trainer.max_steps", "1"])
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(SystemExit, match="belongs to another backbone"):
        main(["fit", *recipe, *LORA, "--ckpt_path", last])


def test_weights_too_coarse_to_learn_are_refused(recipe: list[str]) -> None:
    with pytest.raises(SystemExit, match="bf16-mixed"):
        main(["fit", *recipe, "--trainer.precision", "bf16-true"])


def test_a_misspelt_key_is_named(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *recipe, "--model.betta", "3"])
    assert "betta" in capsys.readouterr().err


def test_validate_and_test_measure_a_checkpoint(recipe: list[str], tmp_path: Path) -> None:
    main(["fit", *recipe])
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    main(["validate", *recipe, "--ckpt_path", last])
    main(["test", *recipe, "--ckpt_path", last])
    logged = scalars(tmp_path / "run")
    # The test set is the validation set, and draws depend on the pair alone.
    assert logged["test/accuracy"][-1] == logged["val/accuracy"][-1]
    assert logged["test/margin"][-1] == pytest.approx(logged["val/margin"][-1], abs=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "There is no command 'train'; choose one of estimate, evaluate, export, fit"),
        (["fti"], "There is no command 'fti'; did you mean fit?"),
        (["shards", "convret"], "convret: did you mean convert?"),
        (
            ["fit", "--config", "toy-dpo"],
            "toy-dpo is neither a file nor a shipped recipe; did you mean toy-curriculum-dpo or "
            "toy-diffusion-dpo",
        ),
    ],
    ids=["far", "command", "shards", "recipe"],
)
def test_unknown_names_are_answered_by_the_nearest(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lit-prefopt: {message}")


def test_help_lists_commands_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text = capsys.readouterr().out
    for word in ("fit", "shards", "toy-diffusion-dpo", "sd15-sft"):
        assert word in text


def test_shards_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in ("a", "b"):
        Image.new("RGB", (8, 8), {"a": "red", "b": "blue"}[name]).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a.png", "rejected": "b.png"}')
    source, output = str(tmp_path / "pairs.jsonl"), str(tmp_path / "shards")
    main(["shards", "convert", "--source", source, "--output", output])
    assert (tmp_path / "shards" / "index.json").is_file()
    assert "1" in capsys.readouterr().out
