"""Whether a checkpoint belongs to the run that wants to go on from it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unitok.core.errors import CheckpointError

logger = logging.getLogger("unitok")

# Settings of how a run is run and shown, not of what is trained.
RUNNING = (
    "output_dir", "resume", "tracker", "num_workers", "device", "log_every", "save_every", "eval_every", "keep_last",
    "keep_every", "resume_fallback", "non_finite", "non_finite_limit", "non_finite_total", "rank_timeout",
)  # fmt: skip


def check_same_run(
    path: Path,
    saved: dict[str, Any],
    present: dict[str, Any],
    incidental: Sequence[str] = (),
    decisive: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    switches: Sequence[str] = (),
) -> None:
    """Refuse to resume under settings that would change what the steps mean. Other changes are a warning, unless no
    step is left to make them true.

    Args:
        saved, present: `{"world_size", "zero_stage", "global_micro_batch", "config", ...}` of checkpoint and run.
        incidental: the task's settings that may differ, such as places whose content it checks itself.
        decisive: those that say what is trained, and so what the checkpoint holds.
        defaults: of all settings; one that the checkpoint does not know, as it was made before there was such a
            setting, had its default.
        switches: as decisive, but only whether it is 0.
    """
    keys = ("seed", "engine.zero_stage", "engine.precision", "engine.accumulation_steps")
    old, new = _flatten(saved["config"]), _flatten(present["config"])
    old = {key: value for key, value in _flatten(dict(defaults or {})).items() if key in new} | old
    for key in keys:
        if old.get(key) != new.get(key):
            raise CheckpointError(
                f"checkpoint {path} was written with {key}={old.get(key)}, now it is {new.get(key)}; "
                f"set it back, or start anew in another output_dir"
            )
    for key in (*decisive, *switches):
        kind = bool if key in switches else lambda value: value
        if kind(old.get(key)) != kind(new.get(key)):
            raise CheckpointError(
                f"checkpoint {path} was written with {key}={old.get(key)}, now it is {new.get(key)}; set it back, or "
                "train on from its export in another output_dir (init_from=EXPORT)"
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


def check_same_mixture(where: str, saved: list[Any] | None, present: list[Any] | None) -> None:
    """CheckpointError if a mixture shares an epoch otherwise than when the checkpoint was written: samples would come
    twice, or never. Members with other names are a warning: data may be moved, not exchanged.

    Args:
        where: begins the message. saved, present: `Mixed.shares` and names: a row [name, samples of an epoch, size] of
            each member, with the rows of a mixture within it; None without a mixture.
    """
    if _without_names(saved) != _without_names(present):
        raise CheckpointError(
            f"{where}: the checkpoint was trained on the mixture [name, samples of an epoch, size] {saved}, the data "
            f"now give {present}; resume with the same sources and weights"
        )
    if saved != present:
        logger.warning("%s: the members of the mixture were %s, now they are %s", where, saved, present)


def _without_names(rows: Any) -> Any:
    return [_without_names(one) for one in rows if not isinstance(one, str)] if isinstance(rows, list) else rows


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flatten(part, f"{prefix}.{key}" if prefix else str(key))
    return flat
