"""SPIN-Diffusion: self-play against the previous round's model (arXiv 2402.10210, 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs, Steps
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.rollout import Rollout, logp
from lit_prefopt.errors import InputError
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.transfer import to_device


class SPINDiffusion(DiffusionDPO):
    """Trains the policy to prefer real images over samples of the opponent, its own reference.

    The pairs are real images against the opponent's samples (`SelfPlay`), and training starts from
    the opponent: `lit-prefopt rounds` alternates generation and training. Once the opponent's
    samples are distributed as the data, the expected gradient is zero.

    Args:
        beta: Strength of the regularisation to the opponent, on log-ratios as in Diffusion-DPO;
            with `exact` on log-densities of steps that are means over channels and pixels.
        exact: Compare single steps of complete trajectories: a real image's, drawn from the noise
            process, and one that the opponent rolls out on the fly. By default, noise is added to
            both final images, which the paper calls its approximate objective and uses in all
            experiments; the loss is then Diffusion-DPO's.
        sampling: Steps, guidance and eta of those trajectories; by default the backbone's own,
            without guidance.
    """

    def __init__(
        self,
        *args: Any,
        beta: float,
        exact: bool = False,
        sampling: Sampling | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, beta=beta, **kwargs)
        of_errors = (self.anchor, self.chosen_protection is not None, self.weighting is not None)
        if exact and (any(of_errors) or self.gamma != 1):
            raise InputError(
                "`exact` compares steps, which have no denoising errors and are drawn uniformly: "
                "leave `anchor`, `chosen_protection`, `weighting` and `gamma` out, or set `exact` "
                "to false."
            )
        own = self.backbone.sampling
        how = sampling or Sampling(own.steps, guidance=1.0, eta=1.0, batch_size=own.batch_size)
        self.rollout = Rollout(self.backbone, how) if exact else None
        self.takes_reference_errors = not exact
        self.least_beta = 0.0 if exact else self.least_beta  # log-densities, and not errors

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return the log-ratio of policy to opponent for each side."""
        if self.rollout is None:
            return super().log_ratios(pairs)
        steps = self.steps(pairs, self.rollout)
        with self.backbone.as_reference():
            opponent = logp(self.backbone, self.rollout.how, steps)
        policy = logp(self.backbone, self.rollout.how, steps)
        return LogRatios((policy - opponent).squeeze(-1), steps.t.squeeze(-1))

    @torch.no_grad()
    def steps(self, pairs: Pairs, rollout: Rollout) -> Steps:
        """Return one step of a real image's trajectory and the same step of an opponent's.

        Args:
            pairs: B pairs, of whose sides only the chosen one, the real image, is used.
            rollout: The schedule of the trajectories.
        """
        device, real = pairs.latents.device, pairs.latents[:, 0]
        u = draws.uniform(pairs.seeds, "step", device=torch.device("cpu"))
        numbers = (u * rollout.how.steps).long()  # on the CPU, where the steps are counted
        levels = rollout.levels
        t, t_next = (to_device(levels[which], device) for which in (numbers, numbers + 1))
        own = self._noised(real, t, t_next, pairs.seeds, rollout)
        others = self._rolled_out(pairs, numbers, rollout)
        sides = zip(own, others, strict=True)
        parents, children = (torch.stack(both, 1)[:, :, None] for both in sides)
        return Steps(
            parents,
            children,
            t[:, None],
            t_next[:, None],
            pairs.prompt,
            pairs.seeds,
            pairs.labels,
            pairs.weights,
        )

    def _noised(
        self, real: Tensor, t: Tensor, t_next: Tensor, seeds: Tensor, rollout: Rollout
    ) -> tuple[Tensor, Tensor]:
        """Return x_t and x_t_next of real images: q(x_t | x_0), then q(x_t_next | x_t, x_0)."""
        process = self.backbone.process
        noise = rollout.noise(seeds, "real", real.device)
        parents = process.add_noise(real, noise, t)
        # the prediction of a denoiser that knew the image; its step is the posterior
        known = process.target(real, noise, t)
        step = process.step(known, parents, t, t_next, rollout.how)
        return parents, step.sample(rollout.noise(seeds, "real step", real.device))

    def _rolled_out(self, pairs: Pairs, numbers: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the opponent's states before and after each row's step."""
        device = pairs.latents.device
        latents = rollout.start(pairs.seeds, device)
        parents, children = torch.zeros_like(latents), torch.zeros_like(latents)
        with self.backbone.as_reference():
            for number in range(int(numbers.max()) + 1):
                noise = rollout.noise(pairs.seeds, f"step {number}", device)
                after = rollout.step(latents, number, pairs.prompt).sample(noise)
                now = to_device(numbers == number, device)[:, None, None, None]
                parents = torch.where(now, latents, parents)
                children = torch.where(now, after, children)
                latents = after
        return parents, children
