"""Stop on SIGTERM or SIGINT: at the end of a step on all ranks together, or at once where no step is to be finished."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from unitok.core.errors import StoppedError

GRACE_SECONDS = 5.0


class StopSignals:
    """Context in which the first signal only sets `requested`.

    Launchers send a signal to the whole group and again to each rank, so those of the next seconds say the same once
    more. One after that does what it did before (usually ends).
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        self.requested, self.grace_seconds = False, grace_seconds
        self._first_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._restore()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._first_at = True, time.monotonic()
        elif time.monotonic() - self._first_at > self.grace_seconds:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


@contextmanager
def interrupt_ends() -> Iterator[None]:
    """Context in which Ctrl-C ends the process at once with 130: for imports and loading, where nothing is half done.

    Raised in there, KeyboardInterrupt is swallowed or turned into other errors by the libraries that are loaded.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        try:
            os.write(2, b"unitok: interrupted\n")
        finally:  # also where nobody reads it
            os._exit(130)

    # Python allows handlers only in the main thread; who ignores the signal, as nohup does, has a reason.
    in_main = threading.current_thread() is threading.main_thread()
    taken = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if taken:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if taken:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _Stop(BaseException):
    """SIGTERM, wherever the process happens to be: no `except` for bad samples or files takes it for one of those."""


@contextmanager
def stopped_by_sigterm(message: str) -> Iterator[None]:
    """Context that SIGTERM ends at once: what is half done is tidied up on the way out, then StoppedError(message).

    The process is expected to end then: signals after the first are ignored, so that none of a launcher that sends it
    twice, nor a loader's worker that has heard it too, cuts the tidying up short.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise _Stop

    in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
    previous = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    except _Stop:
        raise StoppedError(message) from None
    finally:
        if in_main and signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
