"""Load a ZeRO checkpoint with another number of ranks, through DeepSpeed's universal format."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unitok.core.distributed import LAUNCHER_VARIABLES, barrier, broadcast_object, is_main
from unitok.core.errors import CheckpointError

RUN_FILES = "run"  # folder of a universal checkpoint with the small files of its run's folder


@contextmanager
def universal_copy(state_folder: Path, safe_load: Callable[[str, str], Any]) -> Iterator[Path]:
    """A temporary copy of one network's DeepSpeed state that any number of ranks can load (every rank enters).

    DeepSpeed's converter reads with full pickle, so `safe_load` reads every file first: it refuses a file that holds
    anything but tensors and plain values. The copy lies beside the checkpoint and is deleted on leaving.
    """
    holder: tempfile.TemporaryDirectory[str] | None = None
    error = ""
    if is_main():
        holder = tempfile.TemporaryDirectory(prefix=".universal_", dir=state_folder.parent.parent)
        for file in sorted(state_folder.glob("*.pt")):
            safe_load(str(file), "cpu")
        error = convert(state_folder, Path(holder.name) / state_folder.name)
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
        if holder is not None:
            holder.cleanup()


def convert(source: Path, target: Path) -> str:
    """Run the converter in a process of its own; returns what went wrong, or nothing."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the converter ended with {done.returncode}"


def load_universal(engine: Any, folder: Path, tag: str) -> Any:
    """Load a universal copy into an engine; returns what `engine.load_checkpoint` returns.

    Under ZeRO 3 DeepSpeed gives all parameter groups the first one's settings (its weight decay, say) and all states
    one and the same step counter, which each of them would then advance: both are put right here.
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
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    return loaded
