"""Self-play: a real image against the model's own sample of the same prompt (arXiv 2402.10210)."""

from __future__ import annotations

from typing import Any

from lit_prefopt.backbones import Backbone
from lit_prefopt.data.images import to_pil
from lit_prefopt.datamodules.generation import GenerationGroup
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError
from lit_prefopt.generate.generator import GeneratedPair, Generator
from lit_prefopt.processes.settings import Sampling


class SelfPlay(Generator):
    """Pairs each real image with a sample of the opponent, which is the model as it stands.

    The prompts and their real images are those of pair shards (`--data PairGroups`).

    Args:
        backbone: The opponent; given as the recipe's own key `backbone`.
        output: Folder of pair shards to be made.
        sampling: How images are sampled; the backbone's own settings where not given.
        opponent_round: In which round the opponent was made; goes to each sample's .json.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: str,
        sampling: Sampling | None = None,
        opponent_round: int = 0,
    ) -> None:
        super().__init__(backbone, output, sampling)
        self.opponent_round = opponent_round

    def settings(self) -> dict[str, Any]:
        """Return what decides, beside weights, prompts and sampling, what is made."""
        return {"opponent_round": self.opponent_round}

    def make(self, group: GenerationGroup) -> list[GeneratedPair]:
        """Return a pair for each prompt: the real image is the chosen one."""
        seeds = draws.subseeds(group.seeds, 1, "self-play")[:, 0]
        images = sample(self.backbone, group.texts, seeds, self.sampling)
        made = []
        for i, (text, real) in enumerate(zip(group.texts, group.images, strict=True)):
            if real is None:
                raise InputError(
                    "Self-play wants a real image for each prompt: give pair shards by "
                    "`--data PairGroups --data.shards FOLDER`."
                )
            meta = {
                "source": "self-play",
                "seeds": [None, int(seeds[i])],
                "opponent_round": self.opponent_round,
            }
            made.append(GeneratedPair(group.indices[i], text, real, to_pil(images[i]), meta))
        return made
