"""Base class of on-policy methods, which train on roll-outs of the current weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs, Steps, Trajectories
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion.rollout import Rollout, logp
from lit_prefopt.diffusion.sampling import check_sampling
from lit_prefopt.diffusion.swapped import swapped
from lit_prefopt.errors import InputError
from lit_prefopt.judges.judge import Judge, checked_scores
from lit_prefopt.losses import Comparisons
from lit_prefopt.module import PreferenceDiffusionModule
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.record_rows import select_rows


class OnPolicyModule(PreferenceDiffusionModule):
    """Trains on its own roll-outs as scored by a judge; usually on steps with a known density.

    Args:
        judge: Scores decoded images or, if it is step-aware, predictions of them at a timestep.
        sampling: Sampler of the roll-outs; eta must be above 0 for steps with a density.
    """

    COLLECTS: ClassVar[type[Steps] | type[Trajectories] | type[Pairs]] = Steps
    """Record that `collect` returns."""

    BATCH: ClassVar[type[Steps] | type[Pairs]] = Steps
    """Record that `draw` returns: steps with a density, or finished images."""

    takes_reference_errors = False

    def __init__(self, *args: Any, judge: Judge, sampling: Sampling, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.judge = judge
        self.sampling = sampling
        if self.BATCH is Steps:
            self.rollout = Rollout(self.backbone, sampling)
        else:
            check_sampling(self.backbone, sampling)
        self.images_judged = 0

    def setup(self, stage: str | None = None) -> None:
        """Check that the judge can be loaded, before the first roll-out."""
        super().setup(stage)
        if stage == "fit":
            self.judge.prepare()

    @abstractmethod
    def collect(self, texts: list[str], seeds: Tensor) -> Any:
        """Return roll-outs of the current policy for B prompts; there may be no rows.

        Args:
            texts: B prompts.
            seeds: (B,) int64; all random numbers are drawn from them.
        """

    def complete(self, rounds: list[Any]) -> list[Any]:
        """Return a collection's records, with what depends on all of them; by default unchanged.

        All ranks call it at the same time.

        Args:
            rounds: Records that `collect` returned on this rank.
        """
        return rounds

    def draw(self, collected: Any, which: Tensor, seeds: Tensor) -> Any:
        """Return a batch (`BATCH`) from collected roll-outs; by default the rows themselves.

        Args:
            collected: Record that `collect` returned.
            which: Rows of it, (B,) int64.
            seeds: (B,) int64; all random numbers are drawn from them.
        """
        return select_rows(collected, which)

    def clipped(self, log_ratios: Tensor) -> Tensor:
        """Clip the log-ratios (B, K, S); identity by default."""
        return log_ratios

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch that was drawn from a collection.

        Args:
            batch: Steps of roll-outs, or what else the method draws (`BATCH`).
            batch_idx: Its number in the epoch.

        Raises:
            InputError: The data module yields something else.
        """
        if not isinstance(batch, self.BATCH):
            raise InputError(
                f"{type(self).__name__} trains on its own roll-outs, not on stored pairs: name "
                "prompts as `--data PromptCollections --data.prompts ...`."
            )
        self.check_base_once(batch)
        if self.swapped:
            batch = swapped(cast("Any", batch))
        return self.weighted_loss(self.log_ratios(batch), batch)

    def log_ratios(self, pairs: Pairs | Steps) -> LogRatios:
        """Return the log-ratio of policy to reference of every step, or of held-out pairs."""
        if not isinstance(pairs, Steps):
            return super().log_ratios(pairs)
        with self.backbone.as_reference():
            reference = logp(self.backbone, self.sampling, pairs)
        policy = logp(self.backbone, self.sampling, pairs)
        return LogRatios(policy - reference, pairs.t)

    def held_out_losses(self, ratios: LogRatios, pairs: Pairs) -> Tensor | None:
        """Return None: the loss is one of steps, and held-out pairs are not rolled out."""
        return None

    def measure(self, ratios: LogRatios, pairs: Comparisons, loss: Tensor) -> dict[str, Tensor]:
        """Return the logged means of a batch, with the share of clipped log-ratios."""
        values = ratios.values.detach()
        clipped = (self.clipped(values) != values).float().mean()
        return super().measure(ratios, pairs, loss) | {"clipped": clipped}

    def parts(
        self, prompt: Prompt, texts: Sequence[str], count: int
    ) -> Iterator[tuple[Tensor, Prompt, list[str]]]:
        """Yield `count` rows of each prompt, `sampling.batch_size` at a time.

        Args:
            prompt: B rows.
            texts: B prompts.
            count: Roll-outs of each prompt.

        Yields:
            Numbers of the rows among all B * count, their prompts and their texts.
        """
        repeated, every = prompt.repeat(count), [text for text in texts for _ in range(count)]
        for rows in torch.arange(len(every)).split(self.sampling.batch_size):
            yield rows, repeated.rows(rows.to(prompt.device)), [every[i] for i in rows]

    @torch.no_grad()
    def judge_latents(self, latents: Tensor, texts: Sequence[str], t: Tensor) -> Tensor:
        """Return the judge's scores of decoded latents, (B,) float32.

        Args:
            latents: Clean latents or predictions of them, (B, C, H, W).
            texts: B prompts.
            t: Noise levels of the predictions, (B,); 0 for clean latents.

        Raises:
            InputError: The judge does not give one number for each image.
        """
        parts = latents.split(self.sampling.batch_size)
        images = torch.cat([self.backbone.preview(part) for part in parts])
        scores = checked_scores(self.judge, images, texts, self.backbone.process.timestep(t))
        self.window.add({"judge": scores.mean()})
        self.images_judged += len(images)
        return scores
