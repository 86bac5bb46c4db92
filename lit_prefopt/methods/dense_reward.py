"""Dense-reward DPO: a discount weighs early denoising steps more (arXiv 2402.08265, 2024)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Steps, Trajectories
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.denoising import discounted
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.losses import Comparisons, plackett_luce
from lit_prefopt.on_policy import OnPolicyModule


class DenseRewardDPO(OnPolicyModule):
    """Ranks complete trajectories by their last image and trains on sampled steps of them.

    A discount over the reverse steps models that early, noisy steps determine more of the image:
    it is the distribution from which a trajectory's steps are drawn. Trajectories may serve for
    many updates (`data.keep`, `data.batches`).

    Args:
        beta: Factor C of the mean of clipped log-ratios, on log-densities that are means over
            channels and pixels.
        delta: Log-ratios are clipped to [-delta, delta], step by step.
        gamma: Weight of a step relative to the step before it, in (0, 1]; 1 weighs all equally.
        drawn_steps: Steps drawn from a trajectory for one update, with replacement, the same ones
            of all sides.
        trajectories: Roll-outs of each prompt.
        kept: Number of roll-outs that are kept, evenly spaced by rank, best and worst included.
        sides: Trajectories of one prompt that are compared at a time (K), drawn from those kept.
        states: Precision of the stored states, to which each state is rounded in the roll-out.
    """

    COLLECTS: ClassVar = Trajectories

    def __init__(
        self,
        *args: Any,
        beta: float,
        delta: float,
        gamma: float,
        drawn_steps: int,
        trajectories: int,
        kept: int,
        sides: int = 2,
        states: Literal["float32", "bfloat16", "float16"] = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("beta", beta, above=0)
        check_number("delta", delta, above=0)
        check_number("gamma", gamma, most=1, above=0)
        check_number("drawn_steps", drawn_steps, 1)
        if not 2 <= sides <= kept <= trajectories:
            raise InputError(
                f"`sides` is {sides}, `kept` {kept} and `trajectories` {trajectories}: set 2 <= "
                "`sides` <= `kept` <= `trajectories`."
            )
        self.beta, self.delta, self.gamma, self.drawn_steps = beta, delta, gamma, drawn_steps
        self.trajectories, self.kept, self.sides = trajectories, kept, sides
        self.states: torch.dtype = getattr(torch, states)

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return minus the log-probability of the judge's ranking, one value per row, (B,)."""
        return plackett_luce(self.beta * self.clipped(ratios.values).mean(2))

    def clipped(self, log_ratios: Tensor) -> Tensor:
        """Clip the log-ratios (B, K, S) to [-delta, delta]."""
        return log_ratios.clamp(-self.delta, self.delta)

    @torch.no_grad()
    def collect(self, texts: list[str], seeds: Tensor) -> Trajectories:
        """Return the trajectories of B prompts, on the CPU.

        Args:
            texts: B prompts.
            seeds: (B,) int64; all random numbers are drawn from them.
        """
        prompt = self.backbone.embed(texts)
        count = self.trajectories
        own_seeds = draws.subseeds(seeds, count, "trajectory").flatten()
        states, scores = [], []
        for part, rows, some in self.parts(prompt, texts, count):
            states.append(self.rollout.roll_out(own_seeds[part], rows, self.states))
            last = states[-1][:, -1].to(prompt.device).float()
            clean = self.rollout.level(self.sampling.steps, len(last), last.device)
            scores.append(self.judge_latents(last, some, clean))
        every, score = torch.cat(states), torch.cat(scores).view(-1, count)
        self.window.add({"spread": (score.amax(1) - score.amin(1)).mean()})
        score = score.cpu()
        ranks = torch.linspace(0, count - 1, self.kept).round().long()
        order = score.argsort(dim=1, descending=True, stable=True)[:, ranks]
        times = self.rollout.levels.repeat(len(texts), 1)
        own = every.view(len(texts), count, *every.shape[1:])
        best_first = own[torch.arange(len(texts))[:, None], order]
        return Trajectories(best_first, times, score.gather(1, order), prompt.cpu(), seeds)

    def draw(self, collected: Trajectories, which: Tensor, seeds: Tensor) -> Steps:
        """Return sampled steps of sampled trajectories of each prompt, best trajectory first.

        Args:
            collected: Trajectories that `collect` returned.
            which: Rows of it, (B,) int64.
            seeds: (B,) int64; all random numbers are drawn from them.
        """
        chance = draws.uniform(seeds, "sides", (self.kept,))
        sides = chance.argsort(1)[:, : self.sides].sort(1).values  # stored best first
        count = self.sampling.steps
        u = draws.uniform(seeds, "steps", (self.drawn_steps,))
        numbers = count - 1 - (discounted(u, self.gamma, count) * count).long()
        return collected.steps(which, sides, numbers, seeds)
