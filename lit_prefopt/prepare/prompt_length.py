"""Count prompts that CLIP's text encoders truncate, without a tokenizer."""

from __future__ import annotations

import re

CONTEXT = 77  # tokens of CLIP's text encoders, with start and end
# CLIP's pieces of a text, each at least one token: a common ending such as 's, a word, a digit,
# or a run of other characters
PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE)


def exceeds_context(text: str) -> bool:
    """Return whether a prompt is surely longer than the context of CLIP's text encoders.

    A long word has several tokens, so a prompt just below the limit may be too long nevertheless.

    Args:
        text: The prompt.
    """
    return len(text) > CONTEXT - 2 and len(PIECE.findall(text)) > CONTEXT - 2
