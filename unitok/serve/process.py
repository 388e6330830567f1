"""The model in a process of its own.

Between any two operations the model's thread needs Python's lock. In one process with the requests it waits for it a
third of the time; here it has a lock to itself. Batches go to the process and events come back through a pipe that only
the two have.
"""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from queue import SimpleQueue
from typing import Any

from unitok.core.errors import UserError
from unitok.serve.child import Load, send, serve
from unitok.serve.jobs import Job

LOOK_SECONDS = 0.02  # how often it is looked whether clients of a batch have gone
CLOSE_SECONDS = 10.0
_COMMON = {field.name for field in fields(Job)}


class RemoteModel:
    """A `ServedModel` of the pipeline that `load()` makes in another process.

    `load` must be picklable by name. `number`: of the process, for its GPU.
    """

    def __init__(self, load: Load, max_batch: int, threads: int, number: int = 0) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share what CUDA and OpenMP keep
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, load, max_batch, threads, number)
        self._process = context.Process(target=serve, args=arguments, name="unitok-model", daemon=True)
        with _without_interrupts():
            self._process.start()
            # Also where a program ends without `close`, before it waits for its processes
            self.close = Finalize(self, _end, args=(self._pipe, self._process), exitpriority=10)
        theirs.close()  # or the end of the process would not be seen
        self._batch = 0

    def wait(self) -> None:
        """Until it can run; to be called before anything else. UserError where `load` raises it."""
        try:
            refusal, self._facts, self.views = self._pipe.recv()
        except (EOFError, OSError):
            refusal = self._ended()
        if refusal is not None:
            raise UserError(refusal)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def facts(self) -> dict[str, Any]:
        """As of `ServedModel`."""
        return self._facts

    def run(self, jobs: Sequence[Job]) -> None:
        """As of `ServedModel`; RuntimeError where that fails, or where the process has ended."""
        self._batch += 1
        left: set[int] = set()  # whose clients have gone, and the process knows
        try:
            send(self._pipe, ("run", self._batch, [_order(job) for job in jobs]))
            while True:
                for index, job in enumerate(jobs):
                    if job.cancelled and index not in left:
                        left.add(index)
                        send(self._pipe, ("cancel", self._batch, index))
                if not self._pipe.poll(LOOK_SECONDS):
                    continue
                batch, index, value = self._pipe.recv()
                if batch != self._batch:  # of one that was left by an error
                    continue
                if index is not None:
                    jobs[index].emit(*value)
                elif value is None:
                    return
                else:
                    raise RuntimeError(f"in the model's process: {value}")
        except (EOFError, OSError):
            raise RuntimeError(self._ended()) from None

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._process.kill()

    def hang_up(self) -> None:
        """Let the process end after its step."""
        self._pipe.close()

    def _ended(self) -> str:
        self._process.join(CLOSE_SECONDS)
        return f"the model's process ended with exit code {self._process.exitcode}; what it wrote says why"


class RemoteModels:
    """As many equal `RemoteModel`s as are asked for. A batch goes to one that is free: `run` may be called from as many
    threads at once as there are `workers`. UserError where `load` raises it."""

    def __init__(self, load: Load, max_batch: int, threads: int, workers: int = 1) -> None:
        self.workers = workers
        self.models: list[RemoteModel] = []
        self._free: SimpleQueue[RemoteModel] = SimpleQueue()
        try:
            for number in range(workers):
                self.models.append(RemoteModel(load, max_batch, threads, number))
            for model in self.models:  # which all load at the same time
                model.wait()
                self._free.put(model)
        except BaseException:  # refused, or interrupted
            self.kill()
            self.close()
            raise
        self.facts, self.views = self.models[0].facts, self.models[0].views

    @property
    def alive(self) -> bool:
        """Whether all processes run."""
        return all(model.alive for model in self.models)

    def run(self, jobs: Sequence[Job]) -> None:
        """As of `RemoteModel`, in one that is free."""
        model = self._free.get()
        try:
            model.run(jobs)
        finally:
            self._free.put(model)

    def kill(self) -> None:
        """End the processes at once."""
        for model in self.models:
            model.kill()

    def close(self) -> None:
        """End the processes after their steps; those that take long, at once."""
        for model in self.models:
            model.hang_up()
        for model in self.models:
            model.close()


def _end(pipe: Connection, process: Any) -> None:
    pipe.close()
    process.join(CLOSE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C comes after the block; a process that begins in it never gets one, not even while it begins."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _order(job: Job) -> tuple[type[Job], dict[str, Any]]:
    """What a job asks for, without what belongs to this process."""
    return type(job), {f.name: getattr(job, f.name) for f in fields(job) if f.init and f.name not in _COMMON}
