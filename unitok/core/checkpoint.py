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
import pickle  # the name of its error alone
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from unitok.core.distributed import all_gather_object, barrier, broadcast_object, is_main, rank, world_size
from unitok.core.ema import Ema
from unitok.core.errors import CheckpointError, UserError, is_loader_death
from unitok.core.reshard import load_universal, universal_copy

MARKER = "COMPLETE.json"
PARTIAL = ".partial"
CORRUPT = ".corrupt"
STATE = "state.json"
AVERAGE = ".ema.safetensors"
TAG = "state"
logger = logging.getLogger("unitok")
Result = TypeVar("Result")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies below the checkpoints folder."""
    return Path(folder) / f"step_{step}"


def save_checkpoint(
    folder: Path, step: int, engines: dict[str, Any], emas: dict[str, Ema], state: dict[str, Any]
) -> Path:
    """Write `folder/step_N` (every rank calls). It gets its name and its marker only when all files are on disk.

    CheckpointError on every rank when any rank cannot write (a full disk); nothing of it is left then.
    """
    final = step_folder(folder, step)
    partial = final.with_name(final.name + PARTIAL)
    on_main(lambda: _attempt(partial, lambda: _begin(partial, list(engines))))
    failed: list[str] = []
    for name, engine in engines.items():
        engine.checkpoint_engine = writer = _safe_checkpoint_engine()
        engine._copy_recovery_script = lambda _folder: None  # a script beside our files, written past our writer
        engine.save_checkpoint(str(partial / name), tag=TAG, save_latest=False)
        failed += writer.failed
    averages = {name: ema.state_dict_full() for name, ema in emas.items()}
    every = [text for texts in all_gather_object(failed) for text in texts]

    def finish() -> None:
        if every:
            raise CheckpointError(every[0])
        for name, average in averages.items():
            _save_tensors({key: value.contiguous() for key, value in average.items()}, partial / f"{name}{AVERAGE}")
        _write_json(partial / STATE, {**state, "ema_updates": {name: e.updates for name, e in emas.items()}})
        seal(partial, step)
        replace_folder(partial, final)

    on_main(lambda: _attempt(partial, finish))
    return final


def _begin(partial: Path, names: list[str]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for name in names:
        (partial / name / TAG).mkdir(parents=True)


def _attempt(partial: Path, write: Callable[[], None]) -> None:
    """Write into `partial`; if that fails delete it, so that its space is free again."""
    try:
        write()
    except (*WRITING_FAILED, UserError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise writing_error(f"checkpoint {partial.with_suffix('')}", error, partial.parent) from error


# What is raised when a file cannot be written; torch's own RuntimeError is caught where it writes.
WRITING_FAILED: tuple[type[Exception], ...] = (OSError, SafetensorError)


def writing_error(what: str, error: Exception, folder: Path) -> CheckpointError:
    """One line about a checkpoint or export that could not be written; `folder` is on the same disk."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:200]
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return CheckpointError(
        f"{what} could not be written: {reason}; {free / 2**20:.0f} MiB are free there: make room and give the same "
        "command again, older checkpoints are as they were"
    )


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def seal(folder: Path, step: int) -> None:
    """Bring all files of a checkpoint to the disk and write its marker."""
    _write_json(folder / MARKER, {"step": step, "files": _inventory(folder, sync=True)})


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that no run takes it for one; nothing is deleted."""
    aside = path.with_name(path.name + CORRUPT)
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(path, aside)
    return aside


def latest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that has its marker, or None."""
    found = all_complete(folder)
    return found[-1] if found else None


def all_complete(folder: Path) -> list[Path]:
    """The checkpoints that have their marker, by step. Folders without it are skipped with a warning."""
    found = {}
    for path in sorted(Path(folder).glob("step_*")) if Path(folder).is_dir() else []:
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / MARKER).is_file():
            found[int(match.group(1))] = path
        elif path.is_dir() and path.suffix != CORRUPT:
            logger.warning("checkpoint %s was cut short (no %s): skipped", path, MARKER)
    return [found[step] for step in sorted(found)]


def step_of(path: Path) -> int:
    """The step that a complete checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its marker. Raises CheckpointError that names the first misfit."""
    remedy = f"delete {path} to resume from the one before it, or restore the file"
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MARKER}; give a folder that has one")
    files = _listed(path / MARKER)
    if files is None:
        raise CheckpointError(f"{MARKER} of checkpoint {path} is corrupt; {remedy}")
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


def _listed(marker: Path) -> dict[str, dict[str, Any]] | None:
    """The files that a marker lists; None where it is not as `seal` writes it."""
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # no JSON, no UTF-8
        return None
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or STATE not in files:
        return None
    whole = (isinstance(entry, dict) and {"size", "blake2b"} <= entry.keys() for entry in files.values())
    return files if all(whole) else None


