"""Extraction of codes by many processes: the same bytes however the work is shared, interrupted or repeated."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_data_sources import fill_folder
from tiny import make_tokenizer

from unitok.cli import main
from unitok.core.distributed import free_port
from unitok.core.errors import ConfigError, DataError, WorkerLostError
from unitok.core.workers import forking
from unitok.data.code_units import units_of
from unitok.data.codes import CodeSource
from unitok.data.shard_index import INDEX_FILE
from unitok.data.shards import temporary_name, write_shard, write_shards
from unitok.data.source import open_source
from unitok.data.transforms import eval_transform
from unitok.data.words import words_to_json
from unitok.tokenizer.extract import Share, extract_codes

SPEC = "shapes:train?num=23&seed=1&size=32"
SHARDS = 5


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Five shards of five images (the last of three)."""
    folder, source = tmp_path_factory.mktemp("shards"), open_source(SPEC)
    samples = (source[index] for index in range(len(source)))
    write_shards(({"__key__": s.key, "png": s.image, "json": words_to_json(s)} for s in samples), folder, 5)
    return folder


@pytest.fixture(scope="module")
def expected(tokenizer, shards, tmp_path_factory) -> dict[str, bytes]:
    return made(extract_codes(tokenizer, open_source(shards), tmp_path_factory.mktemp("codes"), 3, progress=False))


def made(out: Path) -> dict[str, bytes]:
    """All that extraction leaves but its logs, which tell the time."""
    return {
        path.name: path.read_bytes()
        for path in out.iterdir()
        if path.is_file() and path.suffix != ".jsonl" and path.name != INDEX_FILE
    }


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


def test_units_cover_a_source_once(shards):
    for source, size, count in ((open_source(shards), 100, 5), (open_source(SPEC), 10, 3), (open_source(SPEC), 23, 1)):
        units = units_of(source, size)
        covered = [index for unit in units for index in range(unit.start, unit.stop)]
        assert covered == list(range(23)) and len(units) == count == units[-1].number + 1


def extract_until(event: int, *arguments) -> None:
    """In a fork: extract, and die by SIGKILL before the n-th thing that changes the folder."""
    from unitok.data import shards as shard_files

    left = event

    def dying(function):
        def call(*given, **named):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return call

    os.replace, os.fsync = dying(os.replace), dying(os.fsync)
    for name in ("replace", "write_text", "unlink"):
        setattr(Path, name, dying(getattr(Path, name)))
    shard_files._ShardFile.write = dying(shard_files._ShardFile.write)
    torch.set_num_threads(1)
    extract_codes(*arguments, progress=False)
    os._exit(0)


def test_killed_at_every_moment_it_ends_with_the_same_bytes(tokenizer, shards, expected, tmp_path):
    """Each attempt goes one event further than the one before it, into the same folder; headers come last of all."""
    source, attempts, codes = open_source(shards), 0, []
    fork = multiprocessing.get_context("fork")
    while not codes or codes[-1] != 0:
        attempts += 1
        assert attempts < 100, codes
        process = fork.Process(target=extract_until, args=(attempts, tokenizer, source, tmp_path, 3))
        with forking():
            process.start()
        process.join()
        codes.append(process.exitcode)
        if codes[-1] != 0 and (tmp_path / "header.json").exists():
            assert len(CodeSource(tmp_path)) == 23  # killed after it was done
            (tmp_path / INDEX_FILE).unlink()
    assert set(codes[:-1]) == {-signal.SIGKILL} and attempts > 10
    assert made(tmp_path) == expected


def names(folder: Path) -> set[str]:
    """The units in a folder and what is being written of them."""
    return {path.name for path in folder.glob("*codes-*")}


ATTEMPT = """
import io, os, pathlib, shutil, signal, sys, tarfile, time
folder, way = pathlib.Path(sys.argv[1]), sys.argv[2]
def stop(*_):
    print("stopped; the same command goes on", file=sys.stderr, flush=True)
    os._exit(75)
if way != "deaf":
    signal.signal(signal.SIGTERM, stop)
if way == "refuses" and folder.exists():
    sys.exit(2)
if way == "anew" and folder.exists():
    shutil.rmtree(folder)
folder.mkdir(exist_ok=True)
for number in range(24):
    path = folder / f"codes-{number:05d}.tar"
    if not path.exists():
        time.sleep(0.02)
        with tarfile.open(path.with_suffix(".tmp"), "w") as file:
            file.addfile(tarfile.TarInfo(f"{number}.npy"), io.BytesIO())
        path.with_suffix(".tmp").rename(path)
"""


@pytest.mark.parametrize(
    "way,fault",
    [
        ("goes on", None),
        ("anew", "complete before a kill, and made again: codes-00000"),
        ("refuses", "ended with 2 before"),
        ("deaf", "SIGTERM: exit code -15, or no message"),
    ],
)
def test_the_soak_sees_whether_an_extraction_goes_on(tmp_path, way, fault):
    """Kills fall where some shards are complete; what begins anew, or refuses to go on, is a fault."""
    from unitok.scripts.soak import Soak, Unit

    class Attempts(Soak):
        def command(self, unit: Unit, folder: Path) -> list[str]:
            return [sys.executable, "-S", "-c", ATTEMPT, str(folder), way]

    soak, unit = Attempts(tmp_path / "soak", seed=0), Unit("extraction", "codes", 0, "", 0)
    soak.undisturbed(unit)
    soak.disturbed(unit, 2)
    if fault is None:
        assert not unit.faults and unit.kills == 2 and unit.kept > 2
    else:
        assert re.search(fault, "; ".join(unit.faults)), unit.faults


