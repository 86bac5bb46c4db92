"""Fixtures: a cache folder of each test's own, and a path for a file to be written."""

from tests.helpers.shards import cache_folder
from tests.helpers.sources import source

__all__ = ["cache_folder", "source"]
