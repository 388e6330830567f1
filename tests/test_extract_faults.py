"""Extraction of codes that is killed, stopped or short of disk, and several processes of it."""

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
from extraction import made, make_shards
from tiny import make_tokenizer

from unitok.cli import main
from unitok.core.distributed import free_port
from unitok.core.errors import DataError, WorkerLostError
from unitok.core.workers import forking
from unitok.data.codes import CodeSource
from unitok.data.shard_index import INDEX_FILE
from unitok.data.shards import temporary_name, write_shard, write_shards
from unitok.data.source import open_source
from unitok.tokenizer.extract import extract_codes


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def expected(tokenizer, shards, tmp_path_factory) -> dict[str, bytes]:
    return made(extract_codes(tokenizer, open_source(shards), tmp_path_factory.mktemp("codes"), 3, progress=False))


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
for number in range(120):  # far more than are complete at the last kill
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


def test_a_shard_that_goes_while_the_soak_looks_is_not_complete(tmp_path):
    """It is in the list of the folder and not there, as a link to nothing is."""
    from unitok.scripts.soak import complete_shards

    (tmp_path / "codes-00000.tar").touch()
    (tmp_path / "codes-00001.tar").symlink_to("gone")
    assert list(complete_shards(tmp_path)) == ["codes-00000.tar"]


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
