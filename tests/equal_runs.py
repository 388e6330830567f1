"""Runs of one stage held against each other: their logs and their weights."""

from pathlib import Path
from typing import Any

import torch
from stages import run_stage
from torch import Tensor, nn

from unitok.core.engine import whole_parameters

Weights = dict[str, dict[str, Tensor]]  # "NETWORK first" and "NETWORK last" -> parameter -> value


def run_with_weights(
    stage: str, file: Path, out: Path, world: int, options: list[str], prepare: Any = None
) -> tuple[list, Weights]:
    """The log, and the weights of every network before the first step and after the last."""
    weights: Weights = {}

    def remember(task: Any) -> None:
        if prepare is not None:
            prepare(task)
        after_step, micro_step = task.after_step, task.micro_step

        def take(when: str, modules: dict[str, nn.Module]) -> None:
            for name, module in modules.items():
                with whole_parameters(module):
                    parameters = {k: p.detach().clone() for k, p in module.named_parameters() if p.requires_grad}
                weights[f"{name} {when}"] = parameters

        def before(engines: dict[str, Any], batch: Any, micro_index: int, step: int) -> dict[str, Tensor]:
            if not weights:
                take("first", {name: engine.module for name, engine in engines.items()})
            return micro_step(engines, batch, micro_index, step)

        def after(modules: dict[str, nn.Module], step: int) -> Any:
            replaced = after_step(modules, step)
            if step == task.config.steps - 1:
                take("last", modules)
            return replaced

        task.micro_step, task.after_step = before, after

    return run_stage(stage, file, out, world, options, prepare=remember), weights


def _without_key_biases(parameters: dict[str, Tensor]) -> Tensor:
    """All values in one vector, but for the biases of attention's keys, in the middle third of a joint bias.

    They shift all scores of a query alike, which softmax does not see: their gradient is 0 but for rounding, and Adam
    makes steps of full size from rounding (measured: 3e-4 of the norm of all weights, from 16 values).
    """
    kept = []
    for name, value in parameters.items():
        query, key, rest = value.tensor_split(3) if name.endswith(("qkv.bias", "in_proj_bias")) else (value, None, None)
        kept += [query.flatten()] if key is None else [query, rest]
    return torch.cat(kept)


def check_weights(weights: Weights, expected: Weights, of_the_way: float = 1e-4) -> None:
    """Every network ends with the same weights: to 1e-4 of their norm, and `of_the_way` that they moved."""
    assert weights.keys() == expected.keys() and weights
    for name in {key.split()[0] for key in weights}:
        assert weights[f"{name} last"].keys() == expected[f"{name} last"].keys()
        ours, theirs, start = (
            _without_key_biases(one)
            for one in (weights[f"{name} last"], expected[f"{name} last"], expected[f"{name} first"])
        )
        gap, moved = float((ours - theirs).norm()), float((theirs - start).norm())
        print(name, "gap", gap / float(theirs.norm()), "of the way", gap / moved)
        assert gap < 1e-4 * float(theirs.norm()) and gap < of_the_way * moved, (name, gap, moved)


def check_equal(log: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Every value to 1e-4, gradient norms to 1e-3.

    These have kinks where a pixel meets its target: L1's gradient is the sign of a difference that rounding decides.
    Measured with accumulation 2: 1.9e-4 from one step to the next, and at most 4e-7 with loss.l1=0.
    """
    found = differences(log, expected)
    assert max(value for name, value in found.items() if not name.startswith("grad_norm")) < 1e-4, found
    assert all(value < 1e-3 for name, value in found.items() if name.startswith("grad_norm")), found


def differences(log: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative difference of every logged value between two logs of the same steps and keys."""
    assert [record["step"] for record in log] == [record["step"] for record in other]
    worst: dict[str, float] = {}
    for a, b in zip(log, other, strict=True):
        assert a.keys() == b.keys(), (a["step"], a.keys() ^ b.keys())
        for key in a:
            gap = abs(a[key] - b[key])
            # an accuracy that is 0 in one run and 1e-9 in the other is no difference
            worst[key] = max(worst.get(key, 0.0), gap / max(abs(a[key]), abs(b[key]), 1e-6))
    return worst
