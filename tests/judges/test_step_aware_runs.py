"""The step-aware judge's training, from a recipe to its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_prefopt import load
from lit_prefopt.cli import main
from lit_prefopt.judges import CLIPJudge, StepAware
from tests.helpers.runs import scalars
from tests.helpers.step_aware import Make, batch


@pytest.fixture
def judge_recipe(tiny_folder: str, tiny_clip_folder: str, shards: str, tmp_path: Path) -> list[str]:
    """Arguments of a small run in a folder of its own."""
    return [
        *("--config", "toy-step-aware-preference", "--model.pretrained", tiny_clip_folder),
        *("--backbone", "StableDiffusion", "--backbone.pretrained", tiny_folder),
        *("--data", "PairShards", "--data.shards", shards, "--data.validation", shards),
        *("--data.batch_size", "4", "--data.resolution", "32", "--data.workers", "0"),
        *("--data.caption_dropout", "0", "--model.optimizer.warmup_steps", "0"),
        *("--model.optimizer.schedule", "constant", "--model.optimizer.lr", "1e-3"),
        *("--trainer.default_root_dir", str(tmp_path / "run")),
        *("--trainer.max_steps", "4", "--batch.pairs", "4", "--batch.validate_every", "2"),
        *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
    ]


def test_fit_from_recipe_to_judge(
    judge_recipe: list[str], tiny_clip_folder: str, tmp_path: Path
) -> None:
    main(["fit", *judge_recipe])
    run = tmp_path / "run"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(name.startswith("clip.") for name in checkpoint["state_dict"])
    assert (run / "weights" / "recipe.yaml").is_file()
    assert not (run / "samples").exists()

    loaded = load(run / "checkpoints" / "last.ckpt").state_dict()
    assert all(torch.equal(loaded[name], w) for name, w in checkpoint["state_dict"].items())

    images, texts = torch.rand(3, 3, 32, 32) * 2 - 1, ["a cat", "two dogs", "the sea"]
    written = run / "weights" / "step_aware.safetensors"
    judge = StepAware(str(written), tiny_clip_folder, tiny_clip_folder)
    trained_one = StepAware(None, tiny_clip_folder, tiny_clip_folder)
    state = {name.removeprefix("clip."): w for name, w in checkpoint["state_dict"].items()}
    trained_one.clip.load_state_dict(state)
    plain = CLIPJudge(tiny_clip_folder).score(images, texts)
    for t in (0, 500, 999):
        times = torch.full((3,), t)
        score = judge.score(images, texts, times)
        assert torch.equal(score, trained_one.score(images, texts, times))
        assert not torch.allclose(score, plain, atol=1e-3)

    logged = scalars(run)
    names = {"loss", "accuracy", "clip_accuracy", "chance_95"}
    names |= {f"{who}accuracy_t{t}" for who in ("", "clip_") for t in (0, 251, 501, 701, 951)}
    assert {f"val/{name}" for name in names} <= set(logged)
    assert logged["val/chance_95"][0] == pytest.approx(0.5 + 0.98 / 24**0.5)
    # what it started from never moves, and sees the same at every validation
    for name in names:
        values = logged[f"val/{name}"]
        assert len(values) == 2
        assert ("clip" not in name and name != "chance_95") or values[0] == values[1], name
    mean = sum(logged[f"val/accuracy_t{t}"][-1] for t in (0, 251, 501, 701, 951)) / 5
    assert logged["val/accuracy"][-1] == pytest.approx(mean)


def test_every_validation_has_the_same_draws(judge_recipe: list[str], tmp_path: Path) -> None:
    """What does not learn is measured alike, and as the CLIP that it started from."""
    main(["fit", *judge_recipe, "--model.optimizer.lr", "0"])
    logged = scalars(tmp_path / "run")
    assert logged["val/loss"][0] == logged["val/loss"][1]
    for t in (0, 251, 501, 701, 951):
        ours, theirs = logged[f"val/accuracy_t{t}"], logged[f"val/clip_accuracy_t{t}"]
        assert ours == [ours[0]] * 2
        assert ours == theirs


def test_held_out_ties_do_not_count(make: Make) -> None:
    module = make(validation_timesteps=(0, 900)).eval()
    module.validation_step(batch(4, labels=torch.tensor([1.0, 0.5, 0.0, 0.5])), 0)
    counts = dict(zip(module.held_out.names, module.held_out.counts.tolist(), strict=True))
    assert counts == {
        **{"loss": 8, "accuracy": 4, "clip_accuracy": 4, "accuracy_t0": 2, "accuracy_t900": 2},
        **{"clip_accuracy_t0": 2, "clip_accuracy_t900": 2},
    }
    turned = make(validation_timesteps=(0, 900)).eval()
    turned.validation_step(batch(4, labels=torch.tensor([0.0, 0.5, 1.0, 0.5])), 0)
    right, wrong = (m.held_out.compute()["accuracy"] for m in (module, turned))
    assert right + wrong == 1


def test_a_resumed_run_ends_in_the_same_weights(judge_recipe: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(["fit", *judge_recipe, "--trainer.default_root_dir", str(whole)])
    judge_recipe += ["--trainer.default_root_dir", str(parts)]
    main(["fit", *judge_recipe, "--trainer.max_steps", "2"])
    main(["fit", *judge_recipe, "--ckpt_path", "last"])
    a, b = (run / "checkpoints" / "last.ckpt" for run in (whole, parts))
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    assert a["state_dict"]
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--model.pretrained", "runs/nowhere"], "runs/nowhere has no CLIP.*toy/clip.yaml"),
        (
            ["--model.processor", "runs/nowhere"],
            "runs/nowhere has no tokenizer.*HF_HUB_OFFLINE forbids",
        ),
        (["--model.guidance", "0.5"], "guidance is 0.5; give a number from 1"),
        (["--model.noisiest", "1000"], "noisiest is 1000; give a number from 0 up to 999"),
        (["--model.threshold", "2"], "threshold is 2.*; give a number from 0 up to 1"),
        (["--model.validation_timesteps", "[0, 1000]"], "validation_timesteps is 1000"),
        (["--data.caption_dropout", "1"], "set `--data.caption_dropout 0`"),
        (["--data", "ToyWeb", "--data.steps", "2", "--batch.pairs", "64"], "yields single images"),
        (
            ["--trainer.precision", "bf16-true"],
            r"keep them in float32 \(`--trainer.precision bf16-mixed`",
        ),
    ],
)
def test_bad_input_is_answered_by_a_sentence(
    judge_recipe: list[str], change: list[str], sentence: str
) -> None:
    if "ToyWeb" in change:
        kept = judge_recipe.index("--data"), judge_recipe.index("--model.optimizer.warmup_steps")
        del judge_recipe[slice(*kept)]
    with pytest.raises(SystemExit, match=sentence):
        main(["fit", *judge_recipe, *change])
