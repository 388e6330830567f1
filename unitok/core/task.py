"""The contract between a training task (batches, networks, losses, metrics) and the loop that drives it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unitok.core.bad_share import Reading
from unitok.core.optim import OptimizerConfig

# By network and parameter: which elements were replaced, and the new values (both whole, also under ZeRO 3).
Replaced = dict[str, dict[str, tuple[Tensor, Tensor]]]


@dataclass
class Network:
    """One network with its own optimizer: one DeepSpeed engine.

    ema_decay: keep an exponential moving average of the weights; evaluation and export use it.
    start_step: the loop does not step the network before it, and the task must not call its engine's `backward`.
    holds_codebooks: parameters that must never be cast to bf16 (found by name too: "codebook").
    """

    module: nn.Module
    optimizer: OptimizerConfig
    ema_decay: float | None = None
    start_step: int = 0
    holds_codebooks: bool = False


class Task(ABC):
    """What is trained. The loop calls, in this order, `build` once and then per step `load_batch` for every
    micro-batch, `prepare_step`, `micro_step` for every micro-batch, `after_step`.

    name: names the run in messages. headline: the metrics that the progress line shows. incidental: settings that a
    resumed run may change freely (dotted names), because they do not matter or the task checks them itself. decisive:
    those that it may not change at all, because they say what is trained. switches: those that it may change, but not
    to or from 0, for the same reason.
    """

    name: str = "task"
    incidental: tuple[str, ...] = ()
    decisive: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    epochs_differ: bool = False  # one index means another sample in another epoch, as in a mixture
    headline: tuple[str, ...] = ("loss",)

    @abstractmethod
    def build(self) -> dict[str, Network]:
        """The networks by name, the main one first; equal weights on every rank (seeded). The process group is up."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of training samples; one epoch."""

    @property
    def shard_sizes(self) -> list[int] | None:
        """Samples of each shard, in the order of their numbers; None where the data are no shards."""
        return None

    @abstractmethod
    def load_batch(self, indices: list[int], epoch: int) -> Any:
        """One micro-batch of this rank: a pure function of (seed, indices, epoch), without hidden state.

        It may run in a worker process. `epoch` is that of the global micro-batch's first sample. Where
        `epochs_differ`, an index of `num_samples` or more is one of a later epoch: see `place`.
        """

    def place(self, index: int, epoch: int) -> tuple[int, int]:
        """(index within its epoch, its epoch) of an index that `load_batch` was given with `epoch`."""
        later, index = divmod(index, self.num_samples)
        return index, epoch + later

    def sample_keys(self, indices: list[int], epoch: int) -> list[str]:
        """The names of samples in their source, for messages about a batch."""
        return [str(index) for index in indices]

    def batch_keys(self, batch: Any, indices: list[int], epoch: int) -> list[str]:
        """The names of the samples that `load_batch` has read for these indices: where one is bad, its stand-in's."""
        return self.sample_keys(indices, epoch)

    def readings(self) -> list[Reading]:
        """The sources that samples come from, whose bad ones the loop counts over all ranks; none: nothing is."""
        return []

    def places(self, batch: Any) -> Tensor:
        """Of a batch that `load_batch` gave: int64 `[len(readings()), 2]`, how many of its samples are of each source,
        and for how many of these, bad ones, others stand in. A pure function of the same arguments."""
        assert not self.readings(), f"{self.name} has readings(), and so needs places(batch) for them"
        return torch.zeros(0, 2, dtype=torch.int64)

    def prepare_step(self, batches: list[Any], step: int) -> None:  # noqa: B027 - optional
        """See all micro-batches of this rank before the step (global counts: one all-reduce)."""

    @abstractmethod
    def micro_step(self, engines: dict[str, Any], batch: Any, micro_index: int, step: int) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch.

        Calls `engines[name](...)` and, exactly once per network that has started, `engines[name].backward(loss)`;
        never `step`. DeepSpeed divides the loss by the number of micro-batches and averages gradients over ranks.
        What a network's `forward` returns must be a tensor, tuple, list or dict (transformers' `ModelOutput` is one):
        ZeRO finds the tensors of nothing else.

        Returns detached scalars; their mean over ranks and micro-batches is logged and must be finite. The names must
        not depend on rank or micro-batch.
        """

    def after_step(self, modules: dict[str, nn.Module], step: int) -> Replaced | None:
        """Change parameters after the optimizer step, e.g. clamp a logit scale (see `edit_parameter_`).

        Returns what was set anew and has nothing to do with its former value: averages take it over at once.
        """
        return None

    @abstractmethod
    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Write what inference needs into `folder`. Rank 0 only; the modules hold the whole (EMA) weights."""

    def extra_state(self) -> dict[str, Any]:
        """State of the task that a checkpoint must hold (JSON values)."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - optional
        """Take back what `extra_state` gave."""
