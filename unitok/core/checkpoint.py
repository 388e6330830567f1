"""Whole checkpoints: complete only with their marker, checked before they are read, read without running pickled code.

    checkpoints/step_N/<network>/state/...      DeepSpeed's model and optimizer files
    checkpoints/step_N/<network>.ema.safetensors
    checkpoints/step_N/state.json               step, position in the data, configuration, versions, task state
    checkpoints/step_N/COMPLETE.json            size and hash of every file, written last

There is no random state to save: the loop derives it from (seed, step, micro-batch, rank).
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from unitok.core.distributed import barrier, broadcast_object, is_main, world_size
from unitok.core.ema import Ema
from unitok.core.errors import CheckpointError, UserError
from unitok.core.reshard import load_universal, universal_copy

MARKER = "COMPLETE.json"
PARTIAL = ".partial"
TAG = "state"
logger = logging.getLogger("unitok")
Result = TypeVar("Result")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies below the checkpoints folder."""
    return Path(folder) / f"step_{step}"


def save_checkpoint(
    folder: Path, step: int, engines: dict[str, Any], emas: dict[str, Ema], state: dict[str, Any]
) -> Path:
    """Write `folder/step_N` (every rank calls). It gets its name and its marker only when all files are on disk."""
    final = step_folder(folder, step)
    partial = final.with_name(final.name + PARTIAL)
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    for name, engine in engines.items():
        engine.checkpoint_engine = _safe_checkpoint_engine()
        engine.save_checkpoint(str(partial / name), tag=TAG, save_latest=False)
    averages = {name: ema.state_dict_full() for name, ema in emas.items()}
    barrier()
    if is_main():
        from safetensors.torch import save_file

        for name, average in averages.items():
            save_file({key: value.contiguous() for key, value in average.items()}, partial / f"{name}.ema.safetensors")
        _write_json(partial / "state.json", {**state, "ema_updates": {name: e.updates for name, e in emas.items()}})
        _write_json(partial / MARKER, {"step": step, "files": _inventory(partial, sync=True)})
        replace_folder(partial, final)
    barrier()
    return final


def latest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that has its marker, or None. Folders without it are skipped with a warning."""
    found = {}
    for path in sorted(Path(folder).glob("step_*")) if Path(folder).is_dir() else []:
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / MARKER).is_file():
            found[int(match.group(1))] = path
        elif path.is_dir():
            logger.warning("checkpoint %s was cut short (no %s): skipped", path, MARKER)
    return found[max(found)] if found else None


def step_of(path: Path) -> int:
    """The step that a complete checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its marker. Raises CheckpointError that names the first misfit."""
    remedy = f"delete {path} to resume from the one before it, or restore the file"
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MARKER}; give a folder that has one")
    try:
        files = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{MARKER} of checkpoint {path} is corrupt; {remedy}") from error
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is corrupt: {name} is missing; {remedy}")
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(
                f"checkpoint {path} is corrupt: {name} has {size} bytes, expected {expected['size']}; {remedy}"
            )
        if _hash(file) != expected["blake2b"]:
            raise CheckpointError(f"checkpoint {path} is corrupt: the content of {name} has changed; {remedy}")


def read_state(path: Path) -> dict[str, Any]:
    """The checkpoint's state.json."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load_checkpoint(path: Path, engines: dict[str, Any], emas: dict[str, Ema]) -> dict[str, Any]:
    """Restore engines and averages (every rank calls) and return the saved state. `verify` it first."""
    from safetensors.torch import load_file

    state = read_state(path)
    for name, engine in engines.items():
        if not (path / name).is_dir():
            raise CheckpointError(f"checkpoint {path} has no network {name!r}; it belongs to another configuration")
        engine.checkpoint_engine = _safe_checkpoint_engine()
        try:
            loaded = _load_engine(engine, path / name, reshard=state["world_size"] != world_size())
        except RuntimeError as error:  # torch: keys or shapes of the state do not fit
            text = " ".join(str(error).split())[:300]
            raise CheckpointError(f"checkpoint {path} does not fit network {name!r}: {text}") from error
        if loaded is None:
            raise CheckpointError(f"checkpoint {path}: DeepSpeed found no state of network {name!r}")
    for name, ema in emas.items():
        file = path / f"{name}.ema.safetensors"
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} has no average of {name!r}; resume with its ema_decay unset")
        ema.load_full(load_file(file), state["ema_updates"][name])
    barrier()
    return state


