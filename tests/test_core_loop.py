"""The loop in one process: sampling, log, checkpoints, averages, resume, refusals."""

import gc
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from core_toys import AdversarialTask, ToyNet, ToyTask, run_toy
from torch import nn

from unitok.core import checkpoint, launch
from unitok.core.config import Config
from unitok.core.ema import Ema
from unitok.core.errors import EXIT_RESUME, CheckpointError, ConfigError, DataError, NonFiniteError
from unitok.core.loop import train
from unitok.core.run import TrainConfig, locked
from unitok.core.runlog import RunLog, read_log, truncate_log
from unitok.core.sampling import SampleOrder, batches
from unitok.core.signals import StopSignals
from unitok.core.task import Network
from unitok.core.workers import forking


def test_order_visits_every_sample_once_per_epoch() -> None:
    order = SampleOrder(10, seed=3)
    epochs = [[order.index(10 * epoch + i) for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    again = SampleOrder(10, seed=3)
    assert [again.index(p) for p in range(25, 30)] == epochs[2][5:]  # no need to walk there
    assert SampleOrder(10, seed=4).index(0) != epochs[0][0] or SampleOrder(10, seed=4).index(1) != epochs[0][1]
    with pytest.raises(DataError, match="0 samples"):
        SampleOrder(0, seed=0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_same_global_micro_batch(ranks: int) -> None:
    """Also across an epoch's end, where every rank gets the epoch of the micro-batch's first sample."""
    whole, epoch = SampleOrder(10, 0).micro_batch(8, 4, 0)
    parts = [SampleOrder(10, 0).micro_batch(8, 4 // ranks, rank) for rank in range(ranks)]
    assert [i for indices, _ in parts for i in indices] == whole
    assert {e for _, e in parts} == {epoch} == {0}


def test_workers_do_not_change_the_batches() -> None:
    task, order = ToyTask(), SampleOrder(50, 0)
    alone, ahead = (list(batches(task, order, 8, 40, 4, workers)) for workers in (0, 2))
    assert len(alone) == 8
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, ahead, strict=True))


class Leftover:
    """Like a process group: in a cycle, so that only a collection frees it, and that must be in its own process."""

    def __init__(self, freed_in: Path) -> None:
        self.itself, self.freed_in = self, freed_in

    def __del__(self) -> None:
        with open(self.freed_in, "a") as file:
            print(os.getpid(), file=file)


class Collecting(ToyTask):
    def load_batch(self, indices: list[int], epoch: int) -> Any:
        gc.collect()
        return super().load_batch(indices, epoch)


def test_workers_do_not_free_what_the_process_left_behind(tmp_path: Path) -> None:
    gc.disable()  # what is left behind stays until the workers are forked
    try:
        Leftover(tmp_path / "ended")
        in_use = Leftover(tmp_path / "in_use")
        frozen = gc.get_freeze_count()
        list(batches(Collecting(), SampleOrder(50, 0), 0, 40, 4, 2))
    finally:
        gc.enable()
    assert (tmp_path / "ended").read_text() == f"{os.getpid()}\n"
    assert gc.get_freeze_count() == frozen and not (tmp_path / "in_use").exists()
    del in_use
    gc.collect()
    assert (tmp_path / "in_use").read_text() == f"{os.getpid()}\n"
    for _ in range(2):
        with forking():
            child = os.fork()
        if child == 0:
            os._exit(gc.get_freeze_count() == 0)
        assert os.waitpid(child, 0)[1] == 0, "a fork does not thaw what it inherits"


def test_log_is_cut_and_keeps_full_precision(tmp_path: Path) -> None:
    log = RunLog(tmp_path, total_steps=9)
    log.start(0, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / 3 / step, "samples": 4 * step})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a process killed while writing
    truncate_log(tmp_path / "log.jsonl", 3)
    assert read_log(tmp_path / "log.jsonl") == [{"step": s, "loss": 1 / 3 / s, "samples": 4 * s} for s in (1, 2, 3)]
    assert {"time", "samples_per_s"} <= set(read_log(tmp_path / "log.jsonl", timing=True)[0])


def test_plain_progress_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, total_steps=100, headline=("loss",), interval=1000.0)
    log.start(0, 0)
    for step in range(1, 101):
        log.progress(step, {"loss": 0.5, "other": 1.0}, step * 4)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "100/100" in lines[-1] and "loss 0.5" in lines[-1] and "left" in lines[-1]


def test_average_follows_the_weights() -> None:
    net = nn.Linear(2, 2)
    ema = Ema(net, decay=0.9)
    start, expected = net.weight.detach().clone(), net.weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            net.weight.add_(1.0)
        ema.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    trained = net.weight.detach().clone()
    with ema.swap():
        torch.testing.assert_close(net.weight.detach(), expected)
    assert torch.equal(net.weight, trained) and torch.equal(trained, start + 1 + 1 + 1 + 1)
    other = Ema(nn.Linear(2, 2), decay=0.9)
    other.load_full(ema.state_dict_full(), ema.updates)
    assert all(torch.equal(a, b) for a, b in zip(other.shadow, ema.shadow, strict=True)) and other.updates == 4
    with pytest.raises(CheckpointError, match="bias"):
        other.load_full({"weight": start}, 1)


@pytest.mark.parametrize("make", [ToyTask, AdversarialTask])
def test_resume_equals_straight(tmp_path: Path, make: Any) -> None:
    """Twice half the way is once the whole way, bit for bit; `train` runs several times in one process."""
    straight = run_toy(make(), tmp_path / "straight", steps=12, save_every=4)
    event = ("nan" if make is ToyTask else "none", 9, 0)
    if make is ToyTask:
        with pytest.raises(NonFiniteError, match=r"step 10: metric loss.*is not finite.*step_8"):
            run_toy(make(event=event), tmp_path / "again", steps=12, save_every=4)
    else:
        run_toy(make(), tmp_path / "again", steps=12, save_every=4)
        checkpoint_12 = tmp_path / "again" / "checkpoints" / "step_12"
        checkpoint_12.rename(tmp_path / "elsewhere")
    assert run_toy(make(), tmp_path / "again", steps=12, save_every=4) == straight
    assert {p.name for p in (tmp_path / "again" / "checkpoints").iterdir()} == {"step_8", "step_12"}


def test_finished_run_only_exports_again(tmp_path: Path) -> None:
    first = run_toy(ToyTask(), tmp_path, steps=3)
    (tmp_path / "export" / "net.pt").unlink()
    assert run_toy(ToyTask(), tmp_path, steps=3) == first
    assert (tmp_path / "export" / "net.pt").is_file()
    assert json.loads((tmp_path / "checkpoints" / "step_3" / "state.json").read_text())["extra_state"] == {
        "steps_seen": 3
    }


def test_cut_short_is_skipped_and_corrupt_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_toy(ToyTask(), tmp_path, steps=4, save_every=2)
    folder = tmp_path / "checkpoints"
    (folder / "step_4" / checkpoint.MARKER).unlink()
    with caplog.at_level(logging.WARNING, logger="unitok"):
        assert checkpoint.latest_complete(folder) == folder / "step_2"
    assert "step_4" in caplog.text and "cut short" in caplog.text

    victim = next((folder / "step_2" / "net").rglob("*model_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_2 is corrupt: .*model_states.pt has changed; delete"):
        run_toy(ToyTask(), tmp_path, steps=4, save_every=2)
    victim.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=r"model_states.pt has \d+ bytes, expected \d+"):
        run_toy(ToyTask(), tmp_path, steps=4, save_every=2)
    victim.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        run_toy(ToyTask(), tmp_path, steps=4, save_every=2)


def test_changed_settings_are_refused(tmp_path: Path) -> None:
    run_toy(ToyTask(), tmp_path, steps=2)
    for change, words in (
        ({"seed": 5}, "seed=0, now it is 5"),
        ({"global_batch": 8}, "micro_batch_size x ranks was 4, now it is 8"),
        ({"engine_accumulation_steps": 1}, "accumulation_steps=2, now it is 1"),
        ({"engine_zero_stage": 2}, "zero_stage=0, now it is 2"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run_toy(ToyTask(), tmp_path, **{"steps": 3, **change})
    with pytest.raises(ConfigError, match="resume=never, but"):
        run_toy(ToyTask(), tmp_path, steps=3, resume="never")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        run_toy(ToyTask(), tmp_path, steps=3, resume=str(tmp_path / "nowhere"))


def test_finished_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    """Its weights would be exported under a configuration that never trained them."""
    run_toy(ToyTask(), tmp_path, steps=2)
    written = (tmp_path / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match="no step is left .*engine.gradient_clipping.*another output_dir"):
        run_toy(ToyTask(), tmp_path, steps=2, engine_gradient_clipping=0.5)
    assert (tmp_path / "config.yaml").read_text() == written
    run_toy(ToyTask(), tmp_path, steps=2, log_every=2)  # how it is shown may change


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default(tmp_path: Path) -> None:
    """Of a run from before there was such a setting, also within a part."""

    class Part(Config):
        noise: float = 0.0

    class Later(TrainConfig):
        part: Part = Part()
        shares: list[int] = [1, 2]

    settings = {"output_dir": str(tmp_path), "steps": 2}
    train(ToyTask(), TrainConfig(**settings))
    train(ToyTask(), Later(**settings))  # writes what it knows into config.yaml, not into the checkpoint
    for change in ({"part": {"noise": 0.5}}, {"shares": [2, 1]}):
        with pytest.raises(CheckpointError, match=r"no step is left .*(part\.noise|shares)"):
            train(ToyTask(), Later(**settings, **change))
    decisive = ToyTask()
    decisive.decisive = ("part.noise",)
    train(decisive, Later(**settings))
    with pytest.raises(CheckpointError, match=r"part\.noise=0\.0, now it is 0\.5"):
        train(decisive, Later(**settings, part={"noise": 0.5}))


def test_finished_run_may_lie_elsewhere(tmp_path: Path) -> None:
    """What the task says it checks itself (here: where its data lie) may differ in a run that has no step left."""

    class Placed(TrainConfig):
        place: str = "here"

    task = ToyTask()
    task.incidental = ("place",)
    settings = {"output_dir": str(tmp_path), "steps": 2}
    train(task, Placed(**settings))
    train(task, Placed(**settings, place="there"))
    task.incidental = ()
    with pytest.raises(CheckpointError, match="place"):
        train(task, Placed(**settings, place="nowhere"))


def test_two_processes_never_train_into_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="another process is training into it"):
        run_toy(ToyTask(), tmp_path, steps=2)
    run_toy(ToyTask(), tmp_path, steps=2)


def test_interrupt_at_any_point_is_one_wish(tmp_path: Path) -> None:
    """SIGINT while networks are built: one step, a checkpoint, exit code 75. While the export is written: all of it."""
    straight = run_toy(ToyTask(), tmp_path / "straight", steps=3)

    class Interrupted(ToyTask):
        def __init__(self, where: str) -> None:
            super().__init__()
            self.where = where

        def build(self) -> Any:
            if self.where == "build":
                signal.raise_signal(signal.SIGINT)
            return super().build()

        def export(self, modules: dict[str, Any], folder: Path) -> None:
            if self.where == "export":
                signal.raise_signal(signal.SIGINT)
            super().export(modules, folder)

    with pytest.raises(SystemExit) as stopped:
        run_toy(Interrupted("build"), tmp_path / "run", steps=3)
    assert stopped.value.code == EXIT_RESUME
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1"]
    assert not (tmp_path / "run" / "export").exists()
    assert run_toy(Interrupted("export"), tmp_path / "run", steps=3) == straight
    assert (tmp_path / "run" / "export" / "net.pt").is_file()


def test_export_cut_short_leaves_the_old_one(tmp_path: Path) -> None:
    run_toy(ToyTask(), tmp_path, steps=2)
    before = (tmp_path / "export" / "net.pt").read_bytes()

    class Full(ToyTask):
        def export(self, modules: dict[str, Any], folder: Path) -> None:
            folder.mkdir()
            (folder / "net.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"export .* could not be written: No space left on device; \d+ MiB"):
        run_toy(Full(), tmp_path, steps=2)
    assert (tmp_path / "export" / "net.pt").read_bytes() == before
    run_toy(ToyTask(), tmp_path, steps=2)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "checkpoints", "config.yaml", "export", "log.jsonl"}


def test_tracker_shows_the_log(tmp_path: Path) -> None:
    """TensorBoard's event files hold what log.jsonl holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = run_toy(ToyTask(), tmp_path, steps=3, tracker="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in log]
    assert {"lr", "grad_norm", "samples"} <= set(events.Tags()["scalars"])


def test_cores_within_a_quota(tmp_path: Path) -> None:
    for text, cores in (("150000 100000\n", 1.5), ("max 100000\n", math.inf), ("nonsense", math.inf)):
        (tmp_path / "cpu.max").write_text(text)
        assert launch.quota(tmp_path / "cpu.max") == cores
    assert launch.quota(tmp_path / "none") == math.inf


CHILD = (
    "import time; from unitok.core.launch import follow_parent; follow_parent(); print(1, flush=True); time.sleep(99)"
)
LAUNCHER = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=os.environ | {{"UNITOK_LAUNCHER": str(os.getpid())}})
print(child.pid, flush=True)
time.sleep(99)
"""


def test_a_rank_ends_with_its_launcher() -> None:
    """Killed, the launcher cannot pass anything on; the rank sees that it is gone and gets its SIGTERM."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(launcher.stdout.readline()))
    assert launcher.stdout.readline() == "1\n" and child.is_running()
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs([child], timeout=20)
    for process in alive:
        process.kill()
    assert not alive, "the rank still ran 20 seconds after its launcher"


def test_signals_of_the_first_seconds_count_once() -> None:
    """A launcher and the terminal both signal the ranks; only a later wish ends a rank before it has saved."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with StopSignals(grace_seconds=60) as patient:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert patient.requested and not seen
        with StopSignals(grace_seconds=-1) as hasty:
            signal.raise_signal(signal.SIGTERM)
            assert hasty.requested and not seen
            signal.raise_signal(signal.SIGTERM)
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_checkpoints_hold_no_runnable_code(tmp_path: Path) -> None:
    """A pickled call in a checkpoint file is refused, not run."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"module": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        checkpoint._safe_checkpoint_engine().load(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def test_codebooks_are_never_cast(tmp_path: Path) -> None:
    class Coded(ToyTask):
        def build(self) -> dict[str, Network]:
            networks = super().build()
            networks["net"].module.codebooks = nn.Parameter(torch.zeros(1, 2, 2))
            return networks

    with pytest.raises(ConfigError, match="codebooks.*autocast"):
        run_toy(Coded(), tmp_path, engine_precision="bf16", engine_zero_stage=1)


def test_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 3: gradient of net.first.weight.*no checkpoint yet"):
        run_toy(ToyTask(event=("inf", 2, 0)), tmp_path, steps=5)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_clipping_equals_torch(tmp_path: Path) -> None:
    """With and without: DeepSpeed's hidden default of 1.0 would change the second."""
    for clipping in (0.5, 0.0):
        log = run_toy(
            ToyTask(), tmp_path / str(clipping), steps=6, engine_gradient_clipping=clipping, engine_accumulation_steps=1
        )
        assert [r["loss"] for r in log] == pytest.approx(_plain_losses(clipping), rel=1e-5)
        assert max(r["grad_norm"] for r in log) > 1.0


def _plain_losses(clipping: float) -> list[float]:
    from unitok.core.optim import lr_at, parameter_groups

    task, order = ToyTask(), SampleOrder(50, 0)
    network = task.build()["net"]
    net: ToyNet = network.module
    adam = torch.optim.AdamW(parameter_groups(net, network.optimizer), betas=(0.9, 0.95))
    losses = []
    for step in range(6):
        x, y = task.load_batch(*order.micro_batch(4 * step, 4, 0))
        loss = (net(x) - y).square().mean()
        adam.zero_grad()
        loss.backward()
        if clipping:
            nn.utils.clip_grad_norm_(net.parameters(), clipping)
        for group in adam.param_groups:
            group["lr"] = lr_at(network.optimizer, step, 6)
        adam.step()
        losses.append(float(loss.detach()))
    return losses
