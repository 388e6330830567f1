"""Numbers recorded from the reference code. Small files lie in tests/fixtures; the whole set is too large to commit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
REFERENCE = Path(os.environ.get("UNITOK_REFERENCE", HERE.parent.parent / "shared"))
PLACES = (HERE / "fixtures", REFERENCE / "fixtures")


def fixture(name: str) -> Path:
    """Path of a recorded file or folder; the test is skipped where it is not at hand, and fails where it should be."""
    for place in PLACES:
        if (place / name).exists():
            return place / name
    if "UNITOK_REFERENCE" in os.environ:
        pytest.fail(f"UNITOK_REFERENCE={REFERENCE} has no fixtures/{name}")
    pytest.skip(
        f"the recorded {name} is too large for the repository; set UNITOK_REFERENCE to the folder that holds fixtures/"
    )


def tensors(name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(fixture(name))


def numbers(name: str) -> Any:
    return json.loads(fixture(name).read_text())


def relative(ours: Tensor, recorded: Tensor) -> float:
    """Error in norm, relative to the recorded norm."""
    assert ours.shape == recorded.shape, (ours.shape, recorded.shape)
    gap = (ours.detach().double() - recorded.double()).norm()
    return float(gap / recorded.double().norm().clamp(min=1e-30))


def assert_near(ours: Tensor, recorded: Tensor, tolerance: float = 1e-4) -> None:
    """Equal in shape, and within `tolerance` of the recorded norm."""
    error = relative(ours, recorded)
    assert error <= tolerance, error


def same_codes(ours_BKL: Tensor, recorded_BKL: Tensor, margin_BKL: Tensor) -> bool:
    """Equal wherever the recorded decision was not a near tie."""
    assert ours_BKL.shape == recorded_BKL.shape
    return bool(((ours_BKL == recorded_BKL) | (margin_BKL < 1e-5)).all())


def loaded(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """`module` with exactly the recorded state."""
    module.load_state_dict(tensors(name))
    return module
