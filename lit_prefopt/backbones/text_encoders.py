"""Text encoders of diffusion models: a frozen network with its tokenizer and its context."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import AutoTokenizer, CLIPTokenizer

from lit_prefopt.errors import InputError
from lit_prefopt.ragged import Ragged
from lit_prefopt.utils.transfer import to_device


class TextEncoder:
    """A frozen text encoder with its tokenizer; a model family encodes prompts with one or more.

    Args:
        network: The text encoder's network of transformers.
        tokenizer: Its tokenizer.
        length: Number of tokens to which prompts are padded or cut; by default the class's or the
            tokenizer's own.
    """

    TOKENIZER: ClassVar[Any] = AutoTokenizer
    """Class that loads the tokenizer."""

    LENGTH: ClassVar[int | None] = None
    """Number of tokens to which prompts are padded or cut; the tokenizer's own if None."""

    MASKED: ClassVar[bool] = False
    """Whether the network gets the mask of the tokens that are no padding."""

    def __init__(self, network: Any, tokenizer: Any, length: int | None = None) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.length = length or self.LENGTH or int(tokenizer.model_max_length)

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
        """Encode B prompts and return all outputs.

        Args:
            texts: The prompts.
            options: Further arguments of the network, such as `output_hidden_states`.
        """
        return self.encode_tokens(self.tokenize(texts), **options)

    def encode_tokens(self, tokens: Any, **options: Any) -> Any:
        """Encode the tokens of B prompts, without a mask unless the class is `MASKED`.

        Args:
            tokens: What `tokenize` returns.
            options: Further arguments of the network, such as `output_hidden_states`.
        """
        device = self.network.device
        if self.MASKED:
            options["attention_mask"] = to_device(tokens.attention_mask, device)
        with torch.autocast(device.type, enabled=False):
            return self.network(to_device(tokens.input_ids, device), **options)

    def unpadded(self, states: torch.Tensor, tokens: Any, start: int = 0) -> Ragged:
        """Return the states of the tokens that are no padding.

        Args:
            states: Hidden states, (B, N, D).
            tokens: What `tokenize` returns, padded on one side.
            start: Number of first tokens of each prompt that are left out.
        """
        lengths = tokens.attention_mask.sum(1).tolist()
        left = self.tokenizer.padding_side == "left"
        first = [states.shape[1] - length if left else 0 for length in lengths]
        return Ragged.from_rows(
            [
                row[begin + start : begin + length]
                for row, begin, length in zip(states, first, lengths, strict=True)
            ]
        )

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


class ChatText(TextEncoder):
    """A language model that encodes a prompt as a user's message in its chat template."""

    LENGTH = 512
    MASKED = True

    THINKING: ClassVar[bool] = False
    """Whether the template leaves room for the model to reason."""

    def __init__(self, network: Any, tokenizer: Any, length: int | None = None) -> None:
        super().__init__(network, tokenizer, length)
        if not tokenizer.chat_template:
            raise InputError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template, in which prompts "
                "are embedded: copy chat_template.jinja, or the tokenizer_config.json with one, "
                "from the model that it belongs to."
            )

    def message(self, text: str) -> str:
        """Return a prompt in the chat template, up to the beginning of the answer."""
        return str(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self.THINKING,
            )
        )

    def tokenize(self, texts: list[str]) -> Any:
        """Return the tokens of B messages, `input_ids` and `attention_mask`, each (B, length)."""
        return super().tokenize([self.message(text) for text in texts])

    def fits_context(self, text: str) -> bool:
        """Whether a prompt is encoded whole."""
        return super().fits_context(self.message(text))


class SystemPromptText(TextEncoder):
    """A language model that encodes a prompt after a system prompt; an empty prompt has none."""

    MASKED = True

    system_prompt: str = ""
    """Text before each prompt, which the backbone sets."""

    def __init__(self, network: Any, tokenizer: Any, length: int | None = None) -> None:
        super().__init__(network, tokenizer, length)
        tokenizer.padding_side = "right"  # as the stock pipeline sets it; Gemma's own is left

    def message(self, text: str) -> str:
        """Return a prompt with the system prompt before it."""
        return f"{self.system_prompt} <Prompt Start> {text}" if text else ""

    def tokenize(self, texts: list[str]) -> Any:
        """Return the tokens of B messages, `input_ids` and `attention_mask`, each (B, length)."""
        return super().tokenize([self.message(text) for text in texts])

    def fits_context(self, text: str) -> bool:
        """Whether a prompt is encoded whole."""
        return super().fits_context(self.message(text))
