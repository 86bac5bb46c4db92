"""Conditioning of the denoiser: embedded prompts as an open record of tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lit_prefopt.errors import InputError
from lit_prefopt.ragged import Ragged, register_pytree

__all__ = ["RESERVED", "Prompt", "Ragged", "Text", "described"]

RESERVED = ("frames", "guidance", "mean", "deviation", "masks")
"""Names that no text tensor has: those of other tensors in the same records and files."""

VALUES, LENGTHS = ".values", ".lengths"  # ends of the flat names of a `Ragged`

Text = Tensor | Ragged
"""One part of embedded prompts: a tensor (B, ...), or rows of unequal lengths."""


@dataclass(eq=False)
class Prompt:
    """Conditioning of the denoiser beside the noise level, one row per prompt.

    The text is an open record: a family names the tensors that its denoiser needs, such as `hidden`
    (B, N, D) for the embedded tokens, `pooled` (B, P), or `mask` (B, N). Tensors that have a length
    of their own for each prompt are `Ragged`.

    Args:
        text: Parts of the embedded text by name, at least one.
        frames: Size conditioning of the images in pixels, (B, 6) int64: height and width of the
            original, top and left of the crop in the resized (and possibly mirrored) image, height
            and width of the crop. If None, images are uncropped and have the latents' size.
        guidance: Guidance scale, (B,) float32, for denoisers that are conditioned on it.
    """

    text: dict[str, Text]
    frames: Tensor | None = None
    guidance: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the names, and that all parts have as many rows.

        Raises:
            InputError: They do not fit.
        """
        if not self.text:
            raise InputError("A prompt needs a text tensor at least: name one, such as `hidden`.")
        for name in self.text:
            if name in RESERVED or "." in name:
                raise InputError(
                    f"A text tensor cannot be called {name!r}: take a name without a dot that is "
                    f"none of {', '.join(RESERVED)}."
                )
        counts = {name: len(value) for name, value in self._parts().items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise InputError(
                f"The parts of a prompt have different numbers of rows ({found}): `embed` returns "
                "one row of each for every text."
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.text.values())))

    def __contains__(self, name: str) -> bool:
        """Return whether there is a text tensor of this name."""
        return name in self.text

    def __getitem__(self, name: str) -> Tensor:
        """Return the text tensor of this name.

        Raises:
            InputError: There is none, or its rows have unequal lengths.
        """
        value = self._found(name)
        if isinstance(value, Ragged):
            raise InputError(
                f"The text tensor `{name}` has rows of unequal lengths: read it as "
                f"`prompt.ragged({name!r})`."
            )
        return value

    def ragged(self, name: str) -> Ragged:
        """Return the rows of unequal lengths of this name.

        Raises:
            InputError: There are none, or they are one tensor.
        """
        value = self._found(name)
        if isinstance(value, Tensor):
            raise InputError(
                f"The text tensor `{name}` has rows of one length: read it as `prompt[{name!r}]`."
            )
        return value

    def get(self, name: str) -> Tensor | None:
        """Return the text tensor of this name, or None if there is none."""
        return self[name] if name in self.text else None

    @property
    def device(self) -> torch.device:
        """Device of the text."""
        return next(iter(self.text.values())).device

    def widths(self) -> dict[str, int]:
        """Return the width of every text tensor by name: its last axis, or 1 if it has only one."""
        return {n: x.shape[-1] if len(x.shape) > 1 else 1 for n, x in self.text.items()}

    # Rows ---------------------------------------------------------------------------------------

    def repeat(self, times: int) -> Prompt:
        """Repeat each row `times` times, B * times rows: one for each side."""
        return self._each(
            lambda x: x.repeat(times) if isinstance(x, Ragged) else x.repeat_interleave(times, 0)
        )

    def rows(self, which: Tensor | slice) -> Prompt:
        """Return the rows of these numbers, (B',) int64; a slice shares memory."""
        return self._each(lambda x: x.rows(which) if isinstance(x, Ragged) else x[which])

    def row(self, number: int) -> dict[str, Tensor]:
        """Return the text tensors of one row by name, without padding and without the row's axis.

        Args:
            number: Number of the row.
        """
        text = self.rows(slice(number, number + 1)).text
        return {n: x.values if isinstance(x, Ragged) else x[0] for n, x in text.items()}

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Tensor]], like: Prompt) -> Prompt:
        """Return the prompt whose rows were returned by `row`.

        Args:
            rows: Text tensors of each row by name.
            like: A prompt with the same text tensors, which says which of them are ragged.
        """
        return cls(
            {
                name: (Ragged.from_rows if isinstance(value, Ragged) else torch.stack)(
                    [row[name] for row in rows]
                )
                for name, value in like.text.items()
            }
        )

    @classmethod
    def cat(cls, parts: Sequence[Prompt]) -> Prompt:
        """Concatenate prompts along their rows.

        Raises:
            InputError: One has a part that another lacks, or has it in another form.
        """
        named = [part._parts() for part in parts]
        joined = {name: _joined(name, [one.get(name) for one in named]) for name in _names(named)}
        fields = {name: joined.pop(name, None) for name in ("frames", "guidance")}
        return cls(joined, **cast("dict[str, Tensor | None]", fields))

    def prepend(self, other: Prompt) -> Prompt:
        """Return the other prompt's rows followed by these; both have the same parts."""
        return Prompt.cat([other, self])

    # Moves --------------------------------------------------------------------------------------

    def map(self, fn: Callable[[Tensor], Tensor]) -> Prompt:
        """Apply a function to every tensor, such as a move to a device."""
        return self._each(lambda x: x.map(fn) if isinstance(x, Ragged) else fn(x))

    def cpu(self) -> Prompt:
        """Return a copy on the CPU."""
        return self.map(lambda x: x.cpu())

    def to(self, device: torch.device) -> Prompt:
        """Return a copy on a device; from pinned memory it is copied without blocking."""
        waits = torch.device(device).type in ("cpu", "mps")  # as Lightning moves tensors
        return self.map(lambda x: x.to(device, non_blocking=not waits))

    def pin_memory(self) -> Prompt:
        """Return a copy in pinned memory."""
        return self.map(lambda x: x.pin_memory())

    def replace(self, **changes: Any) -> Prompt:
        """Return a copy with other `text`, `frames` or `guidance`."""
        return replace(self, **changes)

    # Files --------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return flat tensors by name: `NAME.values` and `NAME.lengths` where rows are ragged."""
        flat: dict[str, Tensor] = {}
        for name, value in self._parts().items():
            if isinstance(value, Ragged):
                flat[name + VALUES] = value.values
                flat[name + LENGTHS] = torch.tensor(value.lengths, dtype=torch.int64)
            else:
                flat[name] = value
        return flat

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Prompt:
        """Return the prompt of flat tensors: the inverse of `tensors`."""
        text: dict[str, Text] = {}
        for name, value in tensors.items():
            if name.endswith(VALUES):
                name = name.removesuffix(VALUES)
                text[name] = Ragged(value, tuple(tensors[name + LENGTHS].tolist()))
            elif not name.endswith(LENGTHS) and name not in ("frames", "guidance"):
                text[name] = value
        return cls(text, tensors.get("frames"), tensors.get("guidance"))

    def _found(self, name: str) -> Text:
        if name not in self.text:
            raise InputError(
                f"The prompts have no `{name}`, which the denoiser needs, but only "
                f"{', '.join(self.text)}: embed them with the backbone that is trained, or cache "
                "the pairs again with it."
            )
        return self.text[name]

    def _parts(self) -> dict[str, Text]:
        """Return all parts by name, without those that are None."""
        own = {"frames": self.frames, "guidance": self.guidance}
        return self.text | {name: value for name, value in own.items() if value is not None}

    def _each(self, fn: Callable[[Any], Any]) -> Prompt:
        """Return the prompt with a function applied to every part."""
        parts = {name: fn(value) for name, value in self._parts().items()}
        fields = {name: parts.pop(name, None) for name in ("frames", "guidance")}
        return Prompt(parts, **fields)


