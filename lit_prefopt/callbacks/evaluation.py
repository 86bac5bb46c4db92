"""The evidence: policy against reference on held-out prompts, after `fit` and in `test`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_prefopt.errors import check_number
from lit_prefopt.evaluate.comparison import EvaluationPlan, image_sampler, reference_image_sampler
from lit_prefopt.evaluate.results import Evaluator, PartialRunEvaluation, Pictures, check_pictures
from lit_prefopt.evaluate.scoring import Scorers, TextReader
from lit_prefopt.judges import CLIPJudge, Judge
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.prompts.base import Prompts
from lit_prefopt.strategies import FullStateStrategy
from lit_prefopt.utils.fingerprint import fingerprint


class Evaluation(Callback):
    """Samples policy and reference with the same seeds and lets judges compare them.

    In the run's directory it writes `evaluation/evaluation.json` (means, paired difference and win
    rate with 95 % intervals, and all that decided them), `per_prompt.jsonl`, `before-after.png`,
    `images/`, and `report.html`, a page that shows them all. All ranks take part, and one that was
    stopped goes on where it stood.

    Args:
        judge: Scores the images.
        prompts: Held-out prompts.
        sampling: Settings of the sampler; the backbone's own where they are not given.
        seed: Seed of the first prompt's image; the others follow.
        pictures: Of how many prompts, from the first one on, images are written; `all` for all.
        folder: Name of the folder inside the run's directory.
        judges: Further judges by name, reported beside the first.
        images: Images of each prompt.
        similarity: A CLIP whose image features tell how far the policy has drifted from the
            reference, and how alike the images of a prompt are.
        text: Looks for the text that prompts quote.
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
    ) -> None:
        check_pictures(pictures)
        check_number("images", images, 1)
        self.scorers = Scorers(judge, judges, similarity, text)
        self.prompts = prompts
        self.sampling = sampling
        self.seed = seed
        self.pictures: Pictures = pictures
        self.folder = folder
        self.images = images
        self._started = 0.0
        self._seconds = 0.0
        self._curve: list[list[float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a backbone that cannot make pictures, and a judge that cannot score them."""
        if isinstance(pl_module, PreferenceDiffusionModule):
            pl_module.backbone.require_encoders("Evaluation, which samples images,")
            if stage in ("fit", "test"):
                self.scorers.prepare()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out now what would stop the evaluation after the training."""
        self.prompts.entries()
        if isinstance(pl_module, PreferenceDiffusionModule):
            with pl_module.backbone.as_reference():
                pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the held-out accuracy, and print it beside what a coin would reach."""
        metrics = trainer.callback_metrics
        if trainer.state.fn == "fit" and "val/accuracy" in metrics:
            accuracy, chance = (float(metrics[f"val/{name}"]) for name in ("accuracy", "chance_95"))
            self._curve.append([trainer.global_step, round(accuracy, 4)])
            rank_zero_info(
                f"step {trainer.global_step}: held-out accuracy {accuracy:.3f} (chance: 0.5, "
                f"95% range up to {chance:.3f})"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds += time.monotonic() - self._started
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds and the curve so far, so that a resumed run tells the whole."""
        running = time.monotonic() - self._started if self._started else 0.0
        return {"seconds": self._seconds + running, "curve": self._curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them."""
        self._seconds, self._curve = state_dict["seconds"], list(state_dict["curve"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate what was trained."""
        extra = {"seconds_fit": round(self._seconds, 1), "held_out_accuracy": self._curve}
        self.run(trainer, pl_module, self.folder, extra)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a checkpoint, into `test/`: the evidence of the run itself stays."""
        self.run(trainer, pl_module, "test", {})

    def run(
        self, trainer: Trainer, module: LightningModule, name: str, extra: Mapping[str, Any]
    ) -> None:
        """Compare the two models and write the evidence, each rank its share.

        Args:
            trainer: Knows the run's directory, the device and the precision.
            module: Holds policy and reference.
            name: Folder inside the run's directory.
            extra: What else goes into `evaluation.json`.
        """
        if not isinstance(module, PreferenceDiffusionModule):
            return
        rank, ranks = trainer.global_rank, trainer.world_size
        meet: Callable[[], Any] = trainer.strategy.barrier
        if isinstance(trainer.strategy, FullStateStrategy):  # rank zero alone has the module whole
            rank, ranks, meet = 0, 1, _no_rendezvous
            if not trainer.is_global_zero:
                return
        module.eval()
        module.to(trainer.strategy.root_device)  # when a fit ends, Lightning leaves it on the CPU
        evaluator = self._evaluator(trainer, module)
        folder = Path(trainer.default_root_dir) / name
        groups, form = evaluator.plan.groups, evaluator.form
        parts = PartialRunEvaluation(folder, evaluator.settings, groups, form, evaluator.notes)
        meet()
        if trainer.is_global_zero and trainer.state.fn == "fit":
            parts.forget()
        meet()
        parts.check()
        meet()
        parts.write_settings()
        backbone, how = module.backbone, evaluator.how
        speakers = (reference_image_sampler(backbone, how), image_sampler(backbone, how))
        with trainer.precision_plugin.forward_context():
            for number in range(rank, groups, ranks):
                if not parts.has(number):
                    parts.write(number, [evaluator.evaluate_group(number, *speakers)], {})
        module.cpu()
        meet()
        if trainer.is_global_zero:
            parts.join(partial(evaluator.complete, extra=extra))
            evaluator.print_table(folder)
        meet()

    def _evaluator(self, trainer: Trainer, module: PreferenceDiffusionModule) -> Evaluator:
        backbone, policy = module.backbone, module.backbone.policy
        how = self.sampling or backbone.sampling
        size = max(1, how.batch_size // self.images)
        reference = {"name": backbone.checkpoint, "weights": fingerprint(policy.reference_weights)}
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
    """Meet nobody."""
