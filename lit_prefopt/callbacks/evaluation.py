"""Evaluate policy against reference on held-out prompts, after `fit` and in `test`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_prefopt.backbones.loaded_reference import (
    check_reference_can_be_loaded,
    reference_loaded,
)
from lit_prefopt.diffusion.sampling import check_sampling
from lit_prefopt.errors import check_number
from lit_prefopt.evaluate.comparison import EvaluationPlan, image_sampler, reference_image_sampler
from lit_prefopt.evaluate.reference_images import ReferenceImages, reference_settings
from lit_prefopt.evaluate.results import Evaluator, PartialRunEvaluation, Pictures, check_pictures
from lit_prefopt.evaluate.scoring import Scorers, TextReader
from lit_prefopt.judges import CLIPJudge, Judge
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.base import Prompts
from lit_prefopt.strategies import FullStateStrategy
from lit_prefopt.utils.fingerprint import fingerprint


class Evaluation(Callback):
    """Samples policy and reference with the same seeds and compares their judge scores.

    In the run's directory it writes `evaluation/evaluation.json` (means, paired difference and win
    rate with 95 % intervals, and all settings), `per_prompt.jsonl`, `before-after.png`,
    `images/`, and `report.html`, which shows them all. The work is split among all ranks, and an
    interrupted evaluation resumes. Where a run has no reference, the weights that it started from
    are loaded again for the comparison.

    Args:
        judge: Scores the images.
        prompts: Held-out prompts.
        sampling: Sampler settings; the backbone's own by default.
        seed: Seed of the first prompt's image, incremented for each further one.
        pictures: Number of prompts, from the first one on, whose images are saved; or `all`.
        folder: Name of the folder inside the run's directory.
        judges: Further judges by name, reported in addition to the first.
        images: Images per prompt.
        similarity: A CLIP whose image features measure the policy's drift from the reference and
            the diversity of a prompt's images.
        text: OCR that checks images for the text quoted in their prompts.
        reference_gib: Space in the run's directory for the reference's images, in GiB, so that
            further evaluations with the same prompts, seeds and sampler settings sample only the
            policy; 0 keeps none.
    """

    def __init__(
        self,
        judge: Judge,
        prompts: Prompts,
        sampling: Sampling | None = None,
        seed: int = 0,
        pictures: Pictures = 8,
        folder: str = "evaluation",
        judges: dict[str, Judge] | None = None,
        images: int = 1,
        similarity: CLIPJudge | None = None,
        text: TextReader | None = None,
        reference_gib: float = 4.0,
    ) -> None:
        check_pictures(pictures)
        check_number("images", images, 1)
        check_number("reference_gib", reference_gib, 0)
        self.scorers = Scorers(judge, judges, similarity, text)
        self.prompts = prompts
        self.sampling = sampling
        self.seed = seed
        self.pictures: Pictures = pictures
        self.folder = folder
        self.images = images
        self.reference_bytes = int(reference_gib * 2**30)
        self._started = 0.0
        self._seconds = 0.0
        self._curve: list[list[float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the backbone can sample images and the judges can score them."""
        if isinstance(pl_module, PreferenceDiffusionModule):
            pl_module.backbone.require_encoders("Evaluation, which samples images,")
            if stage in ("fit", "test"):
                check_sampling(pl_module.backbone, self.sampling)
                self.scorers.prepare()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before training what would stop the evaluation after it."""
        self.prompts.entries()
        if isinstance(pl_module, PreferenceDiffusionModule):
            check_reference_can_be_loaded(pl_module.backbone)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start timing."""
        self._started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record and print the held-out accuracy with its chance level."""
        metrics = trainer.callback_metrics
        if trainer.state.fn == "fit" and "val/accuracy" in metrics:
            accuracy, chance = (float(metrics[f"val/{name}"]) for name in ("accuracy", "chance_95"))
            point = [trainer.global_step, round(accuracy, 4)]
            # a run that is resumed within a step's batches repeats its validation
            self._curve = [*(one for one in self._curve if one[0] != point[0]), point]
            rank_zero_info(
                f"step {trainer.global_step}: held-out accuracy {accuracy:.3f} (chance: 0.5, "
                f"95% range up to {chance:.3f})"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop timing."""
        self._seconds += time.monotonic() - self._started
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the time and the accuracy curve so far, for resume."""
        running = time.monotonic() - self._started if self._started else 0.0
        return {"seconds": self._seconds + running, "curve": self._curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore time and accuracy curve."""
        self._seconds, self._curve = state_dict["seconds"], list(state_dict["curve"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the trained policy."""
        extra = {"seconds_fit": round(self._seconds, 1), "held_out_accuracy": self._curve}
        self.run(trainer, pl_module, self.folder, extra)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a checkpoint into `test/`; the run's own results stay."""
        self.run(trainer, pl_module, "test", {})

    def run(
        self, trainer: Trainer, module: LightningModule, name: str, extra: Mapping[str, Any]
    ) -> None:
        """Evaluate both models on all ranks and write the results.

        Args:
            trainer: Gives the run's directory, the device and the precision.
            module: Its backbone has policy and reference.
            name: Folder inside the run's directory.
            extra: Further entries of `evaluation.json`.
        """
        if not isinstance(module, PreferenceDiffusionModule):
            return
        rank, ranks = trainer.global_rank, trainer.world_size
        meet: Callable[[], Any] = trainer.strategy.barrier
        if isinstance(trainer.strategy, FullStateStrategy):  # only rank zero has the full module
            rank, ranks, meet = 0, 1, _no_rendezvous
            if not trainer.is_global_zero:
                return
        with reference_loaded(module.backbone):
            self._evaluate(trainer, module, name, extra, (rank, ranks, meet))

    def _evaluate(
        self,
        trainer: Trainer,
        module: PreferenceDiffusionModule,
        name: str,
        extra: Mapping[str, Any],
        among: tuple[int, int, Callable[[], Any]],
    ) -> None:
        """Evaluate both models on a rank, of so many, which meet at a barrier."""
        rank, ranks, meet = among
        module.eval()
        module.to(trainer.strategy.root_device)  # Lightning moves it to the CPU at the end of a fit
        evaluator = self._evaluator(trainer, module)
        folder = Path(trainer.default_root_dir) / name
        groups, form = evaluator.plan.groups, evaluator.form
        parts = PartialRunEvaluation(folder, evaluator.settings, groups, form, evaluator.notes)
        meet()
        if trainer.is_global_zero:
            parts.lock.acquire()
        if trainer.is_global_zero and trainer.state.fn == "fit":
            parts.forget()
        meet()
        parts.check()
        meet()
        parts.write_settings()
        reference = self._reference_images(trainer, module, evaluator)
        if trainer.is_global_zero:
            reference.prepare()
        meet()
        speakers = (reference, image_sampler(module.backbone, evaluator.how))
        with trainer.precision_plugin.forward_context():
            for number in range(rank, groups, ranks):
                if not parts.has(number):
                    parts.write(number, [evaluator.evaluate_group(number, *speakers)], {})
        module.cpu()
        meet()
        if trainer.is_global_zero:
            parts.join(partial(evaluator.complete, extra=extra))
            evaluator.print_table(folder)
            parts.lock.release()
        meet()

    def _reference_images(
        self, trainer: Trainer, module: PreferenceDiffusionModule, evaluator: Evaluator
    ) -> ReferenceImages:
        backbone = module.backbone
        with trainer.precision_plugin.forward_context():
            settings = reference_settings(backbone, evaluator.settings | evaluator.notes)
        return ReferenceImages(
            reference_image_sampler(backbone, evaluator.how),
            Path(trainer.default_root_dir) / f"{self.folder}.reference",
            settings,
            self.reference_bytes,
            trainer.strategy.root_device,
        )

    def _evaluator(self, trainer: Trainer, module: PreferenceDiffusionModule) -> Evaluator:
        backbone, policy = module.backbone, module.backbone.policy
        how = self.sampling or backbone.sampling
        size = max(1, how.batch_size // self.images)
        reference = {"name": backbone.checkpoint, "weights": policy.reference_fingerprint()}
        tested = trainer.ckpt_path if trainer.state.fn == "test" else None
        trained = {
            "name": str(tested or trainer.default_root_dir),
            "weights": fingerprint(policy.denoiser),
        }
        return Evaluator(
            {"reference": reference, "policy": trained},
            [backbone],
            EvaluationPlan(self.prompts.entries(), self.seed, self.images, size),
            self.scorers,
            how,
            self.pictures,
            trainer,
        )


def _no_rendezvous(name: str | None = None) -> None:
    """Do nothing, in place of a barrier."""
