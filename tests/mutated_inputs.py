"""Mutated inputs: one picture, row, member or file of a good source is spoilt at random.

`python -m tests.mutated_inputs` tries 1,000 of them and prints what came of each kind. A good
answer is a whole result or one sentence. What counts as wrong: a trace, a wait of more than
`PATIENCE` seconds, and a wrong acceptance, which is a result that loses or changes a pair that was
not spoilt, or that holds an image that training cannot use. A seed makes the same input again:
`python -m tests.mutated_inputs --first SEED --inputs 1 --keep FOLDER`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from lit_prefopt.data.images import Augment, BrokenSample
from lit_prefopt.data.loading.image_samples import load_sample
from lit_prefopt.data.shards.index import index_shards, read_index
from lit_prefopt.data.shards.reader import SIDES, Sample, ShardReader
from lit_prefopt.data.shards.writer import ShardWriter
from lit_prefopt.errors import InputError
from lit_prefopt.prepare import convert, preview, split_into_stages, validate
from lit_prefopt.prompts.readers import read_prompts
from lit_prefopt.weights.lora_files import read_lora
from tests.helpers.odd_pictures import odd_picture
from tests.helpers.shards import picture
from tests.helpers.spoil import ODD_PATHS, spoil_bytes, spoil_value

PATIENCE = 30  # seconds
LONGEST = 3000  # characters of a sentence
MEMORY = 1_500_000_000  # bytes that one input may need
PAIRS = 5
FORMS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}

Pair = tuple[str, bytes, bytes]  # prompt, chosen, rejected


class WrongAcceptanceError(Exception):
    """A result that is not what the source holds."""


class Source(NamedTuple):
    """A spoilt source, and what must come out of it."""

    path: Path
    whole: list[Pair]  # the pairs that were not spoilt
    exact: bool  # whether only part of it was spoilt, so that `whole` must come out


def good_pairs() -> list[Pair]:
    """Return pairs in all formats; every picture occurs once."""
    forms = [*FORMS, *FORMS]
    return [
        (f"prompt {n}", picture(100 + n, (24, 16), forms[n]), picture(n, (20, 20), forms[n + 1]))
        for n in range(PAIRS)
    ]


def extension(data: bytes) -> str:
    """Return the file extension of a good picture."""
    starts = {b"\x89PNG": "png", b"RIFF": "webp"}
    return starts.get(data[:4], "jpg")


# Sources --------------------------------------------------------------------------------------


def table(folder: Path, draws: random.Random) -> Source:
    """Write a table of paths, of which one row, one picture or some bytes are spoilt."""
    pairs, spoilt = good_pairs(), draws.randrange(PAIRS)
    rows: list[dict[str, Any]] = []
    for number, (prompt, *sides) in enumerate(pairs):
        names = [f"{number}-{side}.{extension(data)}" for side, data in enumerate(sides)]
        for name, data in zip(names, sides, strict=True):
            (folder / name).write_bytes(data)
        rows.append({"prompt": prompt, "chosen": names[0], "rejected": names[1]})
    way = draws.choice(["row", "picture", "picture", "bytes"])
    if way == "row":
        rows[spoilt] = spoil_value(rows[spoilt], draws)
    if way == "picture":
        (folder / rows[spoilt]["chosen"]).write_bytes(odd_picture(draws))
    kind = draws.choice(["jsonl", "json", "csv", "tsv", "parquet"])
    path = folder / f"source.{kind}"
    WRITERS[kind](path, rows)
    if way == "bytes":
        path.write_bytes(spoil_bytes(path.read_bytes(), draws))
    os.mkfifo(folder / "pipe")
    return Source(path, [pair for n, pair in enumerate(pairs) if n != spoilt], way != "bytes")


def _json_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def _json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows))


def _separated(path: Path, rows: list[Any]) -> None:
    with path.open("w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["prompt", "chosen", "rejected"])
        for row in rows:
            cells = row.values() if isinstance(row, dict) else [row]
            writer.writerow([str(cell).encode(errors="replace").decode() for cell in cells])


def _parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = ("prompt", "chosen", "rejected")
    as_text = [
        {name: None if row.get(name) is None else str(row[name]) for name in columns}
        if isinstance(row, dict)
        else dict.fromkeys(columns)
        for row in rows
    ]
    for row in as_text:
        for name, value in row.items():
            row[name] = value and value.encode(errors="replace").decode()
    parquet.write_table(pyarrow.Table.from_pylist(as_text), path)


WRITERS: dict[str, Callable[[Path, list[Any]], None]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _separated,
    "tsv": _separated,
    "parquet": _parquet,
}


def pair_folder(folder: Path, draws: random.Random) -> Source:
    """Write chosen/ and rejected/, of which one picture or text is spoilt, moved or removed."""
    pairs, spoilt = good_pairs(), draws.randrange(PAIRS)
    for side in SIDES:
        (folder / side).mkdir()
    for number, (prompt, *sides) in enumerate(pairs):
        for side, data in zip(SIDES, sides, strict=True):
            (folder / side / f"{number}.{extension(data)}").write_bytes(data)
        (folder / "chosen" / f"{number}.txt").write_text(prompt)
    victim = draws.choice(sorted((folder / "chosen").glob(f"{spoilt}.*")))
    way = draws.randrange(6)
    if way == 0:
        victim.unlink()
    elif way == 1:
        victim.unlink()
        victim.mkdir()
    elif way == 2:
        victim.unlink()
        os.mkfifo(victim)
    elif way == 3:
        victim.unlink()
        victim.symlink_to(draws.choice(["/dev/zero", "nowhere", victim.name, "/etc"]))
    elif way == 4:
        victim.write_bytes(spoil_bytes(victim.read_bytes(), draws))
    else:
        victim.write_bytes(odd_picture(draws))
    return Source(folder, [pair for n, pair in enumerate(pairs) if n != spoilt], True)


def tar_members(pairs: list[Pair]) -> list[tuple[str, bytes]]:
    """Return the members of a tar of pairs."""
    found = []
    for number, (prompt, chosen, rejected) in enumerate(pairs):
        found += [
            (f"{number:03d}.chosen.{extension(chosen)}", chosen),
            (f"{number:03d}.json", b"{}"),
            (f"{number:03d}.rejected.{extension(rejected)}", rejected),
            (f"{number:03d}.txt", prompt.encode()),
        ]
    return found


PAX = [
    {"GNU.sparse.map": "0,9", "GNU.sparse.size": "900000000000"},
    {"GNU.sparse.size": "900000000000", "GNU.sparse.numblocks": "1"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "900000000000"},
    {"GNU.sparse.realsize": "900000000000"},
    {"size": "-512"},
    {"size": "900000000000"},
    {"path": "../../x.txt"},
    {"path": "x" * 5000},
    {"mtime": "nan"},
    {"uid": "-1"},
    {"hdrcharset": "BINARY"},
]
LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
LINKS += [tarfile.GNUTYPE_SPARSE]


def write_tar(
    path: Path,
    members: list[tuple[str, bytes]],
    victim: int = -1,
    odd: tarfile.TarInfo = tarfile.TarInfo(),  # noqa: B008 - not changed
) -> None:
    """Write a tar; one member has the kind and the further headers of `odd`."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (name, data) in enumerate(members):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            if number == victim:
                member.type, member.linkname = odd.type, odd.linkname
                member.pax_headers = odd.pax_headers
            tar.addfile(member, io.BytesIO(data))


