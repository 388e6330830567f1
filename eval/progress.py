"""Progress of an evaluation: a bar on a terminal, one plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from unitok.data.source import good_samples

T = TypeVar("T")

LINE_EVERY_SECONDS = 10.0


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Yields `items` and shows on stderr how many are done and how long the rest will take."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=label, leave=False)
        return
    yield from _plain_lines(items, label, len(items))


def _plain_lines(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS and done < total:
            left = (now - start) / done * (total - done)
            print(f"{label}: {done}/{total}, about {left:.0f} s left", file=sys.stderr, flush=True)
            last = now


def batches(count: int, batch_size: int) -> list[range]:
    """Cuts `range(count)` into consecutive ranges of at most `batch_size`."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def sample_batches(source: Any, count: int, batch_size: int, label: str) -> Iterator[list[Any]]:
    """The readable ones of the first `count` samples, `batch_size` at a time, with progress."""
    found = (sample for _, sample in good_samples(source, count))
    for rows in progress(batches(count, batch_size), label):
        if batch := list(islice(found, len(rows))):
            yield batch
