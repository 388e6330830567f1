"""Exponential moving average of a network's weights, in fp32, sharded like the parameters and saved by name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unitok.core.distributed import is_main, rank, world_size
from unitok.core.errors import CheckpointError


class Ema:
    """Average `e <- d_t * e + (1 - d_t) * w` with `d_t = min(decay, (1 + t) / (10 + t))` (or `decay` without warm-up).

    Under ZeRO 3 every rank averages its own part of each parameter, else all ranks hold the whole average. Every
    method is to be called on all ranks. Under bf16 the average is over the bf16 weights, kept in fp32.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay {decay} is not in [0, 1)")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.named = list(module.named_parameters())
        self.shadow = [_part(parameter).detach().float().clone() for _, parameter in self.named]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights (call after the optimizer step)."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        weights = [_part(parameter).detach().float() for _, parameter in self.named]
        torch._foreach_lerp_(self.shadow, weights, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def replace(self, replaced: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take over elements as they are: by parameter name, a mask and values, both of the parameter's whole shape."""
        for (name, parameter), shadow in zip(self.named, self.shadow, strict=True):
            if name in replaced:
                mask, values = (_own_part(parameter, whole.cpu()).to(shadow.device) for whole in replaced[name])
                shadow.copy_(torch.where(mask.bool(), values.to(shadow), shadow))

    @torch.no_grad()
    def state_dict_full(self) -> dict[str, Tensor]:
        """The whole average by parameter name, on the CPU of rank 0; empty on other ranks. Collective."""
        full: dict[str, Tensor] = {}
        for (name, parameter), shadow in zip(self.named, self.shadow, strict=True):
            whole = _gather_parts(parameter, shadow)
            if is_main():
                full[name] = whole.cpu().clone()
        return full

    @torch.no_grad()
    def load_full(self, state: dict[str, Tensor], updates: int) -> None:
        """Take back a whole average (every rank gives the same) after `updates` updates."""
        names = {name for name, _ in self.named}
        if names != set(state):
            odd = sorted(names ^ set(state))[0]
            raise CheckpointError(f"the saved average does not fit the network: {odd!r} is in only one of them")
        for (name, parameter), shadow in zip(self.named, self.shadow, strict=True):
            shadow.copy_(_own_part(parameter, state[name]))
        self.updates = updates

    @contextmanager
    def swap(self) -> Iterator[None]:
        """The averaged weights are the network's weights inside the block; the trained ones come back after it."""
        trained = [_part(parameter).detach().clone() for _, parameter in self.named]
        self._put(self.shadow)
        try:
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        # parameters that ZeRO 3 holds whole at this moment are let go and gathered again with the new values
        gathered = [p for _, p in self.named if hasattr(p, "ds_tensor") and p.data.numel() == p.ds_numel]
        if gathered:
            gathered[0].partition(gathered)
        for (_, parameter), value in zip(self.named, values, strict=True):
            _part(parameter).copy_(value)
        if gathered:
            gathered[0].all_gather(gathered)


def _part(parameter: Any) -> Tensor:
    """This rank's values of a parameter: its ZeRO 3 partition, or the parameter itself."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def _gather_parts(parameter: Any, part: Tensor) -> Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return part
    parts = [part]
    if world_size() > 1:
        parts = [torch.empty_like(part) for _ in range(world_size())]
        dist.all_gather(parts, part)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def _own_part(parameter: Any, whole: Tensor) -> Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return whole
    size = parameter.ds_tensor.numel()
    own = torch.zeros(size, dtype=torch.float32)
    values = whole.flatten()[rank() * size : (rank() + 1) * size]
    own[: values.numel()] = values
    return own
