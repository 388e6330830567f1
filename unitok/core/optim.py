"""Optimizer settings, the learning rate as a pure function of the step, and which parameters decay.

The schedules are those of UniTok's released training code (`cos`, `lin`, `lin0`, `lin00`, `lin0.3`, `exp` there).
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from unitok.core.config import Config
from unitok.core.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["cosine", "linear", "two_slopes", "exponential", "constant"]


class OptimizerConfig(Config):
    """AdamW and its schedule. Before `start_step` the rate is 0; warm-up and decay count from there.

    schedule: how the rate falls from `lr` to `lr * final_lr_ratio` after the warm-up. "linear" and "exponential" (equal
    factors) first stay at `lr` for the share `hold` of that time; "two_slopes" halves the way that is left within it.
    endpoints: "exclusive": no step has the rate of either end (the first warm-up step has lr / warmup_steps);
    "inclusive", as released: the first step has `lr * start_lr_ratio`, the last exactly `lr * final_lr_ratio`.
    lr_multipliers: a factor for all parameters whose name begins so ("encoder.": 0.1); the longest match counts.
    """

    lr: float = Field(1e-3, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    schedule: Schedule = "cosine"
    hold: float = Field(0.0, ge=0, lt=1)
    endpoints: Literal["exclusive", "inclusive"] = "exclusive"
    start_lr_ratio: float = Field(0.0, ge=0, le=1)
    warmup_steps: int = Field(0, ge=0)
    start_step: int = Field(0, ge=0)
    final_lr_ratio: float = Field(0.0, ge=0, le=1)
    lr_multipliers: dict[str, Annotated[float, Field(ge=0)]] = {}

    @model_validator(mode="after")
    def _fits(self) -> "OptimizerConfig":
        if self.schedule == "exponential" and self.final_lr_ratio == 0:
            raise ValueError("schedule=exponential never reaches 0; set final_lr_ratio above 0")
        if self.schedule == "two_slopes" and self.hold == 0:
            raise ValueError("schedule=two_slopes needs hold above 0, the share of the first slope")
        if self.start_lr_ratio > 0 and self.endpoints == "exclusive":
            raise ValueError("start_lr_ratio counts with endpoints=inclusive only")
        return self


def lr_at(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (counted from 0) of `total_steps`. Pure: there is nothing to save."""
    position = step - config.start_step
    if position < 0:
        return 0.0
    inclusive = config.endpoints == "inclusive"
    if position < config.warmup_steps:
        progress = (position if inclusive else position + 1) / config.warmup_steps
        return config.lr * (config.start_lr_ratio + (1 - config.start_lr_ratio) * progress)
    length = max(1, total_steps - config.start_step - config.warmup_steps - inclusive)
    return config.lr * _decay(config, min(1.0, (position - config.warmup_steps) / length))


def _decay(config: OptimizerConfig, progress: float) -> float:
    """The rate relative to its peak after the share `progress` of the time behind the warm-up."""
    final, hold = config.final_lr_ratio, config.hold
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    middle = 1.0  # where the slope after `hold` begins
    if config.schedule == "two_slopes":
        middle = (1 + final + (1 - final) * (1 - hold)) / 2
    if progress < hold:
        return 1 + (middle - 1) * progress / hold
    later = (progress - hold) / (1 - hold)
    if config.schedule == "exponential":
        return final**later
    return final + (middle - final) * (1 - later)


def warmup_ramp(config: OptimizerConfig, step: int) -> float:
    """0 to 1 over the warm-up of `config`, for weights that grow with the rate (1 at once without warm-up)."""
    position = step - config.start_step + (config.endpoints == "exclusive")
    return min(1.0, max(0.0, position / max(1, config.warmup_steps)) if config.warmup_steps else 1.0)


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups by weight decay and learning rate; every trainable parameter is in one of them exactly once.

    Not decayed: parameters of at most one dimension (norms, biases, scales), and those named by the module's optional
    `no_weight_decay() -> set[str]`. "lr_scale" is a group's factor on the rate. Raises ConfigError for a multiplier
    that fits no parameter.
    """
    listed = set(module.no_weight_decay()) if hasattr(module, "no_weight_decay") else set()
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    unmatched = set(config.lr_multipliers)
    for name, parameter in module.named_parameters():  # shared parameters come once
        if not parameter.requires_grad:
            continue
        # under ZeRO-3 a parameter may already be in parts: its own shape is then in ds_shape
        shape = getattr(parameter, "ds_shape", parameter.shape)
        found = [prefix for prefix in config.lr_multipliers if name.startswith(prefix)]
        unmatched -= set(found)
        scale = config.lr_multipliers[max(found, key=len)] if found else 1.0
        groups.setdefault((scale, len(shape) <= 1 or name in listed), []).append(parameter)
    if unmatched:
        raise ConfigError(f"optimizer.lr_multipliers: no trainable parameter begins with {sorted(unmatched)[0]!r}")
    order = sorted(groups, key=lambda key: (-key[0], key[1]))  # the same on every rank
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else config.weight_decay, "lr_scale": key[0]}
        for key in order
    ]
