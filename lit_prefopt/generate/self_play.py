"""Self-play: pair a real image with the model's own sample of its prompt (arXiv 2402.10210)."""

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
    """Pairs each real image with a sample of the opponent, which is the current model.

    The prompts and their real images are those of pair shards (`--data PairGroups`).

    Args:
        backbone: The opponent; given as the recipe's own key `backbone`.
        output: Output folder of pair shards.
        sampling: Sampler settings; the backbone's own by default.
        opponent_round: Round in which the opponent was trained; stored in each sample's .json.
        negative: LoRA file, denoiser's folder, checkpoint or run of a negative model
            (`--model.swapped true`), whose prediction takes the place of the one without prompt in
            guidance.
        negative_merge: 0 adds the negative model to the weights that are sampled, 1 to the base.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: str,
        sampling: Sampling | None = None,
        opponent_round: int = 0,
        negative: str | None = None,
        negative_merge: float = 0.0,
    ) -> None:
        super().__init__(backbone, output, sampling, negative, negative_merge)
        self.opponent_round = opponent_round

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the output, besides weights, prompts and sampling."""
        return {"opponent_round": self.opponent_round}

    def make(self, group: GenerationGroup) -> list[GeneratedPair]:
        """Return a pair per prompt, with the real image as the chosen side."""
        seeds = draws.subseeds(group.seeds, 1, "self-play")[:, 0]
        images = sample(self.backbone, group.texts, seeds, self.sampling)
        made = []
        for i, (text, real) in enumerate(zip(group.texts, group.images, strict=True)):
            if real is None:
                raise InputError(
                    "Self-play needs a real image for each prompt: give pair shards with "
                    "`--data PairGroups --data.shards FOLDER`."
                )
            meta = {
                "source": "self-play",
                "seeds": [None, int(seeds[i])],
                "opponent_round": self.opponent_round,
            }
            made.append(GeneratedPair(group.indices[i], text, real, to_pil(images[i]), meta))
        return made
