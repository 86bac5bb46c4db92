"""What a worker does: it makes whole batches out of places in shards."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.loading.broken_samples import Tally, TooManyBroken
from lit_prefopt.data.loading.image_samples import Items, Visit, own_room
from lit_prefopt.data.loading.shared_memory import Batch, Carried, Sender
from lit_prefopt.data.order.plan import RankSplit, SampleOrder, replacement_positions
from lit_prefopt.data.order.position import EpochPosition
from lit_prefopt.errors import InputError

log = logging.getLogger(__name__)


class Stop(NamedTuple):
    """What a worker hands out instead of a batch when the run has to end."""

    reason: str


class PairBatches(IterableDataset[Batch | Carried | Stop]):
    """The batches of one rank, from wherever the run stands.

    Args:
        plan: The order of the samples.
        items: Makes samples and batches of them.
        ranks: This rank's part of every global batch.
        samples: How many samples of an epoch are used.
        broken_share: Largest share of unreadable samples.
    """

    def __init__(
        self,
        plan: SampleOrder,
        items: Items,
        ranks: RankSplit,
        samples: int,
        broken_share: float,
    ) -> None:
        self.plan, self.items, self.ranks = plan, items, ranks
        self.samples = samples
        self.tally = Tally(broken_share, samples)
        # shared with the workers, which live on from one epoch to the next
        self.at = torch.zeros(3, dtype=torch.int64).share_memory_()
        self.sender: Sender | None = None  # of a worker

    def __iter__(self) -> Iterator[Batch | Carried | Stop]:
        """Yield the batches that are this worker's, every n-th one, or all in the main process."""
        worker = get_worker_info()
        if worker:
            self.sender = self.sender or Sender(worker.id)
            self.sender.begin()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        stage = EpochPosition(*self.at.tolist())
        try:
            for batch in range(first, stage.batches, step):
                made = self.batch(stage.epoch, *self.ranks.rank_positions(stage.position, batch))
                yield self.sender.send(made) if self.sender else made
        except InputError as error:  # anything else is a bug and keeps its trace
            # torch would bury the sentence in a worker's traceback
            log.debug("The reading of batches ended.", exc_info=True)
            yield Stop(str(error))

    def batch(self, epoch: int, start: int, stop: int) -> Batch:
        """Return the batch of the positions start to stop."""
        broken: list[str] = []
        stop = min(stop, self.samples)
        items = [self._item(epoch, position, broken) for position in range(start, stop)]
        room = self.sender.room if self.sender else own_room
        batch: Batch = self.items.collate(items, tuple(broken), room)
        return batch

    def _item(self, epoch: int, position: int, broken: list[str]) -> Any:
        # of the position, also for a stand-in: a batch has one shape
        bucket = self.plan.bucket(epoch, position)
        for place in replacement_positions(position, self.samples, self.ranks.global_batch):
            [stored] = self.plan.slice(epoch, place, place + 1)
            self.tally.read += 1
            try:
                return self.items.item(Visit(epoch, position, bucket, *stored))
            except BrokenSample as error:
                broken.append(str(error))
                self.tally.add(str(error))
        raise TooManyBroken(f"No sample can be read, the first one since {broken[0]}.")


def ignore_interrupts(worker: int) -> None:
    """Let this worker outlive a Ctrl-C or SIGTERM that was meant for the run.

    A terminal sends Ctrl-C, and a cluster SIGTERM, to every process of a job. The run goes on to
    its next optimizer step before it stops, and needs its workers until then.

    Args:
        worker: Number of the worker, as DataLoader hands it to every `worker_init_fn`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nobody says who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_request, daemon=True).start()


def _exit_on_request() -> None:
    if sys.platform == "linux":
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            continue
        os._exit(0)