def test_a_full_disk_leaves_nothing_but_what_is_complete(tokenizer, shards, expected, tmp_path):
    """Writing fails, and then closing fails too: the kernel allows files of 4 KiB, a shard's tar is larger."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        torch.set_num_threads(1)
        try:
            extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False)
        except DataError as error:
            (tmp_path / "said").write_text(str(error))

    for folder, call in ((tmp_path, limited), (tmp_path / "shards", lambda: write_large(tmp_path / "shards"))):
        process = multiprocessing.get_context("fork").Process(target=call)
        with forking():
            process.start()
        process.join(60)
        assert process.exitcode == 0
        assert {path.name for path in folder.iterdir()} <= {"said", "shards"}
    assert re.fullmatch(r".*codes-00000.tar cannot be written \(File too large\); .*", (tmp_path / "said").read_text())
    for path in (tmp_path / "said", tmp_path / "shards"):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    extract_codes(tokenizer, open_source(shards), tmp_path, 3, progress=False)
    assert made(tmp_path) == expected


def write_large(folder: Path) -> None:
    """In a fork: shards that do not fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="File too large"):
        write_shards(({"__key__": str(number), "txt": "x" * 500} for number in range(99)), folder)


def test_one_temporary_name_is_enough(tmp_path):
    name = temporary_name(tmp_path / "a.tar")
    assert name == temporary_name(name) and name.name.startswith(".a.tar.") and name.name.count(".tmp") == 1
    assert write_shard([{"__key__": "x", "txt": "x"}], name) == 1
    assert list(tmp_path.iterdir()) == [name]


def test_a_killed_worker_is_told_in_one_line(tokenizer, shards, tmp_path):
    """As where memory runs out; the same command goes on."""
    source, main = open_source(shards), os.getpid()
    read = source.read

    def dying(index, shrink_of=None):
        if index == 12 and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(index, shrink_of)

    source.read = dying
    with pytest.raises(WorkerLostError, match="a worker that loads data is gone .*; the same command") as caught:
        extract_codes(tokenizer, source, tmp_path, 2, progress=False, num_workers=2)
    assert caught.value.exit_code == 75 and "\n" not in str(caught.value)


@pytest.mark.parametrize("moment", ["eval_transform", "write_json"])
def test_sigterm_ends_it_tidily(tokenizer, shards, expected, tmp_path, monkeypatch, capsys, moment):
    """With 75, without a temporary file, and the sample that was being read is none that failed."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    module = {"eval_transform": "unitok.tokenizer.extract", "write_json": "unitok.data.code_units"}[moment]
    original, calls = getattr(sys.modules[module], moment), []

    def signalled(*args):
        calls.append(args)
        if len(calls) in (4, 5):  # and once more while it tidies up, as launchers do
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    command = ["data", "codes", "--tokenizer", str(tmp_path / "tokenizer"), "--shards", str(shards)]
    command += ["--out", str(tmp_path / "out"), "--batch-size", "3"]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)]
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{moment}", signalled)
        try:
            assert main(command) == 75
        finally:
            for number, handler in zip((signal.SIGTERM, signal.SIGCHLD), before, strict=True):
                signal.signal(number, handler)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"unitok: error: extraction to {tmp_path / 'out'} was stopped; complete shards stay, the same " + (
        "command goes on"
    )
    assert not list((tmp_path / "out").glob(".*.tmp")) and not (tmp_path / "out" / "header.json").exists()
    assert main(command) == 0 and signal.getsignal(signal.SIGTERM) == before[0]
    assert made(tmp_path / "out") == expected


@pytest.mark.slow
def test_two_commands_killed_at_random_end_with_the_same_bytes(tokenizer, shards, expected, tmp_path):
    """As on two hosts: `unitok data codes` under a launcher's variables, killed and started again until done."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out, draw = tmp_path / "out", random.Random(0)
    command = [sys.executable, "-m", "unitok", "data", "codes", "--tokenizer", str(tmp_path / "tokenizer")]
    command += ["--shards", str(shards), "--batch-size", "3", "--workers", "1"]

    def start(rank: int, out: Path) -> subprocess.Popen:
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.Popen(
            [*command, "--out", str(out)], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )

    killed = 0
    for _ in range(4):  # killed when something new stands there: clocks tell little, most of the time goes into imports
        there = names(out)
        processes = [start(rank, out) for rank in range(2)]
        while names(out) <= there and any(process.poll() is None for process in processes):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed
    assert [process.wait(timeout=300) for process in [start(rank, out) for rank in range(2)]] == [0, 0]
    assert made(out) == expected


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["torchrun", "deepspeed"])
def test_launchers_share_the_work(tokenizer, shards, expected, tmp_path, tool):
    """Two processes, each of which encodes its own units: by scripts/cluster/torchrun.sh, and by what deepspeed.sh
    gives to `deepspeed` (which itself would ask for ssh)."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    root, port = Path(__file__).parents[1], str(free_port())
    own = {"TOKENIZER": tmp_path / "tokenizer", "SHARDS": shards, "CODES": tmp_path / "out", "GPUS": 2, "PORT": port}
    own |= {"PYTHONPATH": root, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}
    own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["data", "codes", "--tokenizer", own["TOKENIZER"], "--shards", shards, "--out", own["CODES"]]
    command = {
        "torchrun": ["bash", root / "scripts" / "cluster" / "torchrun.sh", "codes"],
        "deepspeed": [
            "deepspeed", "--num_gpus", "2", "--master_port", port, "--module", "--no_local_rank", "unitok", *words
        ],
    }[tool]  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in own.items()}
    done = subprocess.run(
        [*map(str, command), "--batch-size", "3"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        executable=shutil.which(command[0], path=environment["PATH"]),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert made(tmp_path / "out") == expected
    logs = [(tmp_path / "out" / f"extract-rank{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert [len(lines) for lines in logs] == [3, 2]
