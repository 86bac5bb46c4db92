"""Fixtures: sources of pairs beside their images, and small real shards."""

from tests.helpers.shards import make_shards
from tests.helpers.sources import source

__all__ = ["make_shards", "source"]
