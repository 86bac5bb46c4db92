"""Both models of a backbone on a few prompts."""

from __future__ import annotations

from pathlib import Path

from lit_prefopt.backbones import Backbone
from lit_prefopt.evaluate.comparison import (
    Answer,
    Questions,
    compare,
    reference_speaker,
    speaker,
)
from lit_prefopt.evaluate.rows import Compared
from lit_prefopt.evaluate.scoring import Panel
from lit_prefopt.judges import Judge
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.base import Entry


def asked(
    backbone: Backbone,
    judge: Judge | Panel,
    texts: list[str],
    how: Sampling,
    seed: int = 0,
    reference_seed: int | None = None,
    images: int = 1,
) -> list[Answer]:
    """Return the answers of both to all prompts, in one group."""
    entries = [Entry(text) for text in texts]
    questions = Questions(entries, seed, images, len(texts), reference_seed)
    panel = judge if isinstance(judge, Panel) else Panel(judge)
    speakers = (reference_speaker(backbone, how), speaker(backbone, how))
    return compare(*speakers, panel, questions.group(0), how.batch_size)


def compared(
    backbone: Backbone,
    judge: Judge,
    texts: list[str],
    how: Sampling,
    seed: int = 0,
    reference_seed: int | None = None,
) -> list[Compared]:
    """Return the rows alone."""
    return [answer.row for answer in asked(backbone, judge, texts, how, seed, reference_seed)]


def budget(evaluations: int) -> list[str]:
    more = ["--trainer.callbacks+", "Budget", "--trainer.callbacks.evaluations", str(evaluations)]
    return [*more, "--trainer.max_steps", "100"]


def evaluation(folder: Path) -> list[str]:
    """Arguments that add an evaluation on the prompts of a file."""
    return [
        *("--trainer.callbacks+", "Evaluation"),
        *("--trainer.callbacks.judge", "tests.callbacks.test_evaluation.Redness"),
        *("--trainer.callbacks.prompts", "PromptFile"),
        *("--trainer.callbacks.prompts.path", str(folder / "prompts.txt")),
        *("--trainer.callbacks.sampling.steps", "2"),
    ]
