"""One checkpoint in DeepSpeed's universal format: all networks, resumed by any number of ranks.

OUT/<network>/state/...             universal state under ZeRO; without ZeRO the files as they are (whole on any rank)
OUT/<network>.ema.safetensors, state.json ("universal": true), COMPLETE.json     as in any checkpoint
OUT/run/...                         small files that the task made at the start of its run (its text model, say)
"""

import json
import logging
import os
import shutil
from pathlib import Path

from unitok.core import checkpoint
from unitok.core.errors import CheckpointError, ConfigError
from unitok.core.reshard import RUN_FILES, convert

logger = logging.getLogger("unitok")
NOT_COPIED = {"log.jsonl", ".lock"}


def make_universal(source: Path, out: Path) -> Path:
    """Convert the complete checkpoint `source` to the new folder `out`. CheckpointError, ConfigError."""
    if out.exists():
        raise ConfigError(f"{out} exists already; give a new folder for the universal checkpoint")
    checkpoint.verify(source)
    state = checkpoint.read_state(source)
    if state.get("universal"):
        raise CheckpointError(f"{source} is a universal checkpoint already; resume={source} takes it as it is")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    partial = out.with_name(out.name + checkpoint.PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _fill(source, partial, state)
        checkpoint.seal(partial, state["step"])
        checkpoint.replace_folder(partial, out)
    except OSError as error:
        raise checkpoint.writing_error(f"universal checkpoint {out}", error, out.parent) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _fill(source: Path, partial: Path, state: dict) -> None:
    load = checkpoint._safe_checkpoint_engine().load
    zero = state["config"]["engine"]["zero_stage"] > 0
    networks = sorted(path.parent.name for path in source.glob(f"[!.]*/{checkpoint.TAG}"))
    for name in networks:
        states, target = source / name / checkpoint.TAG, partial / name / checkpoint.TAG
        if not zero:
            shutil.copytree(states, target)
            continue
        target.parent.mkdir(parents=True)
        error = convert(states, target, load)
        if error:
            raise CheckpointError(f"network {name!r} of {source} cannot be converted: {error}")
    for average in source.glob(f"*{checkpoint.AVERAGE}"):
        shutil.copyfile(average, partial / average.name)
    text = json.dumps({**state, "universal": zero, "converted_from": source.name}, indent=1)
    (partial / "state.json").write_text(text, encoding="utf-8")
    (partial / RUN_FILES).mkdir()
    run = source.resolve().parent.parent
    if source.resolve().parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        logger.warning("%s is not in RUN/checkpoints: a text model that its run made is not copied", source)
        return
    for file in run.iterdir():
        if file.is_file() and file.name not in NOT_COPIED:
            shutil.copyfile(file, partial / RUN_FILES / file.name)
