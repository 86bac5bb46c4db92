"""Tell the splits of a dataset apart, so that held-out files do not become training pairs."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

from lit_prefopt.errors import InputError
from lit_prefopt.prepare.source_rows import MAX_LISTED

HELD_OUT = {"validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
TRAIN = {"train", "training"}
# 00000-of-00001, with the hash that older files of the hub have after it
NUMBER = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?(-[0-9a-f]{16})?$")


def training_files(source: str, files: list[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """Return the files of the training split, and a note that names the other splits.

    Names such as train-00000-of-00002.parquet or test_unique.parquet tell the split. Files of one
    split, and files without such names, are all returned.

    Args:
        source: The folder or pattern that the files were found by.
        files: Its files.
    """
    splits = defaultdict[str, list[Path]](list)
    training: list[Path] = []
    for path in files:
        words = set(re.split(r"[^a-z]+", path.stem.lower()))
        if words & HELD_OUT and not words & TRAIN:
            splits[NUMBER.sub("", path.stem)].append(path)
        else:
            training.append(path)
    if not splits or (not training and len(splits) == 1):
        return files, ()
    offers = [f"{name} (`--source '{_pattern(paths)}'`)" for name, paths in splits.items()]
    others = ", ".join(offers[:MAX_LISTED])
    if not training:
        raise InputError(
            f"{source} has several splits and none for training; choose one: {others}."
        )
    return training, (
        f"{source}: {len(training)} of {len(files)} files are read, without the splits {others}",
    )


def _pattern(paths: list[Path]) -> str:
    """Return the path or pattern that finds exactly these files."""
    if len(paths) == 1:
        return str(paths[0])
    common = os.path.commonprefix([path.name for path in paths]).rstrip("0123456789")
    return str(paths[0].with_name(f"{common}*{paths[0].suffix}"))
