"""What the loop knows of its data: bad samples over all ranks and workers, workers that die, mixtures that changed."""

import gc
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from core_toys import ToyTask, run_toy
from PIL import Image
from ranks import run_ranks
from stages import COMMON, tokenizer_values
from torch import Tensor

from unitok.cli import main
from unitok.core import watchdog
from unitok.core.bad_share import BadCounts, Reading
from unitok.core.checkpoint import read_state
from unitok.core.distributed import rank
from unitok.core.errors import DataError, RankLostError, UserError, WorkerLostError
from unitok.core.loop import train
from unitok.core.runlog import read_log
from unitok.core.sampling import SampleOrder, batches
from unitok.core.workers import loader_deaths


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog that decides in a tenth of the time; forks inherit it."""
    for name, seconds in (("BEAT_SECONDS", 0.1), ("SUSPECT_SECONDS", 1.0), ("END_SECONDS", 2.0)):
        monkeypatch.setattr(watchdog, name, seconds)


# ---- the rule


def ends_at(reading: Reading, bad: set[int], places: list[int], per_epoch: int, step: int = 8) -> int | None:
    """After how many places reading ends; None if it does not."""
    counts = BadCounts([reading])
    for start in range(0, len(places), step):
        part = places[start : start + step]
        counts.add([len(part), sum(index in bad for index in part)])
        try:
            counts.check(-(-(start + len(part)) // per_epoch))
        except DataError:
            return start + len(part)
    return None


@pytest.mark.parametrize("size,passes", [(50, 40), (300, 20), (10_000, 3)])
def test_the_limit_is_exact_within_an_epoch_and_never_met_by_as_many_as_allowed(size: int, passes: int) -> None:
    draw, reading = random.Random(0), Reading("x", size, size, 0.02)
    allowed = set(draw.sample(range(size), size // 50))
    for _ in range(20):
        orders = [draw.sample(range(size), size) for _ in range(passes)]
        if size < 1000:  # the worst: all of them first, in the last epoch (chance never does that to many)
            orders[-1].sort(key=lambda index: index not in allowed)
        assert ends_at(reading, allowed, sum(orders, []), size) is None
        more = allowed | {next(index for index in range(size) if index not in allowed)}
        assert ends_at(reading, more, orders[0], size) is not None


def test_a_small_share_read_is_enough_where_it_leaves_no_doubt() -> None:
    """16 ranks on 10,000 samples, 4 % bad: over at 1000 samples read. Of a billion nobody reads them all."""
    draw = random.Random(1)
    for size in (10_000, 10**9):
        places = [draw.randrange(size) for _ in range(5000)]
        bad = {index for index in places if draw.random() < 0.04}
        assert ends_at(Reading("x", size, size, 0.01), bad, places, size) in range(1000, 1100)


def test_members_of_a_mixture_may_come_several_times_an_epoch() -> None:
    """20 samples for 50 places: one bad one in twenty comes three times, and is still one in twenty."""
    draw = random.Random(2)
    for _ in range(50):
        places = []
        for epoch in range(4):
            block = [position % 20 for position in range(50 * epoch, 50 * (epoch + 1))]
            draw.shuffle(block)
            places += block
        assert ends_at(Reading("x", 20, 50, 0.05), {3}, places, 50) is None
        assert ends_at(Reading("x", 20, 50, 0.05), {3, 4}, places, 50) is not None


def test_what_is_lost_counts_and_messages_are_one_line() -> None:
    counts = BadCounts([Reading("a", 100, 100, 0.05, lost=4), Reading("b", 100, 300, 0.05)])
    counts.add([50, 1, 90, 15])
    counts.check(1)
    assert counts.metrics() == {"read": 140, "bad": 16, "bad/a": 1, "bad/b": 15}
    other = BadCounts([Reading("b", 100, 300, 0.05), Reading("new", 1, 1, 0.5)])
    other.load(json.loads(json.dumps(counts.state())))
    assert (other.read, other.bad) == ([90, 0], [15, 0])
    counts.add([1, 1, 0, 0])
    with pytest.raises(DataError, match=r"^a: over all ranks 6 of 104 samples are bad, more than max_bad"):
        counts.check(1)
    other.add([1, 1, 0, 0])
    with pytest.raises(DataError, match=r"^b: over all ranks 16 of 300 samples are bad, in 3 passes over it"):
        other.check(1)


# ---- the loop


class Spotty(ToyTask):
    """Samples that are multiples of 10 are bad: 5 of 50."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def readings(self) -> list[Reading]:
        return [Reading("toys", 50, 50, self.limit)]

    def load_batch(self, indices: list[int], epoch: int) -> Any:
        x, y = super().load_batch(indices, epoch)
        return x, y, torch.tensor([[len(indices), sum(index % 10 == 0 for index in indices)]])

    def places(self, batch: Any) -> Tensor:
        return batch[2]


