"""Small pipelines of the flow families, written once per run of the tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_prefopt.data.shards.writer import ShardWriter
from tests.families.all_cases import CASES
from tests.families.cases import TEXTS, Models
from tests.helpers.caching import cache
from tests.helpers.generating import samples

FolderOf = Callable[[str], Path]
CacheOf = Callable[[str], str]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """Function of a case's name that returns the folder of its pipeline, written once."""
    return functools.cache(lambda name: CASES[name].write(tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session", params=[*CASES])
def family(request: pytest.FixtureRequest) -> str:
    """Name of a case."""
    return str(request.param)


@pytest.fixture(scope="session")
def folder(family: str, folder_of: FolderOf) -> Path:
    """Folder of the family's pipeline."""
    return folder_of(family)


@pytest.fixture(scope="session")
def models(family: str, folder: Path) -> Models:
    """Ours and the stock pipeline, in float32."""
    return CASES[family].models(folder)


@pytest.fixture(scope="session")
def few(shards: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of six pairs, whose prompts have three lengths."""
    folder = tmp_path_factory.mktemp("few") / "pairs"
    with ShardWriter(folder, max_count=4) as writer:
        for text, sample in zip([*TEXTS, *TEXTS], samples(Path(shards)), strict=False):
            writer.add(text, *sample.sides, {})
    return str(folder)


@pytest.fixture(scope="session")
def cache_of(few: str, folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> CacheOf:
    """Function of a case's name that returns a cache of the six pairs, each encoded by itself."""

    def made(name: str) -> str:
        case, output = CASES[name], tmp_path_factory.mktemp(name) / "cache"
        backbone = case.ours(folder_of(name), reference="none")
        return cache(backbone, few, output, resolution=case.sizes[0][0], batch_size=2)

    return functools.cache(made)


@pytest.fixture(scope="session")
def cached(family: str, cache_of: CacheOf) -> str:
    """Folder of the family's cache."""
    return cache_of(family)
