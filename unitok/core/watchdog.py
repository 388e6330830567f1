"""Every rank says once a second that it lives; when one falls silent, or says that it failed, all end in bounded time.

A rank waiting in a collective for one that is gone would wait for ever, or for the half hour of NCCL's own limit. Here
a thread of each rank counts up its key in a store of rank 0, and a second thread judges:

    beat/R   counter of rank R. Rank 0 watches all of them, the others watch rank 0: N keys a second, not N * N.
    lost     JSON {"text", "code", "readers"}: what has happened, written once by whoever knows; every rank reads it.
    suspect  a collective has failed somewhere: from then on SUSPECT_SECONDS of silence are enough.
    acks     ranks that have read "lost"; rank 0, which holds the store, stays until all have.

The main thread learns of it where a collective fails, or, if it hangs in one, is ended with the process.
"""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from unitok.core.distributed import broadcast_object, rank, world_size
from unitok.core.errors import EXIT_RESUME, EXIT_USER, RankLostError, UserError

BEAT_SECONDS = 1.0
SET_UP_SECONDS = 600.0
SUSPECT_SECONDS = 5.0  # of silence, once a collective has failed: the kernel has said already that a rank is gone
END_SECONDS = 8.0  # for a rank to end by itself once a loss is known
RESUME = "the same command goes on from the last complete checkpoint"