def outcome(task: ToyTask, out: Path, world: int, settings: dict[str, Any]) -> Any:
    multiprocessing.current_process()._config["daemon"] = False  # the test's ranks are, and have no children then
    try:
        return run_toy(task, out, world=world, **settings)
    except UserError as error:
        return type(error).__name__, str(error), error.exit_code


def test_every_rank_and_worker_count_decides_alike(tmp_path: Path, quick: None) -> None:
    """No rank or worker alone has seen more than the limit allows, all together have."""
    one = run_ranks(1, outcome, Spotty(0.09), tmp_path / "one", 1, {"steps": 12})[0]
    two = run_ranks(2, outcome, Spotty(0.09), tmp_path / "two", 2, {"steps": 12, "num_workers": 2})
    assert one == two[0] == two[1]
    assert one[::2] == ("DataError", 2) and one[1].startswith("toys: over all ranks 5 of 50 samples are bad"), one
    steps = [[record["step"] for record in read_log(tmp_path / name / "log.jsonl")] for name in ("one", "two")]
    assert steps[0] == steps[1] and 3 < len(steps[0]) < 7


def test_counts_are_logged_and_go_on_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = run_toy(Spotty(0.1), tmp_path / "straight", steps=20)
    assert "20 steps in " in capsys.readouterr().out
    order, bad = SampleOrder(50, 0), 0
    for step, record in enumerate(straight):
        bad += sum(order.index(position) % 10 == 0 for position in range(8 * step, 8 * step + 8))
        assert (record["read"], record["bad"]) == (8 * (step + 1), bad)
    run_toy(Spotty(0.1), tmp_path / "run", steps=20, save_every=5, keep_last=9)
    for step in (20, 15):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step_{step}"
        checkpoint.rename(tmp_path / checkpoint.name)
    assert read_state(tmp_path / "run" / "checkpoints" / "step_10")["bad"] == [["toys", 80, straight[9]["bad"]]]
    capsys.readouterr()
    settings = {"steps": 20, "save_every": 5, "keep_last": 9, "num_workers": 1}
    again = run_toy(Spotty(0.1), tmp_path / "run", **settings)
    assert again == straight
    assert f"% of the time waiting for data, {bad} of 160 samples bad" in capsys.readouterr().out


