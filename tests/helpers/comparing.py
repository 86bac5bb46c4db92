"""Both models of a backbone on a few prompts."""

from __future__ import annotations

from pathlib import Path

from lit_prefopt.backbones import Backbone
from lit_prefopt.evaluate.comparison import (
    EvaluationPlan,
    SampleResult,
    compare,
    image_sampler,
    reference_image_sampler,
)
from lit_prefopt.evaluate.rows import ComparisonRow
from lit_prefopt.evaluate.scoring import Scorers
from lit_prefopt.judges import Judge
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.base import PromptEntry


def asked(
    backbone: Backbone,
    judge: Judge | Scorers,
    texts: list[str],
    how: Sampling,
    seed: int = 0,
    reference_seed: int | None = None,
    images: int = 1,
) -> list[SampleResult]:
    """Return the answers of both to all prompts, in one group."""
    entries = [PromptEntry(text) for text in texts]
    questions = EvaluationPlan(entries, seed, images, len(texts), reference_seed)
    panel = judge if isinstance(judge, Scorers) else Scorers(judge)
    speakers = (reference_image_sampler(backbone, how), image_sampler(backbone, how))
    return compare(*speakers, panel, questions.group(0), how.batch_size)


def compared(
    backbone: Backbone,
    judge: Judge,
    texts: list[str],
    how: Sampling,
    seed: int = 0,
    reference_seed: int | None = None,
) -> list[ComparisonRow]:
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
