"""Starting our own commands on several ranks of this machine."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from unitok.core.distributed import free_port
from unitok.core.errors import EXIT_RESUME, StoppedError, UserError

PARENT = "UNITOK_LAUNCHER"  # process id of the launcher, in the environment of its ranks
END_SECONDS = 20.0  # for a rank to end by itself when another has failed


def local_ranks(most: int) -> int:
    """One rank per GPU, or per CPU core where there is none: on small networks two ranks of one thread train faster
    than one rank of two threads."""
    return max(1, min(most, torch.cuda.device_count() if torch.cuda.is_available() else _cores()))


def _cores() -> int:
    """Cores this process may use (macOS knows only how many there are), at most what its control group is given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = quota(Path("/sys/fs/cgroup/cpu.max"))
    return cores if math.isinf(allowed) else max(1, min(cores, math.ceil(allowed)))


def quota(file: Path) -> float:
    """Cores' worth of time that a cpu.max file ("QUOTA PERIOD" or "max PERIOD") allows; infinite without one."""
    try:
        allowed, period = file.read_text().split()
        return math.inf if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError):
        return math.inf


def follow_parent() -> None:
    """End this rank when the process that launched it has died: nobody would stop it any more."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def launch(arguments: Sequence[str], ranks: int) -> None:
    """Run `unitok ARGUMENTS` on `ranks` ranks of this machine and wait; UserError with the exit code when one fails,
    StoppedError when they were stopped and the same command goes on.

    A rank gets its share of the cores, and its output goes where ours goes. When one fails the others are stopped.
    Unlike torchrun's, these ranks can be asked to stop without a traceback: a signal to us is passed on, they save a
    checkpoint and end, and only then do we return.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, _cores() // ranks)),
        "WORLD_SIZE": str(ranks),
        PARENT: str(os.getpid()),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, _frame: object) -> None:
        # The terminal's Ctrl-C has reached the ranks already; they take both as one wish.
        for process in processes:
            process.terminate()

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(ranks):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen([sys.executable, "-m", "unitok", *arguments], env=own))
        code = _wait(processes)
    finally:
        end_processes(processes)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code == EXIT_RESUME:
        raise StoppedError(f"`unitok {' '.join(arguments[:2])}` was stopped; the same command goes on from there")
    if code:
        raise UserError(f"`unitok {' '.join(arguments[:2])}` on {ranks} ranks ended with exit code {code}")


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    """0 once all have ended well, or the exit code of the first that did not. A rank that was killed gives the others
    the time to end by themselves: they say which one it was."""
    ended_at = math.inf
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        ended_at = min(ended_at, time.monotonic()) if failed else math.inf
        if None not in codes or time.monotonic() - ended_at > END_SECONDS:
            # a negative code (by a signal) says nothing, and "go on" less than an error
            return max(failed, key=lambda code: (code > 0, code != EXIT_RESUME), default=0)
        time.sleep(0.1)


def end_processes(processes: Sequence[subprocess.Popen]) -> None:
    """Stop those that still run, with force after a while: a rank alone would wait for the others for ever."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
