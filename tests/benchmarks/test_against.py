"""The benchmark of two checkouts, on very small networks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.against import main
from tests.benchmarks.test_released_step import numbers

ROOT = Path(__file__).parents[2]


def package_alone(folder: Path) -> Path:
    """Return a folder with the package and its recipes, without benchmarks."""
    folder.mkdir()
    for name in ("lit_prefopt", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no `lit_prefopt`: name a checkout as --before"):
        main(before=str(tmp_path), after=str(ROOT), folder=str(tmp_path / "runs"))


@pytest.mark.slow
def test_a_checkout_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once as it is, and once as a package that borrows the benchmarks."""
    old = package_alone(tmp_path / "old")
    names = ["later_step", "memory", "evaluation"]
    options = {"size": "tiny", "rounds": 1, "steps": 1, "folder": str(tmp_path / "runs")}
    main(before=str(old), after=str(ROOT), benchmarks=names, **options)  # type: ignore[arg-type]
    text = capsys.readouterr().out
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    found = {name.strip(): cells for name, *cells in rows[1:]}
    assert {name.split(",")[0] for name in found} == {
        "a later LoRA step",
        "peak of a checkpointed LoRA step",
        "the first evaluation",
        "the second evaluation",
    }
    for cells in found.values():
        before, after, ratio, share = (numbers(cell)[0] for cell in cells)
        assert ratio == pytest.approx(before / after, rel=1e-2)
        assert share == pytest.approx(after / before, rel=1e-2)
    assert numbers(found["peak of a checkpointed LoRA step, GiB"][2])[0] == pytest.approx(
        1, abs=0.1
    )
    assert text.count("benchmarks of the other checkout were used (before: ImportError") == 3


@pytest.mark.slow
def test_what_a_checkout_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old"
    (old / "lit_prefopt").mkdir(parents=True)
    (old / "configs").mkdir()
    (old / "lit_prefopt" / "__init__.py").write_text("")
    options = {"size": "tiny", "rounds": 1, "folder": str(tmp_path / "runs")}
    main(before=str(old), after=str(ROOT), benchmarks=["start"], **options)  # type: ignore[arg-type]
    text = capsys.readouterr().out
    assert "- `start` cannot be compared: before: ModuleNotFoundError" in text
