"""Optimizer settings, the learning rate as a pure function of the step, and which parameters decay."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from unitok.core.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]
NO_DECAY_NAMES = ("logit_scale", "codebook", "codebooks")


class OptimizerConfig(Config):
    """AdamW and its schedule. Before `start_step` the rate is 0; warm-up and decay count from there."""

    lr: float = Field(1e-3, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    start_step: int = Field(0, ge=0)
    final_lr_ratio: float = Field(0.0, ge=0, le=1)


def lr_at(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (counted from 0) of `total_steps`. Pure: there is nothing to save."""
    position = step - config.start_step
    if position < 0:
        return 0.0
    if position < config.warmup_steps:
        return config.lr * (position + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    length = max(1, total_steps - config.start_step - config.warmup_steps)
    progress = min(1.0, (position - config.warmup_steps) / length)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining)


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay; every trainable parameter is in one of them exactly once.

    Not decayed: one-dimensional parameters (norms, biases), `logit_scale`, codebooks, and the parameters named by the
    module's optional `no_weight_decay() -> set[str]`.
    """
    listed = set(module.no_weight_decay()) if hasattr(module, "no_weight_decay") else set()
    decayed, kept = [], []
    for name, parameter in module.named_parameters():  # shared parameters come once
        if not parameter.requires_grad:
            continue
        # under ZeRO-3 a parameter may already be in parts: its own shape is then in ds_shape
        shape = getattr(parameter, "ds_shape", parameter.shape)
        is_kept = len(shape) <= 1 or name in listed or any(part in NO_DECAY_NAMES for part in name.split("."))
        (kept if is_kept else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