def tar_file(path: Path, pairs: list[Pair], draws: random.Random) -> Source:
    """Write a tar of which one member, one header or some bytes are spoilt."""
    members, spoilt = tar_members(pairs), draws.randrange(len(pairs))
    way = draws.choice(["picture", "member", "pax", "link", "bytes"])
    victim = 4 * spoilt + draws.randrange(4)
    if way == "picture":
        victim = 4 * spoilt + draws.choice([0, 2])
        members[victim] = members[victim][0], odd_picture(draws)
    if way == "member":
        members[victim] = members[victim][0], spoil_bytes(members[victim][1], draws)
    odd = tarfile.TarInfo()
    if way == "pax":
        odd.pax_headers = draws.choice(PAX)
    if way == "link":
        odd.type, odd.linkname = draws.choice(LINKS), "/etc/passwd"
        members[victim] = members[victim][0], b""
    write_tar(path, members, victim, odd)
    if way == "bytes":
        path.write_bytes(spoil_bytes(path.read_bytes(), draws))
    whole = [pair for n, pair in enumerate(pairs) if n != spoilt]
    return Source(path, whole, way in ("picture", "member", "link"))


# What each kind of input goes through ---------------------------------------------------------


def try_convert(folder: Path, draws: random.Random) -> str:
    """Convert a spoilt source, and compare what came out with what was whole."""
    make = draws.choice([table, table, pair_folder, None])
    source = (
        tar_file(folder / "source.tar", good_pairs(), draws)
        if make is None
        else make(folder, draws)
    )
    convert(str(source.path), str(folder / "out"), workers=1, resolution=16)
    samples = read_all(folder / "out")
    if source.exact:
        found = [(sample.text, *sample.sides) for sample in samples]
        for pair in source.whole:
            if found.count(pair) != 1:
                raise WrongAcceptanceError(f"{pair[0]} is not among {len(found)} pairs")
    for sample in samples:
        use(sample)
    report = validate(str(folder / "out"), workers=1)
    if report.broken.count:
        raise WrongAcceptanceError(f"broken after the conversion: {report.broken.names[0]}")
    preview(str(folder / "out"), str(folder / "sheet.png"))
    return "converted"


