"""SPIN-Diffusion: self-play against the model of the round before (arXiv 2402.10210, 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.batches import LogRatios, Pairs, Steps
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.rollout import Rollout, logp
from lit_prefopt.methods.diffusion_dpo import DiffusionDPO
from lit_prefopt.optimizers import OptimizerConfig
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.transfer import to_device


class SPINDiffusion(DiffusionDPO):
    """Learns to tell real images from those of the opponent, which is its own reference.

    The pairs are real images against the opponent's samples (`SelfPlay`), and training starts from
    the opponent: `lit-prefopt rounds` generates and trains in turn. When the opponent makes what
    the data hold, there is nothing left to tell apart and the expected gradient is zero.

    Args:
        backbone: The model family; given as the recipe's own key `backbone`.
        optimizer: Optimizer and learning-rate schedule of the trained weights.
        beta: Pull to the opponent, on log-ratios as in Diffusion-DPO; with `exact` on log-densities
            of steps that are means over channels and pixels.
        exact: Compare single steps of whole trajectories: a real image's, drawn from the noise
            process, and one that the opponent rolls out on the fly. Without it, both final images
            are noised alike, which the paper calls its approximate objective and uses in all
            experiments; then the loss is Diffusion-DPO's.
        sampling: Steps, guidance and eta of those trajectories; the backbone's own without
            guidance where not given.
        validation_draws: Draws of timestep and noise per held-out pair.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerConfig,
        beta: float,
        exact: bool = False,
        sampling: Sampling | None = None,
        validation_draws: int = 4,
    ) -> None:
        super().__init__(backbone, optimizer, beta, validation_draws=validation_draws)
        own = backbone.sampling
        how = sampling or Sampling(own.steps, guidance=1.0, eta=1.0, batch_size=own.batch_size)
        self.rollout = Rollout(backbone, how) if exact else None

    def log_ratios(self, pairs: Pairs) -> LogRatios:
        """Return how much likelier the policy finds each side than the opponent does."""
        if self.rollout is None:
            return super().log_ratios(pairs)
        steps = self.steps(pairs, self.rollout)
        with self.backbone.as_reference():
            opponent = logp(self.backbone, self.rollout.how, steps)
        policy = logp(self.backbone, self.rollout.how, steps)
        return LogRatios((policy - opponent).squeeze(-1), steps.t.squeeze(-1))

    @property
    def takes_reference_errors(self) -> bool:
        """Whether the opponent's errors are all that is asked of it; `exact` asks for its steps."""
        return self.rollout is None

    @torch.no_grad()
    def steps(self, pairs: Pairs, rollout: Rollout) -> Steps:
        """Return one step of a real image's trajectory and the same step of an opponent's.

        Args:
            pairs: B real images, the chosen sides; what else there is goes unused.
            rollout: The schedule of the trajectories.
        """
        device, real = pairs.latents.device, pairs.latents[:, 0]
        u = draws.uniform(pairs.seeds, "step", device=torch.device("cpu"))
        numbers = (u * rollout.how.steps).long()  # on the host, which counts the steps by them
        times = torch.tensor(rollout.times)
        t, t_next = (to_device(times[which], device) for which in (numbers, numbers + 1))
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
        # a denoiser that knew the image would say this, and its step is then the posterior
        known = process.target(real, noise, t)
        step = process.step(known, parents, t, t_next, rollout.how.eta)
        return parents, step.sample(rollout.noise(seeds, "real step", real.device))

    def _rolled_out(self, pairs: Pairs, numbers: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the opponent's states before and after the step of each row's number."""
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
