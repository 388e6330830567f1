"""The loop over ranks and ZeRO stages: equal losses, resume bit for bit, signals, finite check, precision."""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import AdversarialTask, ToyTask, largest_difference, plain_adversarial_losses, run_toy
from ranks import RankError, run_ranks

from unitok.core.checkpoint import latest_complete
from unitok.core.distributed import gather_with_grad, init_distributed, rank, shutdown_distributed
from unitok.core.engine import clamp_parameter_
from unitok.core.sampling import SampleOrder

pytestmark = pytest.mark.slow
STAGES = (0, 1, 2, 3)
TOYS = {"toy": (ToyTask, ("loss", "grad_norm")), "adversarial": (AdversarialTask, ("loss", "weight", "discriminator"))}


def _run(world: int, out: Path, task: Any, **settings: Any) -> list[dict[str, Any]]:
    return run_ranks(world, lambda: run_toy(task, out, world=world, **settings))[0]


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_do_not_depend_on_ranks_or_stage(tmp_path: Path, kind: str, stage: int) -> None:
    """Guards the sample order, the averaging of losses and gradients, clipping and the two-engine recipe."""
    make, keys = TOYS[kind]
    clipping = 0.5 if kind == "toy" else 0.0
    one = _run(1, tmp_path / "one", make(), engine_gradient_clipping=clipping)
    two = _run(2, tmp_path / "two", make(), engine_gradient_clipping=clipping, engine_zero_stage=stage)
    assert largest_difference(two, one, keys) < 1e-4
    exported = [torch.load(tmp_path / name / "export" / _main(kind), weights_only=True) for name in ("one", "two")]
    for key in exported[0]:
        torch.testing.assert_close(exported[1][key], exported[0][key], rtol=1e-4, atol=1e-6)


def _main(kind: str) -> str:
    return "net.pt" if kind == "toy" else "generator.pt"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_adversarial_equals_plain_torch(tmp_path: Path, accumulation: int) -> None:
    """The recipe trains what plain torch trains with the weight taken by autograd at the last layer."""
    steps, size, task = 16, 4, AdversarialTask()
    order = SampleOrder(task.num_samples, 0)
    starts = [[(step * accumulation + m) * size for m in range(accumulation)] for step in range(steps)]
    batches = [[task.load_batch(*order.micro_batch(s, size, 0)) for s in row] for row in starts]
    expected = [{"step": i + 1, **row} for i, row in enumerate(plain_adversarial_losses(batches))]
    for stage in STAGES:
        log = _run(
            2,
            tmp_path / f"z{stage}",
            task,
            steps=steps,
            engine_zero_stage=stage,
            engine_accumulation_steps=accumulation,
        )
        assert largest_difference(log, expected, TOYS["adversarial"][1] + ("extra",)) < 1e-4, stage


