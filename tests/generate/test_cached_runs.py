"""Trainings from cached pairs: the run from the images, without VAE and text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_prefopt import load
from lit_prefopt.backbones import StableDiffusion, StableDiffusionXL
from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.judges import StepAwarePreference
from lit_prefopt.optimizers import AdamW
from tests.helpers.caching import assert_same_end, cache, frozen, logged, on, recipe
from tests.helpers.runs import TWO_RANKS, finished, launch, wait_until
from tests.helpers.tiny import tiny_vae


def test_a_run_from_the_cache_is_the_run_from_the_images(
    cached: str, tiny_folder: str, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without VAE and text encoder, over two workers: the same losses, resumed to the last bit."""
    a, b = tmp_path / "images", tmp_path / "cached"
    images = [*on("PairShards", shards), "--data.resolution", "32", "--data.flip", "true"]
    main(["fit", *recipe(tiny_folder, a, *images)])
    blind = [*on("CachedPairs", cached, 2), "--backbone.encoders", "false"]
    with caplog.at_level("INFO"):
        main(["fit", *recipe(tiny_folder, b, *blind)])
    assert "Sample grids are disabled" in caplog.text
    assert f"the pairs were cached with those of {tiny_folder}." in caplog.text
    one, other = logged(a), logged(b)
    for name in ("train/loss", "train/error", "val/accuracy", "val/error"):
        assert one[name] == pytest.approx(other[name], rel=1e-4), name
    assert len(set(one["train/loss"])) > 2
    halves = recipe(tiny_folder, tmp_path / "halves", *blind)
    main(["fit", *halves, "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0"])
    main(["fit", *halves, "--ckpt_path", "last"])
    assert_same_end(b, tmp_path / "halves")
    assert load(b / "checkpoints" / "last.ckpt").backbone.has_encoders


def test_another_model_is_refused_before_anything_is_trained(
    cached: str, tiny_folder: str, tiny_xl_folder: str, shards: str, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    tiny_vae().save_pretrained(tmp_path / "vae")
    arguments = recipe(tiny_folder, tmp_path / "run", *on("CachedPairs", cached))
    with pytest.raises(SystemExit, match="whose vae has other weights"):
        main(["fit", *arguments, "--backbone.vae", str(tmp_path / "vae")])
    xl = ["--backbone", "StableDiffusionXL", "--backbone.pretrained", tiny_xl_folder]
    with pytest.raises(SystemExit, match="scaling_factor 0.18215 and not 0.13025, text tensors"):
        main(["fit", *arguments, *xl])
    with pytest.raises(
        SystemExit, match=r"text tensors hidden \(32\) and not hidden \(56\), pooled \(20\)\)"
    ):
        main(["fit", *arguments, *xl, "--backbone.encoders", "false"])


def test_what_needs_the_encoders_says_so(
    tiny_folder: str, cached: str, shards: str, tmp_path: Path, tiny_clip_folder: str
) -> None:
    blind = ["--backbone.encoders", "false"]
    images = [*on("PairShards", shards), "--data.resolution", "32"]
    with pytest.raises(SystemExit, match="PairShards, which yields images or prompts, needs"):
        main(["fit", *recipe(tiny_folder, tmp_path / "a", *images, *blind)])
    looking = ["--trainer.callbacks+", "Evaluation", "--trainer.callbacks.judge", "ToyJudge"]
    looking += ["--trainer.callbacks.prompts", "ToyPrompts"]
    latents = on("CachedPairs", cached)
    with pytest.raises(SystemExit, match="Evaluation, which samples images, needs the VAE"):
        main(["fit", *recipe(tiny_folder, tmp_path / "b", *latents, *blind, *looking)])
    backbone = frozen(tiny_folder, encoders=False)
    with pytest.raises(InputError, match="set `--backbone.encoders true`"):
        backbone.embed(["a cat"])
    with pytest.raises(InputError, match="LatentCache needs the VAE"):
        cache(backbone, shards, tmp_path / "c")
    with pytest.raises(InputError, match="StepAwarePreference, which looks at images"):
        StepAwarePreference(backbone, AdamW(1e-3), pretrained=tiny_clip_folder, processor=None)


def test_without_encoders_the_rest_is_the_same(tiny_folder: str, tiny_xl_folder: str) -> None:
    for family, folder in ((StableDiffusion, tiny_folder), (StableDiffusionXL, tiny_xl_folder)):
        whole, blind = family(folder), family(folder, encoders=False)
        assert blind.latent_settings() == whole.latent_settings()
        assert blind.reference_settings() == whole.reference_settings()
        assert set(blind.encoders) == set()
        kept = sum(p.numel() for p in blind.parameters())
        assert kept == sum(p.numel() for p in whole.policy.parameters())


def predict(model: str, folder: str, output: Path, shards: str, *more: str) -> list[str]:
    """Return the arguments of `predict` in small groups."""
    groups = {"LatentCache": "SampleGroups", "ReferenceErrors": "CachedGroups"}[model]
    return [
        *("predict", "--model", model, "--model.output", str(output), *more),
        *("--backbone", "StableDiffusion", "--backbone.pretrained", folder),
        *("--backbone.reference", "none", "--data", groups, "--data.shards", shards),
        *("--data.group_size", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("LatentCache", ["--model.resolution", "32", "--model.batch_size", "4"]),
        ("ReferenceErrors", ["--model.draws", "2", "--model.batch_size", "2"]),
    ],
)
def test_killed_or_on_two_ranks_the_bytes_are_the_same(
    model: str, more: list[str], cached: str, tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    source = shards if model == "LatentCache" else cached

    def arguments(name: str) -> list[str]:
        return predict(model, tiny_folder, tmp_path / name, source, *more)

    def content(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    main(arguments("whole"))
    running = launch(arguments("killed"))
    wait_until(lambda: len([*(tmp_path / "killed.parts").glob("0*")]) >= 2, running)
    running.kill()
    finished(running)
    assert not (tmp_path / "killed").exists()
    assert "groups are left to generate" in finished(launch(arguments("killed")))
    assert content("killed") == content("whole")
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    said = finished(launch([*arguments("both"), *two], TWO_RANKS))
    assert content("both") == content("whole"), said
