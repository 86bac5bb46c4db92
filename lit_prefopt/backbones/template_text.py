"""A language model that encodes prompts in the template of a stock pipeline."""

from __future__ import annotations

from typing import Any

from lit_prefopt.backbones.text_encoders import TextEncoder
from lit_prefopt.families.qwen_image import QWEN_IMAGE
from lit_prefopt.ragged import Ragged


class TemplateText(TextEncoder):
    """A language model that encodes a prompt in Qwen-Image's template, whose beginning is cut off.

    The template and the number of tokens of its beginning are those of the stock pipeline.

    Args:
        network: The language model.
        tokenizer: Its tokenizer.
        length: Number of tokens after the template's beginning to which prompts are cut.
    """

    LENGTH = 512  # as `max_sequence_length` of the stock pipeline
    MASKED = True

    def __init__(self, network: Any, tokenizer: Any, length: int | None = None) -> None:
        super().__init__(network, tokenizer, length)
        stock = QWEN_IMAGE.pipeline(*[None] * 5)  # without components
        self.template: str = stock.prompt_template_encode
        self.beginning: int = stock.prompt_template_encode_start_idx
        self.most: int = stock.tokenizer_max_length

    def tokenize(self, texts: list[str]) -> Any:
        """Return the tokens of B prompts in the template, padded to the longest, (B, N)."""
        return self.tokenizer(
            [self.template.format(text) for text in texts],
            padding=True,
            max_length=self.most + self.beginning,
            truncation=True,
            return_tensors="pt",
        )

    def fits_context(self, text: str) -> bool:
        """Whether a prompt is encoded whole, with the end of the template."""
        tokens = self.tokenizer(self.template.format(text), verbose=False).input_ids
        return len(tokens) - self.beginning <= self.length

    def rows(self, texts: list[str]) -> Ragged:
        """Encode B prompts to the last hidden states of their tokens, without padding.

        Args:
            texts: The prompts.
        """
        tokens = self.tokenize(texts)
        # without logits, which nothing needs: 152,064 numbers a token
        outputs = self.encode_tokens(
            tokens, output_hidden_states=True, logits_to_keep=1, use_cache=False
        )
        own = self.unpadded(outputs.hidden_states[-1], tokens, self.beginning)
        return Ragged.from_rows([row[: self.length] for row in own])
