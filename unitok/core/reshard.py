"""Load a ZeRO checkpoint with another number of ranks, through DeepSpeed's universal format."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from unitok.core.distributed import LAUNCHER_VARIABLES, barrier, broadcast_object, is_main
from unitok.core.engine import load_whole_
from unitok.core.errors import CheckpointError

COPY = ".universal_"
REST = "rest.pt"
RUN_FILES = "run"  # folder of a universal checkpoint with the small files of its run's folder
# What the converter's last line says where a file could not be written: torch's writer does not give the reason.
_WRITING = re.compile(r"inline_container|PytorchStreamWriter|No space left|quota|File too large|write failed", re.I)


@contextmanager
def universal_copy(state_folder: Path, safe_load: Callable[[str, str], Any]) -> Iterator[Path]:
    """A temporary copy of one network's DeepSpeed state that any number of ranks can load (every rank enters).

    DeepSpeed's converter reads with full pickle, so `safe_load` reads every file first: it refuses a file that holds
    anything but tensors and plain values. The copy lies in the checkpoint and is deleted on leaving, or where the
    process is killed, by the next one.
    """
    holder: tempfile.TemporaryDirectory[str] | None = None
    lock: IO[str] | None = None
    error = ""
    if is_main():
        _remove_leftovers(state_folder.parent.parent)
        holder = tempfile.TemporaryDirectory(prefix=COPY, dir=state_folder.parent.parent)
        lock = _locked(Path(holder.name))
        error = convert(state_folder, Path(holder.name) / state_folder.name, safe_load)
    name, error = broadcast_object((holder.name if holder else "", error))
    try:
        if error:
            raise CheckpointError(
                f"checkpoint {state_folder} cannot be converted to another number of ranks: {error}; "
                "resume with as many ranks as it was written by"
            )
        yield Path(name)
        barrier()
    finally:
        if holder is not None and lock is not None:
            holder.cleanup()
            lock.close()


def _remove_leftovers(folder: Path) -> None:
    """Delete copies of killed processes: nobody holds the lock of those."""
    for left in folder.glob(f"{COPY}*"):
        with suppress(BlockingIOError, FileNotFoundError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)


def _locked(folder: Path) -> IO[str]:
    """An open file that locks `folder` as long as the process holds it; BlockingIOError where another one does."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    return file


def convert(source: Path, target: Path, safe_load: Callable[[str, str], Any]) -> str:
    """Convert one network's state; returns what went wrong, or nothing.

    The converter reads with full pickle, so `safe_load` reads every file first. It runs in a process of its own.
    """
    for file in sorted(source.glob("*.pt")):
        safe_load(str(file), "cpu")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    error = "" if done.returncode == 0 else lines[-1] if lines else f"the converter ended with {done.returncode}"
    if not error:
        rest = _rest(source, safe_load)
        try:
            torch.save(rest, target / REST)
        except (OSError, RuntimeError) as caught:
            error = " ".join(str(caught).split())
    if _WRITING.search(error):
        free = shutil.disk_usage(target.parent).free / 2**20
        return f"writing {target} failed, {free:.0f} MiB are free there (is the disk or quota full?): {error}"
    return error


def _rest(source: Path, safe_load: Callable[[str, str], Any]) -> dict[str, Tensor]:
    """What no optimizer holds, whole: buffers (the running usage of codes) and frozen parameters.

    ZeRO 3 has a file per rank, with its part of each frozen parameter; 1 and 2 have one, with all that there is.
    """
    files = sorted(source.glob("*model_states.pt"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    states = [safe_load(str(file), "cpu") for file in files]
    first = states[0]
    if len(files) == 1 and files[0].name.startswith("mp_rank"):
        trained = {name for group in first["param_shapes"] for name in group}
        return {name: value for name, value in first["module"].items() if name not in trained}
    rest = {name: first["module"][name] for name in first["buffer_names"] if name in first["module"]}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        parts = torch.cat([state["frozen_param_fragments"][name].flatten() for state in states])
        rest[name] = parts[: shape.numel()].view(shape)
    return rest


@torch.no_grad()
def _load_rest(module: nn.Module, rest: dict[str, Tensor]) -> None:
    buffers, parameters = dict(module.named_buffers()), dict(module.named_parameters())
    for name, value in rest.items():
        if name in buffers:
            buffers[name].copy_(value)
        elif name in parameters and not parameters[name].requires_grad:  # tied weights have a second name
            load_whole_(parameters[name], value)


def load_universal(engine: Any, folder: Path, tag: str) -> Any:
    """Load a universal copy into an engine; returns what `engine.load_checkpoint` returns.

    DeepSpeed then loads what its optimizer holds and nothing else; the rest of the network follows here.
    Under ZeRO 3 DeepSpeed gives all parameter groups the first one's settings (its weight decay, say) and all states
    one and the same step counter, which each of them would then advance; and the counters are on the CPU, where a fused
    optimizer on a GPU refuses them. All that is put right here.
    """
    groups = engine.optimizer.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    engine._config.load_universal_checkpoint = True  # DeepSpeed has only a setting of the whole engine for it
    try:
        loaded = engine.load_checkpoint(str(folder), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    for group, own in zip(groups, settings, strict=True):
        group.update(own)
    for parameter, state in engine.optimizer.optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, copy=True)
    _load_rest(engine.module, engine.checkpoint_engine.load(str(folder / tag / REST), "cpu"))
    return loaded
