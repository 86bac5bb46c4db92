"""Any two models by name: which are found, which are refused, and what is left by a stop."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning import Trainer
from torch import Tensor

from lit_prefopt.backbones import LoRA, StableDiffusion
from lit_prefopt.cli import main
from lit_prefopt.configs import recipe_names
from lit_prefopt.datamodules import PromptGroups
from lit_prefopt.datamodules.generation import GenerationGroup
from lit_prefopt.errors import InputError
from lit_prefopt.evaluate.comparison import image_seed
from lit_prefopt.evaluate.models import check_alike, load_model
from lit_prefopt.evaluate.results import ResultGroup as Answered
from lit_prefopt.evaluate.two_models import ModelComparison
from lit_prefopt.judges import Judge
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.base import PromptEntry, Prompts, digest
from lit_prefopt.utils.fingerprint import fingerprint
from tests.helpers.runs import TWO_RANKS, finished, launch, wait_until

HOW = Sampling(steps=2, guidance=2.0, eta=1.0, batch_size=4)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Listed(Prompts):
    """Prompts that are given at once, of two categories in turn."""

    def __init__(self, *texts: str) -> None:
        self.listed = texts

    def texts(self) -> list[str]:
        return list(self.listed)

    def entries(self) -> list[PromptEntry]:
        return [PromptEntry(text, "ab"[n % 2]) for n, text in enumerate(self.listed)]


class Redness(Judge):
    """How red an image is."""

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        return images[:, 0].mean((1, 2))


class Stopped(Exception):
    """Stands for whatever ends a process."""


class Halting(ModelComparison):
    """Stops before it evaluates some group."""

    halt_at = -1

    def make(self, group: GenerationGroup) -> list[Answered]:
        if group.number == self.halt_at:
            raise Stopped
        return super().make(group)


TEXTS = ["a cat", "a dog", "the sea", "a house", "a tree"]


def evaluate(
    policy: str,
    reference: str,
    output: Path,
    halt_at: int = -1,
    seed: int = 0,
    texts: Sequence[str] = TEXTS,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate in groups of two prompts, maybe up to some group only; return the summary."""
    arguments: dict[str, Any] = {"judge": Redness(), "sampling": HOW, "pictures": 2} | options
    model = Halting(policy, reference, str(output), **arguments)
    model.halt_at = halt_at
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[], **QUIET)
    data = PromptGroups(Listed(*texts), group_size=2, seed=seed)
    if halt_at >= 0:
        with pytest.raises(Stopped):
            trainer.predict(model, data, return_predictions=False)
        return {}
    trainer.predict(model, data, return_predictions=False)
    return json.loads((output / "evaluation.json").read_text())


def content(folder: Path) -> dict[str, Any]:
    """Return the bytes of every file; of the summary, all but what it took."""
    files = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    summary = json.loads(files.pop("evaluation.json"))
    summary.pop("seconds_evaluation")
    files.pop("report.html")  # made of the other files, seconds included
    return {**files, "evaluation.json": summary}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "per_prompt.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def other(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a UNet of the tiny pipeline whose weights are a little different."""
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias += 0.3
    folder = tmp_path_factory.mktemp("other") / "unet"
    unet.save_pretrained(folder)
    return str(folder)


# What is evaluated ------------------------------------------------------------------------------


def test_a_model_against_itself(tiny_folder: str, tmp_path: Path) -> None:
    """With the same seeds exactly nothing differs."""
    found = evaluate(tiny_folder, tiny_folder, tmp_path / "out", images=2)
    assert found["difference"] == 0
    assert found["win_rate"] == 0.5
    assert found["judges"]["Redness"]["ties"] == 5
    assert (found["prompts"], found["images_per_prompt"], found["format"]) == (5, 2, 2)
    assert found["categories"]["a"]["prompts"] == 3


def test_a_model_against_itself_on_other_seeds(tiny_folder: str, tmp_path: Path) -> None:
    texts = [f"picture {n}" for n in range(24)]
    out = tmp_path / "out"
    found = evaluate(tiny_folder, tiny_folder, out, texts=texts, reference_seed=1000)
    assert found["difference"] != 0
    assert found["win_rate_ci"][0] < 0.5 < found["win_rate_ci"][1]
    assert found["difference_ci"][0] < 0 < found["difference_ci"][1]
    assert [row["seed_reference"] for row in rows(out)][:2] == [1000, 1001]


