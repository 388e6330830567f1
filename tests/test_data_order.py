"""The order of samples: permutations that need no memory, checkpoints that tell theirs, exact positions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_toys import ToyTask, run_toy
from key_records import record_keys, recorded

from unitok.core import permutation
from unitok.core.errors import CheckpointError, ConfigError
from unitok.core.permutation import Permutation
from unitok.core.rng import numpy_rng
from unitok.core.sampling import SampleOrder, WindowOrder, batches, check_same_order, order_of
from unitok.data.bad import SampleError
from unitok.data.texts import TextOrder


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 12, 17, 99, 100, 101, 1024, 4097, 9999, 30011])
def test_every_item_comes_once(size: int) -> None:
    found = [Permutation(size, "key", size, whole_below=1)[i] for i in range(size)]
    assert sorted(found) == list(range(size))
    assert size < 9 or found != sorted(found)


def test_keys_decide() -> None:
    def draw(*key: int | str) -> list[int]:
        return [Permutation(1000, *key, whole_below=1)[i] for i in range(1000)]

    assert draw("a", 1) == draw("a", 1)
    same = np.mean(np.array(draw("a", 1)) == np.array(draw("a", 2)))
    assert same < 0.01  # as of two independent ones: one in a thousand


def test_small_ones_are_the_shuffle_that_runs_have_always_had() -> None:
    expected = numpy_rng("order", 3, 1).permutation(50)
    assert [SampleOrder(50, 3).index(50 + i) for i in range(50)] == expected.tolist()
    assert permutation.kind_of_order(2**22 - 1) == "shuffle" and permutation.kind_of_order(2**22) == "feistel-8"


def test_places_are_uniform_and_neighbours_part() -> None:
    """Where an item goes is uniform over keys; neighbours' distances are those of a random permutation."""
    size, keys = 60, 6000
    places = np.array([[Permutation(size, "u", k, whole_below=1)[i] for i in (0, 1, 31)] for k in range(keys)])
    for column in places.T:
        chi = ((np.bincount(column, minlength=size) - keys / size) ** 2 / (keys / size)).sum()
        assert chi < 59 + 5 * (2 * 59) ** 0.5  # mean 59, deviation sqrt(118)
    pairs = np.bincount(places[:, 0] * size + places[:, 1], minlength=size * size).reshape(size, size)
    expected = keys / (size * (size - 1))
    chi = ((pairs - expected) ** 2)[~np.eye(size, dtype=bool)].sum() / expected
    assert abs(chi - 3539) < 5 * (2 * 3539) ** 0.5
    walk = np.array([Permutation(100_000, "n", whole_below=1)[i] for i in range(20_000)])
    assert abs(np.abs(np.diff(walk)).mean() / 100_000 - 1 / 3) < 0.01
    assert abs(np.corrcoef(walk, np.arange(20_000))[0, 1]) < 0.03