def try_shards(folder: Path, draws: random.Random) -> str:
    """Read spoilt shards; what `validate` accepts must be usable in training."""
    shards = folder / "shards"
    shards.mkdir()
    source = tar_file(shards / "a.tar", good_pairs(), draws)
    write_tar(shards / "b.tar", tar_members(good_pairs()))
    index_shards(str(shards))
    index = shards / "index.json"
    if draws.random() < 0.3:
        index.write_bytes(spoil_bytes(index.read_bytes(), draws))
    report = validate(str(shards), workers=1)
    named = " ".join(report.broken.names)
    reader = ShardReader(read_index(shards))
    usable = 0
    for shard, count in enumerate(reader.counts):
        for number in range(count):
            try:
                use(reader(shard, number))
                usable += 1
            except BrokenSample as error:
                if not report.broken.count:
                    raise WrongAcceptanceError(f"{error} after validation ({named})") from error
    if report.samples - report.broken.count > usable:
        raise WrongAcceptanceError(f"{usable} usable, {report.broken.count} broken: {named}")
    preview(str(shards), str(folder / "sheet.png"))
    if source.exact and usable < len(source.whole):
        raise WrongAcceptanceError(f"only {usable} are usable")
    return "read"


def try_stages(folder: Path, draws: random.Random) -> str:
    """Split pairs into stages, of which one has a spoilt .json."""
    pairs, spoilt = good_pairs(), draws.randrange(PAIRS)
    by = draws.choice(["gap", "rank"])
    with ShardWriter(folder / "in") as writer:
        for number, (prompt, chosen, rejected) in enumerate(pairs):
            meta = {"rank_gap": number % 3 + 1, "images": 4, "gap": number + 0.5}
            meta["scores"] = {"chosen": number + 0.5, "rejected": 0.0}
            if number == spoilt:
                meta = spoil_value(meta, draws)
            try:
                writer.add(prompt, chosen, rejected, meta)
            except (TypeError, ValueError, UnicodeEncodeError):  # no JSON: not an input
                writer.add(prompt, chosen, rejected, {"gap": None})
    split_into_stages(
        str(folder / "in"), str(folder / "out"), 1, by, winner=draws.choice(["label", "reward"])
    )
    found = [(sample.text, *sample.sides) for sample in read_all(folder / "out" / "stage-1")]
    for number, pair in enumerate(pairs):
        if number != spoilt and found.count(pair) != 1:
            raise WrongAcceptanceError(f"{pair[0]} is not among {len(found)} pairs")
    return "split"


