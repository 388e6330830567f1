"""Which samples a step sees: a pure function of (seed, position), whatever the number of ranks and workers.

Samples are numbered by one global position p over all epochs: epoch p // N, index permutation(seed, epoch)[p % N].
Micro-batch m of a step covers G consecutive positions (G = micro-batch size x ranks), rank r its r-th contiguous part.
"""

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data

from unitok.core.distributed import rank, world_size
from unitok.core.errors import DataError
from unitok.core.rng import numpy_rng
from unitok.core.task import Task


class SampleOrder:
    """The endless, reproducible order of `num_samples` samples."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise DataError("the training data is empty: 0 samples; check the data source")
        self.num_samples, self.seed = num_samples, seed
        self._permutations: dict[int, np.ndarray] = {}

    def epoch(self, position: int) -> int:
        """The epoch that a global position lies in."""
        return position // self.num_samples

    def index(self, position: int) -> int:
        """The sample at a global position."""
        epoch, offset = divmod(position, self.num_samples)
        if epoch not in self._permutations:
            if len(self._permutations) > 1:  # two epochs at most meet in one micro-batch (or the data are tiny)
                self._permutations.pop(min(self._permutations))
            self._permutations[epoch] = numpy_rng("order", self.seed, epoch).permutation(self.num_samples)
        return int(self._permutations[epoch][offset])

    def micro_batch(self, start: int, size: int, rank: int) -> tuple[list[int], int]:
        """Indices of `rank`'s part of the global micro-batch that starts at position `start`, and its epoch."""
        first = start + rank * size
        return [self.index(position) for position in range(first, first + size)], self.epoch(start)


class _Requests(torch.utils.data.Sampler):
    def __init__(self, order: SampleOrder, start: int, stop: int, size: int) -> None:
        self.order, self.start, self.stop, self.size = order, start, stop, size

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        for start in range(self.start, self.stop, self.size * world_size()):
            yield self.order.micro_batch(start, self.size, rank())


class _Loads(torch.utils.data.Dataset):
    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, request: tuple[list[int], int]) -> Any:
        return self.task.load_batch(*request)


def _leave_signals(_worker: int) -> None:
    """A signal to the whole group means the loop: it needs its workers until the checkpoint is written. They end with
    their parent."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def batches(
    task: Task, order: SampleOrder, start: int, stop: int, micro_batch_size: int, num_workers: int
) -> Iterator[Any]:
    """This rank's micro-batches from global position `start` to `stop`, loaded in order.

    With workers they are loaded ahead in processes; without, in this one when they are asked for.
    """
    requests = _Requests(order, start, stop, micro_batch_size)
    if num_workers == 0:
        for indices, epoch in requests:
            yield task.load_batch(indices, epoch)
        return
    yield from torch.utils.data.DataLoader(
        _Loads(task),
        sampler=requests,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals,
        prefetch_factor=2,
    )
