"""A thread owns the model; requests wait in a queue and go through it in batches.

Requests come and go in the event loop. The thread takes one batch after the other from the queue by itself, as long as
anything waits: the loop, which has the answers of the batch before to write, would let it wait. Where there are several
copies of the model, each has such a thread.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from unitok.serve.errors import ApiError, internal_error
from unitok.serve.jobs import Event, Job
from unitok.serve.metrics import Metrics
from unitok.serve.settings import ServeSettings

_LOGGER = logging.getLogger(__name__)
J = TypeVar("J", bound=Job)
_STOP_SECONDS = 5.0  # for the step that runs when nothing is wanted any more
_MAX_PASSED_OVER = 4  # batches of others that a job lets go before it


class Runs(Protocol):
    """What the scheduler needs of a model."""

    workers: int  # how many batches it runs at once
    alive: bool

    def run(self, jobs: Sequence[Job]) -> None: ...

    def close(self) -> None: ...


class Scheduler:
    """The queue and the thread behind it.

    `waiting` and `running` change under a lock, because both the event loop and the thread change them.
    """

    def __init__(self, model: Runs, settings: ServeSettings, metrics: Metrics) -> None:
        self.model, self.settings, self.metrics = model, settings, metrics
        self.waiting: deque[Job] = deque()
        self.preparing = 0  # requests that have a place in the queue, but no job yet: their pictures are unpacked
        self.running: list[Job] = []
        self.draining = self.gave_up = False
        self._lock = threading.Lock()
        self._arrived = asyncio.Event()
        self._executor = ThreadPoolExecutor(
            max_workers=model.workers,
            thread_name_prefix="unitok-model",
            initializer=torch.set_num_threads,  # for its thread alone
            initargs=(settings.threads or torch.get_num_threads(),),
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to work; to be called in the event loop."""
        self._loop = loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._work()) for _ in range(self.model.workers)]

    def give_up(self) -> None:
        """Tell all who still wait that there will be no answer."""
        with self._lock:  # from now on the thread takes nothing
            self.draining = self.gave_up = True
            jobs = [*self.waiting, *self.running]
        for job in jobs:
            job.emit("error", _stopping())
            job.cancelled = True

    async def stop(self) -> None:
        """Give up what is left, and end the thread once its step is done."""
        self.give_up()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        ending = asyncio.create_task(asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True))
        await asyncio.wait({ending}, timeout=_STOP_SECONDS)
        if not ending.done():  # a step that does not end, of a process that can be ended
            await asyncio.to_thread(self.model.close)
        await ending

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        with self._lock:
            return not self.queued and not self.running

    @property
    def queued(self) -> int:
        """Requests that wait, those included whose pictures are being unpacked."""
        return len(self.waiting) + self.preparing

    async def prepare(self, make: Callable[[], Awaitable[J]]) -> J:
        """Queue the job that `make` gives, whose place is held meanwhile.

        ApiError 429 when too many wait, 503 when the server is stopping, 504 when it takes too long. The time of the
        request runs from now on.
        """
        deadline = asyncio.get_running_loop().time() + self.settings.request_seconds
        with self._place():
            try:
                async with asyncio.timeout_at(deadline):
                    job = await make()
            except TimeoutError:
                self.metrics.cancelled.inc()
                raise self._too_late() from None
            except asyncio.CancelledError:
                self.metrics.cancelled.inc()
                raise
        if self.gave_up:
            raise _stopping()
        job.deadline = deadline
        with self._lock:
            self.waiting.append(job)
        self._arrived.set()
        return job

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.draining:
            raise _stopping()
        if self.queued >= self.settings.max_queue:
            self.metrics.refused.inc()
            raise ApiError(
                429,
                "queue_full",
                f"{self.queued} requests wait already; ask again later",
                headers={"Retry-After": str(self.metrics.retry_after(self.queued))},
            )
        self.preparing += 1
        try:
            yield
        finally:
            self.preparing -= 1

    def _too_late(self) -> ApiError:
        self.metrics.timeouts.inc()
        return ApiError(504, "timeout", f"no answer within {self.settings.request_seconds:g} seconds; ask for less")

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """The job's events up to "done". An "error" is raised; so is ApiError 504 when it takes too long.

        A job whose reader goes away is cancelled: it leaves the queue, or stops at its next token or position.
        """
        finished = False
        try:
            while not finished:
                try:
                    async with asyncio.timeout_at(job.deadline):
                        kind, value = await job.events.get()
                except TimeoutError:
                    raise self._too_late() from None
                finished = kind in ("done", "error")
                if kind == "error":
                    raise value
                yield kind, value
        finally:
            if not finished:
                self.metrics.cancelled.inc()
            job.cancelled = True
            with self._lock:
                if job in self.waiting:
                    self.waiting.remove(job)

    async def _work(self) -> None:
        """Wake the thread when something has come, after the time that it waits for company."""
        while True:
            await self._arrived.wait()
            if self.waiting and self.settings.max_wait_ms:
                await self._gather()
            self._arrived.clear()  # before the thread looks: what comes now wakes it again
            await asyncio.get_running_loop().run_in_executor(self._executor, self._run_all)

    async def _gather(self) -> None:
        """Give others the time to come along, unless the batch is full already."""
        until = asyncio.get_running_loop().time() + self.settings.max_wait_ms / 1000
        while (left := until - asyncio.get_running_loop().time()) > 0:
            if sum(job.weight for job in self.waiting) >= self.settings.max_batch:
                return
            await asyncio.sleep(min(left, 0.002))

    def _take(self) -> list[Job]:
        """The next batch, which then is among those `running`: jobs of the key of which most wait, because a batch
        costs little more than one job. Where a job has been passed over too often, of its key. The oldest go first."""
        with self._lock:
            batch = [] if self.gave_up else self._next_batch()
            self.running = [*self.running, *batch]
            if self.waiting and self._loop is not None:  # there may be another thread that sleeps
                self._loop.call_soon_threadsafe(self._arrived.set)
            return batch

    def _next_batch(self) -> list[Job]:
        if not self.waiting:
            return []
        groups: dict[Hashable, list[Job]] = {}
        for job in self.waiting:
            groups.setdefault(job.key, []).append(job)
        oldest = self.waiting[0]
        if oldest.passed_over >= _MAX_PASSED_OVER:
            group = groups[oldest.key]
        else:
            group = max(groups.values(), key=lambda jobs: min(sum(job.weight for job in jobs), self.settings.max_batch))
        batch: list[Job] = []
        weight = 0
        for job in group:
            if batch and weight + job.weight > self.settings.max_batch:
                continue
            batch.append(job)
            weight += job.weight
        taken = set(batch)
        self.waiting = deque(job for job in self.waiting if job not in taken)
        for job in self.waiting:
            job.passed_over += 1
        return batch

    def _run_all(self) -> None:
        """In the model's thread: batches, until nothing waits."""
        while batch := self._take():
            self._run(batch)
            done = set(batch)
            with self._lock:
                self.running = [job for job in self.running if job not in done]

    def _run(self, batch: list[Job]) -> None:
        """One batch. An error nobody foresaw costs the request that it is about, not those beside it: each is then run
        alone."""
        error = self._call(batch)
        if error is not None:
            _LOGGER.error("a batch of %d requests failed", len(batch), exc_info=error)
        for job in batch if error is not None else ():
            if job.ended or job.cancelled:
                continue
            if not self.model.alive:
                job.emit("error", _stopping())
                continue
            if len(batch) > 1:
                job.begin_again()
                error = self._call([job])
            if error is not None:
                job.emit("error", internal_error())

    def _call(self, jobs: list[Job]) -> BaseException | None:
        with self.metrics.batch(jobs):
            try:
                self.model.run(jobs)
            except BaseException as error:  # noqa: BLE001 - whatever it is, somebody waits for an answer
                return error
        return None


def _stopping() -> ApiError:
    return ApiError(503, "stopping", "the server is stopping; ask again later", headers={"Retry-After": "10"})
