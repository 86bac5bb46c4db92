"""Fixtures: small real shards, and a cache folder of each test's own."""

from tests.helpers.shards import cache_folder, make_shards

__all__ = ["cache_folder", "make_shards"]
