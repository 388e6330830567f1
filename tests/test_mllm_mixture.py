"""Stage two over weighted mixtures of code folders: whose turn it is, what the log says, what is refused."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from stages import make_task, task_of, write_configs

from unitok.cli import main
from unitok.core.checkpoint import latest_complete
from unitok.core.errors import CheckpointError, ConfigError, DataError
from unitok.core.sampling import order_of
from unitok.data.code_mixtures import CodeMixture
from unitok.data.codes import CodeSource, write_codes
from unitok.data.source import open_source
from unitok.mllm.mixture import drawn
from unitok.tokenizer import UniTok
from unitok.tokenizer.extract import extract_codes

SIZES = {"pairs": 18, "talks": 8, "lines": 4}  # 30 samples an epoch
SHARES = {"pairs": (0.5, 15), "talks": (0.3, 9), "lines": (0.2, 6)}  # weight, and samples of an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Codes of captioned scenes, of LLaVA's JSON with conversations, and of JSON lines with both."""
    path = tmp_path_factory.mktemp("mixture")
    write_configs(path)
    scenes = open_source("shapes:val?num=12&seed=4&size=32")
    (path / "images").mkdir()
    llava, lines = [], []
    for number in range(12):
        scenes[number].image.save(path / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": scenes.texts(number)[0]}]
        if number < SIZES["talks"]:
            llava.append({"id": f"talk {number}", "image": f"{number}.png", "conversations": turns})
        else:
            record = {"id": f"line {number}", "image": f"{number}.png", "caption": "a line", "conversations": turns}
            lines.append(json.dumps(record))
    (path / "talks.json").write_text(json.dumps(llava))
    (path / "lines.jsonl").write_text("\n".join(lines))
    tokenizer = UniTok.from_pretrained(path / "visual")
    images = f"?images={path / 'images'}"
    sources = (
        f"shapes:val?num={SIZES['pairs']}&seed=3&size=32",
        f"{path}/talks.json{images}",
        f"{path}/lines.jsonl{images}",
    )
    for name, source in zip(SIZES, sources, strict=True):
        extract_codes(tokenizer, open_source(source), path / name, progress=False)
    (path / "texts.txt").write_text("\n".join(f"document number {number}" for number in range(5)))
    shares = [{"source": str(path / name), "weight": weight, "name": name} for name, (weight, _) in SHARES.items()]
    (path / "mixture.yaml").write_text(yaml.safe_dump(shares))
    return path


def mixed(folder: Path, spec: str = "") -> str:
    return f"data.codes={spec or folder / 'mixture.yaml'}"


def test_every_sample_has_its_turn_whatever_the_form(folder: Path, tmp_path: Path) -> None:
    """Epochs that end within a micro-batch too: shares are exact, none comes twice more often than another."""
    task = task_of(folder, tmp_path, mixed(folder))
    assert isinstance(task.source, CodeMixture) and task.num_samples == 30 and task.epochs_differ
    order, seen = order_of(task, task.config.seed), Counter()
    for epoch in range(4):
        keys = []
        for start in range(30 * epoch // 4 * 4, 30 * (epoch + 1), 4):  # micro-batches that reach into this epoch
            indices, first = order.micro_batch(start, 4, 0)
            places = [task.place(index, first) for index in indices]
            keys += [k for k, (_, e) in zip(task.sample_keys(indices, first), places, strict=True) if e == epoch]
        members = Counter("talks" if k[:4] == "talk" else "lines" if k[:4] == "line" else "pairs" for k in keys)
        assert members == {name: count for name, (_, count) in SHARES.items()}
        seen.update(keys)
        for start, size in (("val", 18), ("talk", 8), ("line", 4)):
            times = [count for key, count in seen.items() if key.startswith(start)]
            assert max(times) - (min(times) if len(times) == size else 0) <= 1
    by_text = "mix:" + ";".join(f"{weight}={folder / name}" for name, (weight, _) in SHARES.items())
    by_list = "[" + ", ".join(f"{{source: '{folder / n}', weight: {w}}}" for n, (w, _) in SHARES.items()) + "]"
    for spec in (by_text, by_list):
        other = task_of(folder, tmp_path, mixed(folder, spec))
        assert other.sample_keys(list(range(30)), 3) == task.sample_keys(list(range(30)), 3)


def test_a_step_counts_its_members_and_all_kinds_take_part(folder: Path, tmp_path: Path) -> None:
    texts = [f"data.texts=[{folder / 'texts.txt'}]", "data.mixture={text_to_image: 2, caption: 1, chat: 2, text: 2}"]
    task = task_of(folder, tmp_path, mixed(folder), *texts)
    task.build()
    order, totals = order_of(task, task.config.seed), Counter()
    for start in range(0, 60, 4):
        batch = task.load_batch(*order.micro_batch(start, 4, 0))
        task.prepare_step([batch], start // 4)
        named = {name: number for name, number in task._samples.items() if "/" in name}
        assert set(named) == {"samples/pairs", "samples/talks", "samples/lines"}
        assert sum(named.values()) + task._samples["samples_text"] == 4
        totals.update(task._samples)
    documents = 2 * round(30 * 2 / 7)
    assert totals["samples_text"] == documents  # of two epochs, the second of which begins within a micro-batch
    assert sum(totals[f"samples/{name}"] for name in SIZES) == 60 - documents
    assert totals["samples_chat"] > totals["samples/talks"] > 0 and totals["samples_text_to_image"] > 0


def test_a_sample_that_comes_twice_is_drawn_for_twice(folder: Path, tmp_path: Path) -> None:
    """Four samples at six places of an epoch: task and words depend on the place."""
    task = task_of(folder, tmp_path, mixed(folder))
    task.build()
    different = 0
    for epoch in range(6):
        of_sample: dict[int, set[tuple[int, ...]]] = {}
        for place in range(24, 30):
            source, number = task.source.turn(place, epoch)
            assert source.name.endswith("lines")
            of_sample.setdefault(number, set()).add(tuple(task._load(place, epoch).sequence.ids))
        assert len(of_sample) == 4
        different += sum(len(sequences) > 1 for sequences in of_sample.values())
    assert different > 0


def test_the_words_of_all_members_make_the_text_tokenizer(folder: Path, tmp_path: Path) -> None:
    words = task_of(folder, tmp_path, mixed(folder))._words()
    assert "a line" in words and any(text.endswith("What is this?") for text in words)
    assert set(open_source("shapes:val?num=18&seed=3&size=32").texts(5)) <= set(words)


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, *options: str) -> None:
        with pytest.raises(error, match=match) as caught:
            task_of(folder, tmp_path, *options)
        assert "\n" not in str(caught.value)

    codes = CodeSource(folder / "lines")
    write_codes([codes[0]], tmp_path / "foreign", codes.header | {"tokenizer": "0" * 16})
    refused(
        DataError, "foreign: tokenizer of the codes is '0000", mixed(folder, f"mix:{folder}/pairs;{tmp_path}/foreign")
    )
    refused(DataError, "give it to all or none", mixed(folder, f"mix:1={folder}/pairs;{folder}/talks"))
    refused(DataError, "gets no sample of 26", mixed(folder, f"mix:1={folder}/pairs;0.001={folder}/talks"))
    refused(DataError, "gone has no header.json", mixed(folder, f"mix:1={folder}/pairs;1={folder}/gone"))
    write_codes([codes[0]], tmp_path / "padded", codes.header | {"preprocess": "padded"})
    refused(DataError, "in different ways .*'padded'", mixed(folder, f"mix:{folder}/pairs;{tmp_path}/padded"))
    task = task_of(folder, tmp_path, mixed(folder))
    with pytest.raises(DataError, match="pairs holds codes without latents"):
        task.source.read_latents()


@pytest.mark.parametrize("stage", ["tokenizer", "mllm"])
def test_windows_of_shards_are_refused_for_mixtures(folder: Path, tmp_path: Path, stage: str) -> None:
    """Members have their own turns through the epochs, which windows of shards would tear apart."""
    spec = mixed(folder) if stage == "mllm" else "data.source=mix:shapes:val?num=4&size=32;shapes:val?num=6&size=32"
    task, config = make_task(stage, folder / f"{stage}.yaml", tmp_path, 1, [spec, "shuffle_window=2"])
    with pytest.raises(
        ConfigError, match=r"shuffle_window=2: the data are no shards, or a mixture .* leave it at 0"
    ) as caught:
        order_of(task, config.seed, config.shuffle_window)
    assert "\n" not in str(caught.value)


def test_training_logs_the_members_and_other_weights_cannot_go_on(folder: Path, tmp_path: Path, capsys) -> None:
    run = ["train", "mllm", "--config", str(folder / "mllm.yaml"), f"output_dir={tmp_path / 'run'}", "steps=3"]
    run += ["engine.micro_batch_size=4", "data.max_length=200", "save_every=2"]
    assert main([*run, mixed(folder)]) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(sum(record[f"samples/{name}"] for name in SIZES) == 4 for record in records) and len(records) == 3
    assert latest_complete(tmp_path / "run" / "checkpoints").name == "step_3"
    capsys.readouterr()
    other = f"mix:1={folder}/pairs;1={folder}/talks;1={folder}/lines"
    assert main([*run, "steps=6", mixed(folder, other)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "trained on the mixture" in said and "15, 18], " in said and "10, 18], " in said
    task = task_of(folder, tmp_path / "run", f"data.codes={folder}/{{pairs,talks,lines}}")
    with pytest.raises(CheckpointError, match="the data now give None"):
        task.load_extra_state(task_of(folder, tmp_path, mixed(folder)).extra_state())
    assert torch.equal(task.source[0].codes, CodeSource(folder / "pairs")[0].codes)


@pytest.mark.parametrize("weights", [[1], [0.72, 0.03, 0.25], [0, 1, 0, 3, 0], [1e-9, 1, 1e9], [16, 81, 625, 625]])
def test_what_is_drawn_is_what_numpy_draws(weights):
    ours, theirs = np.random.default_rng(5), np.random.default_rng(5)
    shares = [weight / sum(weights) for weight in weights]
    found = [drawn(weights, ours) for _ in range(2000)]
    assert found == [int(theirs.choice(len(weights), p=shares)) for _ in range(2000)]
    assert ours.random() == theirs.random() and all(weights[number] > 0 for number in found)
