"""What the endpoints share."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from fastapi import Request

from unitok.serve.errors import ApiError, bad
from unitok.serve.jobs import Job
from unitok.serve.metrics import Metrics
from unitok.serve.model import ServedModel
from unitok.serve.process import RemoteModels
from unitok.serve.scheduler import Scheduler
from unitok.serve.schemas import SEEDS, ErrorAnswer
from unitok.serve.settings import ServeSettings

T = TypeVar("T")
_STATUSES = {
    400: "cannot be asked",
    401: "wrong key",
    404: "unknown model",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not JSON",
    422: "the body has another form",
    429: "too many requests",
    500: "a mistake of the server",
    503: "stopping",
    504: "took too long",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _STATUSES.items()
}


class _GoneError(Exception):
    """The client whose pictures are unpacked has gone."""


@dataclass
class Service:
    """One model, its queue, figures and limits."""

    model: ServedModel | RemoteModels
    scheduler: Scheduler
    metrics: Metrics
    settings: ServeSettings
    created: int
    facts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.facts = self.model.facts()
        self._unpacking = ThreadPoolExecutor(
            self.settings.unpack_threads,
            thread_name_prefix="unitok-unpack",
            initializer=torch.set_num_threads,
            initargs=(1,),
        )

    def close(self) -> None:
        """End the threads that unpack pictures, each after the picture it is at."""
        self._unpacking.shutdown(wait=False, cancel_futures=True)

    async def unpack(self, call: Callable[[Callable[[], None]], T]) -> T:
        """`call(go_on)` in one of the few threads that unpack pictures. When nobody waits for it any more, it is not
        begun, or `go_on`, which it calls before each picture, ends it."""
        gone = threading.Event()

        def go_on() -> None:
            if gone.is_set():
                raise _GoneError

        try:
            return await asyncio.get_running_loop().run_in_executor(self._unpacking, call, go_on)
        finally:
            gone.set()

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for a model that is not served."""
        if name is not None and name != self.settings.name:
            shown = name[:80].encode("ascii", "backslashreplace").decode()
            raise ApiError(
                404, "model_not_found", f"model {shown!r} is not served; this is {self.settings.name!r}", "model"
            )

    def check_number(self, n: int, seed: int | None) -> None:
        """ApiError 400 for more answers or pictures than one request may ask for, or than there are seeds."""
        if (seed or 0) + n > SEEDS:
            raise bad("invalid_value", f"seed={seed}: the last of {n} would be beyond 2^63 - 1", "seed")
        if n > self.settings.max_n:
            raise bad("n_too_large", f"n={n}: expected at most {self.settings.max_n}", "n")

    async def result(self, make: Callable[[], Awaitable[Job]]) -> Any:
        """Queue the job that `make` gives and wait for its "done"."""
        job = await self.scheduler.prepare(make)
        async for kind, value in self.scheduler.events(job):
            if kind == "done":
                return value
        raise AssertionError("events end with done or raise")


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ApiError(499, "client_closed_request", "the client went away")  # nobody reads it; it is in the figures
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