def read_state(path: Path) -> dict[str, Any]:
    """The checkpoint's state.json."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def origin(path: Path) -> dict[str, str]:
    """What the checkpoints of a run say of the one at `path` that it started from."""
    return {"path": str(path.resolve()), "marker": _hash(path / MARKER)}


def came_from(path: Path, start: Path) -> bool | None:
    """Whether the checkpoint `path` is of a run that started from the checkpoint `start`: from the same one, wherever
    it lies now, or from that place where nothing lies any more. None where its state cannot be read."""
    try:
        said = read_state(path).get("started_from")
        if said is None:
            return False
        if (start / MARKER).is_file():
            return said["marker"] == _hash(start / MARKER)
        return said["path"] == str(start.resolve())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


def load_checkpoint(path: Path, engines: dict[str, Any], emas: dict[str, Ema]) -> dict[str, Any]:
    """Restore engines and averages (every rank calls) and return the saved state. `verify` it first."""
    from safetensors.torch import load_file

    state = read_state(path)
    for name, engine in engines.items():
        if not (path / name).is_dir():
            raise CheckpointError(f"checkpoint {path} has no network {name!r}; it belongs to another configuration")
        engine.checkpoint_engine = _safe_checkpoint_engine()
        try:
            loaded = _load_engine(engine, path / name, state)
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:  # torch: keys, shapes or parameter groups do not fit
            text = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"checkpoint {path} does not fit network {name!r}: {text}; set its settings back, or take another "
                "output_dir"
            ) from error
        if loaded is None:
            raise CheckpointError(f"checkpoint {path}: DeepSpeed found no state of network {name!r}")
    for name, ema in emas.items():
        file = path / f"{name}{AVERAGE}"
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} has no average of {name!r}; resume with its ema_decay unset")
        ema.load_full(load_file(file), state["ema_updates"][name])
    barrier()
    return state


def _load_engine(engine: Any, folder: Path, state: dict[str, Any]) -> str | None:
    load = engine.checkpoint_engine.load
    if state.get("universal"):
        on_main(lambda: _read_all(folder, load))
        return load_universal(engine, folder, TAG)[0]
    if state["world_size"] != world_size() and engine.zero_optimization():  # without ZeRO every rank holds everything
        with universal_copy(folder / TAG, load) as copy:
            return load_universal(engine, copy, TAG)[0]
    return engine.load_checkpoint(str(folder), tag=TAG)[0]


def _read_all(folder: Path, load: Callable[[str, str], Any]) -> None:
    """Refuse a file with anything but tensors and plain values: DeepSpeed reads universal files with full pickle."""
    for file in sorted(folder.rglob("*.pt")):
        try:
            load(str(file), "cpu")
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{file} holds more than tensors and plain values; it is not read") from error


def prune(folder: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep_last` complete checkpoints (at least one stays) and those of steps that
    `keep_every` divides, and what a killed process left of older ones: cut short in writing, or in this deletion."""
    found = [
        (int(match[1]), bool(match[2]), path)
        for path in Path(folder).glob("step_*")
        if (match := re.fullmatch(rf"step_(\d+)({re.escape(PARTIAL)})?", path.name)) and path.is_dir()
    ]
    complete = sorted((step, path) for step, partial, path in found if not partial and (path / MARKER).is_file())
    newest = complete[-1][0] if complete else -1
    for step, partial, path in found:
        if step <= newest and (partial or not (path / MARKER).is_file()):
            shutil.rmtree(path)
    for step, path in complete[: -max(1, keep_last)]:
        if keep_every and step % keep_every == 0:
            continue
        (path / MARKER).unlink()  # first, so that a deletion cut short leaves nothing that looks complete
        shutil.rmtree(path)


def on_main(function: Callable[[], Result]) -> Result:
    """Call on rank 0 and give every rank its result; a UserError, or a file that cannot be read or written (a UserError
    then), is raised on every rank, so none waits for ever."""
    result: Any = None
    error: UserError | None = None
    if is_main():
        try:
            result = function()
        except UserError as caught:
            error = caught
        except OSError as caught:
            error = UserError(f"{caught.filename or 'a file'}: {caught.strerror or caught}")
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def _safe_checkpoint_engine() -> Any:
    """DeepSpeed's plain file engine, reading with `weights_only=True` and the few of its own classes allowed."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def __init__(self) -> None:
            super().__init__()
            self.failed: list[str] = []

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            # To raise here would leave the other ranks in DeepSpeed's barriers.
            try:
                torch.save(state_dict, path)
            except (OSError, RuntimeError) as error:  # torch's writer does not say why; most often the disk is full
                Path(path).unlink(missing_ok=True)
                if is_loader_death(error):  # the watchdog then ends the other ranks
                    raise
                self.failed.append(f"rank {rank()}: {Path(path).name}: {' '.join(str(error).split())[:120]}")

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
    """Give a folder that is complete its name; what had that name before is deleted, and never stands there in part."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