def described(widths: Mapping[str, int] | None) -> str:
    """Format the widths of text tensors, for messages."""
    return ", ".join(f"{name} ({width})" for name, width in (widths or {}).items()) or "none"


def _names(named: Sequence[Mapping[str, Text]]) -> dict[str, None]:
    return dict.fromkeys(name for one in named for name in one)


def _joined(name: str, values: Sequence[Text | None]) -> Text:
    """Concatenate one part of several prompts."""
    cure = "embed all of them with the same backbone, or cache the pairs again with it"
    if any(value is None for value in values):
        raise InputError(f"Some of the prompts have `{name}` and others have none: {cure}.")
    if all(isinstance(value, Ragged) for value in values):
        return Ragged.cat(cast("Sequence[Ragged]", values))
    if any(isinstance(value, Ragged) for value in values):
        raise InputError(f"`{name}` is ragged in some of the prompts and not in others: {cure}.")
    tensors = cast("list[Tensor]", values)
    shapes = sorted({tuple(x.shape[1:]) for x in tensors})
    if len(shapes) > 1:
        raise InputError(
            f"A row of `{name}` has the shape {shapes[0]} in some of the prompts and {shapes[-1]} "
            f"in others: {cure}."
        )
    return torch.cat([*tensors])


register_pytree(Prompt, ("text", "frames", "guidance"))
