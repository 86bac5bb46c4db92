"""The dense-reward view: DPO whose early steps count more (arXiv 2402.08265, 2024)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import LogRatios, Pairs, Steps, Trajectories
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.denoising import discounted
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.judges import Judge
from lit_prefopt.losses import plackett_luce
from lit_prefopt.on_policy import OnPolicyModule
from lit_prefopt.optimizers import OptimizerConfig
from lit_prefopt.processes.settings import Sampling


class DenseRewardDPO(OnPolicyModule):
    """Rolls out whole trajectories, ranks them by their last image, and learns from their steps.

    A discount over the reverse steps says that the early, noisy ones have the larger part in the
    outcome: it is the distribution from which a trajectory's steps are drawn. Trajectories may
    serve for many updates (`data.keep`, `data.batches`).

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        judge: Scores the last images.
        beta: Factor C of the mean of clipped log-ratios, on log-densities that are means over
            channels and pixels.
        delta: Log-ratios are clipped to [-delta, delta], step by step.
        gamma: Weight of a step against the one before it, in (0, 1]; 1 weighs all alike.
        drawn_steps: Steps drawn from a trajectory for one update, with replacement, the same ones
            of all sides.
        sampling: How it rolls out; eta must be above 0.
        trajectories: Roll-outs of each prompt.
        kept: How many of them are kept, evenly spaced by rank, the best and the worst among them.
        sides: Trajectories that are compared at a time (K), drawn from those of one prompt.
        states: Precision of the kept states, to which the roll-out rounds each of them.
        validation_draws: Draws of timestep and noise per held-out pair.
    """

    COLLECTS: ClassVar = Trajectories

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig,
        judge: Judge,
        beta: float,
        delta: float,
        gamma: float,
        drawn_steps: int,
        sampling: Sampling,
        trajectories: int,
        kept: int,
        sides: int = 2,
        states: Literal["float32", "bfloat16", "float16"] = "float32",
        validation_draws: int = 4,
    ) -> None:
        super().__init__(backbone, optimizer, judge, sampling, validation_draws)
        check_number("beta", beta, above=0)
        check_number("delta", delta, above=0)
        check_number("gamma", gamma, most=1, above=0)
        check_number("drawn_steps", drawn_steps, 1)
        if not 2 <= sides <= kept <= trajectories:
            raise InputError(
                f"{sides} sides out of {kept} kept of {trajectories} trajectories cannot be: give "
                "at least 2 sides, and no more than are kept, nor keep more than there are."
            )
        self.beta, self.delta, self.gamma, self.drawn_steps = beta, delta, gamma, drawn_steps
        self.trajectories, self.kept, self.sides = trajectories, kept, sides
        self.states: torch.dtype = getattr(torch, states)

    def losses(self, ratios: LogRatios, pairs: Pairs | Steps) -> Tensor:  # type: ignore[override]
        """Return minus the log-probability of the judge's order, one value per row, (B,)."""
        return plackett_luce(self.beta * self.clipped(ratios.values).mean(2))

    def clipped(self, log_ratios: Tensor) -> Tensor:
        """Return the log-ratios (B, K, S) clipped to [-delta, delta]."""
        return log_ratios.clamp(-self.delta, self.delta)

    @torch.no_grad()
    def collect(self, texts: list[str], seeds: Tensor) -> Trajectories:
        """Return the trajectories of B prompts, on the CPU.

        Args:
            texts: B prompts.
            seeds: (B,) int64; everything random is drawn from them.
        """
        prompt = self.backbone.embed(texts)
        count, size = self.trajectories, self.sampling.batch_size
        own_seeds = draws.subseeds(seeds, count, "trajectory").flatten()
        repeated, every_text = prompt.repeat(count), [text for text in texts for _ in range(count)]
        states, scores = [], []
        for part in torch.arange(len(own_seeds)).split(size):
            rows = repeated.rows(part.to(prompt.hidden.device))
            states.append(self.rollout.roll_out(own_seeds[part], rows, self.states))
            last = states[-1][:, -1].to(prompt.hidden.device).float()
            clean = torch.zeros(len(last), dtype=torch.int64, device=last.device)
            some = [every_text[i] for i in part]
            scores.append(self.judge_latents(last, some, clean))
        every, score = torch.cat(states), torch.cat(scores).view(-1, count)
        self.window.add({"spread": (score.amax(1) - score.amin(1)).mean()})
        score = score.cpu()
        ranks = torch.linspace(0, count - 1, self.kept).round().long()
        order = score.argsort(dim=1, descending=True, stable=True)[:, ranks]
        times = torch.tensor(self.rollout.times).expand(len(texts), -1).contiguous()
        own = every.view(len(texts), count, *every.shape[1:])
        best_first = own[torch.arange(len(texts))[:, None], order]
        return Trajectories(best_first, times, score.gather(1, order), prompt.cpu(), seeds)

    def draw(self, collected: Trajectories, which: Tensor, seeds: Tensor) -> Steps:
        """Return some steps of some trajectories of each prompt, the best one first.

        Args:
            collected: What `collect` returned.
            which: Rows of it, (B,) int64.
            seeds: (B,) int64; everything random is drawn from them.
        """
        chance = draws.uniform(seeds, "sides", (self.kept,))
        sides = chance.argsort(1)[:, : self.sides].sort(1).values  # they lie best first
        count = self.sampling.steps
        u = draws.uniform(seeds, "steps", (self.drawn_steps,))
        numbers = count - 1 - (discounted(u, self.gamma, count) * count).long()
        return collected.steps(which, sides, numbers, seeds)
