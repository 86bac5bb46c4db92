"""How a batch comes from a worker to the main process.

torch gives every tensor that leaves a worker shared memory of its own, which the system has to make
page by page: half as much work as decoding the images that go in. Here a worker writes its batches
to the same few places over and over, and the main process copies each one as soon as it has it.
Small tensors travel by value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lit_prefopt.batches import ImagePairs, LatentPairs

Batch = ImagePairs | LatentPairs
AHEAD = 2  # batches that a worker makes before they are asked for
TURNS = AHEAD + 1  # and one that the main process is copying
SMALL = 2**14  # bytes of a tensor
Room = tuple[int, int]  # turn, and number of the tensor in its batch
NUMBERS: Room = (-1, 0)  # holds which batch lies in the rooms of each turn, (TURNS,) int64
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Small:
    """A tensor by value."""

    content: bytes
    dtype: torch.dtype
    shape: torch.Size

    def tensor(self) -> Tensor:
        """Return it, in memory of its own."""
        content = bytearray(self.content)  # which may be written to
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Large:
    """A tensor that lies in a room."""

    room: Room
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def within(self, room: Tensor) -> Tensor:
        """Return it as a view of the room."""
        size = self.shape.numel() * self.dtype.itemsize
        return room[:size].view(self.dtype).as_strided(self.shape, self.stride)


class Carried(NamedTuple):
    """A batch on its way."""

    worker: int
    number: int  # of the batch among its worker's, from 1
    parts: Any  # the batch; Small and Large stand for its tensors
    rooms: dict[Room, Tensor]  # those that are new


class Sender:
    """Sends a worker's batches.

    Args:
        worker: Its number.
    """

    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.rooms: dict[Room, Tensor] = {}
        self.numbers = torch.zeros(TURNS, dtype=torch.int64).share_memory_()
        self.number = 1
        self.begin()

    def begin(self) -> None:
        """Begin an epoch; of one that was left early, not all that was sent has been received."""
        self.taken: dict[Room, Tensor] = {}  # by this batch
        self.new: dict[Room, Tensor] = {NUMBERS: self.numbers, **self.rooms}

    def room(self, size: int) -> Bytes:
        """Return memory for a tensor of the next batch, which then need not be copied.

        Args:
            size: In bytes.
        """
        room: Bytes = self._room(size)[1].numpy()
        return room

    def send(self, batch: Batch) -> Carried:
        """Return a batch as it travels."""
        self.numbers[self.number % TURNS] = self.number
        there = {room.data_ptr(): key for key, room in self.taken.items()}

        def packed(tensor: Tensor) -> Tensor | Small | Large:
            if not tensor.numel():
                return tensor
            if tensor.nbytes <= SMALL:
                content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                return Small(content, tensor.dtype, tensor.shape)
            key = there.get(tensor.data_ptr())
            if key is not None:
                return Large(key, tensor.dtype, tensor.shape, tensor.stride())
            key, room = self._room(tensor.nbytes)
            dense = torch.empty_like(tensor, device="meta")  # as it lies, without gaps
            large = Large(key, tensor.dtype, tensor.shape, dense.stride())
            large.within(room).copy_(tensor)
            return large

        parts = tree_map_only(Tensor, packed, batch)
        carried = Carried(self.worker, self.number, parts, self.new)
        self.number, self.taken, self.new = self.number + 1, {}, {}
        return carried

    def _room(self, size: int) -> tuple[Room, Tensor]:
        key = self.number % TURNS, len(self.taken)
        self.numbers[key[0]] = self.number
        if key not in self.rooms or self.rooms[key].nbytes < size:
            room = torch.empty(size, dtype=torch.uint8).share_memory_()
            self.rooms[key] = self.new[key] = room
        self.taken[key] = self.rooms[key]
        return key, self.rooms[key][:size]


class Receiver:
    """Receives the batches of all workers; each must be received before the next one is awaited.

    Args:
        pinned: Return pinned memory, from which batches go to a GPU without waiting for it.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self.rooms: dict[int, dict[Room, Tensor]] = {}

    def receive(self, carried: Carried) -> Batch:
        """Return a batch, in memory of its own."""
        if NUMBERS in carried.rooms:  # an epoch begins, perhaps in another process
            self.rooms[carried.worker] = {}
        rooms = self.rooms[carried.worker]
        rooms.update(carried.rooms)

        def unpacked(part: Small | Large) -> Tensor:
            if isinstance(part, Small):
                small = part.tensor()
                return small.pin_memory() if self.pinned else small
            there = part.within(rooms[part.room])
            return torch.empty_like(there, pin_memory=self.pinned).copy_(there)

        batch: Batch = tree_map_only((Small, Large), unpacked, carried.parts)
        if rooms[NUMBERS][carried.number % TURNS] != carried.number:
            raise RuntimeError("A worker has written over a batch that was not copied yet.")
        return batch
