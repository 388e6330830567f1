"""What happens when: ranks that die or fail, disks that are full, corrupt checkpoints."""

import errno
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import ToyTask, run_toy, spoil
from ranks import run_ranks

from unitok import cli
from unitok.core import checkpoint, launch, loop, watchdog
from unitok.core.distributed import init_distributed, shutdown_distributed
from unitok.core.errors import CheckpointError, ConfigError, NonFiniteError, RankLostError, StoppedError
from unitok.core.runlog import RunLog, read_log


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog that decides in a tenth of the time; forks inherit it."""
    for name, seconds in (("BEAT_SECONDS", 0.1), ("SUSPECT_SECONDS", 1.0), ("END_SECONDS", 2.0)):
        monkeypatch.setattr(watchdog, name, seconds)


class Happening(ToyTask):
    """At step 3 on one rank: it is killed or stopped by a signal, or raises."""

    def __init__(self, what: Any, on: int) -> None:
        super().__init__()
        self.what, self.on = what, on

    def micro_step(self, engines: dict[str, Any], batch: Any, micro_index: int, step: int) -> dict[str, torch.Tensor]:
        if (step, micro_index) == (3, 0) and int(os.environ["RANK"]) == self.on:
            if isinstance(self.what, signal.Signals):
                os.kill(os.getpid(), self.what)
            else:
                raise self.what
        return super().micro_step(engines, batch, micro_index, step)


def survivors(out: Path, task: ToyTask, world: int, others: list[int], **settings: Any) -> list[Any]:
    """(error's name, message, exit code) of the ranks `others`, or ("exit", code)."""

    def run() -> Any:
        try:
            return run_toy(task, out, global_batch=6, world=world, **settings)
        except (CheckpointError, RankLostError, ConfigError) as error:
            return type(error).__name__, str(error), error.exit_code

    return [o for o in run_ranks(world, run, outcomes_of=others, timeout=40) if o is not None]


@pytest.mark.parametrize("victim", [0, 2])
def test_the_others_say_which_rank_was_killed(tmp_path: Path, quick: None, victim: int) -> None:
    started = time.monotonic()
    others = [rank for rank in range(3) if rank != victim]
    found = survivors(tmp_path, Happening(signal.SIGKILL, victim), 3, others)
    assert [one[::2] for one in found] == [("RankLostError", 75)] * 2, found
    assert all(f"rank {victim} is gone" in text and "same command" in text for _, text, _ in found), found
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_in_a_collective_is_ended(
    tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str], victim: int
) -> None:
    """No connection closes when a host is cut off (here: the process is stopped): only silence tells."""
    found = survivors(tmp_path, Happening(signal.SIGSTOP, victim), 2, [1 - victim], rank_timeout=2)
    assert found == [("exit", 75)]
    assert f"unitok: error: rank {victim} is gone" in capfd.readouterr().err


def test_what_one_rank_alone_sees_reaches_the_others(tmp_path: Path, quick: None) -> None:
    error = CheckpointError("file x is corrupt; fetch it again")
    found = survivors(tmp_path, Happening(error, 1), 2, [0, 1])
    assert found[0] == ("RankLostError", "rank 1 ended: file x is corrupt; fetch it again", 2)
    assert found[1] == ("CheckpointError", "file x is corrupt; fetch it again", 2)


@pytest.mark.parametrize("seconds", [2.5, 30])
def test_a_rank_that_takes_long_to_tear_down(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], seconds: float
) -> None:
    """Its own error is what it ends with: raised, or where it hangs printed by the thread that ends it. The other one
    waits in a collective all the while, whose connections stay open, and is ended."""
    tear_down = loop._tear_down

    def slowly(run: loop.Run) -> None:
        time.sleep(seconds if os.environ["RANK"] == "1" else 0)
        tear_down(run)

    monkeypatch.setattr(loop, "_tear_down", slowly)
    error = CheckpointError("file x is corrupt; fetch it again")
    found = survivors(tmp_path, Happening(error, 1), 2, [0, 1])
    hangs = seconds > 3
    assert found == [("exit", 2), ("exit", 2) if hangs else ("CheckpointError", str(error), 2)]
    said = [line for line in capfd.readouterr().err.splitlines() if "unitok: error" in line]
    assert sorted(said) == [*[f"unitok: error: {error}"] * hangs, f"unitok: error: rank 1 ended: {error}"]


