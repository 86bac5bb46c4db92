"""Train the step-aware preference model of SPO (arXiv 2406.04314)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from lit_prefopt.backbones import trained
from lit_prefopt.batches import ImagePairs, Pairs
from lit_prefopt.data.shards.sides import Known
from lit_prefopt.datamodules.image_sizes import check_image_sizes
from lit_prefopt.datamodules.side_checks import TrainsOn, check_sides
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.denoising import NoisedPairs
from lit_prefopt.diffusion.encoding import encode_pairs
from lit_prefopt.diffusion.guidance import guided
from lit_prefopt.effective_batch import scale_last_step
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.judges.clip import CLIPJudge
from lit_prefopt.judges.judge import Judge, checked_scores
from lit_prefopt.judges.step_aware import StepAware
from lit_prefopt.learner import Learner
from lit_prefopt.losses import choice_divergence
from lit_prefopt.metrics import NamedMeans, accuracy

FILE = "step_aware.safetensors"


class StepAwarePreference(Learner):
    """Trains a CLIP to predict the better of two images from a denoiser's predictions.

    Both images of a pair get the same timestep and noise; the frozen denoiser predicts the clean
    images, and all weights of the CLIP, conditioned on the timestep, are trained to prefer the
    better one. The optimizer updates the CLIP's weights. Prompts of other pairs are not used as
    negatives. The result is a file for the judge `StepAware`.

    Pair weights are normalized: the gradient of an optimizer step is that of the sum of weighted
    losses divided by the sum of weights, over all ranks and accumulated batches.

    Held-out pairs are evaluated at a few timesteps with the same noise at every validation. For
    comparison with `val/accuracy_t501`, `val/clip_accuracy_t501` is the accuracy of the initial
    CLIP on the same predictions. Held-out ties are excluded from both.

    Args:
        pretrained: Hub name or folder of the CLIP that it starts from.
        processor: Hub name or folder of its image processor and tokenizer; by default
            `pretrained`.
        guidance: Classifier-free guidance scale of the predictions; 1 disables it.
        noisiest: Noisiest timestep in training (1000 sigma of a flow); by default the process's
            own. 0 trains on clean images, as decoded by the VAE.
        judge: Relabels the training pairs by scoring their clean images; by default, and always in
            validation, the labels of the shards are used.
        threshold: Minimum difference of the two softmax probabilities of `judge` for a
            preference; below it the pair is a tie.
        judge_scale: Factor of the scores of `judge` in that softmax.
        validation_timesteps: Timesteps at which held-out pairs are evaluated.
        gradient_checkpointing: Recompute the CLIP's activations in backward to save memory.
    """

    trains_on: TrainsOn = "pairs"
    chosen_only = False
    needs_known: tuple[Known, ...] = ()
    part = "CLIP"
    layout = "the layout of published step-aware judges"

    def __init__(
        self,
        *args: Any,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        guidance: float = 5.0,
        noisiest: int | None = None,
        judge: Judge | None = None,
        threshold: float = 0.1,
        judge_scale: float = 1.0,
        validation_timesteps: tuple[int, ...] = (0, 251, 501, 701, 951),
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        backbone = self.backbone
        backbone.require_encoders("StepAwarePreference, which looks at images,")
        last = backbone.process.steps - 1
        check_number("guidance", guidance, 1)
        check_number("noisiest", noisiest, 0, last, optional=True)
        check_number("threshold", threshold, 0, 1)
        check_number("judge_scale", judge_scale, above=0)
        for t in validation_timesteps:
            check_number("validation_timesteps", t, 0, last)
        backbone.freeze()
        self.guidance, self.noisiest = guidance, last if noisiest is None else noisiest
        self.judge, self.threshold, self.judge_scale = judge, threshold, judge_scale
        self.times = tuple(dict.fromkeys(validation_timesteps))
        self.learning = StepAware(None, pretrained, processor)
        self.started_from = CLIPJudge(pretrained, processor)
        self.started_from.crop = self.learning.crop  # same preprocessing for both
        self.clip = self.learning.clip.requires_grad_(True)
        _ = (
            self.learning.tokenizer,
            self.learning.image_processor,
        )  # raises now if something is missing
        if gradient_checkpointing:
            self.clip.gradient_checkpointing_enable({"use_reentrant": False})
        names = ["loss", "accuracy", "clip_accuracy"]
        names += [f"{who}accuracy_t{t}" for who in ("", "clip_") for t in self.times]
        self.held_out = NamedMeans(names)
        self.weights: list[Tensor] = []  # of the pairs since the last optimizer step

    def setup(self, stage: str | None = None) -> None:
        """Check the images' sizes and load the judge that labels pairs, before training."""
        data = getattr(self.trainer, "datamodule", None)
        check_sides(self, data)
        check_image_sizes(self.backbone, data)
        if stage == "fit" and self.judge is not None:
            self.judge.prepare()

    # Inputs ------------------------------------------------------------------------------------

    @torch.no_grad()
    def predicted(self, pairs: Pairs, t: Tensor) -> Tensor:
        """Return the clean images that the denoiser predicts, (B, K, 3, H, W) in [-1, 1].

        Args:
            pairs: B pairs of latents.
            t: Timesteps of the pairs, (B,) int64, as the judge takes them; 0 is the cleanest.
        """
        # The same noise on all sides: the scores should depend on the images, not on the noise.
        noise = draws.normal(pairs.seeds, pairs.latents.shape[2:], "noise", pairs.latents.device)
        process = self.backbone.process
        noised = NoisedPairs.from_pairs(process, pairs, process.level(t), noise)
        latents, times = noised.latents, noised.t_per_side
        predicted = guided(self.backbone, latents, times, noised.prompt, self.guidance)
        images = self.backbone.decode(process.clean(predicted, latents, times))
        return images.unflatten(0, pairs.latents.shape[:2])

    def margin(self, images: Tensor, texts: list[str], t: Tensor) -> Tensor:
        """Return the first side's score minus the last side's, (B,) float32.

        Args:
            images: (B, K, 3, H, W) in [-1, 1].
            texts: B prompts.
            t: Timesteps of the pairs, (B,) int64.
        """
        text = self.learning.text_features(texts, images.device)
        first, last = (
            self.learning.logits(self.learning.image_features(side, t), text)
            for side in (images[:, 0], images[:, -1])
        )
        return first - last

    def labels(self, batch: ImagePairs) -> Tensor:
        """Return the probability that the first side is the better one, (B,) float32."""
        if self.judge is None:
            return batch.labels
        first, last = (
            checked_scores(self.judge, side, batch.texts)
            for side in (batch.images[:, 0], batch.images[:, -1])
        )
        apart = torch.tanh(self.judge_scale * (first - last) / 2)  # of the probabilities
        return torch.where(apart.abs() > self.threshold, (apart > 0).float(), 0.5)

    # Training ----------------------------------------------------------------------------------

    def training_step(self, batch: ImagePairs, batch_idx: int) -> Tensor:
        """Return the weighted loss of a batch."""
        _check(batch)
        u = draws.uniform(batch.seeds, "t", device=batch.images.device)
        t = (u * (self.noisiest + 1)).long()
        labels, images = self.labels(batch), self.predicted(encode_pairs(self.backbone, batch), t)
        margin = self.margin(images, batch.texts, t)
        losses = choice_divergence(margin, labels)
        self.weights.append(batch.weights)
        self.measured = {
            "loss": losses.detach().mean(),
            "accuracy": agreement(margin.detach(), labels).mean(),
            "margin": margin.detach().mean(),
            "t": t.float().mean(),
        }
        self.window.add(self.measured)
        return scale_last_step((batch.weights * losses).mean(), self._trainer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradient by the mean weight, over all ranks and accumulated batches."""
        super().on_before_optimizer_step(optimizer)
        mean: Any = self.trainer.strategy.reduce(torch.cat(self.weights).mean(), reduce_op="mean")
        self.weights = []
        gradients = [p.grad for p in trained(self).values() if p.grad is not None]
        if gradients:  # a guard may have skipped the step
            torch._foreach_div_(gradients, mean.clamp(min=torch.finfo(mean.dtype).tiny))

    # Validation --------------------------------------------------------------------------------

    def validation_step(self, batch: ImagePairs, batch_idx: int) -> None:
        """Evaluate the model and the initial CLIP at each of the timesteps."""
        _check(batch)
        pairs, decided = encode_pairs(self.backbone, batch), batch.labels != 0.5
        for number in self.times:
            t = torch.full_like(batch.labels, number, dtype=torch.int64)
            images = self.predicted(pairs, t)
            margin = self.margin(images, batch.texts, t)
            first, last = (
                self.started_from.score(side, batch.texts) for side in (images[:, 0], images[:, -1])
            )
            ours = agreement(margin, batch.labels)[decided]
            theirs = agreement(first - last, batch.labels)[decided]
            both = {"accuracy": ours, "clip_accuracy": theirs}
            at_t = {f"{name}_t{number}": right for name, right in both.items()}
            loss = choice_divergence(margin, batch.labels)
            self.held_out.update({"loss": loss, **both, **at_t})

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracies, over all timesteps and at each."""
        means = self.held_out.compute()  # already over all ranks
        if "accuracy" in means:
            means["chance_95"] = self.held_out.chance_95("accuracy", len(self.times))
        self.log_dict({f"val/{name}": mean for name, mean in means.items()}, sync_dist=True)
        self.held_out.reset()
        super().on_validation_epoch_end()

    def save(self, folder: Path) -> Path:
        """Write a weights file for the judge `StepAware`."""
        state = {f"model.{name}": value for name, value in self.clip.state_dict().items()}
        save_file(state, folder / FILE)
        return folder / FILE

    def train(self, mode: bool = True) -> StepAwarePreference:
        """Set the CLIP's mode; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(False)
        return self


def agreement(margin: Tensor, labels: Tensor) -> Tensor:
    """Return 1 if the likelier side has the higher score, one half for ties, (B,).

    Args:
        margin: The first side's score minus the second's, (B,).
        labels: Probability that the first side is the better one, (B,).
    """
    return accuracy(margin * (labels - 0.5).sign())


def _check(batch: ImagePairs) -> None:
    if not isinstance(batch, ImagePairs):
        raise InputError(
            "StepAwarePreference trains on images, but the pairs are cached latents: use `--data "
            "PairShards`."
        )
    if batch.images.shape[1] < 2:
        raise InputError(
            "StepAwarePreference trains on pairs, but the data module yields single images: use "
            "`--data PairShards --data.shards FOLDER`, for example."
        )
    if not all(batch.texts):
        raise InputError(
            "StepAwarePreference needs the prompt of every pair, but some are dropped: set "
            "`--data.caption_dropout 0`."
        )
