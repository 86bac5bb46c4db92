"""Ranked samples: what a pair says of itself is true, and what cannot be ranked is told."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer
from PIL import Image
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.cli import main
from lit_prefopt.configs import CONFIGS
from lit_prefopt.data.images import to_pil
from lit_prefopt.data.shards.reader import Sample
from lit_prefopt.datamodules import PromptGroups
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.generate import RankedSamples
from lit_prefopt.judges import Judge
from lit_prefopt.prepare import split_into_stages
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.files import PromptFile
from tests.generate.test_generator import QUIET
from tests.helpers.generating import content, samples

HOW = Sampling(steps=2, guidance=2.0, eta=1.0, batch_size=5)
TEXTS = ["a cat", "a dog", "the sea"]


class Brightness(Judge):
    """Prefers bright images."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return images.mean((1, 2, 3))


class Redness(Judge):
    """Prefers red images, on another scale."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return 1000 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


class Careful(Brightness):
    """Notes in what precision it was asked."""

    def __init__(self) -> None:
        self.asked: set[tuple[bool, torch.dtype]] = set()

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        self.asked.add((torch.is_autocast_enabled("cpu"), images.dtype))
        return super().score(images, texts)


class Constant(Judge):
    """Gives all images the same score, whatever it is.

    Args:
        value: The score.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return torch.full((len(images),), self.value)


def generate(
    folder: str, output: Path, judge: Judge | list[Judge], precision: str = "32-true", **options
) -> Path:
    """Run ranked generation for three prompts."""
    prompts = output.parent / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    backbone = StableDiffusion(folder, reference="none")
    options = {"images": 4, "sampling": HOW, **options}
    model = RankedSamples(backbone, str(output), judge, **options)
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[], precision=precision, **QUIET)
    data = PromptGroups(PromptFile(str(prompts)), group_size=2, seed=7)
    trainer.predict(model, data, return_predictions=False)
    return output


