"""Pieces of a prompt are never more than its tokens, so that a count of long prompts is sure."""

from __future__ import annotations

import random

from lit_prefopt.prepare.prompt_length import PIECE, exceeds_context
from lit_prefopt.toy.tokenizer import toy_tokenizer

ALPHABET = [*"abcXYZ019 .,;:!?'\"()-_/\n\t", "'s", "'ll", "don't", "é", "²", "日本", "ि", "🦊", " "]


def test_pieces_are_never_more_than_clips_tokens():
    tokenizer, draws = toy_tokenizer(77), random.Random(0)
    longer = 0
    for _ in range(300):
        text = "".join(draws.choices(ALPHABET, k=draws.randrange(240)))
        tokens = len(tokenizer(text, verbose=False).input_ids)
        assert len(PIECE.findall(text)) <= tokens - 2, text
        assert tokens > 77 or not exceeds_context(text), text
        longer += exceeds_context(text)
    assert longer > 20
