"""Processes that load data ahead: how they begin, end, and what is said of one that dies."""

import ctypes
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.data
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from unitok.core.errors import UserError, WorkerLostError, is_loader_death
from unitok.core.heap import frozen_heap

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_NO_ROOM = 28  # exit code of a worker without shared memory


def begin_worker(_worker: int) -> None:
    """What the workers of a loader begin with. They end with their parent, at once: they hold its lock on the run's
    folder, and a killed run may be started again right away."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_without_the_batch)
    if sys.platform == "linux":  # elsewhere torch's workers look for their parent every 5 s
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _end_without_the_batch(error: Exception, _batch: Any) -> None:
    """Called in a worker where a batch cannot be handed over, in place of dropping it: the loop would wait for ever."""
    os.write(2, f"a worker that loads data: {' '.join(str(error).split())}\n".encode(errors="replace"))
    os._exit(_NO_ROOM if "shared memory" in str(error) else 1)


@contextmanager
def forking() -> Iterator[None]:
    """Context around forks: what this process has left behind is freed before, and never in a fork, from its first
    instruction on. An ended process group, say, would join threads there that a fork does not have (a hang, or a
    segmentation fault)."""
    with frozen_heap():
        yield


@contextmanager
def loader_deaths() -> Iterator[None]:
    """Context around whatever goes on while torch's loaders have workers: one that dies is told in one line.

    torch raises its RuntimeError where the main thread happens to be (from the signal that a child has ended), not only
    where a batch is asked for.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_loader_death(error):
            raise
        text = " ".join(str(error).split())
        raise _death(text, "Bus error" in text or f"exit code {_NO_ROOM}." in text) from error


def _death(text: str, no_room: bool) -> UserError:
    if no_room:  # would only come again
        return UserError(
            "a worker that loads data had no room in shared memory (/dev/shm); give the machine or container more "
            "(--shm-size), or set num_workers=0"
        )
    return WorkerLostError(
        f"a worker that loads data is gone ({text.rstrip('. ')}); the same command goes on. If it comes again, "
        "memory runs out: lower num_workers"
    )


def loaded(loader: torch.utils.data.DataLoader) -> Generator[Any, None, None]:
    """What a loader with workers gives, which begin with `begin_worker`. They end when this generator is closed.

    Raises:
        UserError: they cannot be started, or have no room in shared memory. WorkerLostError: one has died.
    """
    stream = _start_workers(loader)
    try:
        yield from stream
    except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
        # the last three: what a worker that has died put into the queue cannot be fetched from it
        if isinstance(error, RuntimeError) and not is_loader_death(error):
            raise
        codes = _codes(stream)
        if not any(codes):
            raise
        raise _death(" ".join(str(error).split()), _NO_ROOM in codes) from error
    finally:
        _end_workers(stream)


def _codes(stream: Any) -> list[int | None]:
    """Exit codes of the workers, once one of them has ended: a moment after its connections were closed."""
    for _ in range(10):
        if any(codes := [worker.exitcode for worker in stream._workers]):
            break
        time.sleep(0.1)
    return codes


def _start_workers(loader: torch.utils.data.DataLoader) -> Any:
    before = set(multiprocessing.active_children())
    try:
        with forking():
            return iter(loader)
    except OSError as error:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(half_made := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
                half_made._shutdown = True  # or it would fail to do that itself, with a traceback
        raise UserError(
            f"workers that load data cannot be started ({error.strerror or error}); lower num_workers, or allow more "
            "processes and memory"
        ) from error


def _end_workers(stream: Any) -> None:
    """Kill what still runs: torch and multiprocessing would send SIGTERM, which workers ignore, and one that waits for
    a lock that a killed worker held never ends by itself. The process would hang at its exit."""
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:  # torch's handler would take these deaths for faults
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for worker in stream._workers:
            worker.kill()
        stream._shutdown_workers()
    finally:
        if in_main:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