def test_log_that_cannot_be_written_ends_all(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = RunLog.write

    def write(self: RunLog, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "log.jsonl")
        original(self, record)

    monkeypatch.setattr(RunLog, "write", write)
    found = survivors(tmp_path, ToyTask(), 2, [0, 1])
    assert found[0][0] == "error" and "No space left on device: 'log.jsonl'" in found[0][1]
    assert found[1][0] == "RankLostError" and "rank 0 ended: OSError" in found[1][1] and found[1][2] == 2


def test_watchdog_is_silent_when_all_is_well(tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]) -> None:
    found = survivors(tmp_path, ToyTask(), 2, [0, 1], rank_timeout=1)
    assert found[0] == found[1] and len(found[0]) == 20 and "gone" not in capfd.readouterr().err


# ---- full disks


class SlowAnswers(torch.distributed.TCPStore):
    """A store that is asked over a slow line."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(0.2)
        return super().check(keys)


def test_no_thread_of_the_watchdog_outlives_it(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of the store from which a thread returns while the interpreter is taken down ends the rank by SIGABRT."""

    def run() -> list[bool]:
        init_distributed("cpu")
        with watchdog.Watchdog(60.0) as watching:
            time.sleep(0.4)  # the first beat is in the middle of its questions
        alive = [thread.is_alive() for thread in watching._threads]
        shutdown_distributed()
        return alive

    monkeypatch.setattr(watchdog.dist, "TCPStore", SlowAnswers)
    assert run_ranks(2, run) == [[False, False]] * 2


def _limited(size: int, on: int) -> Any:
    """A rank that may write no file larger than `size` bytes when step 8 is saved: a real error of the kernel."""

    class Limited(ToyTask):
        def extra_state(self) -> dict[str, Any]:
            if self.steps_seen == 8 and int(os.environ["RANK"]) == on:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return super().extra_state()

    return Limited()


@pytest.mark.parametrize("on,size,stage", [(0, 0, 2), (0, 2500, 2), (1, 0, 2), (0, 0, 0)])
def test_full_disk_while_saving(tmp_path: Path, quick: None, on: int, size: int, stage: int) -> None:
    """Every rank ends with the same line, nothing of the new checkpoint stays, the older one does, and resume works."""
    settings = {"save_every": 4, "engine_zero_stage": stage, "steps": 12}
    straight = run_ranks(2, run_toy, ToyTask(), tmp_path / "straight", 12, 6, 2)[0] if stage == 0 else None
    found = survivors(tmp_path / "run", _limited(size, on), 2, [0, 1], **settings | {"log_every": 100})
    assert found[0] == found[1] and found[0][0] == "CheckpointError" and found[0][2] == 2, found
    assert "step_8 could not be written" in found[0][1] and "MiB are free" in found[0][1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_4"]
    if straight:
        log = survivors(tmp_path / "run", ToyTask(), 2, [0, 1], **settings | {"log_every": 100})[0]
        assert log[-1] == straight[-1]


@pytest.mark.parametrize("broken", ["state.json", "COMPLETE.json", "net.ema.safetensors", "step_8"])
def test_full_disk_at_every_file_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def failing(original: Any, position: int) -> Any:
        def call(*args: Any) -> Any:
            if Path(args[position]).name == broken and "step_8" in str(args[position]):
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args)

        return call

    for name, position in (("_write_json", 0), ("_save_tensors", 1), ("replace_folder", 1)):
        monkeypatch.setattr(checkpoint, name, failing(getattr(checkpoint, name), position))
    with pytest.raises(CheckpointError, match="step_8 could not be written: No space left on device"):
        run_toy(ToyTask(), tmp_path, steps=12, save_every=4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_4"]


# ---- checkpoints


def test_falls_back_only_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = run_toy(ToyTask(), tmp_path, steps=12, save_every=4, keep_last=3)
    weights = (tmp_path / "export" / "net.pt").read_bytes()
    for step in (12, 8):
        spoil(tmp_path / "checkpoints" / f"step_{step}")
    with pytest.raises(CheckpointError, match=r"step_12 is corrupt: .*net.ema.* or set resume_fallback=true"):
        run_toy(ToyTask(), tmp_path, steps=12, save_every=4, keep_last=1)
    assert run_toy(ToyTask(), tmp_path, steps=12, save_every=4, keep_last=1, resume_fallback=True) == straight
    said = capsys.readouterr().out
    assert "step_12 is corrupt" in said and "step_8 is corrupt" in said and "resuming toy from" in said
    assert (tmp_path / "export" / "net.pt").read_bytes() == weights
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_12", "step_12.corrupt", "step_8.corrupt"}


@pytest.mark.parametrize(
    "marker",
    ["", "[]", "\xff", "[" * 100000, '{"files": {}}', '{"files": []}', '{"files": {"state.json": 1}}',
     '{"files": {"x": {"size": 1, "blake2b": ""}}}', '{"files": {"state.json": {"size": 2}}}'],
)  # fmt: skip
def test_a_marker_of_another_form_is_corrupt(tmp_path: Path, marker: str) -> None:
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / checkpoint.MARKER).write_bytes(marker.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"COMPLETE.json of checkpoint .* is corrupt; delete"):
        checkpoint.verify(tmp_path)
    (tmp_path / checkpoint.MARKER).unlink()
    checkpoint.seal(tmp_path, 1)
    checkpoint.verify(tmp_path)


