"""Stopped in mid-epoch and gone on with: the same samples at the same steps, with any number of ranks and workers.

Both stages; stage two mixes all its kinds with documents.
"""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from key_records import record_keys, recorded
from ranks import run_ranks
from stages import GLOBAL_BATCH, STEPS, run_stage, write_configs

from unitok.core.checkpoint import latest_complete
from unitok.core.runlog import read_log

pytestmark = pytest.mark.slow
SAMPLES, KILLED, SAVED = 48, 8, 6  # 24 of 48 samples are trained on when the run goes on, in step 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stages")
    write_configs(path)
    (path / "texts.txt").write_text("\n".join(f"a document about number {number}" for number in range(5)))
    return path


def options(stage: str, folder: Path, workers: int) -> list[str]:
    shared = [f"save_every={SAVED}", f"num_workers={workers}"]
    if stage == "tokenizer":
        return [*shared, "loss.adversarial=0", "discriminator.enabled=false", "data.augment=crop"]
    mixture = "{text: 0.3, text_to_image: 0.4, caption: 0.1, chat: 0.2}"
    return [*shared, f"data.mixture={mixture}", f"data.texts=[{folder / 'texts.txt'}]", "data.max_length=200"]


def run(stage: str, folder: Path, out: Path, world: int, workers: int, keys: str, kill: Any = None) -> None:
    def prepare(task: Any) -> None:
        multiprocessing.current_process()._config["daemon"] = False  # the test's ranks are, and have no children then

        def name(index: int, epoch: int) -> list[Any]:
            if stage == "tokenizer":
                return [task.batches.source.key(index), epoch]
            return [task.source.text(index).key, epoch, task.text_order.turn(index, epoch)]

        record_keys(task, out / keys, name)

    file = folder / f"{stage}.yaml"
    arguments = (stage, file, out, world, options(stage, folder, workers), kill, prepare)
    run_ranks(world, run_stage, *arguments, may_die=kill is not None)


@pytest.fixture(scope="module")
def straight(folder: Path, tmp_path_factory):
    """Undisturbed runs, made once: (stage, ranks) -> their folder."""
    done: dict[tuple[str, int], Path] = {}

    def get(stage: str, world: int) -> Path:
        if (stage, world) not in done:
            done[stage, world] = tmp_path_factory.mktemp(f"{stage}{world}")
            run(stage, folder, done[stage, world], world, 0, "keys")
        return done[stage, world]

    return get


@pytest.mark.parametrize("before,after,workers", [(1, 1, 0), (1, 1, 2), (2, 2, 0), (2, 2, 2), (2, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize("stage", ["tokenizer", "mllm"])
def test_the_next_samples_are_those_of_an_undisturbed_run(
    folder: Path, tmp_path: Path, straight: Any, stage: str, before: int, after: int, workers: int
) -> None:
    expected = recorded(straight(stage, 1) / "keys", range(STEPS))
    assert len(expected) == STEPS * GLOBAL_BATCH
    run(stage, folder, tmp_path, before, workers, "first", kill=(KILLED, before - 1))
    assert latest_complete(tmp_path / "checkpoints").name == f"step_{SAVED}"
    run(stage, folder, tmp_path, after, workers, "then")
    assert not recorded(tmp_path / "then", range(SAVED))
    found = recorded(tmp_path / "first", range(SAVED)) + recorded(tmp_path / "then", range(SAVED, STEPS))
    assert found == expected
    for number in range(STEPS * GLOBAL_BATCH // SAMPLES):  # whole epochs: none lost, none repeated
        epoch = found[number * SAMPLES : (number + 1) * SAMPLES]
        assert len({key for key, *_ in epoch}) == SAMPLES
        if stage == "mllm":
            assert sum(turn is not None for *_, turn in epoch) == round(0.3 * SAMPLES)
    log = read_log(tmp_path / "log.jsonl")
    if before == after:  # bit for bit
        assert log == read_log(straight(stage, before) / "log.jsonl")
    else:
        pairs = zip(log, read_log(straight(stage, 1) / "log.jsonl"), strict=True)
        assert max(abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]) for ours, theirs in pairs) < 1e-4
