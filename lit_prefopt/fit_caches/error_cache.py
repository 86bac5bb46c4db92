"""The reference's denoising errors at seeds that come back, computed at the first visit."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from lit_prefopt.batches import Pairs
from lit_prefopt.utils.record_store import RecordStore

MOST = 4_000_000  # rows in memory, about 0.8 GB
BATCHES = 200  # batches whose errors are written together
KEY = 16  # bytes


class ErrorCache:
    """Errors of the reference by pair, prompt, seed and number of sides.

    Every process has them in memory, two numbers a row. With a store, the errors of the fixed draws
    of training pairs are kept on the disk too, for a resumed run and for other ranks.

    Args:
        store: Where errors are written; they last as long as the process if not given.
        kind: Kind of their records, which names the reference.
    """

    def __init__(self, store: RecordStore | None = None, kind: str = "") -> None:
        self.store, self.kind = store, kind
        self.rows: dict[bytes, tuple[float, ...]] = {}
        self._names: dict[int, str] = {}  # of the current batch: pair and prompt by seed
        self._waiting: list[tuple[list[bytes], Tensor]] = []  # on the device
        self._unwritten: dict[bytes, tuple[float, ...]] = {}
        self._known: set[str] = set()  # records that were read or written
        self.load()

    def look_up(
        self, pairs: Pairs, records: Sequence[str], texts: Sequence[str], draws: int
    ) -> Pairs:
        """Return the pairs with the reference's errors, if they are known of all of them.

        Args:
            pairs: B pairs.
            records: Names of the pairs' images, B of them; "" for one without a name.
            texts: Their prompts.
            draws: Number of draws that follow each other, from `pairs.seeds` on.
        """
        self._names = {}
        if not all(records) or pairs.reference_error is not None:
            return pairs
        seeds = [[seed + draw for draw in range(draws)] for seed in pairs.seeds.tolist()]
        names = [f"{record}/{text}" for record, text in zip(records, texts, strict=True)]
        keys = [
            [_key(name, seed, pairs.sides) for seed in row]
            for name, row in zip(names, seeds, strict=True)
        ]
        found = [[self.rows.get(key) for key in row] for row in keys]
        if any(errors is None for row in found for errors in row):
            self._names = {
                seed: name for name, row in zip(names, seeds, strict=True) for seed in row
            }
            return pairs
        errors = torch.tensor(found, dtype=torch.float32)
        return pairs._replace(reference_error=errors.to(pairs.latents.device))

    def add(self, seeds: Tensor, errors: Tensor) -> None:
        """Keep errors that were computed for the pairs of the last `look_up`.

        Args:
            seeds: Seeds of the pairs, (B,).
            errors: Errors of the reference, (B, K).
        """
        numbers = seeds.tolist()
        if len(self.rows) < MOST and all(seed in self._names for seed in numbers):
            sides = errors.shape[1]
            keys = [_key(self._names[seed], seed, sides) for seed in numbers]
            self._waiting.append((keys, errors.detach().float()))
        if len(self._waiting) >= BATCHES:
            self.flush()

    def flush(self) -> None:
        """Read the errors of the last batches from the device, and write them to the store."""
        for keys, errors in self._waiting:
            new = dict(zip(keys, map(tuple, errors.tolist()), strict=True))
            self.rows |= new
            self._unwritten |= new
        self._waiting = []
        if self.store is None or not self._unwritten:
            self._unwritten = {}
            return
        by_sides: dict[int, list[bytes]] = {}
        for key, values in self._unwritten.items():
            by_sides.setdefault(len(values), []).append(key)
        for keys in by_sides.values():
            name = uuid.uuid4().hex
            flat = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8)
            table = torch.tensor([self._unwritten[key] for key in keys], dtype=torch.float32)
            self.store.write(self.kind, name, {"keys": flat.view(-1, KEY), "errors": table})
            self._known.add(name)
        self._unwritten = {}

    def load(self) -> None:
        """Read the errors that other processes have written since the last time."""
        if self.store is None:
            return
        for name in [*self.store.keys(self.kind)]:
            if name in self._known:
                continue
            self._known.add(name)
            record = self.store.read(self.kind, name)
            if record is None:
                continue
            keys = record["keys"].contiguous().numpy().tobytes()
            for row, values in enumerate(record["errors"].tolist()):
                self.rows[keys[row * KEY : (row + 1) * KEY]] = tuple(values)


def _key(name: str, seed: int, sides: int) -> bytes:
    return blake2b(f"{seed}/{sides}/{name}".encode(), digest_size=KEY).digest()
