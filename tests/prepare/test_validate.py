"""Validation: one test for each thing that stops or harms a run."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lit_prefopt.cli import main
from lit_prefopt.data.shards.index import index_shards
from lit_prefopt.errors import InputError
from lit_prefopt.prepare import validate
from tests.helpers.shards import Maker, picture

Members = dict[str, bytes]


def member(key: str, number: int = 0, **more: Any) -> Members:
    """Return the members of one sample; `meta` goes to its .json."""
    files = {
        f"{key}.txt": more.get("text", f"text {key}").encode(),
        f"{key}.chosen.png": more.get("chosen", picture(number + 100)),
        f"{key}.rejected.png": more.get("rejected", picture(number)),
    }
    if "meta" in more:
        files[f"{key}.json"] = json.dumps(more["meta"]).encode()
    return files


def make(folder: Path, *samples: Members) -> str:
    """Write a folder with one shard as somebody would make it by hand."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "hand.tar", "w") as tar:
        for name, data in [pair for sample in samples for pair in sample.items()]:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    index_shards(str(folder))
    return str(folder)


def good(count: int = 10) -> list[Members]:
    """Return samples that nothing is wrong with."""
    return [member(f"{n:03d}", n) for n in range(count)]


def test_good_shards_have_no_finding(make_shards: Maker, capsys: pytest.CaptureFixture):
    report = validate(make_shards(samples=20, per_shard=6))
    assert (report.shards, report.samples, report.would_stop) == (4, 20, False)
    assert {row[1] for row in list(report.rows())[:7]} == {"0"}
    assert report.sizes.smallest_median_largest() == (10, 10, 10)
    assert "Training would not stop" in capsys.readouterr().out


def test_a_missing_and_a_stale_index(make_shards: Maker):
    folder = Path(make_shards())
    with (folder / "pairs-000000.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(InputError, match="is older than pairs-000000.tar"):
        validate(str(folder))
    (folder / "index.json").unlink()
    with pytest.raises(InputError, match="make it with `lit-prefopt shards index"):
        validate(str(folder))


def test_a_tar_that_the_index_does_not_know(make_shards: Maker):
    folder = Path(make_shards())
    (folder / "new.tar").write_bytes((folder / "pairs-000000.tar").read_bytes())
    report = validate(str(folder))
    assert (report.unlisted.names, report.would_stop) == (["new.tar"], False)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (member("bad", chosen=picture(1, (64, 64), "JPEG")[:-40]), "chosen cannot be decoded"),
        (member("bad", rejected=b"text"), "rejected is not a png, jpg or webp image"),
        ({"bad.txt": b"a", "bad.chosen.png": picture(1)}, "has no rejected image"),
        (member("bad") | {"bad.txt": b"\xff"}, "has a prompt that is not UTF-8"),
        (member("bad") | {"bad.json": b"{"}, "has a .json that is not JSON"),
        (member("bad") | {"bad.mask.png": b"x"}, "mask is not a png, jpg or webp image"),
        (
            member("bad", meta={"label": 1.5}),
            "has the label 1.5, not a number from 0 to 1",
        ),
        (member("bad", meta={"weight": -1}), "has the weight -1"),
        (member("bad", meta={"weight": "2"}), "has the weight '2'"),
        (member("bad", meta={"weight": 10**400}), "has the weight 1000"),
        (member("bad", meta={"weight": float("inf")}), "has the weight inf"),
        (member("bad", meta={"label": ["x"] * 900}), "has the label ['x', "),
    ],
)
def test_broken_samples_are_named(tmp_path: Path, sample: Members, reason: str):
    report = validate(make(tmp_path / "shards", *good(), sample))
    assert report.broken.count == 1
    assert report.broken.names[0].startswith(f"hand.tar/bad {reason}")
    assert not report.would_stop  # a handful may be passed over
    assert validate(str(tmp_path / "shards"), broken_share=0).would_stop


def test_names_like_markup_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = make(tmp_path / "[red]", member("[/bold]", text=""), member("good", 1))
    index_shards(folder)
    assert validate(folder).empty.count == 1
    printed = "".join(capsys.readouterr().out.split())
    assert "hand.tar/[/bold]" in printed
    assert "[red]:2samples" in printed


def test_offsets_that_point_elsewhere_are_broken_samples(make_shards: Maker):
    folder = Path(make_shards(samples=8, per_shard=8))
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["offsets"][3] += 512
    (folder / "index.json").write_text(json.dumps(index))
    report = validate(str(folder))
    assert report.broken.names[-1].startswith("pairs-000000.tar, sample 3 ")
    assert report.broken.count >= 1


