from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_prefopt.backbones import StableDiffusion
from lit_prefopt.backbones.start_weights import StartWeights
from lit_prefopt.cli import main
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.summary import summarise
from lit_prefopt.judges import Judge
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.files import PromptFile
from tests.helpers.comparing import asked, compared, evaluation
from tests.helpers.recipes import small_recipe

FAST = Sampling(steps=3, guidance=2.0, eta=1.0, batch_size=8)


class Redness(Judge):
    """How red an image is, and, for prompts that name it, how blue."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return images[:, 0].mean((1, 2))

    def attributes(self, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        blue = images[:, 2].mean((1, 2))
        applies = torch.tensor(["blue" in text for text in texts])
        return {"blue": torch.where(applies, blue, torch.nan)}


def test_the_base_against_itself(backbone: StableDiffusion) -> None:
    texts = [f"picture {i}" for i in range(40)] + ["blue"]
    answers = asked(backbone, Redness(), texts, FAST)
    same = summarise([answer.row for answer in answers])
    assert all(torch.equal(answer.before, answer.after) for answer in answers)
    assert same["difference"] == 0
    assert same["difference_ci"] == (0, 0)
    assert same["win_rate"] == 0.5
    assert same["attributes"]["blue"]["difference"] == 0


def test_the_base_against_itself_with_other_seeds(backbone: StableDiffusion) -> None:
    """A 95 % interval holds the truth in 19 of 20 repetitions; of 12, at least 9 must."""
    texts, held = [f"picture {i}" for i in range(32)], []
    for offset in range(1000, 13000, 1000):
        rows = compared(backbone, Redness(), texts, FAST, offset, offset + 100_000)
        summary = summarise(rows)
        rate, difference = summary["win_rate_ci"], summary["difference_ci"]
        held.append((rate[0] < 0.5 < rate[1], difference[0] < 0 < difference[1]))
    assert sum(rate for rate, _ in held) >= 9
    assert sum(difference for _, difference in held) >= 9


def test_an_image_depends_on_its_seed_and_not_on_its_batch(backbone: StableDiffusion) -> None:
    texts, seeds = ["a", "b", "c"], torch.tensor([5, 6, 7])
    together = sample(backbone, texts, seeds, FAST)
    alone = sample(backbone, ["b"], seeds[1:2], FAST)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[1:2], sample(backbone, ["b"], seeds[:1], FAST), atol=1e-2)


def test_guidance_one_is_the_prompt_alone(backbone: StableDiffusion) -> None:
    texts, seeds = ["a cat"], torch.tensor([3])
    plain = sample(backbone, texts, seeds, Sampling(steps=3, guidance=1.0))
    nearly = sample(backbone, texts, seeds, Sampling(steps=3, guidance=1.0 + 1e-6))
    torch.testing.assert_close(plain, nearly, atol=1e-3, rtol=1e-3)


def test_evidence_after_fit(recipe: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a blue house\n\nthe sea\n")
    arguments = [
        *evaluation(tmp_path),
    ]
    main(["fit", *recipe, *arguments])
    run = tmp_path / "run"
    summary = json.loads((run / "evaluation" / "evaluation.json").read_text())
    wanted = "reward_reference reward_policy difference difference_ci win_rate win_rate_ci prompts"
    assert {*wanted.split(), "seconds_fit"} <= set(summary)
    assert summary["prompts"] == 2
    rows = (run / "evaluation" / "per_prompt.jsonl").read_text().splitlines()
    assert [json.loads(row)["text"] for row in rows] == ["a blue house", "the sea"]
    assert json.loads(rows[1])["attributes_policy"] == {"blue": None}
    assert summary["pinned"]["sampling"]["steps"] == 2
    assert summary["pinned"]["policy"]["weights"] != summary["pinned"]["reference"]["weights"]
    assert summary["format"] == 2
    assert {path.name for path in (run / "evaluation" / "images").iterdir()} == {
        f"0000{n}-{side}.png" for n in (0, 1) for side in ("reference", "policy")
    }
    assert [step for step, _ in summary["held_out_accuracy"]] == [2, 4]
    assert Image.open(run / "evaluation" / "before-after.png").size[0] > 200
    assert "the sea" in (run / "evaluation" / "report.html").read_text(encoding="utf-8")
    grids = sorted(path.name for path in (run / "samples").iterdir())
    assert grids == ["000002.png", "000004.png"]
    assert Image.open(run / "samples" / "000002.png").size == (4 * 32, 2 * 32)


def test_a_resumed_run_tells_the_whole_and_a_test_leaves_it(
    recipe: list[str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a blue house")
    recipe = [*recipe, *evaluation(tmp_path)]
    main(["fit", *recipe, "--trainer.max_steps", "2"])
    main(["fit", *recipe, "--ckpt_path", "last"])
    evidence = tmp_path / "run" / "evaluation" / "evaluation.json"
    summary = json.loads(evidence.read_text())
    assert [step for step, _ in summary["held_out_accuracy"]] == [2, 4]
    main(["test", *recipe, "--ckpt_path", "last"])
    assert json.loads(evidence.read_text()) == summary
    test = tmp_path / "run" / "test"
    again = json.loads((test / "evaluation.json").read_text())
    assert again["difference"] == pytest.approx(summary["difference"], abs=1e-6)


def test_a_second_evaluation_samples_the_policy_alone(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a blue house\n\nthe sea\n")
    recipe, run = [*recipe, *evaluation(tmp_path)], tmp_path / "run"
    main(["fit", *recipe])
    with monkeypatch.context() as patch:
        name = "lit_prefopt.callbacks.evaluation.reference_image_sampler"
        patch.setattr(name, lambda *_: pytest.fail)  # called only where a batch is sampled
        main(["test", *recipe, "--ckpt_path", "last"])
    assert list((run / "evaluation.reference").rglob("*.safetensors"))
    found = {path.name: path.read_bytes() for path in (run / "test" / "images").iterdir()}
    found["rows"] = (run / "test" / "per_prompt.jsonl").read_bytes()
    main(["test", *recipe, "--ckpt_path", "last", "--trainer.callbacks.reference_gib", "0"])
    again = {path.name: path.read_bytes() for path in (run / "test" / "images").iterdir()}
    assert found == again | {"rows": (run / "test" / "per_prompt.jsonl").read_bytes()}
    assert not (run / "evaluation.reference").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--backbone.reference", "none"], "--backbone.reference initial"),
        (["--trainer.callbacks.prompts.path", "nowhere.txt"], "check the path"),
    ],
)
def test_what_would_stop_the_evaluation_stops_the_run_at_its_start(
    recipe: list[str], tmp_path: Path, change: list[str], sentence: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a blue house")
    with pytest.raises(SystemExit, match=sentence):
        main(["fit", *recipe, *evaluation(tmp_path), *change])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(InputError, match="contains no prompt"):
        PromptFile(str(tmp_path / "none.txt")).texts()


def test_a_half_finished_test_of_other_settings_is_refused(
    recipe: list[str], tmp_path: Path
) -> None:
    """After a fit it gives way: the model has learned more since."""
    (tmp_path / "prompts.txt").write_text("a blue house\nthe sea")
    recipe = [*recipe, *evaluation(tmp_path), "--trainer.max_steps", "2"]
    (tmp_path / "run" / "evaluation.parts").mkdir(parents=True)
    (tmp_path / "run" / "evaluation.parts" / "settings.json").write_text('{"seed": 7}')
    main(["fit", *recipe])
    assert (tmp_path / "run" / "evaluation" / "evaluation.json").exists()
    assert not (tmp_path / "run" / "evaluation.parts").exists()
    settings = json.loads((tmp_path / "run" / "evaluation" / "settings.json").read_text())
    settings["policy"]["name"] = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    begun = tmp_path / "run" / "test.parts"
    begun.mkdir()
    (begun / "settings.json").write_text(json.dumps(settings | {"seed": 7}))
    last = ["--ckpt_path", "last"]
    with pytest.raises(SystemExit, match="another evaluation, which differs in seed: "):
        main(["test", *recipe, *last])
    (begun / "settings.json").write_text(json.dumps(settings))
    main(["test", *recipe, *last])
    assert not begun.exists()
    assert (tmp_path / "run" / "test" / "settings.json").read_text()


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_without_a_reference_is_compared_with_the_base_loaded_again(
    lora: bool, tiny_folder: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training and by the same images, bit for bit, as with a copy kept in memory."""
    (tmp_path / "prompts.txt").write_text("a blue house\nthe sea\n")
    loaded: list[int] = []
    load = StartWeights.load

    def counted(start: StartWeights) -> object:
        net = load(start)
        loaded.append(sum(p.requires_grad for p in net.parameters()))
        return net

    monkeypatch.setattr(StartWeights, "load", counted)
    found = []
    for reference in ("initial", "none"):
        run = tmp_path / reference
        more = ["--backbone.reference", reference, "--trainer.max_steps", "2"]
        more += ["--backbone.lora.rank", "4"] if lora else []
        more += ["--trainer.limit_val_batches", "0", "--seed_everything", "3"]
        recipe = small_recipe(tiny_folder, shards, run, "toy-mapo")
        main(["fit", *recipe, *evaluation(tmp_path), *more])
        files = {path.name: path.read_bytes() for path in (run / "evaluation" / "images").iterdir()}
        summary = json.loads((run / "evaluation" / "evaluation.json").read_text())
        found.append((files, summary["reward_reference"], summary["reward_policy"]))
        assert summary["pinned"]["policy"]["weights"] != summary["pinned"]["reference"]["weights"]
        found[-1] += (summary["pinned"]["reference"]["weights"],)
    assert loaded == ([] if lora else [0])
    assert found[0] == found[1]


def test_random_weights_cannot_be_loaded_again(
    tiny_folder: str, shards: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a blue house")
    config = str(Path(tiny_folder) / "unet" / "config.json")
    more = ["--backbone.reference", "none", "--backbone.denoiser", config]
    recipe = [*small_recipe(tiny_folder, shards, tmp_path / "run", "toy-mapo"), *more]
    with pytest.raises(SystemExit, match="cannot be loaded again: set `--backbone.reference init"):
        main(["fit", *recipe, *evaluation(tmp_path)])
