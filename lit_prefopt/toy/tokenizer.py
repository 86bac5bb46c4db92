"""CLIP tokenizer with the vocabulary of the toy world's grammar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lit_prefopt.toy.scenes import all_scenes

_END = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def toy_tokenizer(length: int) -> CLIPTokenizer:
    """Return a tokenizer with one token for each word of the grammar.

    Any other text is tokenized in bytes, but toy text encoders are not trained on those.

    Args:
        length: Number of tokens to which texts are padded or truncated.
    """
    words = {word for scene in all_scenes() for word in scene.caption().split()}
    merges = merges_of(words)
    letters = bytes_to_unicode().values()
    tokens = [*letters, *(letter + _END for letter in letters), *map("".join, merges), *_SPECIAL]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, merges, model_max_length=length)


def merges_of(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return byte-pair merges, the most common pair first, that give one token per word."""
    split = [[*word[:-1], word[-1] + _END] for word in sorted(words)]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in split for pair in pairwise(pieces)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        split = [_merged(pieces, best) for pieces in split]
    return merges


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the tokenizer, also as vocab.json and merges.txt for older versions of transformers."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
