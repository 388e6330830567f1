"""Stop on SIGTERM or SIGINT at the end of a step, on all ranks together."""

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Context in which the first signal only sets `requested`; the second does what it did before (usually ends)."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._first)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._restore()

    def _first(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