def test_the_contract_of_the_files(tiny_folder: str, other: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    again = {"again": Redness()}
    found = evaluate(other, tiny_folder, out, base=tiny_folder, images=2, judges=again)
    assert found["difference"] != 0
    assert found["models"] == {"reference": tiny_folder, "policy": other}
    assert found["judges"]["again"] == found["judges"]["Redness"]
    assert set(found["categories"]["b"]) == {"prompts", "Redness", "again"}
    pinned = found["pinned"]
    assert pinned["prompts_sha256"] == digest(TEXTS)
    assert pinned["sampling"]["eta"] == 1.0
    assert pinned["resolution"] == [32, 32]
    assert pinned["sampler"]["class"] == "DDIM"
    assert pinned["precision"] == "32-true"
    assert pinned["reference"]["weights"] != pinned["policy"]["weights"]
    assert {"torch", "diffusers", "transformers", "lit-prefopt"} <= set(pinned["versions"])
    found_rows = rows(out)
    assert [(row["prompt"], row["image"]) for row in found_rows] == [
        (n, i) for n in range(5) for i in range(2)
    ]
    assert [row["seed"] for row in found_rows[:2]] == [0, image_seed(0, 0, 1)]
    last = found_rows[3]
    assert (last["text"], last["category"]) == ("a dog", "b")
    assert last["scores_policy"] == {name: last["reward_policy"] for name in ("Redness", "again")}
    assert last["picture_policy"] == "images/00001-1-policy.png"
    assert (out / last["picture_reference"]).is_file()
    assert found_rows[4]["picture_policy"] is None
    assert (out / "before-after.png").is_file()


def test_more_images_and_fewer_prompts_keep_the_others(tiny_folder: str, tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    evaluate(tiny_folder, tiny_folder, few, texts=TEXTS[:3], images=1, pictures="all")
    evaluate(tiny_folder, tiny_folder, many, images=2, pictures=0)
    seeds = {(row["prompt"], row["image"]): row["seed"] for row in rows(many)}
    assert all(seeds[row["prompt"], 0] == row["seed"] for row in rows(few))
    assert len(set(seeds.values())) == 10
    assert len([*(few / "images").iterdir()]) == 6
    assert not [*(many / "images").iterdir()]
    assert not (many / "before-after.png").exists()


# Names ------------------------------------------------------------------------------------------


def test_a_unet_and_a_lora_by_file(tiny_folder: str, other: str, tmp_path: Path) -> None:
    """Each is the model that its weights make, by another way."""
    own = UNet2DConditionModel.from_pretrained(other)
    assert fingerprint(load_model(other, tiny_folder).backbone.policy.denoiser) == fingerprint(own)
    trained = StableDiffusion(tiny_folder, lora=LoRA(2))
    with torch.no_grad():
        for name, parameter in trained.policy.denoiser.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    file = str(trained.save(tmp_path / "lora"))
    loaded = load_model(file, tiny_folder)
    torch.manual_seed(0)
    latents, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        prompt = trained.embed(["a cat"])
        ours = loaded.backbone.predict(latents, t, prompt)
        theirs = trained.predict(latents, t, prompt)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    plain = load_model(tiny_folder)
    with torch.no_grad():
        assert not torch.allclose(ours, plain.backbone.predict(latents, t, prompt), atol=1e-2)
    facts = loaded.settings()
    assert len(facts["sha256"]) == 64
    assert facts["family"] == plain.family


@pytest.mark.parametrize("extra", [[], ["--backbone.lora.rank", "2"]], ids=["full", "lora"])
def test_a_checkpoint_and_its_run_are_what_was_trained(
    recipe: list[str], tmp_path: Path, extra: list[str]
) -> None:
    """The file of training, its run's folder and the exported weights make the same images."""
    fast = ["--trainer.max_steps", "2", "--model.optimizer.lr", "1e-3"]
    main(["fit", *recipe, *fast, *extra])
    run = tmp_path / "run"
    names = [str(run / "checkpoints" / "last.ckpt"), str(run)]
    models = [load_model(name) for name in names]
    a, b = (fingerprint(model.backbone) for model in models)
    assert a == b
    start = load_model(str(recipe[recipe.index("--backbone.pretrained") + 1]))
    assert fingerprint(start.backbone) != a
    check_alike(models[0], start)


def test_names_without_a_model(tiny_folder: str, other: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.ckpt does not exist"):
        load_model("nowhere.ckpt")
    with pytest.raises(InputError, match=r"--model\.base"):
        load_model(other)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load_model(str(tmp_path / "broken.safetensors"), tiny_folder)


def test_models_of_different_families_are_refused(
    tiny_folder: str, tiny_xl_folder: str, tiny_lcm_folder: str
) -> None:
    plain = load_model(tiny_folder)
    with pytest.raises(InputError, match="sdxl.*compare two models of one family"):
        check_alike(plain, load_model(tiny_xl_folder))
    with pytest.raises(InputError, match="latent consistency model.*its own sampler"):
        check_alike(plain, load_model(tiny_lcm_folder))


# Stops ------------------------------------------------------------------------------------------


def test_a_stopped_evaluation_ends_with_the_same_bytes(
    tiny_folder: str, other: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"base": tiny_folder, "images": 2}
    evaluate(other, tiny_folder, tmp_path / "whole", **options)
    output = tmp_path / "out"
    evaluate(other, tiny_folder, output, halt_at=1, **options)
    assert not output.exists()
    with pytest.raises(InputError, match="another evaluation, which differs in seed: "):
        evaluate(other, tiny_folder, output, seed=1, **options)
    with pytest.raises(InputError, match="differs in categories_sha256, prompts, prompts_sha256"):
        evaluate(other, tiny_folder, output, texts=TEXTS[:4], **options)
    with pytest.raises(InputError, match="differs in policy: "):
        evaluate(tiny_folder, tiny_folder, output, **options)
    begun = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.parts").rglob("*.jsonl")}
    assert len(begun) == 1
    evaluate(other, tiny_folder, output, **options)
    assert content(output) == content(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    evaluate(other, tiny_folder, output, **options)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


# Prompts ----------------------------------------------------------------------------------------


def test_no_prompt_and_long_prompts(tiny_folder: str, tmp_path: Path) -> None:
    """The tiny tokenizer spells words letter by letter and reads 16 tokens."""
    with pytest.raises(InputError, match=r"no prompts to generate.*--data\.prompts"):
        evaluate(tiny_folder, tiny_folder, tmp_path / "out", texts=[])
    texts = ["a cat", "a very long story about a cat", "a very long story about a dog"]
    with pytest.warns(UserWarning, match="2 of 3 prompts are longer") as told:
        found = evaluate(tiny_folder, tiny_folder, tmp_path / "out", texts=texts)
    assert len([one for one in told if "longer" in str(one.message)]) == 1
    assert found["pinned"]["prompts_cut"] == 2


# The command line -------------------------------------------------------------------------------


def command(folder: str, output: Path, prompts: Path) -> list[str]:
    """Return the arguments of an evaluation of a model against itself."""
    return [
        *("evaluate", "--config", "toy", "--model.policy", folder, "--model.reference", folder),
        *("--model.judge", "tests.evaluate.test_two_models.Redness"),
        *("--model.sampling.steps", "2", "--model.output", str(output)),
        *("--data.prompts", "PromptFile", "--data.prompts.path", str(prompts)),
        *("--data.group_size", "2", "--trainer.enable_progress_bar", "false"),
    ]


def test_by_the_command_line(
    tiny_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.tsv").write_text("Prompt\tCategory\na cat\tanimals\nthe sea\twater\n")
    again = {"again": {"class_path": "tests.evaluate.test_two_models.Redness"}}
    arguments = command(tiny_folder, tmp_path / "out", tmp_path / "prompts.tsv")
    main([*arguments, "--model.judges", json.dumps(again)])
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(found["categories"]) == ["animals", "water"]
    assert list(found["judges"]) == ["Redness", "again"]
    assert "win rate" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        main(["evaluate", "--config", "nothing"])
    known = ", ".join(recipe_names("evaluate"))
    assert f"nor a shipped recipe; choose one of {known}." in capfd.readouterr().err


@pytest.mark.slow
def test_a_killed_evaluation_ends_with_the_same_bytes(tiny_folder: str, tmp_path: Path) -> None:
    """SIGKILL, then SIGTERM; afterwards on two ranks: the same rows, to the last byte here."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"picture {n}\n" for n in range(24)))
    whole, output, both = (tmp_path / name for name in ("whole", "out", "both"))
    main(command(tiny_folder, whole, prompts))
    parts = tmp_path / "out.parts"
    for done, code in ((1, -signal.SIGKILL), (4, 128 + signal.SIGTERM)):
        running = launch(command(tiny_folder, output, prompts))
        wait_until(lambda n=done: len([*parts.glob("0*")]) >= n, running)
        running.send_signal(signal.SIGKILL if code < 0 else signal.SIGTERM)
        finished(running)
        assert running.returncode == code
        assert not output.exists()
    said = finished(launch(command(tiny_folder, output, prompts)))
    assert "groups are left to evaluate" in said
    assert content(output) == content(whole)
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    said = finished(launch([*command(tiny_folder, both, prompts), *two], TWO_RANKS))
    assert content(both) == content(whole), said