def test_what_a_kill_leaves_of_old_checkpoints_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the marker's deletion and the folder's: the next save deletes the rest, and nothing else."""
    for step in range(2, 7):
        checkpoint.step_folder(tmp_path, step).mkdir()
        (checkpoint.step_folder(tmp_path, step) / checkpoint.MARKER).write_text("{}")
    for name in ("step_3.partial", "step_9.partial", "step_8", "step_4.corrupt", "step_mine", "step_mine.partial"):
        (tmp_path / name).mkdir()

    def killed(path: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        checkpoint.prune(tmp_path, 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        (tmp_path / "step_3.partial").rmdir()
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        checkpoint.prune(tmp_path, 4)
    assert (tmp_path / "step_2").is_dir() and not (tmp_path / "step_2" / checkpoint.MARKER).exists()
    checkpoint.prune(tmp_path, 4)
    kept = {"step_3", "step_4", "step_5", "step_6"}
    kept |= {"step_9.partial", "step_8", "step_4.corrupt", "step_mine", "step_mine.partial"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_folder_that_is_replaced_never_stands_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the old export is deleted: the new one has the name already."""
    for name in ("export", "export.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(name)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        assert path.name != "export"
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        checkpoint.replace_folder(tmp_path / "export.partial", tmp_path / "export")
    assert (tmp_path / "export" / "of").read_text() == "export.partial"
    (tmp_path / "export.partial").mkdir()
    checkpoint.replace_folder(tmp_path / "export.partial", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_every_nth_checkpoint_stays(tmp_path: Path) -> None:
    run_toy(ToyTask(), tmp_path, steps=14, save_every=2, keep_last=2, keep_every=4)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_4", "step_8", "step_12", "step_14"}
    with pytest.raises(ConfigError, match="keep_every=3 must be a multiple of save_every=2"):
        run_toy(ToyTask(), tmp_path / "other", steps=4, save_every=2, keep_every=3)


# ---- exit codes, waiting share


def test_exit_codes_of_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from unitok.commands import train

    for error, code in ((RankLostError("rank 3 is gone"), 75), (RankLostError("x", 2), 2), (NonFiniteError("y"), 2)):

        def fail(_arguments: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(train, "train", fail)
        assert cli.main(["train", "tokenizer", "--config", "x"]) == code
        assert capsys.readouterr().err == f"unitok: error: {error}\n"


def test_launcher_says_that_the_same_command_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        def __init__(self, *_args: Any, **_options: Any) -> None:
            self.code = codes.pop()

        def poll(self) -> int:
            return self.code

        def wait(self, timeout: float) -> int:
            return self.code

    monkeypatch.setattr(launch.subprocess, "Popen", Ended)
    for ended, kind in (([75, 75], StoppedError), ([75, -9], StoppedError), ([2, 75], launch.UserError)):
        codes = list(ended)
        with pytest.raises(kind) as caught:
            launch.launch(["train", "mllm"], 2)
        assert type(caught.value) is kind
    codes = [0, 0]
    launch.launch(["train", "mllm"], 2)


def test_log_shows_the_share_of_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(ToyTask):
        def load_batch(self, indices: list[int], epoch: int) -> Any:
            time.sleep(0.3)
            return super().load_batch(indices, epoch)

    run_toy(Slow(), tmp_path / "slow", steps=5)
    run_toy(ToyTask(), tmp_path / "fast", steps=5)
    slow, fast = (read_log(tmp_path / name / "log.jsonl", timing=True) for name in ("slow", "fast"))
    assert all(0 <= record["data_wait"] <= 1 for record in slow + fast)
    # of times, only that sleeping adds to the share: the machine may be busy
    assert sum(record["data_wait"] for record in slow) > sum(record["data_wait"] for record in fast)
    assert "% of the time waiting for data" in capsys.readouterr().out
    assert read_log(tmp_path / "slow" / "log.jsonl") == read_log(tmp_path / "fast" / "log.jsonl")
