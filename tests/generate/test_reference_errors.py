"""The reference's errors at fixed draws: what the table holds, and trainings that read it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.cache_checks import check_data
from lit_prefopt.cli import main
from lit_prefopt.datamodules.generation import StoredGroup
from lit_prefopt.errors import InputError
from lit_prefopt.generate import ReferenceErrors
from lit_prefopt.methods import DiffusionDPO, SPINDiffusion
from lit_prefopt.optimizers import AdamW
from lit_prefopt.processes.settings import LevelDraw, Sampling
from tests.helpers.caching import (
    QUIET,
    assert_same_end,
    cache,
    data,
    errors,
    frozen,
    logged,
    on,
    recipe,
)
from tests.helpers.converted_flow import ConvertedFlow

DROPOUT = 0.2


@pytest.fixture(scope="module")
def tables(
    cached: str, tiny_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """Two draws of the training pairs, four of the held-out ones."""
    root, blind = tmp_path_factory.mktemp("errors"), {"encoders": False}
    training = errors(frozen(tiny_folder, **blind), cached, root / "train", caption_dropout=DROPOUT)
    held_out = errors(
        frozen(tiny_folder, **blind), cached, root / "held-out", held_out=True, draws=4
    )
    return training, held_out


def reading(cached: str, tables: tuple[str, str], **options: Any) -> Any:
    """Return a data module that reads both tables."""
    given = {"reference": tables[0], "validation": cached, "validation_reference": tables[1]}
    return data(cached, **given | {"caption_dropout": DROPOUT} | options)


@pytest.mark.parametrize(
    "lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"]
)
def test_the_table_holds_what_the_reference_says(
    cached: str, tables: tuple[str, str], tiny_folder: str, lora: bool
) -> None:
    """Margins of a policy that has moved agree with those of a reference that is asked."""
    backbone = StableDiffusion(tiny_folder, lora=LoRA(4) if lora else None)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in backbone.parameters():
            if weight.requires_grad:
                weight += (0.2 if lora else 0.01) * torch.randn_like(weight)
    module = DiffusionDPO(backbone, AdamW(1e-3), beta=5000.0).eval()
    module_data = reading(cached, tables)
    seen = []
    loader = module_data.train_dataloader()
    for epoch in range(4):
        loader.remaining = lambda e=epoch: loader.epoch_progress.position_after(6 * e)
        for batch in loader:
            pairs = module.form_pairs(batch)
            asked = pairs._replace(reference_error=None)
            with torch.no_grad():
                known, measured = module.log_ratios(pairs), module.log_ratios(asked)
            assert torch.equal(known.t, measured.t)
            margins = known.margin(5000.0), measured.margin(5000.0)
            assert margins[0].abs().max() > 0.5
            torch.testing.assert_close(*margins, atol=1e-2, rtol=0)
            seen.append((epoch, batch))
    by_key = {}
    for epoch, batch in seen:
        for key, seed, text in zip(batch.keys, batch.seeds.tolist(), batch.texts, strict=True):
            by_key.setdefault(key, []).append((epoch, seed, text))
    for visits in by_key.values():  # two draws in turn, each with all that is random about it
        assert visits[0][1:] == visits[2][1:] != visits[1][1:] == visits[3][1:]


def test_held_out_pairs_have_the_draws_of_validation(
    cached: str, tables: tuple[str, str], tiny_folder: str
) -> None:
    """With the table's seed they are those of a validation without any table."""
    module = DiffusionDPO(StableDiffusion(tiny_folder), AdamW(1e-3), beta=5000.0).eval()
    plain = data(cached, validation=cached, seed=0).val_dataloader()
    for batch, other in zip(reading(cached, tables).val_dataloader(), plain, strict=True):
        assert batch.seeds.tolist() == other.seeds.tolist()
        pairs, asked = module.form_pairs(batch), module.form_pairs(other)
        assert pairs.reference_error.shape == (4, 4, 2)
        for draw in range(4):
            with torch.no_grad():
                known = module.log_ratios(pairs.at_draw(draw))
                measured = module.log_ratios(asked.at_draw(draw))
            torch.testing.assert_close(known.reference_error, measured.reference_error)


