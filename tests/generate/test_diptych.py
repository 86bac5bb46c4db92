"""Diptychs: one canvas cut in two, filtered, masked, written, and trained on."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_prefopt import generate as generate_package
from lit_prefopt.backbones import StableDiffusion, StableDiffusionXL
from lit_prefopt.cli import main
from lit_prefopt.data.images import decode, to_pil
from lit_prefopt.data.shards.index import read_index
from lit_prefopt.data.shards.reader import ShardReader
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.generate import (
    CallableFilter,
    ChangeMask,
    EdgeControl,
    MinimumChange,
    MisspeltText,
)
from lit_prefopt.generate.diptych import split_panels
from lit_prefopt.processes.settings import Sampling
from tests.helpers.generating import HOW, controlnet, generate


def test_panels_are_cut_in_the_middle_and_lie_on_each_other() -> None:
    canvas = torch.arange(2 * 3 * 8 * 24.0).view(2, 3, 8, 24)
    left, right = split_panels(canvas)
    assert torch.equal(torch.cat([left, right], -1), canvas)
    left, right = split_panels(canvas, seam=2)
    assert torch.equal(left, canvas[..., 2:10])
    assert torch.equal(right, canvas[..., 14:22])


def test_panels_are_brought_to_size_without_distortion() -> None:
    """A disc stays a disc, in the same place in both panels, whatever the panels' shape."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    disc = ((x - 31.5) ** 2 + (y - 23.5) ** 2 < 15**2).float() * 2 - 1
    panel = disc.expand(1, 3, 48, 64)
    left, right = split_panels(torch.cat([panel, panel], -1), seam=4, size=32)
    assert left.shape == right.shape == (1, 3, 32, 32)
    assert torch.equal(left, right)
    inside = left[0, 0] > 0
    assert torch.equal(inside, inside.T)
    # 48 pixels became 32: the radius is two thirds of 15
    assert inside.sum().item() == pytest.approx(torch.pi * 10**2, rel=0.05)


def test_pairs_are_the_halves_of_one_canvas(tiny_folder: str, tmp_path: Path) -> None:
    made = generate(tiny_folder, tmp_path / "out", per_prompt=2, masks=True)
    assert [m.text for m in made] == ['"A1"', '"A1"', '"BO"', '"BO"', '"CAT"', '"CAT"']
    backbone = StableDiffusion(tiny_folder, reference="none").eval()
    one = made[2]
    seed = one.meta["canvas_seed"]
    panels = MisspeltText().corrupt('"BO"', draws.generator(seed, "corruption"))
    assert panels is not None
    assert one.meta["rejected_prompt"] == panels.right
    assert one.meta["changed"] == "text"
    text, wide = f"{panels.left}|{panels.right}", Sampling(**{**vars(HOW), "width": 64})
    [canvas] = sample(backbone, [text], torch.tensor([seed]), wide)
    left, right = map(decode, one.sides)
    whole = Image.new("RGB", (64, 32))
    whole.paste(left, (0, 0))
    whole.paste(right, (32, 0))
    theirs = to_pil(canvas)
    apart = max(abs(a - b) for a, b in zip(whole.tobytes(), theirs.tobytes(), strict=True))
    assert apart <= 1
    assert one.mask is not None
    mask = decode(one.mask, "L")
    assert set(mask.tobytes()) <= {0, 255}
    assert mask.size == (32, 32)
    assert len({bytes(m.sides[0]) for m in made}) == 6


