"""Groups of roll-outs of each prompt, with the densities under the policy that sampled them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_prefopt.batches import Steps, Trajectories
from lit_prefopt.diffusion import draws
from lit_prefopt.errors import InputError, check_number
from lit_prefopt.on_policy import OnPolicyModule
from lit_prefopt.reward_groups import Groups, group_means, over_ranks
from lit_prefopt.reward_losses import Deviation


class GroupRollouts(OnPolicyModule):
    """Base class of policy gradients: collects roll-outs with advantages and draws their steps.

    A row of a collection is a roll-out: `data.batch_size`, `collection` and `keep` count them.
    Roll-outs of a prompt whose scores are all equal have no advantage and get weight 0.

    Args:
        trajectories: Roll-outs of each prompt, whose scores are compared.
        deviation: Divisor of advantages: the standard deviation of the prompt's scores (`group`)
            or of all scores of a collection on all ranks (`global`).
        drawn_steps: Noisy steps drawn from a roll-out for one update, each at most once; all if not
            given.
        noisy_steps: Number of consecutive steps that add noise and are trained, while the others
            are deterministic; all if not given.
        latest_start: Largest number of the first noisy step, which is drawn for each prompt from 0,
            the noisiest, to this.
        same_start: Whether all roll-outs of a prompt start from the same noise.
        states: Precision of the stored states, to which each state is rounded in the roll-out.
    """

    COLLECTS: ClassVar = Trajectories

    keeps_means: bool = False
    """Whether the means of the steps are stored too, which takes as much memory as the states."""

    def __init__(
        self,
        *args: Any,
        trajectories: int,
        deviation: Deviation = "group",
        drawn_steps: int | None = None,
        noisy_steps: int | None = None,
        latest_start: int = 0,
        same_start: bool = False,
        states: Literal["float32", "bfloat16", "float16"] = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("trajectories", trajectories, 2)
        check_number("noisy_steps", noisy_steps, 1, optional=True)
        check_number("latest_start", latest_start, 0)
        self.noisy_steps, every = noisy_steps or self.sampling.steps, self.sampling.steps
        if latest_start + self.noisy_steps > every:
            raise InputError(
                f"{self.noisy_steps} noisy steps from step {latest_start} on do not fit into "
                f"{every} steps: lower `noisy_steps` or `latest_start`."
            )
        check_number("drawn_steps", drawn_steps, 1, self.noisy_steps, optional=True)
        self.trajectories, self.groups = trajectories, Groups(deviation)
        self.drawn_steps = drawn_steps or self.noisy_steps
        self.latest_start, self.same_start = latest_start, same_start
        self.states: torch.dtype = getattr(torch, states)

    @torch.no_grad()
    def collect(self, texts: list[str], seeds: Tensor) -> Trajectories:
        """Return the roll-outs of B prompts, B * trajectories rows on the CPU.

        Args:
            texts: B prompts.
            seeds: (B,) int64; all random numbers are drawn from them.
        """
        prompt, count = self.backbone.embed(texts), self.trajectories
        own = draws.subseeds(seeds, count, "trajectory").flatten()
        start = seeds.repeat_interleave(count) if self.same_start else own
        u = draws.uniform(seeds, "first noisy step").repeat_interleave(count)
        first = (u * (self.latest_start + 1)).long()
        paths, ends = [], []
        for part, rows, some in self.parts(prompt, texts, count):
            path = self.rollout.path(
                own[part], rows, first[part], self.noisy_steps, start[part], self.states
            )
            clean = self.rollout.level(self.sampling.steps, len(part), path.end.device)
            ends.append(self.judge_latents(path.end, some, clean).cpu())
            paths.append((path.states, path.t, path.logp, path.means))
        scores = torch.cat(ends).view(-1, count)
        self.window.add(group_means(scores))
        states, t, logp, means = (torch.cat(parts) for parts in zip(*paths, strict=True))
        return Trajectories(
            states[:, None],
            t,
            scores.view(-1, 1),
            prompt.repeat(count).cpu(),
            own,
            logp[:, None],
            means[:, None] if self.keeps_means else None,
            self.groups.begin(scores).view(-1, 1),
        )

    def complete(self, rounds: list[Trajectories]) -> list[Trajectories]:
        """Return a collection's roll-outs, their advantages divided by the global deviation."""
        return self.groups.finish(rounds, over_ranks(self))

    def draw(self, collected: Trajectories, which: Tensor, seeds: Tensor) -> Steps:
        """Return noisy steps of roll-outs, the noisiest first.

        Args:
            collected: Roll-outs that `collect` returned.
            which: Rows of it, (B,) int64.
            seeds: (B,) int64; all random numbers are drawn from them.
        """
        order = draws.uniform(seeds, "steps", (self.noisy_steps,)).argsort(1)
        numbers = order[:, : self.drawn_steps].sort(1).values
        steps = collected.steps(which, torch.zeros_like(which)[:, None], numbers, seeds)
        assert steps.advantages is not None
        return steps._replace(weights=(steps.advantages[:, 0] != 0).float())
