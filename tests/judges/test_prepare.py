"""What a judge lacks is told when a run is set up: by all that hold one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_prefopt.cli import main
from lit_prefopt.errors import InputError
from lit_prefopt.generate import AttributeHolds
from lit_prefopt.judges import Judge
from tests.helpers.generating import generate


class Unready(Judge):
    """Lacks its weights, and would score all the same."""

    def prepare(self) -> None:
        raise InputError("The weights are missing: fetch them.")

    def score(self, images: Tensor, texts: Sequence[str], t: Tensor | None = None) -> Tensor:
        raise AssertionError("the run has begun")


NAME = f"{__name__}.Unready"
RUNS = {
    "on policy": ["fit", "--config", "toy-d3po", "--model.judge", NAME],
    "evaluation": [
        *("fit", "--config", "toy-diffusion-dpo", "--trainer.callbacks+", "Evaluation"),
        *("--trainer.callbacks.judge", NAME, "--trainer.callbacks.prompts", "ToyPrompts"),
    ],
    "step-aware": ["fit", "--config", "toy-step-aware-preference", "--model.judge", NAME],
    "ranked": ["predict", "--config", "toy-ranked", "--model.judge", NAME],
}


@pytest.mark.parametrize("run", RUNS)
def test_it_is_told_before_the_run(run: str, tiny_clip_folder: str, tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path / "run")]
    clip = ["--model.pretrained", tiny_clip_folder] if run == "step-aware" else []
    with pytest.raises(SystemExit) as stop:
        main([*RUNS[run], *clip, *root])
    assert stop.value.code == "lit-prefopt: The weights are missing: fetch them."


def test_filters_of_diptychs_tell_it_too(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="The weights are missing"):
        generate(tiny_folder, tmp_path / "out", filters=[AttributeHolds(Unready())])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "toy-d3po", "--model.judge", "judge/hpsv2.1.yaml"],
        [*RUNS["evaluation"][1:4], "Evaluation", "--trainer.callbacks.judge", "judge/hpsv2.1.yaml"]
        + ["--trainer.callbacks.prompts", "ToyPrompts"],
    ],
)
def test_shipped_judges_go_by_their_names(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    assert "version: v2.1" in capsys.readouterr().out


def test_base_facts() -> None:
    assert Unready().settings() == {"class": "Unready"}
    assert Unready().attributes(torch.zeros(1, 3, 8, 8), ["a"]) == {}
