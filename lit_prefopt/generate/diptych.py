"""Diptychs: both sides of a pair from one canvas (Di3PO, arXiv 2602.06355, 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lit_prefopt.backbones import Backbone
from lit_prefopt.data.images import to_pil
from lit_prefopt.datamodules.generation import GenerationGroup
from lit_prefopt.diffusion import draws
from lit_prefopt.diffusion.sampling import sample
from lit_prefopt.errors import InputError, check_number, quoted
from lit_prefopt.generate.change_mask import ChangeMask
from lit_prefopt.generate.corruptions import CorruptedPrompt, Corruption
from lit_prefopt.generate.diptych_sheet import DiptychSheet
from lit_prefopt.generate.edges import EdgeControl
from lit_prefopt.generate.filters import Diptych, Filter, first_rejections
from lit_prefopt.generate.generator import GeneratedPair, Generator
from lit_prefopt.judges import Judge
from lit_prefopt.processes.settings import Sampling
from lit_prefopt.utils.fingerprint import fingerprint


class DiptychRequest(NamedTuple):
    """One diptych to generate."""

    place: int  # of its prompt in the group
    seed: int
    panels: CorruptedPrompt
    text: str  # the prompt of the whole canvas


class DiptychGenerator(Generator):
    """Generates each pair as one image of two panels that differ in the corrupted detail.

    The left panel shows the prompt and becomes the chosen side, the right one shows the corrupted
    prompt and becomes the rejected side. Pairs that a filter rejects are skipped and counted.

    Args:
        backbone: The model that generates the diptychs; given as the recipe's own key `backbone`.
        output: Output folder of pair shards.
        corruption: Changes the prompt of the right panel.
        template: Prompt of the whole image, with {left} and {right} for the panels' prompts.
        size: Width and height of the saved images in pixels; the panels' own size by default.
        per_prompt: Diptychs per prompt, each with its own seed and corruption.
        seam: Pixels cropped from the left and right of both panels, to remove the seam and keep
            the panels aligned.
        filters: Filters of the two halves, applied in this order.
        change: Computes the mask of the region in which the halves differ.
        masks: Save that mask as each pair's mask.png, for methods that use it.
        control: Condition both panels on the edges of an image that is sampled from the prompt
            first.
        sheet: Save a contact sheet of that many diptychs, kept and rejected, as OUTPUT-sheet.png.
        sampling: Sampler settings with height and width of the canvas; by default twice as wide
            as the backbone's own images.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: str,
        corruption: Corruption,
        template: str,
        size: int | None = None,
        per_prompt: int = 1,
        seam: int = 0,
        filters: Sequence[Filter] = (),
        change: ChangeMask | None = None,
        masks: bool = False,
        control: EdgeControl | None = None,
        sheet: int = 0,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(backbone, output, sampling)
        check_number("size", size, 1, optional=True)
        check_number("per_prompt", per_prompt, 1)
        check_number("seam", seam, 0)
        check_number("sheet", sheet, 0)
        _check_template(template)
        own = backbone.latent_shape[2] * backbone.pixels_per_latent
        self.sampling = replace(self.sampling, width=self.sampling.width or 2 * own)
        width = backbone.sampling_shape(self.sampling)[2] * backbone.pixels_per_latent
        if width % 2 or (width // 2) % backbone.size_multiple or width // 2 <= 2 * seam:
            raise InputError(
                f"A canvas {width} pixels wide cannot be cut into two panels without a seam of "
                f"{seam}: set `sampling.width` to a multiple of {2 * backbone.size_multiple}, "
                "or the seam to less."
            )
        self.corruption, self.template, self.size = corruption, template, size
        self.per_prompt, self.seam, self.filters = per_prompt, seam, list(filters)
        self.change, self.masks, self.control = change or ChangeMask(), masks, control
        if control is not None:
            control.check(backbone)
        self.sheet = DiptychSheet(self.output.with_name(f"{self.output.name}-sheet.png"), sheet)

    def setup(self, stage: str | None = None) -> None:
        """Load what the filters need, and check an existing output."""
        for one in self.filters:
            one.prepare()
        super().setup(stage)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the output, besides weights, prompts and sampling."""
        control = self.control and {**self.control.settings(), "weights": fingerprint(self.control)}
        return {
            "corruption": _describe(self.corruption),
            "template": self.template,
            "size": self.size,
            "per_prompt": self.per_prompt,
            "seam": self.seam,
            "filters": [_describe(one) for one in self.filters],
            "change": vars(self.change),
            "masks": self.masks,
            "control": control,
        }

    def make(self, group: GenerationGroup) -> list[GeneratedPair]:
        """Return the pairs that pass the filters."""
        requests = self._requests(group)
        diptychs = [
            diptych
            for start in range(0, len(requests), self.sampling.batch_size)
            for diptych in self._generate(requests[start : start + self.sampling.batch_size])
        ]
        reasons = first_rejections(self.filters, diptychs)
        self.left_out.update(reason for reason in reasons if reason is not None)
        if self.trainer.is_global_zero:
            self.sheet.add(diptychs, reasons)
        return [
            self._pair(group.indices[one.place], one, diptych)
            for one, diptych, reason in zip(requests, diptychs, reasons, strict=True)
            if reason is None
        ]

    def _requests(self, group: GenerationGroup) -> list[DiptychRequest]:
        """Return the diptychs to generate, without prompts that cannot be corrupted or encoded."""
        seeds = draws.subseeds(group.seeds, self.per_prompt, "diptych").tolist()
        requests = []
        for place, text in enumerate(group.texts):
            for seed in seeds[place]:
                panels = self.corruption.corrupt(text, draws.generator(seed, "corruption"))
                if panels is None:
                    self.left_out[f"without {self.corruption.WANTS} in the prompt"] += 1
                    continue
                whole = self.template.format(left=panels.left, right=panels.right)
                if not self.backbone.fits_context(whole):
                    self.left_out["with prompts longer than a text encoder's context"] += 1
                    continue
                requests.append(DiptychRequest(place, seed, panels, whole))
        return requests

    def _generate(self, requests: Sequence[DiptychRequest]) -> list[Diptych]:
        """Generate the diptychs of one batch; they are returned on the CPU."""
        seeds = torch.tensor([one.seed for one in requests])
        drawing: Any = nullcontext()
        if self.control is not None:
            half = replace(self.sampling, width=(self.sampling.width or 0) // 2)
            first = draws.subseeds(seeds, 1, "edges")[:, 0]
            image = sample(self.backbone, [one.panels.left for one in requests], first, half)
            drawing = self.control.condition_on(
                self.backbone, self.control.edges(image).repeat(1, 1, 1, 2)
            )
        with drawing:
            canvases = sample(self.backbone, [one.text for one in requests], seeds, self.sampling)
        left, right = split_panels(canvases.float().cpu(), self.seam, self.size)
        change = self.change(left, right)
        return [
            Diptych(*one.panels, *images)
            for one, *images in zip(requests, left, right, change, strict=True)
        ]

    def _pair(self, index: int, request: DiptychRequest, diptych: Diptych) -> GeneratedPair:
        target = diptych.target
        meta = {
            "source": "diptych",
            "canvas_seed": request.seed,
            "changed": target.kind,
            "rejected_prompt": diptych.other,
        }
        mask = None
        if self.masks:
            mask = Image.fromarray((diptych.change[0] * 255).byte().numpy())
        sides = to_pil(diptych.left), to_pil(diptych.right)
        return GeneratedPair(index, diptych.prompt, *sides, meta, mask)


def split_panels(canvases: Tensor, seam: int = 0, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the two panels of canvases, (B, 3, H, W) each.

    Args:
        canvases: (B, 3, H, 2 W).
        seam: Pixels cropped from the left and right of both panels.
        size: Width and height that the middle of each panel is resized to.
    """
    width = canvases.shape[-1] // 2
    panels = torch.cat([canvases[..., :width], canvases[..., width:]])
    panels = panels[..., seam : width - seam]
    if size is not None and panels.shape[-2:] != (size, size):
        height, width = panels.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        panels = panels[..., top : top + side, left : left + side]
        panels = F.interpolate(panels, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    left_ones, right_ones = panels.chunk(2)
    return left_ones, right_ones


def _check_template(template: str) -> None:
    try:
        filled = template.format(left="\0l", right="\0r")
    except (KeyError, IndexError, ValueError):
        filled = ""
    if "\0l" not in filled or "\0r" not in filled:
        raise InputError(
            f"The template {quoted(template)} has no place for the panels' prompts: write {{left}} "
            "and {right} once each."
        )


def _describe(part: Any) -> dict[str, Any]:
    """Return a component's class and its plain arguments, functions by their names."""
    values = {name: _plain(value) for name, value in sorted(vars(part).items())}
    return {"class": type(part).__name__, **values}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Judge):
        return value.settings()
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    named = value if isinstance(value, FunctionType) else type(value)
    return f"{named.__module__}.{named.__qualname__}"
