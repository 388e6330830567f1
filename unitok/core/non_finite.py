"""A step whose loss or gradient is not finite: its samples are named in a file, then it is an error or left out."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitok.core.checkpoint import on_main
from unitok.core.distributed import all_gather_object, rank
from unitok.core.engine import discard_gradients
from unitok.core.errors import NonFiniteError
from unitok.core.run import Run
from unitok.core.sampling import SampleOrder


class Buffers:
    """The values of all buffers before a step (running usage of codes, power iterations): a forward pass changes them.

    Kept only where steps may be left out: `restore` makes such a step leave no trace.
    """

    def __init__(self, run: Run) -> None:
        keep = run.config.non_finite == "skip"
        found = [buffer for module in run.modules.values() for buffer in module.buffers()] if keep else []
        self.values = [(buffer, buffer.detach().clone()) for buffer in found]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for buffer, value in self.values:
            buffer.copy_(value)


def stop_or_skip(
    run: Run,
    order: SampleOrder,
    micro_batches: list[Any],
    micro_metrics: list[dict[str, Tensor]],
    infinite: list[str],
    buffers: Buffers,
) -> str:
    """Leave the present step out and say why, or raise NonFiniteError, on every rank. Collective; before any update.

    infinite: metrics whose mean over ranks is not finite. The samples are written to `non_finite/step_N.json`.
    """
    own = [f"{name}.{key}" for name in run.active() for key in run.guards[name].names()]
    entries = all_gather_object(
        {"rank": rank(), "gradients": own, "micro_batches": _samples(run, order, micro_batches, micro_metrics)}
    )
    what = _what(infinite, list(dict.fromkeys(key for entry in entries for key in entry["gradients"])))
    file = Path(run.config.output_dir) / "non_finite" / f"step_{run.step + 1}.json"
    on_main(lambda: _write(file, {"step": run.step + 1, "what": what, "ranks": entries}))
    skipped, config = run.skipped, run.config
    skipped.total, skipped.in_a_row = skipped.total + 1, skipped.in_a_row + 1
    last = f"the last complete checkpoint is {run.last_checkpoint}" if run.last_checkpoint else "no checkpoint yet"
    start = f"step {run.step + 1}: {what} is not finite"
    remedy = f"{last}; look at its samples ({file}), lower the learning rate or clip gradients"
    if config.non_finite == "stop":
        raise NonFiniteError(f"{start}; stopped before the optimizer step, {remedy}")
    if skipped.in_a_row > config.non_finite_limit or skipped.total > config.non_finite_total:
        raise NonFiniteError(
            f"{start}, the {skipped.in_a_row}. in a row and {skipped.total}. of the run; non_finite_limit="
            f"{config.non_finite_limit} and non_finite_total={config.non_finite_total} allow no more, {remedy}"
        )
    for name, engine in run.active().items():
        discard_gradients(engine)
        run.guards[name].reset()
    buffers.restore()
    return f"{start}: left out ({skipped.total} so far), its samples are in {file}"


def _what(infinite: list[str], parameters: list[str]) -> str:
    what = [f"metric {', '.join(infinite)}"] if infinite else []
    if parameters:
        more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
        what.append(f"gradient of {parameters[0]}{more}")
    return " and ".join(what)


def _samples(
    run: Run, order: SampleOrder, micro_batches: list[Any], micro_metrics: list[dict[str, Tensor]]
) -> list[dict[str, Any]]:
    """This rank's samples by micro-batch (indices as drawn, keys as read: a bad sample has a stand-in), each with the
    metrics of its own that are not finite."""
    size, found = run.config.engine.micro_batch_size, []
    for number, (batch, metrics) in enumerate(zip(micro_batches, micro_metrics, strict=True)):
        indices, epoch = order.micro_batch(run.samples + number * run.global_micro_batch, size, rank())
        bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
        keys = run.task.batch_keys(batch, indices, epoch)
        found.append({"epoch": epoch, "indices": indices, "keys": keys, "not_finite": bad})
    return found


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
