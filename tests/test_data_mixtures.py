"""Weighted mixtures of sources: whose turn it is, what the log says, any number of processes."""

from collections import Counter

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from unitok.cli import main
from unitok.core.config import load_config
from unitok.core.errors import ConfigError, DataError
from unitok.core.runlog import read_log
from unitok.core.workers import forking
from unitok.data.images import ImageBatches, ImageDataConfig
from unitok.data.mixtures import MixtureSource
from unitok.data.source import open_source

SHARES = [
    {"source": "shapes:train?num=7&size=32", "weight": 0.5, "name": "seven"},
    {"source": "shapes:train?num=20&seed=1&size=32", "weight": 0.3},
    {"source": "shapes:val?num=3&size=32", "weight": 0.2, "name": "three"},
]


def test_every_sample_of_a_member_has_its_turn(caplog):
    """Whatever the epoch: the shares are exact, and no sample of a member comes twice more often than another."""
    mixture = open_source([*SHARES], seed=3)
    assert isinstance(mixture, MixtureSource) and len(mixture) == 30 and mixture.counts == [15, 9, 6]
    seen = [Counter(), Counter(), Counter()]
    for epoch in range(7):
        members = Counter()
        for index in range(30):
            source, number = mixture.turn(index, epoch)
            member = mixture.member(index)
            assert source is mixture.parts[member]
            members[member] += 1
            seen[member][number] += 1
        assert [members[k] for k in range(3)] == [15, 9, 6]
        for part, counts in zip(mixture.parts, seen, strict=True):
            times = [counts[n] for n in range(len(part))]
            assert max(times) - min(times) <= 1
    again = open_source([*SHARES], seed=3)
    assert [again.turn(n, 6)[1] for n in range(29, -1, -1)] == [mixture.turn(n, 6)[1] for n in range(29, -1, -1)]
    other = open_source([*SHARES], seed=4)
    assert [other.turn(n, 6)[1] for n in range(30)] != [mixture.turn(n, 6)[1] for n in range(30)]
    assert "seven 15 (2.14 passes)" in mixture.describe() and len(caplog.records) == 0


def test_forms_of_a_mixture(tmp_path):
    by_list = open_source([*SHARES])
    text = "mix:" + ";".join(f"{share['weight']}={share['source']}" for share in SHARES)
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(SHARES))
    for spec in (text, str(tmp_path / "mixture.yaml")):
        found = open_source(spec)
        assert found.counts == by_list.counts and [found.key(n) for n in range(30)] == [
            by_list.key(n) for n in range(30)
        ]
    plain = open_source("mix:shapes:train?num=4;shapes:val?num=6")
    assert plain.counts == [4, 6] and sorted(plain.turn(n, 5)[1] for n in range(4)) == [0, 1, 2, 3]
    config = load_config(ImageDataConfig, None, ["source=[{source: a, weight: 2}, {source: b, weight: 1e-1}]"])
    assert [share.weight for share in config.source] == [2, 0.1]
    with pytest.raises(ConfigError, match="wieght"):
        load_config(ImageDataConfig, None, ["source=[{source: a, wieght: 2}]"])
    wrong = {
        "mix:": "expected a list",
        "mix:1=shapes:val?num=4;shapes:val?num=6": "all or none",
        "mix:1=shapes:val?num=4;0=shapes:val?num=6": "greater than 0",
        "mix:1=shapes:val?num=4;0.001=shapes:val?num=6": "gets no sample of 10",
        "mix:1=nowhere": "'nowhere'",
        str(tmp_path / "gone.yaml"): "cannot be read",
    }
    for spec, message in wrong.items():
        with pytest.raises(DataError, match=message):
            open_source(spec)


def test_batches_of_a_mixture_do_not_depend_on_the_process(tmp_path):
    config = ImageDataConfig(source=SHARES, augment="crop")
    requests = [([29, 3, 17, 0], 0), ([5, 6, 7, 28], 4)]

    class Loads(torch.utils.data.Dataset):
        def __init__(self):
            self.batches = ImageBatches(config, 32, seed=1)

        def __getitem__(self, number):
            return self.batches.load(*requests[number])

        def __len__(self):
            return len(requests)

    expected = [Loads()[1], Loads()[0]][::-1]
    with forking():
        loaded = iter(DataLoader(Loads(), batch_size=None, num_workers=2))
    for got, wanted in zip(loaded, expected, strict=True):
        assert torch.equal(got["pixels"], wanted["pixels"]) and got["captions"] == wanted["captions"]
        assert torch.equal(got["sources"], wanted["sources"])
    counts = Loads().batches.count_sources(expected[0], times=2)
    assert {name: float(value) for name, value in counts.items()} == {
        "samples/seven": 4,
        "samples/shapes:train?num=20&seed=1&size=32": 2,
        "samples/three": 2,
    }


def test_training_on_a_mixture_logs_where_samples_came_from(tmp_path, capsys):
    from stages import COMMON, tokenizer_values

    values = {**COMMON, **tokenizer_values(), "output_dir": str(tmp_path / "run"), "steps": 15, "log_every": 1}
    values["data"] = {"source": SHARES}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    options = ["model.text_tower=null", "loss.contrastive=0", "loss.adversarial=0", "discriminator.enabled=false"]
    options += ["engine.micro_batch_size=2", "engine.accumulation_steps=2"]
    assert main(["train", "tokenizer", "--config", str(tmp_path / "config.yaml"), *options]) == 0, (
        capsys.readouterr().err
    )
    records = read_log(tmp_path / "run" / "log.jsonl")
    names = [name for name in records[0] if name.startswith("samples/")]
    assert len(names) == 3 and all(sum(record[name] for name in names) == 4 for record in records)
    totals = [sum(record[name] for record in records) for name in ("samples/seven", "samples/three")]
    assert totals == [30, 12]  # two epochs of 30 samples


def test_check_of_a_mixture(capsys):
    assert main(["data", "check", "mix:3=shapes:val?num=4&size=32;1=shapes:train?num=6&size=32", "--limit", "5"]) == 0
    out = capsys.readouterr().out
    assert "num_samples            9" in out and "shapes:val?num=4&size=32: 4 samples, 8 an epoch" in out


@pytest.mark.slow
def test_mixture_over_ranks_workers_and_a_kill(tmp_path):
    """Two ranks log what one logs, members' counts included; killed and resumed with workers is straight."""
    from equal_runs import check_equal
    from ranks import run_ranks
    from stages import COMMON, run_stage, tokenizer_values

    values = {**COMMON, **tokenizer_values(), "output_dir": "unset", "steps": 10, "save_every": 4}
    values["data"] = {"source": SHARES, "augment": "crop"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    straight = run_ranks(1, run_stage, "tokenizer", file, tmp_path / "straight", 1)[0]
    assert sum(record["samples/seven"] for record in straight) == pytest.approx(20, abs=4) and len(straight) == 10
    check_equal(run_ranks(2, run_stage, "tokenizer", file, tmp_path / "two", 2)[0], straight)
    run_ranks(1, run_stage, "tokenizer", file, tmp_path / "killed", 1, [], (6, 0), may_die=True)
    resumed = run_stage("tokenizer", file, tmp_path / "killed", 1, ["num_workers=2"])  # a rank may have no children
    assert [record["step"] for record in resumed] == list(range(1, 11))
    for name in ("samples/seven", "samples/three"):
        assert [record[name] for record in resumed] == [record[name] for record in straight]
    check_equal(resumed, straight)
