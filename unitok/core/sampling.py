"""Which samples a step sees: a pure function of (seed, position), whatever the number of ranks and workers.

Samples are numbered by one global position p over all epochs: epoch p // N, index permutation(seed, epoch)[p % N].
Micro-batch m of a step covers G consecutive positions (G = micro-batch size x ranks), rank r its r-th contiguous part.
So the whole state of the stream is one number, `samples_seen` of a checkpoint, for any number of ranks and workers; and
no rank holds a list of samples (see `permutation`).
"""

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.data

from unitok.core.distributed import rank, world_size
from unitok.core.errors import CheckpointError, DataError
from unitok.core.permutation import Permutation, kind_of_order
from unitok.core.task import Task

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class Recent:
    """The permutations of the epochs used last: two at most meet in one micro-batch (or the data are tiny)."""

    def __init__(self, make: Callable[[int], Permutation]) -> None:
        self._make = make
        self._held: dict[int, Permutation] = {}

    def __getitem__(self, epoch: int) -> Permutation:
        if epoch not in self._held:
            if len(self._held) > 1:
                self._held.pop(min(self._held))
            self._held[epoch] = self._make(epoch)
        return self._held[epoch]


class SampleOrder:
    """The endless, reproducible order of `num_samples` samples."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise DataError("the training data is empty: 0 samples; check the data source")
        self.num_samples, self.seed = num_samples, seed
        self._permutations = Recent(lambda epoch: Permutation(num_samples, "order", seed, epoch))

    def epoch(self, position: int) -> int:
        """The epoch that a global position lies in."""
        return position // self.num_samples

    def index(self, position: int) -> int:
        """The sample at a global position."""
        epoch, offset = divmod(position, self.num_samples)
        return self._permutations[epoch][offset]

    def micro_batch(self, start: int, size: int, rank: int) -> tuple[list[int], int]:
        """Indices of `rank`'s part of the global micro-batch that starts at position `start`, and its epoch."""
        first = start + rank * size
        return [self.index(position) for position in range(first, first + size)], self.epoch(start)


def check_same_order(checkpoint: Path, saved: dict[str, Any], num_samples: int) -> None:
    """CheckpointError if a checkpoint was trained in an order that is drawn otherwise now: samples would come twice."""
    old, new = saved.get("order", "shuffle"), kind_of_order(num_samples)
    if old != new:
        raise CheckpointError(
            f"checkpoint {checkpoint} drew its order of samples by {old!r}, this version draws it by {new!r}; go on "
            "with the version that wrote it, or start anew in another output_dir"
        )


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


def _begin_worker(_worker: int) -> None:
    """A signal to the whole group means the loop: it needs its workers until the checkpoint is written. They end with
    their parent, at once: they hold its lock on the run's folder, and a killed run may be started again right away."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's workers look for their parent every 5 s
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


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
        worker_init_fn=_begin_worker,
        prefetch_factor=2,
    )
