"""Cached pairs, made once."""

from __future__ import annotations

import pytest

from tests.helpers.caching import cache, frozen


@pytest.fixture(scope="session")
def cached(tiny_folder: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Middle crops of the 24 pairs, plain and mirrored."""
    return cache(frozen(tiny_folder), shards, tmp_path_factory.mktemp("cache") / "out", flip=True)
