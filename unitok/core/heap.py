"""Python's garbage collector, and what it need not look through."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap(collect: bool = True) -> Iterator[None]:
    """Context in which collections leave out all that is there at its beginning, torch and a model for instance: they
    would take a second each. What is garbage by then is freed before, unless `collect` is False.

    At the end all is as before (libraries speak of leaks otherwise), but in a fork, which keeps it so.
    """
    process, frozen_before = os.getpid(), gc.get_freeze_count() > 0
    if collect:
        gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if os.getpid() == process and not frozen_before:
            gc.unfreeze()