class Watchdog:
    """Context around a run of several ranks (every rank enters); does nothing in a run of one.

    timeout: seconds of silence after which a rank counts as gone, from `ready` on; before it, while data are read and
    networks built, SET_UP_SECONDS. A rank that is only slow goes on counting: the threads do not depend on what the
    main thread does, as long as it gives them the interpreter now and then.

    Leaving with an error that only this rank has tells the others; leaving with that of a collective names the rank
    that is gone (RankLostError). `close` it when the process group is down.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self._given = SET_UP_SECONDS, timeout
        self.lost: tuple[str, int] | None = None
        self._known = threading.Event()
        self._stopped = threading.Event()
        self._raised = False
        self._readers = 0
        self._suspect = False
        self._threads: list[threading.Thread] = []
        self._silent_since: dict[int, float] = {}
        self._counts: dict[int, bytes] = {}

    def __enter__(self) -> "Watchdog":
        if world_size() == 1:
            return self
        self.rank, self.world = rank(), world_size()
        host, limit = os.environ["MASTER_ADDR"], timedelta(seconds=max(self._given, SUSPECT_SECONDS))
        options: dict[str, Any] = {"world_size": None, "timeout": limit, "wait_for_workers": False}
        self._store = dist.TCPStore(host, 0, is_master=True, **options) if self.rank == 0 else None
        port = broadcast_object(self._store.port if self._store else 0)
        self._store = self._store or dist.TCPStore(host, port, is_master=False, **options)
        self._store.set(f"beat/{self.rank}", "0")
        now = time.monotonic()
        watched = range(1, self.world) if self.rank == 0 else [0]
        self._silent_since = dict.fromkeys(watched, now)
        for target in (self._beat, self._judge):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if not self._threads or error is None or isinstance(error, SystemExit):
            self.close()
            return
        if is_collective_error(error) or is_collective_error(error.__cause__):
            self._explain(error)
        self._announce(error)

    def ready(self) -> None:
        """The steps begin: silence counts from now on."""
        self.timeout = self._given

    def close(self) -> None:
        """Stop watching. Waits for the threads: one that is in a call of the store while the interpreter is taken down
        would end the process with SIGABRT, after all is done. Seconds at most: a store whose host is gone may never
        answer."""
        self._stopped.set()
        self._known.set()  # nobody need wait for it any more
        for thread in self._threads:
            thread.join(END_SECONDS)

    # ---- an error of the main thread

    def _explain(self, error: BaseException) -> None:
        """RankLostError if a rank is gone or has failed; returns if all live. That is known within seconds."""
        self._suspect = True
        self._known.wait(SUSPECT_SECONDS + END_SECONDS)
        if self.lost is not None:
            self._raised = True
            if self.rank == 0:
                self._wait_for_readers()
            raise RankLostError(*self.lost) from error

    def _announce(self, error: BaseException) -> None:
        """Tell the others that this rank ends, and wait (seconds at most) until they know."""
        self._raised = True
        if self.lost is not None:
            return
        code, text = _code_of(error), " ".join(str(error).split())
        named = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
        self.lost = named, code  # before our own thread reads it in the form that it has for the others
        try:
            self._say(f"rank {self.rank} ended: {named}", code, self.world)
        except RuntimeError:
            return  # the store went with rank 0: the others know
        finally:
            self._known.set()

    def _say(self, text: str, code: int, readers: int) -> None:
        self._readers = readers
        self._store.set("lost", json.dumps({"text": text, "code": code, "readers": readers}))
        self._wait_for_readers()

    def _wait_for_readers(self) -> None:
        """Stay until all have read what was said, seconds at most: the store goes with rank 0."""
        deadline = time.monotonic() + END_SECONDS / 2
        while self._store.add("acks", 0) < self._readers and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 10)

    # ---- threads

    def _beat(self) -> None:
        """Talk to the store. Any call may block for ever when its host is gone: judging is for the other thread."""
        count, told = 0, False
        try:
            while not self._stopped.wait(BEAT_SECONDS / 2 if self.rank == 0 else BEAT_SECONDS):
                count += 1
                self._store.set(f"beat/{self.rank}", str(count))
                if self._suspect:
                    self._store.set("suspect", "1")
                elif self._store.check(["suspect"]):
                    self._suspect = True
                if not told and self._store.check(["lost"]):
                    told, found = True, json.loads(self._store.get("lost"))
                    self._readers = found["readers"]
                    self._store.add("acks", 1)
                    self._learn(found["text"], found["code"])
                self._look()
        except RuntimeError:
            self._suspect = True  # no answer: the store's host has closed the connection

    def _look(self) -> None:
        keys = [f"beat/{watched}" for watched in self._silent_since if self._store.check([f"beat/{watched}"])]
        now = time.monotonic()
        for key, count in zip(keys, self._store.multi_get(keys) if keys else [], strict=True):
            number = int(key.removeprefix("beat/"))
            if self._counts.get(number) != count:
                self._counts[number], self._silent_since[number] = count, now

    def _judge(self) -> None:
        while not self._known.wait(BEAT_SECONDS / 4):
            if self._stopped.is_set():
                return
            limit = min(self.timeout, SUSPECT_SECONDS) if self._suspect else self.timeout
            now = time.monotonic()
            silent = [number for number, since in self._silent_since.items() if now - since > limit]
            if silent:
                self._tell(silent, limit)
        if self._stopped.wait(END_SECONDS):
            return
        # where it has raised, the error is on its way, and tearing down takes time
        if not self._raised or not self._stopped.wait(END_SECONDS / 2):
            self._end()

    def _tell(self, silent: list[int], limit: float) -> None:
        names = f"rank {silent[0]} is" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))} are"
        text = f"{names} gone (killed, or its host lost: no sign of life for {limit:.0f} s); {RESUME}"
        if self.rank == 0:  # our own store: it answers
            self._say(text, EXIT_RESUME, self.world - len(silent))
        self._learn(text, EXIT_RESUME)

    def _learn(self, text: str, code: int) -> None:
        self.lost = self.lost or (text, code)
        self._known.set()

    def _end(self) -> NoReturn:
        """The main thread hangs, in a collective or while it tears down, where nothing can reach it."""
        text, code = self.lost or ("", EXIT_RESUME)
        try:
            print(f"unitok: error: {text}", file=sys.stderr, flush=True)
        finally:  # also where nobody reads it
            os._exit(code)


def _code_of(error: BaseException) -> int:
    if isinstance(error, UserError):
        return error.exit_code
    return EXIT_USER if isinstance(error, OSError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def is_collective_error(error: BaseException | None) -> bool:
    """Whether torch has raised this because a collective failed. gloo's errors are known by their text alone."""
    text = str(error).lower()
    marks = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(m in text for m in marks))
