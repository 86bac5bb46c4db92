"""DiffusionNFT: reward learning on the forward process (arXiv 2509.16117, 2025)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_prefopt.batches import Pairs
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample_latents
from lit_prefopt.errors import check_number
from lit_prefopt.methods.offline_nft import OfflineNFT
from lit_prefopt.on_policy import OnPolicyModule
from lit_prefopt.record_rows import select_rows
from lit_prefopt.reward_groups import group_means, over_ranks
from lit_prefopt.reward_losses import apart


class DiffusionNFT(OfflineNFT, OnPolicyModule):  # type: ignore[misc]  # it draws no steps
    """Samples images of each prompt, and moves towards the good and away from the bad ones.

    A moving average of the policy samples, with any sampler, and a judge scores its images: neither
    steps nor densities are needed. A row of a collection is an image: `data.batch_size`,
    `collection` and `keep` count them. Images of a prompt whose scores are all equal get weight 0.

    Args:
        trajectories: Images of each prompt, whose scores are compared.
    """

    COLLECTS: ClassVar = Pairs
    BATCH: ClassVar = Pairs

    def __init__(self, *args: Any, trajectories: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_number("trajectories", trajectories, 2)
        self.trajectories = trajectories

    @torch.no_grad()
    def collect(self, texts: list[str], seeds: Tensor) -> Pairs:
        """Return the images of B prompts with their scores, B * trajectories rows on the CPU.

        Args:
            texts: B prompts.
            seeds: (B,) int64; all random numbers are drawn from them.
        """
        prompt, count = self.backbone.embed(texts), self.trajectories
        own = draws.subseeds(seeds, count, "trajectory").flatten()
        latents, judged = [], []
        with self.average.active(self):
            for part, rows, some in self.parts(prompt, texts, count):
                clean = sample_latents(self.backbone, rows, own[part], self.sampling).float()
                t = torch.zeros(len(part), device=clean.device)
                judged.append(self.judge_latents(clean, some, t).cpu())
                latents.append(clean.cpu())
        scores, ones = torch.cat(judged).view(-1, count), torch.ones(len(own))
        self.window.add(group_means(scores))
        return Pairs(
            torch.cat(latents)[:, None],
            prompt.repeat(count).cpu(),
            own,
            ones,
            apart(scores).repeat_interleave(count),
            scores=scores.view(-1, 1),
            advantages=self.groups.begin(scores).view(-1, 1),
        )

    def complete(self, rounds: list[Pairs]) -> list[Pairs]:
        """Return a collection's images, their advantages divided by the global deviation."""
        return self.groups.finish(rounds, over_ranks(self))

    def draw(self, collected: Pairs, which: Tensor, seeds: Tensor) -> Pairs:
        """Return images of a collection, with new seeds for their noise levels and noise."""
        return select_rows(collected, which)._replace(seeds=seeds)
