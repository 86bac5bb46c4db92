"""Compare any two models by name, on the same prompts and seeds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from lit_prefopt.datamodules.generation import GenerationDataModule, GenerationGroup, PromptGroups
from lit_prefopt.errors import check_number
from lit_prefopt.evaluate.comparison import EvaluationPlan, image_sampler, repeated_images
from lit_prefopt.evaluate.models import DType, check_alike, load_model
from lit_prefopt.evaluate.results import Evaluator, PartialEvaluation, Pictures, check_pictures
from lit_prefopt.evaluate.results import ResultGroup as Answered
from lit_prefopt.evaluate.rows import SIDES
from lit_prefopt.evaluate.scoring import Scorers, TextReader
from lit_prefopt.export.negative import attach_negative
from lit_prefopt.generate.partial_outputs import PartialOutputs
from lit_prefopt.generate.producer import Producer
from lit_prefopt.judges import CLIPJudge, Judge
from lit_prefopt.processes.settings import Sampling


class ModelComparison(Producer):
    """Compares two models by name; run by `lit-prefopt evaluate` on one device or many.

    The prompts are split into groups (`--data PromptGroups`). Each group is saved atomically when
    it is evaluated, so an interrupted evaluation resumes and its output is identical byte for
    byte, except for times.

    A model is named by a hub name; by the folder or single .safetensors file of a whole pipeline;
    by a UNet's folder; by a LoRA's .safetensors file; by a checkpoint (.ckpt) or the folder of a
    run of this library; or it is `toy` or `toy-flow`, the toy world's.

    Args:
        policy: Name of the model to evaluate.
        reference: Name of the model to compare it with.
        output: Output folder: `evaluation.json`, `per_prompt.jsonl`, `before-after.png` and
            `images/`.
        judge: Scores the images.
        judges: Further judges by name, reported in addition.
        base: The pipeline that a LoRA or a UNet belongs to, if it has no recipe; a hub name or a
            folder.
        sampling: Sampler settings; the family's own by default.
        images: Images per prompt.
        reference_seed: Another seed for the reference's images, to measure the effect of the
            seed; by default the policy's.
        pictures: Number of prompts, from the first one on, whose images are saved; or `all`.
        similarity: A CLIP whose image features measure the policy's drift from the reference and
            the diversity of a prompt's images.
        text: OCR that checks images for the text quoted in their prompts.
        dtype: Precision of the models.
        variant: Variant of the pipelines' files, such as `fp16`.
        config: Hub name or folder of a pipeline of the same architecture, if a model is a single
            file.
        negative: LoRA file, denoiser's folder, checkpoint or run of a negative model
            (`--model.swapped true`), whose prediction takes the place of the one without prompt in
            the policy's guidance.
        negative_merge: 0 adds the negative model to the policy's weights, 1 to the base.
    """

    WANTS: ClassVar[type[GenerationDataModule]] = PromptGroups
    WANTED: ClassVar[str] = "PromptGroups"
    VERB: ClassVar[str] = "evaluate"
    SIMILAR: ClassVar[bool] = False  # only the first prompts' images are saved

    def __init__(
        self,
        policy: str,
        reference: str,
        output: str,
        judge: Judge,
        judges: dict[str, Judge] | None = None,
        base: str | None = None,
        sampling: Sampling | None = None,
        images: int = 1,
        reference_seed: int | None = None,
        pictures: Pictures = 8,
        similarity: CLIPJudge | None = None,
        text: TextReader | None = None,
        dtype: DType = "float32",
        variant: str | None = None,
        config: str | None = None,
        negative: str | None = None,
        negative_merge: float = 0.0,
    ) -> None:
        check_number("images", images, 1)
        check_pictures(pictures)
        self.scorers = Scorers(judge, judges, similarity, text)
        named = load_model(policy, base, dtype, variant, config)
        same = reference == policy and negative is None
        other = named if same else load_model(reference, base, dtype, variant, config)
        check_alike(named, other)
        if negative is not None:
            attach_negative(named.backbone, negative, negative_merge)
        super().__init__(named.backbone, output)
        self.reference = other.backbone
        self.models = {"reference": other.settings()}
        self.models["policy"] = self.models["reference"] if same else named.settings()
        if negative is not None:
            self.models["policy"] |= {"negative": negative, "negative_merge": negative_merge}
        self.sampling = sampling or self.backbone.sampling
        self.images, self.reference_seed, self.pictures = images, reference_seed, pictures

    def partial_outputs(self, data: Any) -> PartialOutputs:
        """Return the evaluated groups."""
        self.scorers.prepare()
        self.evaluator = Evaluator(
            self.models,
            [self.backbone, self.reference],
            EvaluationPlan(
                data.entries, data.seed, self.images, data.group_size, self.reference_seed
            ),
            self.scorers,
            self.sampling,
            self.pictures,
            self.trainer,
        )
        one = self.evaluator
        return PartialEvaluation(self.output, one.settings, data.groups, one.form, one.notes)

    def least_bytes(self) -> int:
        """Return a low estimate of the saved images' size, a byte per pixel."""
        height, width = self.evaluator.settings["resolution"]
        prompts = self.groups().total_prompts
        saved = prompts if self.pictures == "all" else min(self.pictures, prompts)
        return saved * self.images * len(SIDES) * height * width

    def make(self, group: GenerationGroup) -> list[Answered]:
        """Evaluate a group."""
        policy = image_sampler(self.backbone, self.sampling)
        reference = image_sampler(self.reference, self.sampling)
        if self.models["reference"] == self.models["policy"]:
            reference = policy = repeated_images(policy)
        return [self.evaluator.evaluate_group(group.number, reference, policy)]

    def complete(self, folder: Path) -> None:
        """Write the summary (rank zero, at the end)."""
        self.evaluator.complete(folder)

    def log_counts(self, counts: Counter[str]) -> None:
        """Print the table."""
        self.evaluator.print_table(self.output)
