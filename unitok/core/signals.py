"""Stop on SIGTERM or SIGINT at the end of a step, on all ranks together."""

import signal
import threading
import time
from types import FrameType
from typing import Any

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
