"""SPO: step-by-step preference optimisation (arXiv 2406.04314, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Steps
from lit_prefopt.conditioning import Prompt
from lit_prefopt.diffusion import draws
from lit_prefopt.errors import InputError
from lit_prefopt.losses import Comparisons, clip, preference_loss
from lit_prefopt.on_policy import OnPolicyModule
from lit_prefopt.processes.base import ReverseStep
from lit_prefopt.record_rows import concatenate


class SPO(OnPolicyModule):
    """Branches the roll-out and trains, step by step, on the best against the worst branch.

    At every decision each prompt has several candidates that were drawn from one parent. The judge
    (step-aware, as a rule) scores the policy's prediction of each candidate's clean image; the best
    and the worst candidate become a pair if their scores differ enough. The next parent is drawn at
    random, whatever the scores, so that the roll-out remains a sample of the policy.

    Args:
        beta: Strength of the regularisation to the reference, on log-densities that are means over
            channels and pixels.
        eps: Ratios are clipped to [1 - eps, 1 + eps].
        candidates: Candidates of each parent (k).
        first: Number of the first step that branches, counted from the noisiest.
        inner: Ordinary steps of every candidate before the next decision; all steps of the best and
            of the worst chain become pairs.
        threshold: Least difference between the softmax probabilities of best and worst in a pair.
        judge_scale: Factor of the judge's scores in that softmax.
    """

    def __init__(
        self,
        *args: Any,
        beta: float,
        eps: float,
        candidates: int,
        first: int,
        inner: int,
        threshold: float,
        judge_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if candidates < 2:
            raise InputError(f"`candidates` is {candidates}: set it to 2 or more to form pairs.")
        if not 0 <= first < self.sampling.steps or inner < 0:
            raise InputError(
                f"Branching from step {first} with {inner} inner steps does not fit into "
                f"{self.sampling.steps} steps: lower `first`."
            )
        self.beta, self.eps = beta, eps
        self.candidates, self.first, self.inner = candidates, first, inner
        self.threshold, self.judge_scale = threshold, judge_scale

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the sigmoid loss of the clipped ratios, one value per pair, (B,)."""
        clipped = self.clipped(ratios.values)
        difference = (clipped[:, 0] - clipped[:, -1]).flatten(1).mean(1)
        return preference_loss(difference, pairs.labels, self.beta)

    def clipped(self, log_ratios: Tensor) -> Tensor:
        """Clip ratios to [1 - eps, 1 + eps], given and returned as log-ratios (B, K, S)."""
        return clip(log_ratios, self.eps)

    @torch.no_grad()
    def collect(self, texts: list[str], seeds: Tensor) -> Steps:
        """Return the pairs of all decisions of one branching roll-out, as rows.

        Args:
            texts: B prompts.
            seeds: (B,) int64; all random numbers are drawn from them.
        """
        prompt = self.backbone.embed(texts)
        rows = [
            row
            for decision in self._decisions(texts, prompt, seeds)
            for row in self._pairs(decision, prompt, seeds)
        ]
        return concatenate(rows)

    def _decisions(self, texts: list[str], prompt: Prompt, seeds: Tensor) -> Iterator[_Decision]:
        rollout, count, device = self.rollout, self.candidates, prompt.device
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
            t = rollout.level(number, len(clean), device)
            repeated = [text for text in texts for _ in range(count)]
            scores = self.judge_latents(clean, repeated, t).view(-1, count)
            yield _Decision(chain, scores)
            if ahead is None:
                return
            # drawn whatever the scores; the denoiser's prediction for it is known already
            u = draws.uniform(seeds, f"parent {number}", device=device)
            pick = (u * count).long()
            row = torch.arange(len(pick), device=device)
            parents = children[row, pick]
            step = ReverseStep(
                *(part.view(-1, count, *part.shape[1:])[row, pick] for part in ahead)
            )

    def _pairs(self, decision: _Decision, prompt: Prompt, seeds: Tensor) -> Iterator[Steps]:
        """Yield the steps of best and worst chain, of prompts whose scores differ enough."""
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
                self.rollout.level(n, len(row), scores.device)[:, None]
                for n in (number, number + 1)
            )
            # without inner steps all candidates of a decision share their parent
            of = sides if self.inner else sides[:, :1]
            start, end = (
                parents[row[:, None], of][:, :, None],
                children[row[:, None], sides][:, :, None],
            )
            yield Steps(start, end, t, t_next, kept, seeds[row.cpu()], ones, ones)


class _BranchStep(NamedTuple):
    """Latents before and after one step of all candidates."""

    number: int
    parents: Tensor  # (B, k, C, H, W)
    children: Tensor  # (B, k, C, H, W)


class _Decision(NamedTuple):
    """Candidates of one decision, and the judge's scores of them."""

    chain: list[_BranchStep]  # the candidates' steps since they branched
    scores: Tensor  # (B, k)