def try_prompts(folder: Path, draws: random.Random) -> str:
    """Read a file of prompts, of which one record or some bytes are spoilt."""
    kind = draws.choice(["txt", "jsonl", "json", "csv", "tsv"])
    path = folder / f"prompts.{kind}"
    records: list[Any] = [{"prompt": f"prompt {n}", "style": "photo"} for n in range(PAIRS)]
    records[draws.randrange(PAIRS)] = spoil_value(records[0], draws)
    if kind == "txt":
        path.write_text("\n".join(f"prompt {n}" for n in range(PAIRS)))
    else:
        WRITERS[kind](path, records)
    if draws.random() < 0.5:
        path.write_bytes(spoil_bytes(path.read_bytes(), draws))
    texts = read_prompts(str(path))
    if not all(isinstance(text, str) and text.encode() for text in texts):
        raise WrongAcceptanceError("a prompt is empty or no text")
    return "prompts read"


def try_paths(folder: Path, draws: random.Random) -> str:
    """Give commands odd paths and numbers."""
    os.mkfifo(folder / "pipe.jsonl")
    os.mkfifo(folder / "pipe.tar")
    (folder / "empty.jsonl").write_text("")
    path = draws.choice([*ODD_PATHS, "pipe.jsonl", "pipe.tar", "empty.jsonl", ".", "*"])
    path = path if path.startswith("/") else str(folder / path)
    how: Any = draws.choice(["auto", "json", "jsonl", "csv", "parquet", "tar", "folder"])
    command = draws.randrange(4)
    if command == 0:
        convert(path, str(folder / "out"), how, workers=1)
    elif command == 1:
        validate(path, workers=1)
    elif command == 2:
        index_shards(str(folder / Path(path).name))  # which writes there
    else:
        split_into_stages(path, str(folder / "out"))
    return "done"


def try_weights(folder: Path, draws: random.Random) -> str:
    """Read a LoRA of which a tensor, a name or some bytes are spoilt."""
    name = "unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    tensors = {}
    for layer in "qkv":
        tensors[f"lora_{name}{layer}.lora_down.weight"] = np.ones((2, 8), np.float32)
        tensors[f"lora_{name}{layer}.lora_up.weight"] = np.ones((8, 2), np.float32)
        tensors[f"lora_{name}{layer}.alpha"] = np.float32([1])
    victim = draws.choice(sorted(tensors))
    way, odd = draws.randrange(4), [(0, 8), (2,), (3, 7), (2, 8, 1, 1), (2, 8, 3, 3), ()]
    if way == 0:
        tensors[victim] = np.ones(draws.choice(odd), np.float32)
    if way == 1:
        strange = ["", ".", "lora_magnitude_vector", "unet.x", "emb_params", "[/bold]", "\n" * 99]
        tensors[draws.choice(strange)] = tensors.pop(victim)
    if way == 2:
        tensors[victim] = tensors[victim].astype(draws.choice([np.int8, np.float16, np.bool_]))
    path = folder / "lora.safetensors"
    save_file(tensors, path, draws.choice([None, {"ss_network_dim": "x"}]))
    if way == 3:
        path.write_bytes(spoil_bytes(path.read_bytes(), draws))
    for layer in read_lora(path).layers.values():
        if layer.delta.shape != (len(layer.up), layer.down[0].numel()):
            raise WrongAcceptanceError(f"a layer of {tuple(layer.delta.shape)}")
    return "weights read"


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "convert": try_convert,
    "shards": try_shards,
    "stages": try_stages,
    "prompts": try_prompts,
    "weights": try_weights,
    "paths": try_paths,
}
SHARES = [8, 5, 2, 2, 2, 1]  # of 20


