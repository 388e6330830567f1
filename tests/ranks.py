"""Run a function on several ranks: forks of this process, so that torch and deepspeed are imported only once."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable, Collection
from typing import Any

import torch

from unitok.core.distributed import free_port
from unitok.core.workers import forking

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # noqa: E402, F401 - imported once here, for all forks


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 180,
    may_die: bool = False,
    outcomes_of: Collection[int] = (),
) -> list[Any]:
    """Call `function(*args)` on `world_size` forked ranks and return their results in rank order.

    Each rank has the environment of a launcher and one thread. A rank's exception is raised here with its traceback.
    A SystemExit gives the result ("exit", code). With `may_die` a killed rank gives None and ends the others. With
    `outcomes_of` these ranks are waited for, whatever becomes of the others: ("error", traceback) or ("exit", code).
    """
    torch.set_num_threads(1)  # a fork must not inherit a thread pool in use
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world_size, port, sender, function, args), daemon=True)
        with forking():
            process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        if outcomes_of:
            return [_outcome(pipes[r], processes[r], timeout) if r in outcomes_of else None for r in range(world_size)]
        return _collect(pipes, processes, time.monotonic() + timeout, may_die)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _rank(rank: int, world_size: int, port: int, sender: Any, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        _send(sender, "result", function(*args))
    except SystemExit as exit:
        _send(sender, "result", ("exit", exit.code))
    except BaseException:  # noqa: BLE001 - whatever it is belongs to the parent
        _send(sender, "error", traceback.format_exc())


def _send(sender: Any, kind: str, value: Any) -> None:
    """By value: multiprocessing's own pickling would share tensors with a process that is about to end."""
    sender.send_bytes(pickle.dumps((kind, value)))


def _outcome(pipe: Any, process: Any, timeout: float) -> Any:
    if not pipe.poll(timeout):
        raise RankError(f"process {process.pid} did not finish in time")
    try:
        kind, value = pickle.loads(pipe.recv_bytes())  # noqa: S301 - from our own fork
    except EOFError:
        process.join()
        return "exit", process.exitcode
    return value if kind == "result" else (kind, value)


def _collect(pipes: list[Any], processes: list[Any], deadline: float, may_die: bool) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = set(range(len(pipes)))
    while waiting:
        if time.monotonic() > deadline:
            raise RankError(f"ranks {sorted(waiting)} did not finish in time")
        ready = multiprocessing.connection.wait([pipes[rank] for rank in waiting], timeout=1.0)
        for rank in [rank for rank in waiting if pipes[rank] in ready]:
            waiting.discard(rank)
            try:
                kind, value = pickle.loads(pipes[rank].recv_bytes())  # noqa: S301 - from our own fork
            except EOFError:
                processes[rank].join()
                if may_die:
                    return results
                raise RankError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if kind == "error" and not may_die:
                raise RankError(f"rank {rank}:\n{value}")
            results[rank] = value if kind == "result" else None
    return results
