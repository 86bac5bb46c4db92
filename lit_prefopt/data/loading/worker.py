"""Load batches in worker processes, and handle signals there."""

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

from lit_prefopt.batches import ImagePairs, LatentPairs
from lit_prefopt.data.images import BrokenSample
from lit_prefopt.data.loading.broken_samples import BrokenSamples, TooManyBroken
from lit_prefopt.data.loading.image_samples import SampleLoader, SampleRef
from lit_prefopt.data.order.plan import RankSplit, SampleOrder, replacement_positions
from lit_prefopt.data.order.position import EpochPosition
from lit_prefopt.errors import InputError

log = logging.getLogger(__name__)


Batch = ImagePairs | LatentPairs


class Stop(NamedTuple):
    """Error message that a worker returns in place of a batch when the run has to end."""

    reason: str


class PairBatches(IterableDataset[Batch | Stop]):
    """Batches of one rank, from the current position of the run to the end of the epoch.

    Args:
        plan: The order of the samples.
        loader: Loads samples and collates batches.
        ranks: This rank's part of every global batch.
        samples: How many samples of an epoch are used.
        broken_share: Largest share of unreadable samples.
    """

    def __init__(
        self,
        plan: SampleOrder,
        loader: SampleLoader,
        ranks: RankSplit,
        samples: int,
        broken_share: float,
    ) -> None:
        self.plan, self.loader, self.ranks = plan, loader, ranks
        self.samples = samples
        self.broken = BrokenSamples(broken_share, samples)
        # shared with the workers, which live on from one epoch to the next
        self.at = torch.zeros(3, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Batch | Stop]:
        """Yield this worker's batches, every n-th one, or all batches in the main process."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        remaining = EpochPosition(*self.at.tolist())
        try:
            for batch in range(first, remaining.batches, step):
                yield self.batch(
                    remaining.epoch, *self.ranks.rank_positions(remaining.position, batch)
                )
        except InputError as error:  # anything else is a bug and keeps its trace
            # torch would bury the sentence in a worker's traceback
            log.debug("Loading of batches stopped.", exc_info=True)
            yield Stop(str(error))

    def batch(self, epoch: int, start: int, stop: int) -> Batch:
        """Return the batch of the positions start to stop."""
        broken: list[str] = []
        stop = min(stop, self.samples)
        samples = [self._load(epoch, position, broken) for position in range(start, stop)]
        batch: Batch = self.loader.collate(samples, tuple(broken))
        return batch

    def _load(self, epoch: int, position: int, broken: list[str]) -> Any:
        # of the position, also for a stand-in: a batch has one shape
        bucket = self.plan.bucket(epoch, position)
        for place in replacement_positions(position, self.samples, self.ranks.global_batch):
            [stored] = self.plan.slice(epoch, place, place + 1)
            self.broken.read += 1
            try:
                return self.loader.load(SampleRef(epoch, position, bucket, *stored))
            except BrokenSample as error:
                broken.append(str(error))
                self.broken.add(str(error))
        raise TooManyBroken(f"No sample can be read, the first one since {broken[0]}.")


def ignore_interrupts(worker: int) -> None:
    """Ignore SIGINT in a worker, and SIGTERM unless the parent process sent it.

    A terminal sends Ctrl-C, and a cluster SIGTERM, to every process of a job. The run goes on to
    its next optimizer step before it stops, and needs its workers until then.

    Args:
        worker: Number of the worker, as DataLoader passes it to every `worker_init_fn`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # other systems do not report who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def _exit_on_parents_sigterm() -> None:
    if sys.platform == "linux":
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            continue
        os._exit(0)
