"""What runs in the process of a model. Nothing heavy is imported before its signals and its libraries' notices are
settled."""

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from unitok.core.errors import UserError
from unitok.core.heap import frozen_heap
from unitok.core.quiet import quiet_libraries
from unitok.serve.jobs import Event, Job

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline

Load = Callable[[], "UniTokPipeline"]
Batch = tuple[int, list[Job]]


def send(pipe: Connection, message: Any) -> None:
    """Plain pickle: that of `Connection.send` puts tensors into shared memory, of which containers have little.

    It is read by `Connection.recv`; nobody but the server and its own processes has an end of such a pipe.
    """
    pipe.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def serve(pipe: Connection, load: Load, max_batch: int, threads: int, number: int) -> None:
    """Load the model and run batches until the server closes the pipe or ends.

    First (refusal or None, facts, views) is sent, then (batch, index, event) for every event of a job and (batch, None,
    traceback or None) at a batch's end.
    """
    # Both go to whole groups of processes; the server then finishes what it has accepted, and closes the pipe.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    quiet_libraries()
    batches: SimpleQueue[Batch | None] = SimpleQueue()
    loaded = threading.Event()
    threading.Thread(target=_read, args=(pipe, batches, loaded), daemon=True).start()

    import torch

    from unitok.serve.model import ServedModel

    torch.set_num_threads(threads)
    _take_gpu(number)
    try:
        model = ServedModel(load(), max_batch)
    except UserError as error:
        send(pipe, (str(error), None, None))
        return
    with frozen_heap(), suppress(OSError):  # of a pipe whose other end has gone with the server
        loaded.set()
        send(pipe, (None, model.facts(), model.views))
        while batch := batches.get():
            failure = None
            try:
                model.run(batch[1])
            except Exception:  # noqa: BLE001 - the server tells its log and whoever asked
                failure = traceback.format_exc()
            send(pipe, (batch[0], None, failure))


def _take_gpu(number: int) -> None:
    """One GPU for each copy of the model, as far as there are; that of a launcher, where one has said which."""
    import torch

    if torch.cuda.is_available():
        device = os.environ.setdefault("LOCAL_RANK", str(number % torch.cuda.device_count()))
        torch.cuda.set_device(int(device))


def _read(pipe: Connection, batches: "SimpleQueue[Batch | None]", loaded: threading.Event) -> None:
    """Batches, and whose clients have gone meanwhile."""
    jobs: list[Job] = []
    latest = 0
    try:
        while True:
            kind, batch, value = pipe.recv()
            if kind == "run":
                boxes = [_Outbox(pipe, batch, index) for index in range(len(value))]
                jobs = [make(**asked, loop=box, events=box) for (make, asked), box in zip(value, boxes, strict=True)]
                latest = batch
                batches.put((batch, jobs))
            elif batch == latest:
                jobs[value].cancelled = True
    except (EOFError, OSError):
        if not loaded.is_set():
            os._exit(1)  # loading may take long, and nobody wants the model any more
        for job in jobs:
            job.cancelled = True
        batches.put(None)
    except BaseException:  # noqa: BLE001 - or the server would wait for ever
        traceback.print_exc()
        os._exit(1)


class _Outbox:
    """Stands for the event loop and the queue of a job: its events go through the pipe."""

    def __init__(self, pipe: Connection, batch: int, index: int) -> None:
        self.pipe, self.batch, self.index = pipe, batch, index

    def call_soon_threadsafe(self, put: Callable[[Event], None], event: Event) -> None:
        put(event)

    def put_nowait(self, event: Event) -> None:
        send(self.pipe, (self.batch, self.index, event))
