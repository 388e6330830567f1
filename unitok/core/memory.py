"""Memory of this process and everything it started, watched while a long job runs."""

import threading
from types import TracebackType

import psutil

INTERVAL_SECONDS = 1.0


class MemoryWatch:
    """`with MemoryWatch() as watch:` ... `watch.peak_mb`: largest sum of resident memory, sampled every second.

    Pages that processes share are counted for each of them, so the figure is an upper bound.
    """

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it has ended since it was listed
                    continue
            self.peak_mb = max(self.peak_mb, total / 1e6)
            if self._stop.wait(INTERVAL_SECONDS):
                return
