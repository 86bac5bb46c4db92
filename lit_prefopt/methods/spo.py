"""SPO: step-by-step preference optimisation (arXiv 2406.04314, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import LogRatios, Pairs, Prompt, Steps, concatenate
from lit_prefopt.diffusion import draws
from lit_prefopt.errors import InputError
from lit_prefopt.judges import Judge
from lit_prefopt.losses import clip, preference_loss
from lit_prefopt.on_policy import OnPolicyModule
from lit_prefopt.optimizers import OptimizerConfig
from lit_prefopt.processes.base import ReverseStep
from lit_prefopt.processes.settings import Sampling


class SPO(OnPolicyModule):
    """Branches the roll-out and learns, step by step, the best branch against the worst.

    At every decision each prompt has several candidates that were drawn from one parent. The judge
    scores what the policy takes each candidate's clean image to be; the best and the worst become
    a pair if they are far enough apart. Whatever the judge said, the next parent is drawn at
    random, so that the roll-out stays the policy's own.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        judge: A step-aware judge, or any other.
        beta: Pull to the reference, on log-densities that are means over channels and pixels.
        eps: Ratios are clipped to [1 - eps, 1 + eps].
        sampling: How it rolls out; eta must be above 0.
        candidates: Candidates of each parent (k).
        first: Number of the first step that branches, counted from the noisiest.
        inner: Ordinary steps that every candidate takes by itself before the next decision; all
            steps of the best and of the worst chain become pairs.
        threshold: Least difference of the two's softmax probabilities that makes a pair.
        judge_scale: Factor of the judge's scores in that softmax.
        validation_draws: Draws of timestep and noise per held-out pair.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig,
        judge: Judge,
        beta: float,
        eps: float,
        sampling: Sampling,
        candidates: int,
        first: int,
        inner: int,
        threshold: float,
        judge_scale: float = 1.0,
        validation_draws: int = 4,
    ) -> None:
        super().__init__(backbone, optimizer, judge, sampling, validation_draws)
        if candidates < 2:
            raise InputError(f"{candidates} candidate has no rival: set `candidates` to 2 or more.")
        if not 0 <= first < sampling.steps or inner < 0:
            raise InputError(
                f"Branching from step {first} with {inner} inner steps does not fit into "
                f"{sampling.steps} steps: lower `first`."
            )
        self.beta, self.eps = beta, eps
        self.candidates, self.first, self.inner = candidates, first, inner
        self.threshold, self.judge_scale = threshold, judge_scale

    def losses(self, ratios: LogRatios, pairs: Pairs | Steps) -> Tensor:  # type: ignore[override]
        """Return the sigmoid loss of the clipped ratios, one value per pair, (B,)."""
        clipped = self.clipped(ratios.values)
        difference = (clipped[:, 0] - clipped[:, -1]).flatten(1).mean(1)
        return preference_loss(difference, pairs.labels, self.beta)

    def clipped(self, log_ratios: Tensor) -> Tensor:
        """Return the log-ratios (B, K, S) of ratios clipped to [1 - eps, 1 + eps]."""
        return clip(log_ratios, self.eps)

    @torch.no_grad()
    def collect(self, texts: list[str], seeds: Tensor) -> Steps:
        """Return the pairs of one branching roll-out, those of all decisions as rows.

        Args:
            texts: B prompts.
            seeds: (B,) int64; everything random is drawn from them.
        """
        prompt = self.backbone.embed(texts)
        rows = [
            row
            for decision in self._decisions(texts, prompt, seeds)
            for row in self._pairs(decision, prompt, seeds)
        ]
        return concatenate(rows)

    def _decisions(self, texts: list[str], prompt: Prompt, seeds: Tensor) -> Iterator[_Decision]:
        rollout, count, device = self.rollout, self.candidates, prompt.hidden.device
        all_sides = prompt.repeat(count)

        def noise(purpose: str) -> Tensor:
            return rollout.noise(seeds, purpose, device)

        parents = rollout.start(seeds, device)
        for number in range(self.first):
            parents = rollout.step(parents, number, prompt).sample(noise(f"step {number}"))
        number, step = self.first, rollout.step(parents, self.first, prompt)
        while True:
            purposes = [f"candidate {c}" for c in range(count)]
            children = torch.stack([step.sample(noise(f"step {number} {p}")) for p in purposes], 1)
            chain = [_BranchStep(number, parents[:, None].expand_as(children), children)]
            number += 1
            while number <= min(chain[0].number + self.inner, rollout.how.steps - 1):
                own = rollout.step(children.flatten(0, 1), number, all_sides)
                noises = [noise(f"step {number} {p}") for p in purposes]
                moved = own.sample(torch.stack(noises, 1).flatten(0, 1)).view_as(children)
                chain.append(_BranchStep(number, children, moved))
                children, number = moved, number + 1
            last = number == rollout.how.steps
            ahead = None
            if not last:
                ahead = rollout.step(children.flatten(0, 1), number, all_sides)
            clean = children.flatten(0, 1) if ahead is None else ahead.clean
            t = torch.full((len(clean),), rollout.times[number], device=device)
            repeated = [text for text in texts for _ in range(count)]
            scores = self.judge_latents(clean, repeated, t).view(-1, count)
            yield _Decision(chain, scores)
            if ahead is None:
                return
            # drawn whatever the scores; what the denoiser said of it is known already
            u = draws.uniform(seeds, f"parent {number}", device=device)
            pick = (u * count).long()
            row = torch.arange(len(pick), device=device)
            parents = children[row, pick]
            step = ReverseStep(
                *(part.view(-1, count, *part.shape[1:])[row, pick] for part in ahead)
            )

    def _pairs(self, decision: _Decision, prompt: Prompt, seeds: Tensor) -> Iterator[Steps]:
        """Yield the steps of the best and the worst chain of every prompt that is far enough."""
        scores = decision.scores
        best, worst = scores.argmax(1), scores.argmin(1)
        row = torch.arange(len(scores), device=scores.device)
        apart = self.judge_scale * (scores[row, best] - scores[row, worst])
        accepted = torch.tanh(apart / 2) > self.threshold  # p_best - p_worst of a softmax of two
        self.window.add({"accepted": accepted.float().mean()})
        row = row[accepted]
        sides = torch.stack([best, worst], 1)[row]
        ones = torch.ones(len(row), device=scores.device)
        kept = prompt.rows(row)
        for number, parents, children in decision.chain:
            t, t_next = (
                torch.full((len(row), 1), self.rollout.times[n], device=scores.device)
                for n in (number, number + 1)
            )
            # candidates of one decision that took no step by themselves have one parent
            of = sides if self.inner else sides[:, :1]
            start, end = (
                parents[row[:, None], of][:, :, None],
                children[row[:, None], sides][:, :, None],
            )
            yield Steps(start, end, t, t_next, kept, seeds[row.cpu()], ones, ones)


class _BranchStep(NamedTuple):
    """One step of all candidates."""

    number: int
    parents: Tensor  # (B, k, C, H, W)
    children: Tensor  # (B, k, C, H, W)


class _Decision(NamedTuple):
    """What the judge decides over."""

    chain: list[_BranchStep]  # the candidates' steps since they branched
    scores: Tensor  # (B, k)
