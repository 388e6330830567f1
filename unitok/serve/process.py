"""The model in a process of its own.

Between any two operations the model's thread needs Python's lock. In one process with the requests it waits for it a
third of the time; here it has a lock to itself. Batches go to the process and events come back through a pipe that only
the two have.
"""

import gc
import multiprocessing
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from unitok.core.errors import UserError
from unitok.core.quiet import quiet_libraries
from unitok.serve.jobs import Event, Job
from unitok.serve.model import ServedModel

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline

LOOK_SECONDS = 0.02  # how often it is looked whether clients of a batch have gone
CLOSE_SECONDS = 10.0
_COMMON = {field.name for field in fields(Job)}
Load = Callable[[], "UniTokPipeline"]


class RemoteModel:
    """A `ServedModel` of the pipeline that `load()` makes in another process. `close` ends it.

    `load` must be picklable by name. Raises UserError where it does. `number`: of the process, for its GPU.
    """

    workers = 1

    def __init__(self, load: Load, max_batch: int, threads: int, number: int = 0) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share what CUDA and OpenMP keep
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, load, max_batch, threads, number)
        self._process = context.Process(target=_serve, args=arguments, name="unitok-model", daemon=True)
        self._process.start()
        theirs.close()  # or the end of the process would not be seen
        self._batch = 0

    def wait(self) -> None:
        """Until it can run; to be called before anything else."""
        try:
            refusal, self._facts, self.views = _receive(self._pipe)
        except EOFError:
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

    def seen(self, image: Image.Image) -> Image.Image:
        """As of `ServedModel`, in this process."""
        return self.views.seen(image)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """As of `ServedModel`, in this process."""
        return self.views.pixels(image)

    def run(self, jobs: Sequence[Job]) -> None:
        """As of `ServedModel`; RuntimeError where that fails, or where the process has ended."""
        self._batch += 1
        left: set[int] = set()  # whose clients have gone, and the process knows
        try:
            _send(self._pipe, ("run", self._batch, [_order(job) for job in jobs]))
            while True:
                for index, job in enumerate(jobs):
                    if job.cancelled and index not in left:
                        left.add(index)
                        _send(self._pipe, ("cancel", self._batch, index))
                if not self._pipe.poll(LOOK_SECONDS):
                    continue
                index, value = _receive(self._pipe)
                if index is not None:
                    jobs[index].emit(*value)
                elif value is None:
                    return
                else:
                    raise RuntimeError(f"in the model's process: {value}")
        except (EOFError, OSError):
            raise RuntimeError(self._ended()) from None

    def close(self) -> None:
        """End the process: at once where nothing runs, else after its step."""
        self._pipe.close()
        self._process.join(CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ended(self) -> str:
        self._process.join(CLOSE_SECONDS)
        return f"the model's process ended with exit code {self._process.exitcode}; what it wrote says why"


class RemoteModels:
    """As many equal `RemoteModel`s as are asked for. A batch goes to one that is free: `run` may be called from as many
    threads at once as there are `workers`."""

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
            self.close()
            raise
        first = self.models[0]
        self.facts, self.seen, self.pixels = first.facts, first.seen, first.pixels

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

    def close(self) -> None:
        """End the processes."""
        for model in self.models:
            model.close()


def _order(job: Job) -> tuple[type[Job], dict[str, Any]]:
    """What a job asks for, without what belongs to this process."""
    return type(job), {f.name: getattr(job, f.name) for f in fields(job) if f.init and f.name not in _COMMON}


def _send(pipe: Connection, message: Any) -> None:
    # Plain pickle: that of `Connection.send` puts tensors into shared memory, of which containers have little
    pipe.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())  # noqa: S301 - what the other one of our own two processes has written


# ---- in the other process


def _serve(pipe: Connection, load: Load, max_batch: int, threads: int, number: int) -> None:
    # Both go to whole groups of processes; the server then finishes what it has accepted, and closes the pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    quiet_libraries()
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    try:
        model = ServedModel(load(), max_batch)
    except UserError as error:
        _send(pipe, (str(error), None, None))
        return
    gc.collect()
    gc.freeze()  # what is loaded stays: later collections need not look through it
    _send(pipe, (None, model.facts(), model.views))
    batches: SimpleQueue[list[Job]] = SimpleQueue()
    threading.Thread(target=_read, args=(pipe, batches), daemon=True).start()
    try:
        while jobs := batches.get():
            failure = None
            try:
                model.run(jobs)
            except Exception:  # noqa: BLE001 - the server tells its log and whoever asked
                failure = traceback.format_exc()
            _send(pipe, (None, failure))
    except OSError:  # the server has gone
        return


def _read(pipe: Connection, batches: "SimpleQueue[list[Job]]") -> None:
    """Batches, and whose clients have gone meanwhile, until the server closes the pipe or ends."""
    jobs: list[Job] = []
    latest = 0
    try:
        while True:
            kind, batch, value = _receive(pipe)
            if kind == "run":
                outboxes = [_Outbox(pipe, index) for index in range(len(value))]
                jobs = [kind(**asked, loop=box, events=box) for (kind, asked), box in zip(value, outboxes, strict=True)]
                latest = batch
                batches.put(jobs)
            elif batch == latest:
                jobs[value].cancelled = True
    except (EOFError, OSError):
        for job in jobs:
            job.cancelled = True
        batches.put([])


class _Outbox:
    """Stands for the event loop and the queue of a job: its events go through the pipe."""

    def __init__(self, pipe: Connection, index: int) -> None:
        self.pipe, self.index = pipe, index

    def call_soon_threadsafe(self, put: Callable[[Event], None], event: Event) -> None:
        put(event)

    def put_nowait(self, event: Event) -> None:
        _send(self.pipe, (self.index, event))
