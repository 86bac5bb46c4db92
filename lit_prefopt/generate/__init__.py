"""Generators: pairs that a model makes itself, written as ordinary pair shards."""

from lit_prefopt.generate.generator import Generator
from lit_prefopt.generate.ranked import RankedSamples
from lit_prefopt.generate.self_play import SelfPlay

__all__ = ["Generator", "RankedSamples", "SelfPlay"]
