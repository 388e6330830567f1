"""Which samples a run's steps really took: recorded where a micro-batch arrives, behind loaders and their workers."""

import json
from pathlib import Path
from typing import Any

from unitok.core.distributed import rank


def record_keys(task: Any, folder: Path, name: Any) -> None:
    """From now on every micro-batch of `task` notes `[name(index, epoch), ...]` in a file of its rank and step.

    The names travel with the batch. A step that is run again, after a stop, notes its own anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    load, prepare, step_of, places_of = task.load_batch, task.prepare_step, task.micro_step, task.places

    def load_batch(indices: list[int], epoch: int) -> tuple[Any, list[Any]]:
        return load(indices, epoch), [name(index, epoch) for index in indices]

    def prepare_step(batches: list[Any], step: int) -> None:
        prepare([batch for batch, _ in batches], step)

    def micro_step(engines: dict[str, Any], batch: Any, micro_index: int, step: int) -> Any:
        found = step_of(engines, batch[0], micro_index, step)
        (folder / f"{step:04d}-{micro_index}-{rank()}.json").write_text(json.dumps(batch[1]))
        return found

    task.load_batch, task.prepare_step, task.micro_step = load_batch, prepare_step, micro_step
    task.places = lambda batch: places_of(batch[0])


def recorded(folder: Path, steps: range) -> list[Any]:
    """What the micro-batches of these steps took, in order, all ranks together."""
    files = [path for path in sorted(folder.glob("*.json")) if int(path.name[:4]) in steps]
    return [name for path in files for name in json.loads(path.read_text())]