def read_all(folder: Path) -> list[Sample]:
    """Return all samples of a folder of shards."""
    reader = ShardReader(read_index(folder))
    return [reader(s, n) for s, count in enumerate(reader.counts) for n in range(count)]


def use(sample: Sample) -> None:
    """Decode and crop a sample as training does."""
    try:
        load_sample(sample, Augment((32, 32), "random", flip=True), 1)
    except BrokenSample as error:
        if "too long and narrow" not in str(error):  # depends on the resolution of the training
            raise


def attempt(seed: int, folder: Path) -> tuple[str, str, str]:
    """Try the input of a seed; return its kind, its outcome, and details.

    Args:
        seed: The seed.
        folder: An empty folder.
    """
    draws = random.Random(seed)
    [kind] = draws.choices(list(KINDS), SHARES)
    said = io.StringIO()
    try:
        with patience(), redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            what = KINDS[kind](folder, draws)
    except InputError as error:
        text = str(error)
        if "\n" in text or len(text) > LONGEST or not text.isprintable():
            return kind, "traces", f"no sentence but {text[:500]!r}"
        return kind, "sentences", text
    except TimeoutError:
        return kind, "hangs", traceback.format_exc()
    except WrongAcceptanceError as error:
        return kind, "wrong acceptances", str(error)
    except BaseException:
        return kind, "traces", traceback.format_exc()
    longest = max(map(len, said.getvalue().splitlines()), default=0)
    if longest > LONGEST:
        return kind, "traces", f"a line of {longest} characters"
    return kind, "results", what


@contextmanager
def patience() -> Iterator[None]:
    """Raise TimeoutError after some seconds."""

    def too_long(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """Return the most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(first: int, inputs: int, keep: Path | None = None) -> Counter[tuple[str, str]]:
    """Try inputs, print each failure with its seed, and return the counts of kind and outcome.

    Args:
        first: The first seed.
        inputs: How many seeds.
        keep: Folder in which the inputs are kept.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for seed in range(first, first + inputs):
        folder = Path(tempfile.mkdtemp()) if keep is None else keep / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        before = peak()
        kind, outcome, details = attempt(seed, folder)
        if peak() - before > MEMORY:
            outcome, details = "wrong acceptances", f"needed {(peak() - before) / 1e9:.1f} GB"
        counts[kind, outcome] += 1
        if outcome not in ("results", "sentences"):
            print(f"--- seed {seed}, {kind}: {outcome}\n{details}", flush=True)
        elif inputs == 1:
            print(f"seed {seed}, {kind}: {details}")
        if keep is None:
            shutil.rmtree(folder)
    return counts


OUTCOMES = ("results", "sentences", "traces", "hangs", "wrong acceptances")
GOOD = OUTCOMES[:2]


def main() -> None:
    """Run from the command line; the exit code is 1 if any outcome is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--inputs", type=int, default=1000, help="number of seeds")
    parser.add_argument("--keep", type=Path, help="folder in which the inputs are kept")
    given = parser.parse_args()
    counts = run(given.first, given.inputs, given.keep)
    print(f"seeds {given.first} to {given.first + given.inputs - 1}")
    for kind in [*KINDS, ""]:
        own = Counter[str]()
        for (of, outcome), number in counts.items():
            own[outcome] += number * (kind in ("", of))
        print(f"{kind or 'all':>9}: " + ", ".join(f"{own[name]} {name}" for name in OUTCOMES))
    print(f"peak memory {peak() / 1e9:.2f} GB")
    sys.exit(any(outcome not in GOOD for _, outcome in counts))


if __name__ == "__main__":
    main()
