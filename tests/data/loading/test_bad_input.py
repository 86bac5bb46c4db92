"""What is wrong with somebody's data ends in one sentence, out of the loader of a run."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_prefopt.data.shards.index import index_shards
from lit_prefopt.errors import InputError
from tests.helpers.pair_data import data, sentence
from tests.helpers.shards import members, picture, plain_tar, png_header

Members = list[tuple[str, bytes]]


def changed(name: str, content: bytes | None) -> Callable[[Members], Members]:
    """Return a function that gives a member another content, or takes it away."""

    def change(pair: Members) -> Members:
        kept = [(key, content if name in key else data) for key, data in pair]
        return [(key, data) for key, data in kept if data is not None]

    return change


def folder_of(path: Path, change: Callable[[Members], Members], samples: int = 8) -> str:
    """Write and index a tar whose pairs were all changed."""
    path.mkdir()
    pairs = [change(members(f"{n:03d}", n)) for n in range(samples)]
    plain_tar(path / "a.tar", [member for pair in pairs for member in pair])
    index_shards(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("chosen", b"GIF89a"), "chosen is not a png, jpg or webp image"),
        (changed("chosen", picture(1, (90, 90))[:90]), "chosen (cannot be decoded|is not a png)"),
        (changed("rejected", png_header(1_000_000, 64)), "rejected is too large"),
        (changed("txt", b"\xff\xfe"), "prompt that is not UTF-8"),
        (changed("txt", b" \n"), "empty prompt .*write one, or leave the pair out"),
        (changed("txt", None), r"has no prompt \(\.txt\)"),
        (changed("chosen", None), "has no chosen image"),
        (changed("rejected", None), "has no rejected image"),
    ],
)
def test_pairs_that_cannot_be_used_end_in_a_sentence(tmp_path, change, message):
    folder = folder_of(tmp_path / "bad", change)
    for workers in (0, 1):
        said = sentence(data(folder, workers=workers))
        assert re.search(f"Broken samples: .*a.tar/00.*{message}", said)
        assert "\n" not in said


def test_a_shard_of_the_same_size_and_other_content_is_noticed(make_shards):
    folder = Path(make_shards(20, per_shard=20))
    shard = folder / "pairs-000000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[700:] + content[:700])
    assert re.search(
        "not part of a tar .*changed after it was indexed", sentence(data(str(folder)))
    )


def test_a_shard_that_grew_after_the_start_is_noticed(make_shards):
    folder = make_shards()
    module = data(folder, workers=1)
    for shard in Path(folder).glob("*.tar"):
        shard.write_bytes(shard.read_bytes() + b"\0" * 512)
    assert "has changed since it was indexed; make the index again" in sentence(module)


def test_a_shard_that_vanished_after_the_start_is_noticed(make_shards):
    folder = make_shards()
    module = data(folder, workers=1)
    for shard in Path(folder).glob("*.tar"):
        shard.unlink()
    assert re.search("cannot be read .*; check the path", sentence(module))


def test_a_pickle_in_a_shard_is_never_opened(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    def with_bombs(pair: Members) -> Members:
        key = pair[0][0].split(".")[0]
        kinds = ("pyd", "pkl", "pickle", "pth", "npy")
        return pair + [(f"{key}.{kind}", pickle.dumps(Bomb())) for kind in kinds]

    [*batches] = data(folder_of(tmp_path / "bombs", with_bombs), workers=1).train_dataloader()
    assert len(batches) == 2
    assert not (tmp_path / "exploded").exists()


def test_a_command_in_the_place_of_a_url_is_not_run(tmp_path: Path):
    with pytest.raises(InputError, match="would run a command"):
        data(f"pipe:touch {tmp_path}/ran")
    assert not list(tmp_path.iterdir())


def test_more_than_there_is_cannot_be_a_batch(make_shards):
    with pytest.raises(InputError, match="has 5 pairs, less than one batch of 6 on each of 1"):
        data(make_shards(5), batch_size=6).train_dataloader()
