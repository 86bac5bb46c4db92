"""Fixtures: small shards, an own cache folder, and a path for a file to be written."""

from tests.helpers.shards import cache_folder, make_shards
from tests.helpers.sources import source

__all__ = ["cache_folder", "make_shards", "source"]