@pytest.mark.parametrize("world,stage", [(1, 0), (2, 0), (1, 2), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("kind", TOYS)
def test_killed_and_resumed_is_straight(tmp_path: Path, kind: str, world: int, stage: int) -> None:
    """SIGKILL at random steps, resume: the log is equal bit for bit, and so are the exported weights."""
    make = TOYS[kind][0]
    settings = {"save_every": 3, "engine_zero_stage": stage}
    options = {"dropout": 0.2} if kind == "toy" else {}
    straight = _run(world, tmp_path / "straight", make(**options), **settings)
    draw = random.Random(f"{kind}{world}{stage}")
    for step in sorted(draw.sample(range(1, 19), 2)):
        event = ("kill", step, draw.randrange(world))
        run_ranks(world, _resume, make(**options, event=event), tmp_path / "killed", world, settings, may_die=True)
    killed = _run(world, tmp_path / "killed", make(**options), **settings)
    assert killed == straight
    weights = [torch.load(tmp_path / n / "export" / _main(kind), weights_only=True) for n in ("straight", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def _resume(task: Any, out: Path, world: int, settings: dict[str, Any]) -> None:
    run_toy(task, out, world=world, **settings)


@pytest.mark.parametrize("persistence", [0, 100_000])
def test_evaluation_sees_the_average_and_leaves_training_alone(tmp_path: Path, persistence: int) -> None:
    """Averaged weights are the same under ZeRO 3 (parameters in parts, or held whole), and swapping leaves no trace."""
    alone = _run(1, tmp_path / "alone", ToyTask())
    expected: list[float] = []
    for world, stage in ((1, 0), (2, 0), (2, 2), (2, 3)):
        settings = {"engine_zero_stage": stage, "engine_zero3_persistence": persistence, "eval_every": 4}
        log = _run(world, tmp_path / f"{world}{stage}", ToyTask(), evaluators={"held_out": _held_out}, **settings)
        assert largest_difference(log, alone, ("loss",)) < 1e-5
        evaluated = [record["held_out/loss"] for record in log if "held_out/loss" in record]
        assert len(evaluated) == 5 and all(abs(a["loss"] - b) > 1e-3 for a, b in zip(log[3::4], evaluated, strict=True))
        expected = expected or evaluated
        assert evaluated == pytest.approx(expected, rel=1e-4)


def _held_out(modules: dict[str, Any], step: int) -> dict[str, float]:
    x, y = ToyTask().load_batch(list(range(100, 116)), 0)
    return {"loss": float((modules["net"](x) - y).square().mean())}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Killed from outside at random times (saving included: every step saves), resumed until done: straight."""
    settings = {"save_every": 1, "steps": 60}
    straight = _run(1, tmp_path / "straight", ToyTask(dropout=0.2), **settings)
    draw, attempts, done = random.Random(1), 0, False
    while not done:
        attempts += 1
        assert attempts < 300
        seconds = 0.1 if attempts == 1 else draw.uniform(0.2, 1.5)  # one for certain, however fast the machine
        run_ranks(1, _killed_after, tmp_path / "killed", seconds, settings, may_die=True)
        latest = latest_complete(tmp_path / "killed" / "checkpoints")
        done = latest is not None and latest.name == "step_60"
    assert attempts > 1
    assert _run(1, tmp_path / "killed", ToyTask(dropout=0.2), **settings) == straight


def _killed_after(out: Path, seconds: float, settings: dict[str, Any]) -> None:
    class Timed(ToyTask):
        def prepare_step(self, batches: list[Any], step: int) -> None:
            if self.steps_seen >= 0 and not hasattr(self, "timer"):  # counted from the first step on: start-up varies
                self.timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
                self.timer.daemon = True
                self.timer.start()

    run_toy(Timed(dropout=0.2), out, world=1, **settings)


@pytest.mark.parametrize("world,stage", [(1, 0), (2, 2)])
def test_sigterm_saves_and_exits_with_75(tmp_path: Path, world: int, stage: int) -> None:
    """The signal reaches one rank only; all stop after the same step with a checkpoint, and resume is straight."""
    straight = _run(world, tmp_path / "straight", ToyTask(dropout=0.2), engine_zero_stage=stage)
    task = ToyTask(dropout=0.2, event=("term", 6, world - 1))
    stopped = run_ranks(world, _resume, task, tmp_path / "stopped", world, {"engine_zero_stage": stage})
    assert stopped == [("exit", 75)] * world
    assert latest_complete(tmp_path / "stopped" / "checkpoints").name == "step_7"
    assert _run(world, tmp_path / "stopped", ToyTask(dropout=0.2), engine_zero_stage=stage) == straight


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_non_finite_stops_all_ranks_before_the_step(tmp_path: Path, stage: int, kind: str) -> None:
    """One rank's loss or gradient is not finite: every rank stops, the message names it, nothing is saved."""
    with pytest.raises(RankError) as caught:
        run_ranks(2, _resume, ToyTask(event=(kind, 5, 1)), tmp_path, 2, {"engine_zero_stage": stage, "save_every": 2})
    message = str(caught.value).strip().splitlines()[-1]
    assert "NonFiniteError: step 6" in message and "step_4" in message
    assert "metric loss" in message if kind == "nan" else "gradient of net.first" in message
    assert latest_complete(tmp_path / "checkpoints").name == "step_4"


@pytest.mark.parametrize("stage", (0, 2, 3))
def test_autocast_keeps_parameters_and_communication_fp32(tmp_path: Path, stage: int) -> None:
    """bf16 products only: DeepSpeed's defaults would send the gradients of linear layers in bf16."""
    for seen, parameters, states, sent in run_ranks(2, _autocast_dtypes, tmp_path, stage):
        assert seen == torch.bfloat16
        assert parameters == states == {torch.float32}
        assert torch.bfloat16 not in sent and torch.float32 in sent


def _autocast_dtypes(out: Path, stage: int) -> tuple[Any, ...]:
    import deepspeed.comm as comm

    sent: set[torch.dtype] = set()
    for name in ("all_reduce", "reduce_scatter_fn", "reduce_scatter_tensor", "all_gather_into_tensor", "reduce"):
        if hasattr(comm, name):
            setattr(comm, name, _recording(getattr(comm, name), sent))
    found: dict[str, Any] = {}

    class Looking(ToyTask):
        def micro_step(self, engines: dict[str, Any], batch: Any, micro_index: int, step: int) -> dict[str, Any]:
            metrics = super().micro_step(engines, batch, micro_index, step)
            engine = engines["net"]
            found["seen"] = engine.module.seen_dtype
            found["parameters"] = {p.dtype for p in engine.module.parameters()}
            states = engine.optimizer.optimizer.state if stage else engine.optimizer.state
            tensors = [v for s in states.values() for v in s.values() if torch.is_tensor(v)]
            found["states"] = {t.dtype for t in tensors} or {torch.float32}
            return metrics

    run_toy(Looking(), out, steps=3, world=2, engine_zero_stage=stage, engine_precision="autocast")
    return found["seen"], found["parameters"], found["states"], sent


def _recording(function: Any, sent: set[torch.dtype]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        sent.update(a.dtype for a in (*args, *kwargs.values()) if torch.is_tensor(a) and a.is_floating_point())
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bf16_trains_and_resumes(tmp_path: Path, stage: int) -> None:
    """bf16 parameters with fp32 master weights: losses near fp32, and resume is straight."""
    settings = {"engine_zero_stage": stage, "engine_precision": "bf16", "save_every": 4}
    full = _run(2, tmp_path / "fp32", _Half(), engine_zero_stage=stage)
    half = _run(2, tmp_path / "bf16", _Half(), **settings)
    assert largest_difference(half, full, ("loss",)) < 0.1
    run_ranks(2, _resume, _Half(event=("kill", 9, 1)), tmp_path / "killed", 2, settings, may_die=True)
    assert _run(2, tmp_path / "killed", _Half(), **settings) == half


class _Half(ToyTask):
    def load_batch(self, indices: list[int], epoch: int) -> Any:
        return super().load_batch(indices, epoch)

    def micro_step(self, engines: dict[str, Any], batch: Any, micro_index: int, step: int) -> dict[str, Any]:
        dtype = next(engines["net"].module.parameters()).dtype
        return super().micro_step(engines, (batch[0].to(dtype), batch[1]), micro_index, step)


@pytest.mark.parametrize("kind,stage", [("toy", 0), ("toy", 1), ("adversarial", 2), ("toy", 3)])
@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_another_number_of_ranks(tmp_path: Path, kind: str, stage: int, before: int, after: int) -> None:
    """A run goes on with other ranks at equal global micro-batch: the same samples, losses within 1e-5."""
    make, settings = TOYS[kind][0], {"engine_zero_stage": stage}
    straight = _run(1, tmp_path / "straight", make(), **settings)
    event = ("kill", 9, 0)
    saving = {"save_every": 4, **settings}
    run_ranks(before, _resume, make(event=event), tmp_path / "moved", before, saving, may_die=True)
    moved = _run(after, tmp_path / "moved", make(), **settings)
    assert largest_difference(moved, straight, ("loss", "discriminator")) < 1e-5
    assert not list((tmp_path / "moved" / "checkpoints").glob("**/.universal_*"))


def test_gather_gives_the_gradient_of_the_whole_batch() -> None:
    """A loss over all rows on every rank, averaged over ranks, has the gradient of one process with the whole batch."""
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    whole = rows.clone().requires_grad_()
    _pair_loss(whole).backward()
    parts = run_ranks(2, _gathered_gradient, rows)
    torch.testing.assert_close(torch.cat(parts) / 2, whole.grad)


def _pair_loss(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(x @ x.T, torch.arange(len(x)))


def _gathered_gradient(rows: torch.Tensor) -> torch.Tensor:
    init_distributed("cpu")
    own = rows.chunk(2)[rank()].clone().requires_grad_()
    _pair_loss(gather_with_grad(own)).backward()
    shutdown_distributed()
    return own.grad


@pytest.mark.parametrize("world,stage", [(1, 0), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("persistence", [0, 100_000])
def test_clamped_parameter_stays_clamped(tmp_path: Path, world: int, stage: int, persistence: int) -> None:
    """The master weights follow: else the next step would bring the old value back."""
    task = _Clamped()
    log = _run(world, tmp_path, task, steps=6, engine_zero_stage=stage, engine_zero3_persistence=persistence)
    weights = torch.load(tmp_path / "export" / "net.pt", weights_only=True)
    assert len(log) == 6 and weights["second.bias"].abs().max() <= 0.01 + 1e-7


class _Clamped(ToyTask):
    def __init__(self) -> None:
        super().__init__(ema=None)

    def after_step(self, modules: dict[str, Any], step: int) -> None:
        clamp_parameter_(modules["net"].second.bias, -0.01, 0.01)


GROUP_RUN = """
import sys
from pathlib import Path
from core_toys import ToyTask, run_toy
class Slow(ToyTask):
    def after_step(self, modules, step):
        super().after_step(modules, step)
        print("step", step, flush=True)
if __name__ == "__main__":
    run_toy(Slow(), Path(sys.argv[1]), steps=100000, num_workers=2)
"""


def test_a_signal_to_the_whole_group_finds_the_workers_alive(tmp_path: Path) -> None:
    """As a scheduler or a terminal sends it: the loaders' processes get it too, and the run still ends well."""
    (tmp_path / "main.py").write_text(GROUP_RUN)
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "out")]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line == "step 5\n":
            os.killpg(process.pid, signal.SIGTERM)
            break
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert latest_complete(tmp_path / "out" / "checkpoints") is not None
