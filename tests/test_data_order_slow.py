"""Stopped in mid-epoch and gone on with: the same samples at the same steps, with any number of ranks and workers.

Both stages, with one source and with a mixture; stage two mixes all its kinds with documents.
"""

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from key_records import record_keys, recorded
from ranks import run_ranks
from stages import GLOBAL_BATCH, STEPS, run_stage, write_configs

from unitok.core.checkpoint import latest_complete
from unitok.core.runlog import read_log
from unitok.data.source import open_source
from unitok.tokenizer import UniTok
from unitok.tokenizer.extract import extract_codes

pytestmark = pytest.mark.slow
KILLED, SAVED = 8, 6  # 24 samples are trained on when the run goes on, in step 7: of an epoch of 48, or 30 of a mixture
CONVERSED = 12  # pictures of LLaVA's layout, with conversations
MIXTURES = {  # 30 samples an epoch, 20 and 10: more and less than there are; epochs end within a micro-batch
    "tokenizer": [("shapes:train?num=18&size=32", 2.0), ("shapes:val?num=12&size=32", 1.0)],
    "mllm": [("captions", 2.0), ("conversations", 1.0)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stages")
    write_configs(path)
    (path / "texts.txt").write_text("\n".join(f"a document about number {number}" for number in range(5)))
    tokenizer = UniTok.from_pretrained(path / "visual")
    for name, source in {
        "captions": "shapes:val?num=18&seed=3&size=32",
        "conversations": _llava(path / "llava"),
    }.items():
        extract_codes(tokenizer, open_source(source), path / name, progress=False)
    return path


def _llava(folder: Path) -> str:
    """Pictures with conversations, in LLaVA's layout."""
    scenes, records = open_source(f"shapes:val?num={CONVERSED}&seed=4&size=32"), []
    folder.mkdir()
    for number in range(CONVERSED):
        scenes[number].image.save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": scenes.texts(number)[0]},
        ]
        records.append({"id": f"conversed {number}", "image": f"{number}.png", "conversations": turns})
    (folder / "all.json").write_text(json.dumps(records))
    return f"{folder / 'all.json'}?images={folder}"


def options(stage: str, folder: Path, workers: int, mixed: bool) -> list[str]:
    options = [f"save_every={SAVED}", f"num_workers={workers}"]
    if mixed:
        places = [(source if ":" in source else str(folder / source), weight) for source, weight in MIXTURES[stage]]
        shares = ", ".join(f"{{source: '{source}', weight: {weight}}}" for source, weight in places)
        options.append(f"data.{'source' if stage == 'tokenizer' else 'codes'}=[{shares}]")
    if stage == "tokenizer":
        return [*options, "loss.adversarial=0", "discriminator.enabled=false", "data.augment=crop"]
    if mixed:
        return [*options, "data.max_length=200"]
    mixture = "{text: 0.3, text_to_image: 0.4, caption: 0.1, chat: 0.2}"
    return [*options, f"data.mixture={mixture}", f"data.texts=[{folder / 'texts.txt'}]", "data.max_length=200"]


def run(kind: str, folder: Path, out: Path, world: int, workers: int, keys: str, kill: Any = None) -> None:
    stage, _, mixed = kind.partition(" ")

    def prepare(task: Any) -> None:
        multiprocessing.current_process()._config["daemon"] = False  # the test's ranks are, and have no children then

        def name(index: int, epoch: int) -> list[Any]:
            if mixed or stage == "tokenizer":
                return [task.sample_keys([index], epoch)[0], *task.place(index, epoch)]
            return [task.source.text(index).key, epoch, task.text_order.turn(index, epoch)]

        record_keys(task, out / keys, name)

    file = folder / f"{stage}.yaml"
    arguments = (stage, file, out, world, options(stage, folder, workers, bool(mixed)), kill, prepare)
    run_ranks(world, run_stage, *arguments, may_die=kill is not None)


@pytest.fixture(scope="module")
def straight(folder: Path, tmp_path_factory):
    """Undisturbed runs, made once: (kind, ranks) -> their folder."""
    done: dict[tuple[str, int], Path] = {}

    def get(kind: str, world: int) -> Path:
        if (kind, world) not in done:
            done[kind, world] = tmp_path_factory.mktemp(f"{kind.replace(' ', '_')}{world}")
            run(kind, folder, done[kind, world], world, 0, "keys")
        return done[kind, world]

    return get


@pytest.mark.parametrize("before,after,workers", [(1, 1, 0), (1, 1, 2), (2, 2, 0), (2, 2, 2), (2, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize("kind", ["tokenizer", "mllm", "tokenizer mixture", "mllm mixture"])
def test_the_next_samples_are_those_of_an_undisturbed_run(
    folder: Path, tmp_path: Path, straight: Any, kind: str, before: int, after: int, workers: int
) -> None:
    expected = recorded(straight(kind, 1) / "keys", range(STEPS))
    assert len(expected) == STEPS * GLOBAL_BATCH
    run(kind, folder, tmp_path, before, workers, "first", kill=(KILLED, before - 1))
    assert latest_complete(tmp_path / "checkpoints").name == f"step_{SAVED}"
    run(kind, folder, tmp_path, after, workers, "then")
    assert not recorded(tmp_path / "then", range(SAVED))
    found = recorded(tmp_path / "first", range(SAVED)) + recorded(tmp_path / "then", range(SAVED, STEPS))
    assert found == expected
    log = read_log(tmp_path / "log.jsonl")
    if "mixture" in kind:
        check_mixed_epochs(found, log)
    else:
        check_epochs(found, kind)
    if before == after:  # bit for bit
        assert log == read_log(straight(kind, before) / "log.jsonl")
    else:
        pairs = zip(log, read_log(straight(kind, 1) / "log.jsonl"), strict=True)
        assert max(abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]) for ours, theirs in pairs) < 1e-4


def check_epochs(found: list[Any], stage: str) -> None:
    """Whole epochs: none lost, none repeated."""
    samples = 48
    for number in range(len(found) // samples):
        epoch = found[number * samples : (number + 1) * samples]
        assert len({key for key, *_ in epoch}) == samples
        if stage == "mllm":
            assert sum(turn is not None for *_, turn in epoch) == round(0.3 * samples)


def check_mixed_epochs(found: list[Any], log: list[dict[str, Any]]) -> None:
    """Every place of an epoch once; members' shares exact; counted over epochs, none twice more often than another."""
    samples, members = 30, {18: 20, 12: 10}  # size -> share
    seen: Counter[str] = Counter()
    for number in range(len(found) // samples):
        epoch = found[number * samples : (number + 1) * samples]
        assert sorted(index for _, index, _ in epoch) == list(range(samples)) and {e for *_, e in epoch} == {number}
        seen.update(key for key, *_ in epoch)
        for size, share in members.items():
            times = sorted(count for key, count in seen.items() if member_size(key) == size)
            assert sum(times) == share * (number + 1)
            assert times[-1] - (times[0] if len(times) == size else 0) <= 1, (number, times)
    names = [name for name in log[0] if name.startswith("samples/")]
    sizes = [sum(member_size(key) == size for key, *_ in found) for size in members]
    assert [sum(record[name] for record in log) for name in names] == sizes


def member_size(key: str) -> int:
    """The size of the member that a sample of a mixture is of."""
    return 18 if key.startswith(("train-0-", "val-3-")) else 12