def _load_engine(engine: Any, folder: Path, reshard: bool) -> str | None:
    if reshard and engine.zero_optimization():  # without ZeRO every rank holds everything
        with universal_copy(folder / TAG, engine.checkpoint_engine.load) as copy:
            return load_universal(engine, copy, TAG)[0]
    return engine.load_checkpoint(str(folder), tag=TAG)[0]


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` complete checkpoints (at least one stays), and older cut-short ones."""
    complete = sorted(
        (step_of(path), path)
        for path in Path(folder).glob("step_*")
        if re.fullmatch(r"step_\d+", path.name) and (path / MARKER).is_file()
    )
    newest = complete[-1][0] if complete else -1
    for path in Path(folder).glob(f"step_*{PARTIAL}"):  # left by a killed process
        if int(path.name.removeprefix("step_").removesuffix(PARTIAL)) <= newest:
            shutil.rmtree(path)
    for _, path in complete[: -max(1, keep_last)]:
        (path / MARKER).unlink()  # first, so that a deletion cut short leaves nothing that looks complete
        shutil.rmtree(path)


# Settings of how a run is run and shown, not of what is trained.
RUNNING = (
    "output_dir", "resume", "tracker", "num_workers", "device", "log_every", "save_every", "eval_every", "keep_last"
)  # fmt: skip


def check_same_run(path: Path, saved: dict[str, Any], present: dict[str, Any], incidental: Sequence[str] = ()) -> None:
    """Refuse to resume under settings that would change what the steps mean. Other changes are a warning, unless no
    step is left to make them true.

    Args:
        saved, present: `{"world_size", "zero_stage", "global_micro_batch", "config", ...}` of checkpoint and run.
        incidental: the task's settings that may differ, such as places whose content it checks itself.
    """
    keys = ("seed", "engine.zero_stage", "engine.precision", "engine.accumulation_steps")
    old, new = _flatten(saved["config"]), _flatten(present["config"])
    for key in keys:
        if old.get(key) != new.get(key):
            raise CheckpointError(
                f"checkpoint {path} was written with {key}={old.get(key)}, now it is {new.get(key)}; "
                f"set it back, or start anew in another output_dir"
            )
    if saved["global_micro_batch"] != present["global_micro_batch"]:
        raise CheckpointError(
            f"checkpoint {path}: engine.micro_batch_size x ranks was {saved['global_micro_batch']}, now it is "
            f"{present['global_micro_batch']}; set engine.micro_batch_size so that the product stays"
        )
    if saved["num_samples"] != present["num_samples"]:
        raise CheckpointError(
            f"checkpoint {path} was trained on {saved['num_samples']} samples, now there are {present['num_samples']}; "
            "resume with the same data"
        )
    ignored = {*keys, *RUNNING, *incidental, "engine.micro_batch_size"}
    changed = sorted(key for key in {**old, **new} if old.get(key) != new.get(key) and key not in ignored)
    if changed and saved["step"] >= new["steps"]:
        raise CheckpointError(
            f"checkpoint {path} is of step {saved['step']} and no step is left (steps={new['steps']}), but these "
            f"settings have changed: {', '.join(changed)}; take another output_dir"
        )
    if changed:
        logger.warning("resuming %s with changed settings: %s", path, ", ".join(changed))


def on_main(function: Callable[[], Result]) -> Result:
    """Call on rank 0 and give every rank its result; a UserError is raised on every rank, so none waits for ever."""
    result: Any = None
    error: UserError | None = None
    if is_main():
        try:
            result = function()
        except UserError as caught:
            error = caught
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flatten(part, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _safe_checkpoint_engine() -> Any:
    """DeepSpeed's plain file engine, reading with `weights_only=True` and the few of its own classes allowed."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def save(self, state_dict: dict[str, Any], path: str) -> None:
            torch.save(state_dict, path)

        def load(self, path: str, map_location: Any = None) -> dict[str, Tensor]:
            with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
                return torch.load(path, map_location=map_location, weights_only=True)

    return SafeCheckpointEngine()


def _inventory(folder: Path, sync: bool) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if sync:
            _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "blake2b": _hash(path)}
    return files


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(source: Path, target: Path) -> None:
    """Give a folder that is complete its name; what had that name before is deleted."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)
    _sync(target.parent)
