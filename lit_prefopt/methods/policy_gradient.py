"""Policy gradient on denoising steps: DDPO (arXiv 2305.13301), Flow-GRPO (arXiv 2505.05470)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from lit_prefopt.batches import LogRatios, Pairs, Steps
from lit_prefopt.diffusion.rollout import reverse_steps
from lit_prefopt.errors import check_number
from lit_prefopt.group_rollouts import GroupRollouts
from lit_prefopt.losses import Comparisons, clip
from lit_prefopt.reward_losses import clipped_surrogate, masked_surrogate


class PolicyGradient(GroupRollouts):
    """Maximises the judge's score by PPO on the steps of roll-outs, with advantages within prompts.

    On a diffusion model with eta 1 it is DDPO, on a flow Flow-GRPO; with few `noisy_steps` it is
    Flow-GRPO-Fast or MixGRPO (arXiv 2507.21802, which moves them on during the training), with a
    `trust_region` Flow-DPPO. Guidance is that of the roll-outs, in training too.

    Args:
        eps: Ratios of policy to sampling policy are clipped to [1 - eps, 1 + eps]; they are those
            of log-densities that are means over channels and pixels. Unused with `trust_region`.
        kl: Factor of the KL divergence from the reference, exact for each step and a mean over
            channels and pixels; 0 needs no reference. The released Flow-GRPO leaves the length of
            the step out of the variance: with n steps its factor is about n times this one.
        trust_region: KL divergence from the sampling policy above which a step that has moved the
            way of its advantage is dropped, in place of clipping (1e-5 in Flow-DPPO).
    """

    takes_reference_errors = False

    def __init__(
        self, *args: Any, eps: float, kl: float, trust_region: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_number("eps", eps, most=0.999, above=0)
        check_number("kl", kl, 0)
        check_number("trust_region", trust_region, above=0, optional=True)
        self.eps, self.kl, self.trust_region = eps, kl, trust_region
        self.needs_reference = kl > 0
        self.keeps_means = trust_region is not None

    def log_ratios(self, pairs: Pairs | Steps) -> LogRatios:
        """Return the log-ratio of policy to sampling policy of every step, with divergences.

        Args:
            pairs: Steps of roll-outs; the ratio to the reference of held-out pairs.
        """
        if not isinstance(pairs, Steps) or pairs.logp is None:
            return super().log_ratios(pairs)
        shape, terms, reference = pairs.children.shape[:3], {}, None
        if self.kl:
            with self.backbone.as_reference():
                reference = reverse_steps(self.backbone, self.sampling, pairs).mean
        policy = reverse_steps(self.backbone, self.sampling, pairs)
        if reference is not None:
            terms["reference_kl"] = policy.divergence(reference).view(shape)
        if pairs.means is not None:
            moved = policy.divergence(pairs.means.flatten(0, 2)).view(shape)
            terms["sampling_kl"] = moved.detach()
        logp = policy.logp(pairs.children.flatten(0, 2)).view(shape)
        return LogRatios(logp - pairs.logp, pairs.t, terms=terms)

    def losses(self, ratios: LogRatios, pairs: Comparisons) -> Tensor:
        """Return the surrogate loss plus the KL penalty, means over the steps, (B,)."""
        advantages, terms = cast("Tensor", cast("Steps", pairs).advantages), ratios.terms or {}
        if self.trust_region is None:
            losses = clipped_surrogate(ratios.values, advantages, self.eps)
        else:
            moved = terms["sampling_kl"]
            losses = masked_surrogate(ratios.values, advantages, moved, self.trust_region)
        if self.kl:
            losses = losses + self.kl * terms["reference_kl"]
        return losses.mean((1, 2))

    def clipped(self, log_ratios: Tensor) -> Tensor:
        """Clip ratios to [1 - eps, 1 + eps], given and returned as log-ratios (B, K, S)."""
        return log_ratios if self.trust_region is not None else clip(log_ratios, self.eps)
