"""Which samples a step sees: a pure function of (seed, position), whatever the number of ranks and workers.

Samples are numbered by one global position p over all epochs: epoch p // N, index permutation(seed, epoch)[p % N].
Micro-batch m of a step covers G consecutive positions (G = micro-batch size x ranks), rank r its r-th contiguous part.
So the whole state of the stream is one number, `samples_seen` of a checkpoint, for any number of ranks and workers; and
no rank holds a list of samples (see `permutation`).
"""

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.utils.data

from unitok.core.distributed import rank, world_size
from unitok.core.errors import CheckpointError, ConfigError, DataError, UserError
from unitok.core.permutation import Permutation, kind_of_order
from unitok.core.task import Task
from unitok.core.workers import begin_worker, loaded

K = TypeVar("K", int, tuple[int, int, int])
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values that are made when they are asked for, of which the two last in order of their keys are held: no more than
    two epochs, or windows, meet in one micro-batch (or the data are tiny)."""

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = make
        self._held: dict[K, V] = {}

    def __getitem__(self, key: K) -> V:
        if key not in self._held:
            if len(self._held) > 1:
                self._held.pop(min(self._held))
            self._held[key] = self._make(key)
        return self._held[key]


class SampleOrder:
    """The endless, reproducible order of `num_samples` samples.

    epochs_differ: indices of a later epoch than the micro-batch's first one are numbered on (see `Task.place`).
    """

    epochs_differ = False

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise DataError("the training data is empty: 0 samples; check the data source")
        self.num_samples, self.seed = num_samples, seed
        self.kind = kind_of_order(num_samples)
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
        first, epoch = start + rank * size, self.epoch(start)
        positions = range(first, first + size)
        indices = [self.index(position) for position in positions]
        if self.epochs_differ:
            late = [self.num_samples * (self.epoch(position) - epoch) for position in positions]
            indices = [index + more for index, more in zip(indices, late, strict=True)]
        return indices, epoch


class WindowOrder(SampleOrder):
    """The order where reading at random is slow: shards in random order, `window` of them at a time shuffled together.

    All ranks read the same few shards at any time. Every sample still comes once in an epoch, and a position alone
    tells its sample; an epoch costs a few numbers per shard.

    Args:
        sizes: samples of each shard, in the order in which they are numbered. window: shards shuffled together.
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int) -> None:
        super().__init__(sum(sizes), seed)
        self.window = window
        self.kind = f"windows of {window} shards"
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._layouts = Recent(self._layout)
        self._windows = Recent(lambda key: Permutation(key[2], "window", seed, *key))

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and where each ends."""
        shuffled = Permutation(len(self._sizes), "shards", self.seed, epoch)
        shards = np.array([shuffled[number] for number in range(len(shuffled))])
        return shards, np.cumsum(self._sizes[shards])

    def index(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        shards, ends = self._layouts[epoch]
        number = int(np.searchsorted(ends, offset, side="right")) // self.window
        first, stop = number * self.window, min((number + 1) * self.window, len(shards))
        start = int(ends[first - 1]) if first else 0
        size = int(ends[stop - 1]) - start
        place = start + self._windows[epoch, number, size][offset - start]
        shard = int(np.searchsorted(ends, place, side="right"))
        return int(self._starts[shards[shard]]) + place - int(ends[shard] - self._sizes[shards[shard]])


def order_of(task: Task, seed: int, window: int = 0) -> SampleOrder:
    """The order of a run: all samples shuffled together, or windows of shards; ConfigError where there are none."""
    if window == 0:
        order = SampleOrder(task.num_samples, seed)
    else:
        sizes = task.shard_sizes
        if sizes is None:
            raise ConfigError(
                f"shuffle_window={window}: the data are no shards, or a mixture of several sources; leave it at 0 to "
                "shuffle all samples"
            )
        assert sum(sizes) == task.num_samples, (sum(sizes), task.num_samples)
        order = WindowOrder(sizes, seed, window)
    order.epochs_differ = task.epochs_differ
    return order


def check_same_order(checkpoint: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """CheckpointError if a checkpoint was trained in an order that is drawn otherwise now: samples would come twice."""
    old, new = saved.get("order", "shuffle"), present["order"]
    if old != new:
        raise CheckpointError(
            f"checkpoint {checkpoint} orders its samples by {old!r}, this run by {new!r}; set shuffle_window back, go "
            "on with the version that wrote it, or start anew in another output_dir"
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
        """The batch, or the UserError that says why there is none: raised in a worker, torch would wrap it in a
        traceback."""
        try:
            return self.task.load_batch(*request)
        except UserError as error:
            return error


def _begin_deaf_worker(worker: int) -> None:
    """A signal to the whole group means the loop: it needs its workers until the checkpoint is written."""
    begin_worker(worker)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def batches(
    task: Task, order: SampleOrder, start: int, stop: int, micro_batch_size: int, num_workers: int
) -> Generator[Any, None, None]:
    """This rank's micro-batches from global position `start` to `stop`, loaded in order.

    With workers they are loaded ahead in processes, which end when this generator is closed; without, in this one when
    they are asked for.
    """
    requests = _Requests(order, start, stop, micro_batch_size)
    if num_workers == 0:
        for indices, epoch in requests:
            yield task.load_batch(indices, epoch)
        return
    loader = torch.utils.data.DataLoader(
        _Loads(task),
        sampler=requests,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_deaf_worker,
        prefetch_factor=2,
    )
    with closing(loaded(loader)) as stream:
        for batch in stream:
            if isinstance(batch, UserError):
                raise batch
            yield batch
