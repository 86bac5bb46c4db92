"""Text encoders of diffusion models: a frozen network with its tokenizer and its context."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import AutoTokenizer, CLIPTokenizer

from lit_prefopt.utils.transfer import to_device


class TextEncoder:
    """A frozen text encoder with its tokenizer; a model family encodes prompts with one or more.

    Args:
        network: The text encoder's network of transformers.
        tokenizer: Its tokenizer.
        length: Number of tokens to which prompts are padded or cut; the tokenizer's own if not
            given.
    """

    TOKENIZER: ClassVar[Any] = AutoTokenizer
    """Class that loads the tokenizer."""

    def __init__(self, network: Any, tokenizer: Any, length: int | None = None) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.length = length or int(tokenizer.model_max_length)

    def tokenize(self, texts: list[str]) -> Any:
        """Return the tokens of B prompts, `input_ids` and `attention_mask`, each (B, length)."""
        return self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )

    def fits_context(self, text: str) -> bool:
        """Whether a prompt is encoded whole."""
        return len(self.tokenizer(text, verbose=False).input_ids) <= self.length

    def encode(self, texts: list[str], **options: Any) -> Any:
        """Encode B prompts without a mask, as most models of images do, and return all outputs.

        Args:
            texts: The prompts.
            options: Further arguments of the network, such as `output_hidden_states`.
        """
        device = self.network.device
        with torch.autocast(device.type, enabled=False):
            return self.network(to_device(self.tokenize(texts).input_ids, device), **options)

    def penultimate(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode B prompts to the last hidden states but one, (B, N, D), and the first output.

        Of a CLIP with projection the first output is the projected prompt, (B, P).
        """
        outputs = self.encode(texts, output_hidden_states=True)
        return outputs.hidden_states[-2], outputs[0]


class CLIPText(TextEncoder):
    """The text encoder of a CLIP, with or without projection."""

    TOKENIZER = CLIPTokenizer


class T5Text(TextEncoder):
    """The encoder of a T5."""
