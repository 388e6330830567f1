"""Progress of an evaluation: a bar on a terminal, one plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

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