@pytest.fixture(scope="module")
def made(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pairs of six images for each prompt, ranked by brightness."""
    return generate(tiny_folder, tmp_path_factory.mktemp("ranked") / "out", Brightness(), images=6)


def pixels(data: bytes) -> np.ndarray:
    """Return a stored image, (H, W, 3)."""
    return np.asarray(Image.open(BytesIO(data))).astype(int)


def test_every_pair_tells_the_truth_about_itself(tiny_folder: str, made: Path) -> None:
    pairs = samples(made)
    assert Counter(pair.text for pair in pairs) == dict.fromkeys(TEXTS, 15)
    assert [pair.meta["prompt_index"] for pair in pairs] == [n // 15 for n in range(45)]
    backbone = StableDiffusion(tiny_folder, reference="none")
    for pair in pairs:
        meta = pair.meta
        places, scores = meta["ranks"], meta["scores"]
        assert meta["rank_gap"] == places["rejected"] - places["chosen"] > 0
        assert meta["gap"] == pytest.approx(scores["chosen"] - scores["rejected"])
        assert meta["gap"] > 0
        assert meta["judges"] == {"Brightness": scores}
        assert meta["images"] == 6
        for side, data in zip(("chosen", "rejected"), pair.sides, strict=True):
            bright = pixels(data).mean() / 127.5 - 1
            assert abs(bright - scores[side]) < 0.5 / 127.5
    for text in TEXTS:
        gaps = Counter(pair.meta["rank_gap"] for pair in pairs if pair.text == text)
        assert gaps == {1: 5, 2: 4, 3: 3, 4: 2, 5: 1}
    # its seeds make its images again
    last = pairs[-1]
    images = sample(backbone, [last.text] * 2, torch.tensor(last.meta["seeds"]), HOW)
    for image, data in zip(images, last.sides, strict=True):
        assert abs(np.asarray(to_pil(image)).astype(int) - pixels(data)).max() <= 1


def test_the_same_generation_has_the_same_bytes(
    tiny_folder: str, made: Path, tmp_path: Path
) -> None:
    again = generate(tiny_folder, tmp_path / "out", Brightness(), images=6)
    assert content(again) == content(made)
    with pytest.raises(InputError, match="another generation, which differs in judges"):
        generate(tiny_folder, tmp_path / "out", Redness(), images=6)


def test_stages_of_what_was_made(made: Path, tmp_path: Path) -> None:
    stages = split_into_stages(str(made), str(tmp_path / "stages"), stages=5)
    assert stages.pairs == [3, 6, 9, 12, 15]
    assert stages.gaps == [(5, 5), (4, 4), (3, 3), (2, 2), (1, 1)]


def by_prompt(pairs: list[Sample]) -> list[list[Sample]]:
    """Return the pairs of each prompt."""
    return [[pair for pair in pairs if pair.text == text] for text in TEXTS]


def test_fewer_pairs_by_rank_and_by_lot(tiny_folder: str, tmp_path: Path, caplog) -> None:
    best = samples(generate(tiny_folder, tmp_path / "a", Brightness(), pairs="best-worst"))
    assert [pair.meta["ranks"] for pair in best] == [{"chosen": 1, "rejected": 4}] * 3
    apart = generate(tiny_folder, tmp_path / "b", Brightness(), pairs="rank-gap", rank_gap=2)
    for group in by_prompt(samples(apart)):
        assert sorted(pair.meta["rank_gap"] for pair in group) == [2, 2, 3]
    with caplog.at_level("INFO"):
        few = generate(tiny_folder, tmp_path / "c", Brightness(), pairs_per_prompt=2)
    assert [len(group) for group in by_prompt(samples(few))] == [2, 2, 2]
    said = [record.message for record in caplog.records if "Pairs:" in record.message]
    assert said[-1].endswith("c, 6 pairs, 12 pairs beyond pairs_per_prompt")


def test_several_judges(tiny_folder: str, tmp_path: Path) -> None:
    judges = [Brightness(), Redness(), Redness()]
    folder = generate(tiny_folder, tmp_path / "a", judges, weights=[4.0, 0.5, 0.25])
    for pair in samples(folder):
        told, total = pair.meta["judges"], pair.meta["scores"]
        assert list(told) == ["Brightness", "Redness", "Redness 2"]
        for side in ("chosen", "rejected"):
            bright, red = told["Brightness"][side], told["Redness"][side]
            assert total[side] == pytest.approx(4 * bright + 0.75 * red)
    fronts = generate(tiny_folder, tmp_path / "b", judges[:2], pairs="pareto", calibrate=True)
    for pair in samples(fronts):
        told, total = pair.meta["judges"], pair.meta["scores"]
        # calibrated scores are shares, and their mean ranks
        assert 1 > total["chosen"] > total["rejected"] > 0
        # the better one is not worse for both
        assert any(told[name]["chosen"] > told[name]["rejected"] for name in told)


def test_images_that_score_alike_are_no_pairs(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No pair was generated .*3 prompts without a pair"):
        generate(tiny_folder, tmp_path / "a", Constant(0.5))
    with pytest.raises(InputError, match=r"Constant returned \(5,\) scores.*fix the judge"):
        generate(tiny_folder, tmp_path / "b", Constant(float("nan")))


def test_judges_see_full_precision(tiny_folder: str, tmp_path: Path) -> None:
    judge = Careful()
    generate(tiny_folder, tmp_path / "out", judge, precision="bf16-mixed", images=2)
    assert judge.asked == {(False, torch.float32)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": 1}, "images is 1; give a number from 2"),
        ({"rank_gap": 4}, "Ranks of 4 images are at most 3 apart, not 4; raise"),
        ({"rank_gap": 0}, "rank_gap is 0"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt is 0"),
        ({"weights": [1.0, 2.0]}, "There are 2 `weights` for 1 judges"),
        ({"weights": [0.0]}, "weights is 0.0; give a number above 0"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    tiny_folder: str, tmp_path: Path, options: dict, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        generate(tiny_folder, tmp_path / "out", Brightness(), **options)
    with pytest.raises(InputError, match="There is no judge"):
        generate(tiny_folder, tmp_path / "out", [])


@pytest.mark.parametrize("name", ["toy", "sd15", "sdxl"])
def test_the_shipped_files_state_all_their_numbers(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = f"generate/{name}-ranked.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--config", recipe, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    stated = yaml.safe_load((CONFIGS / recipe).read_text())["model"]["init_args"]
    wanted = set(inspect.signature(RankedSamples).parameters) - {"backbone"}
    assert set(stated) | {"sampling", "negative", "negative_merge"} == wanted
    assert config["return_predictions"] is False
    assert config["model"]["init_args"]["images"] == stated["images"]


@pytest.mark.slow
def test_from_prompts_to_a_curriculum(tmp_path: Path) -> None:
    """Generate in the toy world, sort into stages, train across their ends, stop and go on."""
    ranked = ["--model.output", str(tmp_path / "pairs"), "--data.prompts.count", "12"]
    ranked += ["--trainer.default_root_dir", str(tmp_path), "--data.group_size", "6"]
    ranked += ["--model.sampling", "{steps: 4, guidance: 2.0, eta: 1.0, batch_size: 60}"]
    main(["predict", "--config", "generate/toy-ranked.yaml", *ranked])
    pairs, stages = str(tmp_path / "pairs"), str(tmp_path / "stages")
    main(["shards", "stages", "--shards", pairs, "--output", stages, "--stages", "3"])
    counts = json.loads((tmp_path / "stages" / "summary.json").read_text())["pairs"]
    assert all(counts)
    assert sum(counts) == len(samples(tmp_path / "pairs")) > 500

    fit = ["fit", "--config", "toy-curriculum-dpo", "--data.stages", stages]
    fit += ["--data.stage_steps", "2", "--data.batch_size", "4", "--data.validation_pairs", "4"]
    fit += ["--batch.pairs", "4", "--batch.validate_every", "8", "--trainer.log_every_n_steps", "1"]
    fit += ["--trainer.callbacks", "[{class_path: Checkpoints, init_args: {save_last: true}}]"]
    folder = "--trainer.default_root_dir"
    main([*fit, folder, str(tmp_path / "whole"), "--trainer.max_steps", "7"])
    main([*fit, folder, str(tmp_path / "parts"), "--trainer.max_steps", "3"])
    goes_on = ["--trainer.max_steps", "7", "--ckpt_path", "last"]
    main([*fit, folder, str(tmp_path / "parts"), *goes_on])
    whole, parts = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "parts")
    )
    assert whole
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
