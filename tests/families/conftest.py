"""Small pipelines of the flow families, written once per run of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_prefopt.data.shards.writer import ShardWriter
from tests.families.all_cases import CASES
from tests.families.cases import TEXTS, Models
from tests.helpers.caching import cache
from tests.helpers.generating import samples


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the pipelines by name, as far as they have been written."""
    return {}


@pytest.fixture(scope="session", params=[*CASES])
def family(request: pytest.FixtureRequest) -> str:
    """Name of a case."""
    return str(request.param)


@pytest.fixture(scope="session")
def folder(family: str, written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the family's pipeline."""
    if family not in written:
        written[family] = CASES[family].write(tmp_path_factory.mktemp(family))
    return written[family]


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
def cached(family: str, folder: Path, few: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a cache of the six pairs, each encoded by itself."""
    case = CASES[family]
    backbone = case.ours(folder, reference="none")
    output = tmp_path_factory.mktemp(family) / "cache"
    return cache(backbone, few, output, resolution=case.sizes[0][0], batch_size=2)
