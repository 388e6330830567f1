"""Starting our own commands on several ranks of this machine, as `torchrun` would."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import torch

from unitok.core.errors import UserError


def local_ranks(most: int) -> int:
    """One rank per GPU, or per CPU core where there is none: on small networks two ranks of one thread train faster
    than one rank of two threads."""
    return max(1, min(most, torch.cuda.device_count() if torch.cuda.is_available() else _cores()))


def _cores() -> int:
    """Cores this process may use (macOS knows only how many there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(arguments: Sequence[str], ranks: int) -> None:
    """Run `unitok ARGUMENTS` on `ranks` ranks and wait; UserError with the exit code when it fails.

    A rank gets its share of the cores. Every rank's output goes where ours goes.
    """
    threads = max(1, _cores() // ranks)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    process = subprocess.Popen([*command, "-m", "unitok", *arguments], env=environment)
    # Who stops us means the ranks: they save a checkpoint, and only then do we end. Ctrl-C reaches them by itself.
    handlers = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
    }
    try:
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code:
        raise UserError(f"`unitok {' '.join(arguments[:2])}` on {ranks} ranks ended with exit code {code}")