class DyingWorker(ToyTask):
    """The worker of rank `on` that loads the sixth batch is killed, as when memory runs out."""

    def __init__(self, on: int = 0) -> None:
        super().__init__()
        self.on, self.main = on, os.getpid()

    def build(self) -> Any:
        self.main = os.getpid()
        return super().build()

    def load_batch(self, indices: list[int], epoch: int) -> Any:
        if os.getpid() != self.main and rank() == self.on and indices == self.sixth():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load_batch(indices, epoch)

    def sixth(self) -> list[int]:
        world = int(os.environ.get("WORLD_SIZE", 1))
        return SampleOrder(50, 0).micro_batch(5 * 4, 4 // world, self.on)[0]


def test_a_worker_that_is_killed_is_told_in_one_line(tmp_path: Path, quick: None) -> None:
    settings = {"num_workers": 2, "save_every": 1}
    with pytest.raises(
        WorkerLostError, match=r"a worker .* is gone \(DataLoader worker .*; the same command"
    ) as caught:
        run_toy(DyingWorker(), tmp_path / "one", **settings)
    assert caught.value.exit_code == 75 and "\n" not in str(caught.value)
    assert not multiprocessing.active_children()  # though the error is still at hand
    assert run_toy(ToyTask(), tmp_path / "one", **settings) == run_toy(ToyTask(), tmp_path / "straight")
    found = run_ranks(2, outcome, DyingWorker(on=1), tmp_path / "two", 2, settings, outcomes_of=[0, 1], timeout=60)
    assert found[1][::2] == ("WorkerLostError", 75)
    assert found[0][::2] == (RankLostError.__name__, 75) and "rank 1 ended: a worker that loads data" in found[0][1]


def test_a_worker_that_dies_while_a_checkpoint_is_written_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises wherever the main thread happens to be."""

    def dies(*_: Any, **__: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with monkeypatch.context() as patch, pytest.raises(WorkerLostError, match="the same command goes on"):
        patch.setattr(torch, "save", dies)
        run_toy(ToyTask(), tmp_path / "one", num_workers=1, save_every=1)
    assert run_toy(ToyTask(), tmp_path / "one", save_every=1) == run_toy(ToyTask(), tmp_path / "straight")


def test_a_worker_without_shared_memory_would_only_fail_again() -> None:
    with pytest.raises(UserError, match="--shm-size") as caught, loader_deaths():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")
    assert caught.value.exit_code == 2
    with pytest.raises(RuntimeError, match="^something else"), loader_deaths():
        raise RuntimeError("something else")


class Unsendable:
    """Cannot be handed over by a worker, where it is made."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __reduce__(self) -> Any:
        raise RuntimeError(self.reason)


class Stuck(ToyTask):
    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def load_batch(self, indices: list[int], epoch: int) -> Any:
        return Unsendable(self.reason)


@pytest.mark.parametrize(
    ("reason", "kind", "said"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", UserError, "--shm"),
        ("cannot be pickled", WorkerLostError, "a worker that loads data is gone"),
    ],
)
def test_a_batch_that_cannot_be_handed_over_ends_the_run(
    reason: str, kind: type[UserError], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch's worker would drop it, and the loop wait for ever."""
    with pytest.raises(UserError, match=said) as caught:
        run_toy(Stuck(reason), tmp_path, num_workers=2)
    assert type(caught.value) is kind and not multiprocessing.active_children()
    assert f"a worker that loads data: {reason}" in capfd.readouterr().err


def test_what_a_dead_worker_has_sent_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory is asked for at the worker's own socket."""

    def reset(_self: Any) -> Any:
        os.kill(_self._workers[0].pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", reset)
    stream = batches(ToyTask(), SampleOrder(50, 0), 0, 50, 5, 2)
    with pytest.raises(WorkerLostError, match="Connection reset by peer|is killed by signal"), loader_deaths():
        next(stream)
    assert not multiprocessing.active_children()


def test_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit of processes is reached with the second: none is left, and nothing waits for the first."""
    fork, forked = os.fork, []

    def limited() -> int:
        if forked:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(UserError, match=r"cannot be started \(Resource temporarily unavailable\); lower num_workers"):
        next(batches(ToyTask(), SampleOrder(50, 0), 0, 50, 5, 2))
    gc.collect()
    assert not multiprocessing.active_children() and "Traceback" not in capsys.readouterr().err


# ---- stage one


PLAIN = {
    "loss": {"contrastive": 0, "adversarial": 0},
    "discriminator": {"enabled": False},
    "ema_decay": None,
}


def stage_one(folder: Path, source: Any, **values: Any) -> Path:
    """A configuration file of stage one without text and discriminator."""
    content = {**COMMON, **tokenizer_values(), **PLAIN, "output_dir": str(folder / "run"), "steps": 4, **values}
    content["model"]["text_tower"] = None
    content["data"] = {"source": source, **values.get("data", {})}
    content["engine"] = {**COMMON["engine"], "micro_batch_size": 4, **values.get("engine", {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def test_stage_one_over_two_ranks_meets_the_limit(tmp_path: Path, quick: None) -> None:
    """Two bad images on each of two ranks in the first epoch of 40: each alone is below 6 %, both are 10 %."""
    order = SampleOrder(40, 0)
    bad = {index for r in range(2) for start in (8, 24) for index in order.micro_batch(start, 4, r)[0][:1]}
    (tmp_path / "images").mkdir()
    for number in range(40):
        path = tmp_path / "images" / f"{number:02d}.png"
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
        if number in bad:
            path.write_bytes(b"no image")
    data = {"max_bad_fraction": 0.06}
    file = stage_one(tmp_path, str(tmp_path / "images"), data=data, steps=5)
    found = run_ranks(2, _train, file, outcomes_of=[0, 1])
    assert found[0] == found[1] and found[0][0] == "DataError", found
    assert f"{tmp_path / 'images'}: over all ranks 4 of 40 samples are bad" in found[0][1]
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [(record["read"], record["bad"]) for record in log] == [(8, 0), (16, 2), (24, 2)]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_of_stage_one_names_what_it_has_read(tmp_path: Path, mixed: bool) -> None:
    """The picture's colour tells which one it was: of a bad sample, its stand-in."""
    from unitok.core.config import load_config
    from unitok.tokenizer.task import TokenizerTask, TokenizerTrainConfig

    names = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(8):
            names.append(f"{folder}{number}")
            Image.new("RGB", (32, 32), (10 * len(names), 0, 0)).save(tmp_path / folder / f"{names[-1]}.png")
        for number in (1, 2, 7):
            (tmp_path / folder / f"{folder}{number}.png").write_bytes(b"no image")
    source = [{"source": str(tmp_path / folder), "weight": 1} for folder in "ab"] if mixed else str(tmp_path / "a")
    file = stage_one(tmp_path, source, data={"max_bad_fraction": 0.9})
    task = TokenizerTask(load_config(TokenizerTrainConfig, file, []))
    for epoch in (0, 1):
        indices = list(range(task.num_samples))
        batch = task.load_batch(indices, epoch)
        read = [names[round(float(pixels[0].float().mean()) / 10) - 1] for pixels in batch["pixels"]]
        assert [Path(key).stem for key in task.batch_keys(batch, indices, epoch)] == read
        assert not {name[1] for name in read} & set("127")


def _train(file: Path) -> Any:
    from unitok.core.config import load_config
    from unitok.tokenizer.task import TokenizerTask, TokenizerTrainConfig

    config = load_config(TokenizerTrainConfig, file, [])
    try:
        return train(TokenizerTask(config), config)
    except UserError as error:
        return type(error).__name__, str(error)


def test_stage_one_goes_on_with_the_same_mixture_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the weights stand in a file of their own, or in one that a mixture's member names."""

    def write(name: str, weights: tuple[int, int], sources: tuple[str, str]) -> str:
        members = [{"source": s, "weight": w, "name": n} for s, w, n in zip(sources, weights, names, strict=True)]
        (tmp_path / name).write_text(yaml.safe_dump(members))
        return str(tmp_path / name)

    names = ["A", "B"]
    shapes = ("shapes:train?num=30&size=32", "shapes:train?num=30&size=32&seed=5")
    inner = write("inner.yaml", (1, 1), shapes)
    outer = write("outer.yaml", (1, 1), (inner, shapes[1]))
    run = ["train", "tokenizer", "--config", str(stage_one(tmp_path, outer, save_every=2))]
    assert main(run) == 0, capsys.readouterr().err
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert [name for name in records[0] if name.startswith("bad")] == ["bad", "bad/A", "bad/B"]
    capsys.readouterr()
    for name, sources in (("inner.yaml", shapes), ("outer.yaml", (inner, shapes[1]))):
        write(name, (9, 1), sources)
        assert main([*run, "steps=8"]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "was trained on the mixture" in said and "resume with the same sources and weights" in said
        write(name, (1, 1), sources)
    names = ["A", "C"]
    write("outer.yaml", (1, 1), (inner, shapes[1]))
    assert main([*run, "steps=8"]) == 0
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == 8