def test_what_is_left_out_is_counted(
    tiny_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def short(left: object, right: object, prompt: str, *_: object) -> bool:
        return len(prompt) < 5

    caplog.set_level(logging.INFO)
    made = generate(
        tiny_folder, tmp_path / "out", filters=[CallableFilter(short, "that are long")], sheet=2
    )
    assert [m.text for m in made] == ['"A1"', '"BO"']
    assert all(m.mask is None for m in made)
    said = caplog.text
    for words in (
        "2 pairs",
        "1 that are long",
        "1 without a text in quotes in the prompt",
        "1 with prompts longer than a text encoder's context",
    ):
        assert words in said
    sheet = Image.open(tmp_path / "out-sheet.png")
    assert sheet.size[0] > 600
    assert len(set(sheet.convert("L").tobytes())) > 100


def test_one_sentence_where_all_halves_are_alike(tiny_folder: str, tmp_path: Path) -> None:
    never = {"filters": [MinimumChange()], "change": ChangeMask(threshold=1.0)}
    with pytest.raises(InputError, match=r"No pair .*3 with halves that are alike"):
        generate(tiny_folder, tmp_path / "out", **never)


def test_both_panels_follow_the_edges(tiny_folder: str, tmp_path: Path) -> None:
    """The drawing is that of an image of the left prompt, and lies on both panels."""
    backbone = StableDiffusion(tiny_folder, reference="none")
    control = EdgeControl(controlnet(backbone, tmp_path / "control"), scale=2.0)
    drawings = []
    condition_on = control.condition_on

    def record(b: StableDiffusion, drawing: torch.Tensor) -> object:
        drawings.append(drawing)
        return condition_on(b, drawing)

    control.condition_on = record
    plain = generate(tiny_folder, tmp_path / "plain")
    held = generate(tiny_folder, tmp_path / "held", control=control)
    assert [m.text for m in plain] == [m.text for m in held]
    assert all(a.sides != b.sides for a, b in zip(plain, held, strict=True))
    for drawing in drawings:
        assert drawing.shape[1:] == (3, 32, 64)
        assert torch.equal(drawing[..., :32], drawing[..., 32:])
        assert drawing.sum() > 0
    facts = json.loads((tmp_path / "held" / "generation.json").read_text())
    assert facts["control"]["scale"] == 2.0
    assert facts["corruption"]["class"] == "MisspeltText"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"template": "two panels of {left}"}, "has no place for"),
        ({"template": "{left} {wrong} {right}"}, "has no place for"),
        ({"sampling": Sampling(width=36)}, "cannot be cut into two panels"),
        ({"seam": 16}, "cannot be cut into two panels"),
        ({"per_prompt": 0}, "per_prompt is 0"),
    ],
)
def test_bad_settings_are_refused(
    options: dict[str, object], sentence: str, tiny_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        generate(tiny_folder, tmp_path / "out", **options)


def test_the_recipe_runs_and_its_pairs_are_trained_on(tmp_path: Path) -> None:
    """The whole way through the command line, with the shipped base, which knows one panel."""
    output = tmp_path / "pairs"
    change = ["--config", "toy-diptychs", "--backbone.denoiser", "null"]
    change += ["--model.output", str(output), "--model.filters", "[MinimumChange]"]
    change += ["--data.prompts.count", "4", "--model.sampling.steps", "2"]
    change += ["--trainer.enable_progress_bar", "false"]
    main(["predict", *change])
    assert (tmp_path / "pairs-sheet.png").is_file()
    run = ["--config", "toy-di3po", "--data.shards", str(output), "--data.batch_size", "2"]
    run += ["--batch.pairs", "2", "--model.masked", "true", "--trainer.max_steps", "1"]
    run += ["--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false"]
    main(["fit", *run, "--trainer.default_root_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "weights" / "unet").is_dir()


def test_the_recipe_for_sdxl_runs_on_a_small_one(tiny_xl_folder: str, tmp_path: Path) -> None:
    """All of it but the reader of text, whose package is an extra."""
    backbone = StableDiffusionXL(tiny_xl_folder, reference="none")
    control = controlnet(backbone, tmp_path / "control")
    (tmp_path / "prompts.txt").write_text('"A"\n"B"\n')
    arguments = ["--config", "sdxl-diptychs", "--backbone.pretrained", tiny_xl_folder]
    arguments += ["--backbone.vae", "null", "--backbone.dtype", "float32"]
    arguments += ["--model.output", str(tmp_path / "pairs"), "--model.filters", "[MinimumChange]"]
    arguments += ["--model.control.controlnet", control, "--model.control.dtype", "float32"]
    arguments += ["--model.template", "{left}{right}", "--model.per_prompt", "2"]
    arguments += ["--model.seam", "2", "--model.size", "32", "--model.sampling.steps", "2"]
    arguments += ["--model.sampling.height", "40", "--model.sampling.width", "80"]
    arguments += ["--data.prompts.path", str(tmp_path / "prompts.txt")]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    main(["predict", *arguments, "--trainer.enable_progress_bar", "false"])
    reader = ShardReader(read_index(str(tmp_path / "pairs")))
    made = [reader(0, n) for n in range(reader.counts[0])]
    assert [m.text for m in made] == ['"A"', '"A"', '"B"', '"B"']
    assert {decode(side).size for m in made for side in m.sides} == {(32, 32)}
    assert all(m.mask is not None for m in made)


def test_classes_that_recipes_name_explain_every_argument() -> None:
    for name in generate_package.__all__:
        cls = getattr(generate_package, name)
        for argument in set(inspect.signature(cls).parameters) - {"args", "kwargs"}:
            assert f"{argument}:" in (inspect.getdoc(cls) or ""), (name, argument)
