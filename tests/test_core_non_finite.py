"""Steps whose loss or gradient is not finite."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import ToyTask, run_toy
from torch import nn

from unitok.core import checkpoint
from unitok.core.errors import NonFiniteError
from unitok.core.optim import lr_at, parameter_groups
from unitok.core.sampling import SampleOrder


class Infinite(ToyTask):
    """Loss or gradient of the named steps is not finite, on the last rank."""

    def __init__(self, bad: dict[int, str]) -> None:
        super().__init__()
        self.bad = bad

    def _happens(self, kind: str, step: int) -> bool:
        return self.bad.get(step) == kind and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def sample_keys(self, indices: list[int], epoch: int) -> list[str]:
        return [f"sample {index}" for index in indices]


def plain_losses(skipped: set[int], steps: int) -> list[float]:
    """Plain torch with accumulation 2; the update of the skipped steps is left out."""
    task, order = ToyTask(), SampleOrder(50, 0)
    network = task.build()["net"]
    net = network.module
    adam = torch.optim.AdamW(parameter_groups(net, network.optimizer), betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        adam.zero_grad()
        found = []
        for micro in range(2):
            x, y = task.load_batch(*order.micro_batch(8 * step + 4 * micro, 4, 0))
            found.append((net(x) - y).square().mean())
            (found[-1] / 2).backward()
        for group in adam.param_groups:
            group["lr"] = lr_at(network.optimizer, step, steps)
        losses.append(float(sum(found).detach()) / 2)
        if step not in skipped:
            adam.step()
    return losses


BAD = {2: "nan", 5: "inf", 6: "nan"}


def test_skipped_steps_leave_no_trace(tmp_path: Path) -> None:
    log = run_toy(Infinite(BAD), tmp_path, steps=10, non_finite="skip")
    expected = plain_losses(set(BAD), 10)
    kept = [step for step in range(10) if step not in BAD]
    assert [log[step]["loss"] for step in kept] == pytest.approx([expected[step] for step in kept], rel=1e-5)
    assert all("loss" not in log[step] for step in BAD)
    assert [record["skipped"] for record in log] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3]
    state = checkpoint.read_state(tmp_path / "checkpoints" / "step_10")
    assert state["skipped"] == {"total": 3, "in_a_row": 0} and state["ema_updates"] == {"net": 7}
    assert state["extra_state"]["steps_seen"] == 7
    plain = run_toy(ToyTask(), tmp_path / "other", steps=10, non_finite="skip")
    assert plain == [r | {"skipped": 0} for r in run_toy(ToyTask(), tmp_path / "stop", steps=10)]


def test_skipping_restores_buffers(tmp_path: Path) -> None:
    class Counting(Infinite):
        def build(self) -> Any:
            def count(module: nn.Module, *_: Any) -> None:
                module.seen.add_(1)

            networks = super().build()
            networks["net"].module.register_buffer("seen", torch.zeros(()))
            networks["net"].module.register_forward_hook(count)
            return networks

    run_toy(Counting(BAD), tmp_path, steps=10, non_finite="skip")
    assert torch.load(tmp_path / "export" / "net.pt", weights_only=True)["seen"] == 14


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_the_samples_are_named(tmp_path: Path, policy: str) -> None:
    if policy == "stop":
        with pytest.raises(NonFiniteError, match=r"step 3: metric loss.*step_3.json"):
            run_toy(Infinite(BAD), tmp_path, steps=10)
    else:
        run_toy(Infinite(BAD), tmp_path, steps=10, non_finite="skip")
    found = json.loads((tmp_path / "non_finite" / "step_3.json").read_text())
    (only,) = found["ranks"]
    order = SampleOrder(50, 0)
    for number, batch in enumerate(only["micro_batches"]):
        indices, epoch = order.micro_batch(2 * 8 + 4 * number, 4, 0)
        assert (batch["indices"], batch["epoch"]) == (indices, epoch)
        assert batch["keys"] == [f"sample {index}" for index in indices] and batch["not_finite"] == ["loss"]
    assert policy == "stop" or sorted(p.name for p in (tmp_path / "non_finite").iterdir()) == [
        "step_3.json", "step_6.json", "step_7.json"
    ]  # fmt: skip


def test_the_samples_that_are_named_are_those_of_the_batch(tmp_path: Path) -> None:
    """A task may have read others than were drawn, where those are bad."""

    class StandIns(Infinite):
        def batch_keys(self, batch: Any, indices: list[int], epoch: int) -> list[str]:
            return [f"read {float(x[0])}" for x in batch[0]]

    task, order = StandIns({2: "nan"}), SampleOrder(50, 0)
    run_toy(task, tmp_path, steps=3, non_finite="skip")
    (only,) = json.loads((tmp_path / "non_finite" / "step_3.json").read_text())["ranks"]
    for number, batch in enumerate(only["micro_batches"]):
        loaded = task.load_batch(*order.micro_batch(2 * 8 + 4 * number, 4, 0))
        assert batch["keys"] == task.batch_keys(loaded, [], 0)


def test_too_many_skipped_steps_are_an_error(tmp_path: Path) -> None:
    settings = {"steps": 10, "non_finite": "skip", "save_every": 1}
    with pytest.raises(NonFiniteError, match=r"step 7: .* the 2\. in a row and 3\. .*non_finite_limit=1"):
        run_toy(Infinite(BAD), tmp_path / "row", non_finite_limit=1, **settings)
    with pytest.raises(NonFiniteError, match=r"step 6: .* 2\. of the run; .*non_finite_total=1"):
        run_toy(Infinite(BAD), tmp_path / "total", non_finite_total=1, **settings)
    with pytest.raises(NonFiniteError, match="step 6: "):  # the count is in the checkpoint
        run_toy(Infinite(BAD), tmp_path / "total", non_finite_total=1, **settings)
