"""Small pipelines of the flow families, written once per run of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.all_cases import CASES
from tests.families.cases import Models


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