def test_a_billion_takes_no_memory() -> None:
    """Any position at once; ranks agree; an epoch's end goes over into the next."""
    size = 10**9 + 7
    order = SampleOrder(size, 0)
    starts = (0, 123_456_789_000, 7 * size - 3)
    for start in starts:
        whole, epoch = order.micro_batch(start, 8, 0)
        parts = [SampleOrder(size, 0).micro_batch(start, 2, rank) for rank in range(4)]
        assert [index for part, _ in parts for index in part] == whole and {e for _, e in parts} == {epoch}
        assert len(set(whole)) >= 7 and all(0 <= index < size for index in whole)
    texts = TextOrder(size, 0.5, 10**9, 0)
    turns = [texts.turn(index, 3) for index in range(2000)]
    assert 850 < sum(turn is not None for turn in turns) < 1150


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_windows_of_shards_visit_every_sample_once(window: int) -> None:
    """Shards of any size, empty ones too; a window's samples stand together and are shuffled."""
    sizes = [7, 0, 30, 1, 12, 5, 0, 21, 9, 15]
    total, shard_of = sum(sizes), np.repeat(np.arange(10), sizes)
    order = WindowOrder(sizes, 5, window)
    epochs = [[order.index(epoch * total + i) for i in range(total)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        shards = list(dict.fromkeys(shard_of[epoch].tolist()))
        changes = int((np.diff(shard_of[epoch]) != 0).sum())
        assert changes == len(shards) - 1 if window == 1 else changes > len(shards)
        last_seen = {shard: max(i for i, index in enumerate(epoch) if shard_of[index] == shard) for shard in shards}
        first_seen = {shard: [shard_of[i] for i in epoch].index(shard) for shard in shards}
        open_at = [sum(first_seen[s] <= i <= last_seen[s] for s in shards) for i in range(total)]
        assert max(open_at) <= window
        assert epoch != sorted(epoch)
    again = WindowOrder(sizes, 5, window)
    assert [again.index(position) for position in (250, 3, 150)] == [epochs[2][50], epochs[0][3], epochs[1][50]]


def test_windows_of_a_billion_samples() -> None:
    order = WindowOrder([10_000] * 100_000, 0, 16)
    first = [order.index(5 * 10**9 + position) for position in range(0, 160_000, 100)]
    assert len({index // 10_000 for index in first}) == 16 and len(set(first)) == 1600


class Sharded(ToyTask):
    shard_sizes = [20, 10, 0, 20]


def test_another_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of before (they name none) go on where nothing has changed for them."""
    run_toy(Sharded(), tmp_path / "a", steps=2)
    run_toy(Sharded(), tmp_path / "a", steps=3)
    check_same_order(tmp_path, {}, {"order": "shuffle"})
    with pytest.raises(CheckpointError, match="'shuffle'.*'windows of 2 shards'"):
        run_toy(Sharded(), tmp_path / "a", steps=4, shuffle_window=2)
    with pytest.raises(ConfigError, match="no shards"):
        run_toy(ToyTask(), tmp_path / "b", steps=4, shuffle_window=2)
    monkeypatch.setattr(permutation, "WHOLE_BELOW", 8)
    with pytest.raises(CheckpointError, match="'shuffle'.*'feistel-8'"):
        run_toy(ToyTask(), tmp_path / "a", steps=4)


@pytest.mark.parametrize("workers,window", [(0, 0), (2, 0), (2, 2)])
def test_stopped_in_mid_epoch_the_next_samples_follow(tmp_path: Path, workers: int, window: int) -> None:
    """Two micro-batches of 4 a step, 50 samples: stopped after 5 of 20 steps, at sample 40 of the first epoch."""
    order = order_of(Sharded(), 0, window)
    expected = [order.index(position) for position in range(160)]

    def run(name: str, **options: Any) -> None:
        task = Sharded(**options)
        record_keys(task, tmp_path / name, lambda index, epoch: index)
        run_toy(task, tmp_path, num_workers=workers, shuffle_window=window)

    with pytest.raises(SystemExit):
        run("first", event=("term", 4, 0))
    run("then")
    assert not recorded(tmp_path / "then", range(5))
    found = recorded(tmp_path / "first", range(5)) + recorded(tmp_path / "then", range(5, 20))
    assert found == expected and all(len(set(found[start : start + 50])) == 50 for start in (0, 50, 100))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mistake_in_the_data_is_the_same_line_with_and_without_workers(num_workers):
    """torch would wrap what a worker raises in its traceback; one of more than a message keeps what it has."""

    class Broken(ToyTask):
        def load_batch(self, indices, epoch):
            raise SampleError("shard 3: the picture is cut off", "truncated")

    stream = batches(Broken(), SampleOrder(50, 0), 0, 50, 5, num_workers)
    with pytest.raises(SampleError) as caught:
        next(stream)
    assert str(caught.value) == "shard 3: the picture is cut off" and caught.value.kind == "truncated"
