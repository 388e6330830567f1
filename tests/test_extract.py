"""Extraction of codes by many processes: the same bytes however the work is shared, interrupted or repeated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from extraction import SPEC, made, make_shards
from test_data_sources import fill_folder
from tiny import make_tokenizer

from unitok.cli import main
from unitok.core.distributed import inference_device
from unitok.core.errors import ConfigError, DataError
from unitok.data.code_units import units_of
from unitok.data.codes import CodeSource
from unitok.data.source import open_source
from unitok.data.transforms import eval_transform
from unitok.tokenizer.extract import Share, extract_codes


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def expected(tokenizer, shards, tmp_path_factory) -> dict[str, bytes]:
    return made(extract_codes(tokenizer, open_source(shards), tmp_path_factory.mktemp("codes"), 3, progress=False))


def test_codes_are_those_of_the_tokenizer(tokenizer, shards, expected, tmp_path):
    assert sorted(expected) == sorted(
        ["header.json", *(f"codes-{n:05d}.{end}" for n in range(5) for end in ("json", "tar"))]
    )
    out = extract_codes(
        tokenizer, open_source(shards), tmp_path / "out", 4, progress=False, latents=True, num_workers=2
    )
    codes, source = CodeSource(out), open_source(SPEC)
    assert len(codes) == 23 and codes.header["shards"] == 5 and codes.header["failed"] == 0
    codes.read_latents()
    for index in (0, 7, 22):
        pixels = eval_transform(source[index].image, 32)[None]
        assert torch.equal(codes[index].codes, tokenizer.encode(pixels)[0])
        assert codes[index].latents.shape == tokenizer.latents(pixels)[0].shape
        assert codes[index].key == source[index].key and codes[index].captions == source[index].captions
    said = json.loads((out / "codes-00004.json").read_text())
    assert (said["count"], said["samples"], said["failures"]) == (3, 3, [])
    log = [json.loads(line) for line in (out / "extract-rank0.jsonl").read_text().splitlines()]
    assert [record["images"] for record in log] == [5, 5, 5, 5, 3] and all(r["images_per_s"] > 0 for r in log)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_gives_the_same_bytes(tokenizer, shards, expected, tmp_path, world):
    """Each one alone, the last first: only who finds all done writes the header."""
    for rank in reversed(range(world)):
        assert not (tmp_path / "header.json").exists()
        with pytest.raises(DataError, match="no header"):
            CodeSource(tmp_path)
        extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False, share=Share(rank, world))
    assert made(tmp_path) == expected


def test_what_is_done_is_kept_and_what_is_damaged_made_again(tokenizer, shards, expected, tmp_path, monkeypatch):
    for name, data in expected.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "codes-00001.tar").write_bytes(expected["codes-00001.tar"][:-1])
    (tmp_path / "codes-00002.tar").unlink()
    (tmp_path / "codes-00003.tar").unlink()
    (tmp_path / "codes-00003.json").unlink()
    (tmp_path / ".codes-00003.tar.host-1.tmp").write_bytes(b"of a killed process")
    encoded = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda pixels: (encoded.append(len(pixels)), encode(pixels))[1])
    extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False)
    assert sum(encoded) == 15 and made(tmp_path) == expected
    extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False)
    assert sum(encoded) == 15 and made(tmp_path) == expected


def test_an_empty_file_of_a_machine_that_failed_is_made_again(tokenizer, shards, expected, tmp_path):
    extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False)
    first = min(tmp_path.glob("codes-*.json"))
    first.write_bytes(b"")
    with pytest.raises(DataError, match=r"is not JSON .*; remove it and its \.tar, and they are made again"):
        extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False)
    first.with_suffix(".tar").unlink()
    (tmp_path / "header.json").unlink()
    extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False)
    assert made(tmp_path) == expected


def test_fetched_shards_are_the_same_wherever_and_whenever(tokenizer, shards, tmp_path, monkeypatch):
    """The time of a fetched file is that of the fetch."""
    source, other = (f"file://{path}" for path in sorted(Path(shards).glob("*.tar"))[:2])
    for spec, out in ((source, tmp_path / "out"), (f"mix:{source};{other}", tmp_path / "mixed")):
        seen = []
        for name in ("one", "two"):
            monkeypatch.setenv("UNITOK_CACHE", str(tmp_path / name))
            extract_codes(tokenizer, open_source(spec), out, 3, progress=False)
            seen.append({path.name: path.stat().st_mtime_ns for path in out.glob("codes-*")})
        assert seen[0] == seen[1] and len(seen[0]) == 2
    fetched = next((tmp_path / "two").rglob(source.rpartition("/")[2]))
    fetched.write_bytes(sorted(Path(shards).glob("*.tar"))[1].read_bytes())
    with pytest.raises(DataError, match="input is '.*', this run has"):
        extract_codes(tokenizer, open_source(source), tmp_path / "out", 3, progress=False)


def test_codes_of_something_else_are_refused(tokenizer, shards, expected, tmp_path):
    for name, data in expected.items():
        (tmp_path / name).write_bytes(data)
    run = {"out": tmp_path, "batch_size": 3, "progress": False}
    with pytest.raises(DataError, match="tokenizer is '[0-9a-f]+', this run has '[0-9a-f]+'"):
        extract_codes(make_tokenizer(seed=5), open_source(shards), **run)
    with pytest.raises(DataError, match="latent_width is None, this run has"):
        extract_codes(tokenizer, open_source(shards), **run, latents=True)
    with pytest.raises(DataError, match=r"input is 'shard-00000.tar .*shapes:train\?num=24"):
        extract_codes(tokenizer, open_source("shapes:train?num=24&size=32"), **run)
    with pytest.raises(DataError, match="codes-00001.tar, which this source does not give"):
        extract_codes(tokenizer, open_source(str(shards / "shard-00000.tar")), **run)
    assert made(tmp_path) == expected
    (tmp_path / "codes-00004.json").unlink()
    with pytest.raises(DataError, match="without its codes-00004.json"):
        extract_codes(tokenizer, open_source(shards), **run)


def test_a_source_may_grow(tokenizer, shards, expected, tmp_path):
    """More shards after those that are done: the old header goes before the new codes come."""
    part = open_source(str(shards / "shard-0000{0..2}.tar"))
    out = extract_codes(tokenizer, part, tmp_path, 3, progress=False)
    assert len(CodeSource(out)) == 15
    extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False, share=Share(0, 2))
    assert not (out / "header.json").exists()
    extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False, share=Share(1, 2))
    assert made(out) == expected


def test_failures_are_counted_and_too_many_are_fatal(tokenizer, tmp_path):
    folder = fill_folder(tmp_path / "images", bad=(3, 4))
    source = open_source(folder, max_bad_fraction=0.2)
    for rank in (0, 1):
        extract_codes(tokenizer, source, tmp_path / "out", 2, progress=False, share=Share(rank, 2), unit_size=4)
    codes = CodeSource(tmp_path / "out")
    assert len(codes) == 8 and codes.header["failed"] == 2 and codes.header["shards"] == 3
    assert [codes[i].key for i in range(8)] == [f"im{i}" for i in (0, 1, 2, 5, 6, 7, 8, 9)]
    failures = [json.loads((tmp_path / "out" / f"codes-{n:05d}.json").read_text())["failures"] for n in range(3)]
    assert [[key for key, _ in found] for found in failures] == [["im3"], ["im4"], []]
    assert "not a readable image" in failures[0][0][1]
    source.max_bad_fraction = 0.1
    for kept in (tmp_path / "out", tmp_path / "new"):  # found in the files, and met
        with pytest.raises(DataError, match="2 of 10 images failed.*0.1"):
            extract_codes(tokenizer, source, kept, 2, progress=False, unit_size=4)
    with pytest.raises(DataError, match="no header"):
        CodeSource(tmp_path / "new")


def test_names_and_words_that_are_not_utf8_go_through(tokenizer, tmp_path):
    """Keys and reasons are written for both: a file's name that is not UTF-8, an id and a field that are no text."""
    fill_folder(tmp_path / "f", count=3)
    for name in (b"\xff.png", b"\xff\xe9.png"):
        (tmp_path / "f" / name.decode("utf-8", "surrogateescape")).write_bytes(
            (tmp_path / "f" / "im0.png").read_bytes()
        )
    (tmp_path / "f" / b"\xff\xea.png".decode("utf-8", "surrogateescape")).write_bytes(b"nonsense")
    lines = [{"image": "f/im0.png"}, {"image": "f/im0.png", "id": "\ud800"}, {"image": "f/im0.png", "url": "\ud800"}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, keys, failed in (("f", ["im0", "im1", "im2", r"\xff", r"\xff\xe9"], 1), ("r.jsonl", ["r-000000"], 2)):
        source = open_source(tmp_path / name, max_bad_fraction=0.7)
        codes = CodeSource(extract_codes(tokenizer, source, tmp_path / f"codes-{name}", 2, progress=False))
        assert [codes[n].key for n in range(len(codes))] == keys
        assert len(json.loads((codes.folder / "codes-00000.json").read_bytes())["failures"]) == failed


def test_broken_files_without_shards_are_failures_too(tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    fill_folder(tmp_path / "f", count=1)
    image = (tmp_path / "f" / "im0.png").read_bytes()
    for name in "ab":
        pa.parquet.write_table(pa.table({"image": [image] * 3}), tmp_path / f"{name}.parquet")
    (tmp_path / "a.parquet").write_bytes(b"")
    source = open_source(tmp_path, max_bad_fraction=0.5)
    out = extract_codes(tokenizer, source, tmp_path / "codes", 2, progress=False, unit_size=2)
    said = [json.loads((out / f"codes-0000{unit}.json").read_text())["failures"] for unit in range(2)]
    assert [name for name, _ in said[0]] == ["a.parquet"] and said[1] == []
    assert json.loads((out / "header.json").read_text())["failed"] == 1


def test_the_size_of_a_unit_is_an_option_where_there_are_no_shards(tokenizer, shards, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = ["data", "codes", "--tokenizer", str(tmp_path / "tokenizer"), "--unit-size", "9"]
    for rank in range(3):
        share = ["--rank", str(rank), "--world-size", "3"]
        assert main([*command, "--shards", SPEC, "--out", str(tmp_path / "out"), *share]) == 0
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.tar")) == [f"codes-0000{n}" for n in range(3)]
    assert CodeSource(tmp_path / "out").header["count"] == 23
    assert main([*command[:-1], "10", "--shards", SPEC, "--out", str(tmp_path / "out")]) == 2
    assert "0:9" in capsys.readouterr().err
    assert main([*command, "--shards", str(shards), "--out", str(tmp_path / "none")]) == 2
    assert "--unit-size 9" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_codes_are_not_written_among_what_they_are_made_of(tokenizer, shards, tmp_path, capsys):
    """They would hide the pictures of a folder, and count as shards of it."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    fill_folder(tmp_path / "images", count=3)
    copies = tmp_path / "shards"
    shutil.copytree(shards, copies)
    command = ["data", "codes", "--tokenizer", str(tmp_path / "tokenizer"), "--shards"]
    for source, out in (
        (tmp_path / "images", tmp_path / "images" / "." / "."),
        (copies, copies),
        (copies / "*.tar", copies),
        (f"mix:1={tmp_path / 'images'};1={copies}", copies),
    ):
        before = sorted(out.iterdir())
        assert main([*command, str(source), "--out", str(out)]) == 2
        assert "is the folder of the source" in capsys.readouterr().err and sorted(out.iterdir()) == before
    assert main([*command, str(tmp_path / "images"), "--out", str(tmp_path / "codes")]) == 0
    for action, rest in ((["data", "check"], []), (command, ["--out", str(tmp_path / "x")])):
        assert main([*action, str(tmp_path / "codes"), *rest]) == 2
        assert "holds codes, which stage two reads" in capsys.readouterr().err


def test_shares_come_from_the_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert Share.of_launcher() == Share(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert Share.of_launcher() == Share(0, 1)  # a batch script without srun is one process
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert Share.of_launcher() == Share(5, 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Share.of_launcher() == Share(1, 2) and Share.of_launcher(0, 4) == Share(0, 4)
    for given in ((4, 4), (-1, 4), (0, None), (None, 4)):
        with pytest.raises(ConfigError, match="expected|both"):
            Share.of_launcher(*given)


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "3"}, 3),
        ({"SLURM_LOCALID": "2"}, 2),
        ({"SLURM_LOCALID": "2", "LOCAL_RANK": "1"}, 1),
        ({"SLURM_LOCALID": "5"}, 1),  # more processes than GPUs that this one sees
    ],
)
def test_the_gpu_is_the_one_of_the_launcher(variables, number, monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert inference_device() == torch.device("cpu") or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert inference_device() == torch.device("cuda", number)


def test_units_cover_a_source_once(shards):
    for source, size, count in ((open_source(shards), 100, 5), (open_source(SPEC), 10, 3), (open_source(SPEC), 23, 1)):
        units = units_of(source, size)
        covered = [index for unit in units for index in range(unit.start, unit.stop)]
        assert covered == list(range(23)) and len(units) == count == units[-1].number + 1