def test_too_many_broken_samples_stop_a_run(make_shards: Maker):
    broken = dict.fromkeys(range(6), b"not an image")
    folder = make_shards(samples=20, broken=broken)
    assert validate(folder).would_stop
    assert not validate(folder, broken_share=0.5).would_stop
    with pytest.raises(InputError, match="broken_share is -1; give a number"):
        validate(folder, broken_share=-1)


def test_no_sample_or_no_whole_sample_stops_a_run(tmp_path: Path):
    assert validate(make(tmp_path / "empty")).would_stop
    assert validate(make(tmp_path / "bad", {"a.txt": b"a"})).would_stop


class Bomb:
    """An object whose pickle, when it is read, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.folder),))


def test_pickles_and_odd_members_are_named_and_never_opened(tmp_path: Path):
    bomb = pickle.dumps(Bomb(tmp_path / "opened"))
    sample = member("odd") | {"odd.scores.pyd": bomb, "odd.pickle": bomb, "README": b"hello"}
    folder = make(tmp_path / "shards", {"__first.pth": bomb}, *good(), sample)
    with tarfile.open(tmp_path / "shards" / "hand.tar", "a") as tar:
        link = tarfile.TarInfo("odd.chosen.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index_shards(folder)
    report = validate(folder)
    link_named = "odd.chosen.jpg is a link, a device or sparse"
    odd = {"__first.pth", "odd.scores.pyd", "odd.pickle", "README", link_named}
    assert {name.split("/")[1] for name in report.odd.names} == odd
    assert report.odd.count == 5
    assert not (tmp_path / "opened").exists()


def test_duplicates_identical_sides_and_empty_texts(tmp_path: Path):
    twice = member("twice", 3, text="text 003")
    same = member("same", chosen=picture(1), rejected=picture(1))
    empty = member("empty", text=" \n")
    report = validate(make(tmp_path / "shards", *good(), twice, same, empty))
    assert report.duplicates.names == ["hand.tar/twice"]
    assert report.identical.names == ["hand.tar/same"]
    assert report.empty.names == ["hand.tar/empty"]
    assert not report.would_stop


def test_sizes(tmp_path: Path):
    wide = member("wide", chosen=picture(1, (30, 20)))
    report = validate(make(tmp_path / "shards", *good(1), wide), resolution=16)
    assert report.unequal.names == ["hand.tar/wide"]
    assert report.sizes.below(16) == 0.75
    assert ("below 16 pixels", "75.0%", "of the images would be upscaled") in set(report.rows())


def test_the_number_of_workers_changes_no_finding(tmp_path: Path):
    broken = [member(f"bad{n}", rejected=b"") for n in range(4)]
    folder = make(tmp_path / "shards", *good(), *broken)
    one, many = (validate(folder, workers=workers) for workers in (1, 5))
    assert one == many


def test_the_exit_code_tells_whether_a_run_would_stop(
    make_shards: Maker, capsys: pytest.CaptureFixture
):
    main(["shards", "validate", "--shards", make_shards(name="good")])
    bad = make_shards(name="bad", broken={0: b"no image"})
    with pytest.raises(SystemExit) as exit_:
        main(["shards", "validate", "--shards", bad, "--broken_share", "0"])
    assert exit_.value.code == 1
    out = capsys.readouterr().out
    assert "pairs-000000.tar/000000000" in out
    assert "Training would stop" in out
    with pytest.raises(SystemExit, match="has no shards; name .*bad or"):
        main(["shards", "validate", "--shards", str(Path(bad).parent)])


def test_remote_shards_are_looked_at_too(make_shards: Maker):
    files = fsspec.filesystem("memory")
    files.put(make_shards(samples=8, broken={5: b"no image"}) + "/", "/shards", recursive=True)
    report = validate("memory://shards")
    assert (report.samples, report.broken.count) == (8, 1)
    files.rm("/shards", recursive=True)


def test_pairs_too_narrow_for_the_resolution_are_broken(tmp_path: Path):
    narrow = member("narrow", chosen=picture(1, (4000, 2)))
    folder = make(tmp_path / "shards", *good(), narrow)
    assert validate(folder).broken.count == 0
    report = validate(folder, resolution=512)
    assert report.broken.count == 1
    assert "narrow: chosen is too long and narrow with 4000 x 2 pixels" in report.broken.names[0]