class Stopped(Exception):
    """Stands for whatever ends a process."""


def test_a_stopped_computation_ends_with_the_same_bytes(
    cached: str,
    tables: tuple[str, str],
    tiny_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = ReferenceErrors.make

    def halting(self: ReferenceErrors, group: StoredGroup) -> list[Any]:
        if group.number == 3:
            raise Stopped
        return make(self, group)

    monkeypatch.setattr(ReferenceErrors, "make", halting)
    with pytest.raises(Stopped):
        errors(frozen(tiny_folder), cached, tmp_path / "out", caption_dropout=DROPOUT)
    monkeypatch.undo()
    errors(frozen(tiny_folder), cached, tmp_path / "out", caption_dropout=DROPOUT)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["errors.safetensors", "generation.json"]
    made, whole = (Path(folder) / names[0] for folder in (tmp_path / "out", tables[0]))
    assert made.read_bytes() == whole.read_bytes()
    table = load_file(made)
    assert table["errors"].shape == (24, 2, 2)
    assert table["errors"].isfinite().all()
    assert table["u"].unique().numel() > 30


def test_a_pair_that_cannot_be_read_has_no_errors(
    cached: str, tiny_folder: str, tmp_path: Path
) -> None:
    """Its row stays in its place, and the run puts another pair in the pair's."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for path in Path(cached).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tar = folder / "pairs-000000.tar"
    whole = tar.read_bytes()
    at = whole.find(b"000000003.cache.safetensors") + 512
    tar.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
    output = errors(frozen(tiny_folder), str(folder), tmp_path / "out")
    table = load_file(Path(output) / "errors.safetensors")
    assert table["errors"].isfinite().all(2).all(1).tolist() == [n != 3 for n in range(24)]
    assert table["u"][3].tolist() == [-1, -1]
    tar.write_bytes(whole)  # mended since
    module = data(str(folder), reference=output)
    broken = [name for batch in module.train_dataloader() for name in batch.broken]
    assert len(broken) == 1
    assert "was broken when the reference's errors were computed" in broken[0]


# Runs --------------------------------------------------------------------------------------------


def small(folder: str, cached: str, tables: tuple[str, str], output: Path, *more: str) -> list[str]:
    """Return the arguments of a run that reads both tables and holds one network."""
    given = [*on("CachedPairs", cached), "--data.reference", tables[0]]
    given += ["--data.validation_reference", tables[1]]
    alone = ["--backbone.encoders", "false", "--backbone.reference", "none"]
    return ["fit", *recipe(folder, output, *given), *alone, *more]


def test_a_run_without_a_second_network(
    cached: str, tables: tuple[str, str], tiny_folder: str, tmp_path: Path
) -> None:
    """It is the run that asks the reference at the same draws, and no method without one."""
    alone = small(tiny_folder, cached, tables, tmp_path / "alone")
    main(alone)
    one = logged(tmp_path / "alone")
    assert one["train/loss"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(one["train/margin"][0]) < 1e-2
    assert abs(one["train/margin"][-1]) > 1e-2
    assert one["train/reference_error"][0] == pytest.approx(one["train/error"][0], rel=1e-5)
    assert len(one["val/reference_error"]) == 1


@pytest.mark.slow
def test_fixed_draws_resume_to_the_last_bit(
    cached: str, tables: tuple[str, str], tiny_folder: str, tmp_path: Path
) -> None:
    main(small(tiny_folder, cached, tables, tmp_path / "alone"))
    halves = small(tiny_folder, cached, tables, tmp_path / "halves")
    main([*halves, "--trainer.max_steps", "2"])
    main([*halves, "--ckpt_path", "last"])
    assert_same_end(tmp_path / "alone", tmp_path / "halves")


def slow(more: list[str], sentence: str) -> Any:
    """Return a case for the slow run."""
    return pytest.param(more, sentence, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--model.gamma", "0.5"], "DiffusionDPO draws other noise levels than those of"),
        (["--data.caption_dropout", "0.3"], "caption dropout of 0.2, not 0.3: set"),
        (["--data.validation_reference", "null"], "give `--data.validation_reference` as well"),
        slow(["--trainer.precision", "bf16-mixed"], "differ from this run's in precision: give"),
        slow(["--model.validation_draws", "5"], "has 4 draws of each held-out pair, and"),
        slow(["--data.reference", "null"], "give `--data.reference` as well, or set"),
        slow(["--backbone.prediction", "v_prediction"], "differ from this run's in process: give"),
    ],
)
def test_errors_that_are_not_this_runs_are_refused(
    more: list[str],
    sentence: str,
    cached: str,
    tables: tuple[str, str],
    tiny_folder: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(SystemExit, match=sentence):
        main(small(tiny_folder, cached, tables, tmp_path / "run", *more))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_weights_pairs_and_methods_are_refused(
    cached: str, tables: tuple[str, str], tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    backbone = frozen(tiny_folder)
    backbone.policy.denoiser.conv_in.bias.data += 1e-3
    backbone.policy.denoiser.save_pretrained(tmp_path / "unet")
    other = ["--backbone.denoiser", str(tmp_path / "unet")]
    with pytest.raises(SystemExit, match="differ from this run's in reference: give"):
        main(small(tiny_folder, cached, tables, tmp_path / "run", *other))
    swapped = tables[::-1]
    with pytest.raises(SystemExit, match="were computed for held-out pairs, and these are not"):
        main(small(tiny_folder, cached, swapped, tmp_path / "run"))
    plain = cache(frozen(tiny_folder), shards, tmp_path / "plain")
    with pytest.raises(SystemExit, match="were computed on other pairs, or on pairs that"):
        main(small(tiny_folder, plain, tables, tmp_path / "run"))
    with pytest.raises(InputError, match="has no reference errors"):
        reading(cached, (str(tmp_path), tables[1]))
    module = SPINDiffusion(
        StableDiffusion(tiny_folder),
        AdamW(1e-3),
        beta=2000.0,
        exact=True,
        sampling=Sampling(2, 1.0, 1.0),
    )
    assert not module.takes_reference_errors
    exact = ["--model", "SPINDiffusion", "--model.exact", "true"]
    with pytest.raises(SystemExit, match="SPINDiffusion needs more of its reference"):
        main(small(tiny_folder, cached, tables, tmp_path / "run", *exact))


def test_notes_tell_and_do_not_decide(tables: tuple[str, str], tiny_folder: str) -> None:
    facts = json.loads((Path(tables[0]) / "generation.json").read_text())
    assert facts["notes"]["checkpoint"] == tiny_folder
    assert facts["precision"] == "32-true"
    assert facts["process"]["prediction"] == "epsilon"


def test_errors_of_a_flow(cached: str, tiny_folder: str, tmp_path: Path) -> None:
    """The table's levels are those of a training; another draw or discount is refused."""
    table = errors(ConvertedFlow(tiny_folder, reference="none"), cached, tmp_path / "errors")
    stored = load_file(tmp_path / "errors" / "errors.safetensors")["u"]
    assert stored.dtype == torch.float32
    assert stored.min() >= 0
    assert stored.unique().numel() == stored.numel()
    module = DiffusionDPO(ConvertedFlow(tiny_folder), AdamW(1e-3), beta=100.0).eval()
    module_data = data(cached, reference=table)
    for batch in module_data.train_dataloader():
        pairs = module.form_pairs(batch)
        with torch.no_grad():
            known = module.log_ratios(pairs)
            measured = module.log_ratios(pairs._replace(reference_error=None))
        assert known.t.dtype == torch.float64
        assert torch.equal(known.t, measured.t)
        torch.testing.assert_close(known.reference_error, measured.reference_error)

    def run(**options: Any) -> None:
        flow = ConvertedFlow(tiny_folder, levels=options.pop("levels", None))
        module = DiffusionDPO(flow, AdamW(1e-3), beta=100.0, **options)
        module.trainer = Trainer(accelerator="cpu", **QUIET)
        check_data(module, module_data)

    run()
    with pytest.raises(InputError, match="DiffusionDPO draws other noise levels than those of"):
        run(gamma=0.9)
    with pytest.raises(InputError, match="differ from this run's in process: give the recipe"):
        run(levels=LevelDraw("uniform"))
