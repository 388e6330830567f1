"""Kills at random moments over both stages and extraction; every run must end as if nothing had happened: `make soak`.

    python scripts/soak.py [--kills 20] [--seed 0] [--out runs/soak]

Each unit (stage one, extraction, stage two; one rank and two under torchrun and deepspeed) runs once undisturbed, then
again with kills: one rank by SIGKILL, all of them by SIGKILL, or SIGTERM to the launcher, each at a drawn moment of a
drawn step (saving included: it takes most of the time here), a drawn code shard or of the start-up, and the same
command again after it. docs/faults.md says what must come of it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import yaml

from unitok.core.distributed import free_port
from unitok.core.errors import EXIT_RESUME
from unitok.core.runlog import read_log
from unitok.data.shards import write_shards
from unitok.data.source import open_source
from unitok.data.words import words_to_json

ROOT = Path(__file__).resolve().parents[1]
HANG_SECONDS = 60.0  # the others must have ended by then
RUN_SECONDS = 300.0  # for a run that nobody disturbs
STEPS, SAVE_EVERY = 80, 2
SHARDS, SHARD_SIZE = 24, 128  # what is encoded: one code shard for each
WAYS = ("one", "all", "term", "one", "early")

TOKENIZER = {
    "data": {"source": "shapes:train?num=96&size=32"},
    "model": {
        "image_size": 32, "stem_width": 8, "stage_widths": [8, 16], "stage_depths": [1, 1], "width": 24, "depth": 1,
        "num_heads": 2, "mlp_ratio": 1.25, "projection_mlp_ratio": 1.5, "decoder_stage_depths": [1, 1],
        "num_codebooks": 3, "codebook_size": 16, "code_dim": 4, "embed_dim": 20,
        "text_tower": {
            "vocab_size": 90, "context_length": 9, "width": 16, "heads": 2, "layers": 1, "tokenizer": "sentencepiece",
        },
    },
    "revive": {"every": 6, "below": 0.5},
    "loss": {"contrastive": 0.5, "entropy": 0.1, "adversarial": 0.4},
    "discriminator": {"start_step": 12, "channels": 8, "num_layers": 2},
}  # fmt: skip
MLLM = {
    "model": {
        "visual_width": 24, "visual_num_heads": 2, "visual_mlp_ratio": 1.5, "depth_num_layers": 1, "depth_width": 16,
        "depth_num_heads": 2, "depth_intermediate_size": 24,
    },
    "backbone": {
        "config": {
            "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "text_vocab_size": 120,
    },
    "data": {"mixture": {"text_to_image": 0.5, "caption": 0.1, "chat": 0.4}},
}  # fmt: skip
COMMON = {"output_dir": "unset", "steps": STEPS, "save_every": SAVE_EVERY, "ema_decay": 0.9}


@dataclass
class Unit:
    """What is run, and what has come of it. ranks 0: extraction."""

    name: str
    stage: str
    ranks: int
    launcher: str
    zero: int
    kills: int = 0
    by: dict[str, int] = field(default_factory=dict)
    longest_end: float = 0.0  # seconds from a kill to the end of all processes
    kept: int = 0  # code shards that were complete at a kill, and are still the same files at the end
    faults: list[str] = field(default_factory=list)


def all_units() -> list[Unit]:
    """Stage two depends on the files of stage one and of extraction: the order counts."""
    return [
        Unit("stage one, 1 rank", "tokenizer", 1, "", 0),
        Unit("stage one, 2 ranks", "tokenizer", 2, "torchrun", 2),
        Unit("extraction", "codes", 0, "", 0),
        Unit("stage two, 1 rank", "mllm", 1, "", 0),
        Unit("stage two, 2 ranks", "mllm", 2, "deepspeed", 3),
    ]


class Soak:
    """All units below one folder."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.draw = out, random.Random(seed)
        out.mkdir(parents=True)
        for stage, values in (("tokenizer", TOKENIZER), ("mllm", MLLM)):
            (out / f"{stage}.yaml").write_text(yaml.safe_dump(COMMON | values))

    def command(self, unit: Unit, folder: Path) -> list[str]:
        """The command of a unit into `folder`."""
        reference = self.out / "undisturbed"
        if unit.stage == "codes":
            export = str(reference / "stage one, 1 rank" / "export")
            words = ["data", "codes", "--tokenizer", export, "--shards", str(self.images())]
            return [sys.executable, "-m", "unitok", *words, "--out", str(folder), "--batch-size", "32"]
        own = ["--config", str(self.out / f"{unit.stage}.yaml"), f"output_dir={folder}"]
        own += [f"engine.zero_stage={unit.zero}", f"engine.micro_batch_size={4 // unit.ranks}"]
        if unit.stage == "mllm":
            own += [f"tokenizer={reference / 'stage one, 1 rank' / 'export'}", f"data.codes={reference / 'extraction'}"]
        script = str(ROOT / "scripts" / f"train_{unit.stage}.py")
        port = str(free_port())
        launched = {
            "": [sys.executable],
            "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
            "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", port],
        }
        return [*launched[unit.launcher], script, *own]

    def images(self) -> Path:
        """The shards that are encoded, written when they are first asked for."""
        folder = self.out / "images"
        if not folder.is_dir():
            source = open_source(f"shapes:train?num={SHARDS * SHARD_SIZE}&size=32")
            found = (source[index] for index in range(len(source)))
            samples = ({"__key__": s.key, "png": s.image, "json": words_to_json(s)} for s in found)
            write_shards(samples, folder, SHARD_SIZE)
        return folder

    def start(self, unit: Unit, folder: Path, output: Path) -> subprocess.Popen:
        """Start a unit in a process group of its own."""
        # the deepspeed launcher is a script of the environment: it must find python there
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PATH": path, "DS_ACCELERATOR": "cpu"}
        with output.open("w") as file:
            return subprocess.Popen(
                self.command(unit, folder), env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def undisturbed(self, unit: Unit) -> None:
        """The run to compare with; its failure ends the soak."""
        (self.out / "undisturbed").mkdir(exist_ok=True)
        folder = self.out / "undisturbed" / unit.name
        output = self.out / f"{unit.name}.txt"
        code = self.start(unit, folder, output).wait(RUN_SECONDS)
        if code:
            raise SystemExit(f"soak: the undisturbed run of {unit.name} ended with exit code {code}: see {output}")

    def disturbed(self, unit: Unit, kills: int) -> None:
        """Kill it so often, finish it, compare."""
        folder = self.out / "killed" / unit.name
        folder.parent.mkdir(exist_ok=True)
        goals = sorted(self.draw.sample(range(1, (STEPS if unit.ranks else SHARDS) * 2 // 3), kills))
        ways = [WAYS[(self.draw.randrange(len(WAYS)) + number) % len(WAYS)] for number in range(kills)]
        complete: dict[str, tuple[int, int]] = {}
        for number in range(kills):
            output = self.out / f"{unit.name} kill {number + 1}.txt"
            process = self.start(unit, folder, output)
            way = ways[number] if unit.ranks else ("all", "term")[number % 2]
            if not self._wait_for(unit, process, folder, goals[number], early=way == "early"):
                unit.faults.append(f"ended with {process.poll()} before kill {number + 1}: see {output}")
                return
            self._kill(unit, process, way, output)
            complete.update(complete_shards(folder))
        self._finish(unit, folder)
        again = sorted(name for name, file in complete.items() if complete_shards(folder).get(name) != file)
        unit.kept = len(complete) - len(again)
        if again:
            unit.faults.append(f"complete before a kill, and made again: {', '.join(again)}")
        unit.faults += differences(unit, self.out / "undisturbed" / unit.name, folder)

    def _wait_for(self, unit: Unit, process: subprocess.Popen, folder: Path, goal: int, early: bool) -> bool:
        """Wait for the drawn moment; False if the process ends before it, or takes too long."""
        deadline = time.monotonic() + (self.draw.uniform(0, 15) if early else RUN_SECONDS)
        before = last_step(folder / "log.jsonl")
        goal = goal if unit.ranks else max(goal, len(complete_shards(folder)) + 1)  # of this attempt
        while time.monotonic() < deadline and process.poll() is None:
            if early and last_step(folder / "log.jsonl") != before:
                break
            done = last_step(folder / "log.jsonl") if unit.ranks else len(complete_shards(folder))
            if not early and done >= goal:
                time.sleep(self.draw.uniform(0, 0.1 if unit.ranks else 0.3))
                break
            time.sleep(0.01)
        return process.poll() is None and (early or time.monotonic() < deadline)

    def _kill(self, unit: Unit, process: subprocess.Popen, way: str, output: Path) -> None:
        ranks = rank_processes(process.pid) or [psutil.Process(process.pid)]
        started = time.monotonic()
        victim = self.draw.randrange(len(ranks))
        if way == "term":  # as a scheduler does; the deepspeed launcher alone would not pass it on
            os.killpg(process.pid, signal.SIGTERM)
        else:
            for target in [ranks[victim]] if way in ("one", "early") else ranks:
                target.kill()
        while (process.poll() is None or psutil.wait_procs(ranks, 0)[1]) and time.monotonic() - started < HANG_SECONDS:
            time.sleep(0.05)
        code, left = process.poll(), psutil.wait_procs(ranks, 0)[1]
        if code is None or left:
            unit.faults.append(f"still there {HANG_SECONDS:.0f} s after {way}: see {output}")
        unit.longest_end = max(unit.longest_end, round(time.monotonic() - started, 1))
        end_group(process)
        text = output.read_text()
        folder = self.out / "killed" / unit.name
        message = f"stopped at step {last_step(folder / 'log.jsonl')}" if unit.ranks else "the same command goes on"
        if way == "term" and (message not in text or (unit.ranks < 2 and code != EXIT_RESUME)):
            unit.faults.append(f"SIGTERM: exit code {code}, or no message: see {output}")
        if way == "one" and len(ranks) > 1 and f"rank {victim} is gone" not in text:
            unit.faults.append(f"no message says that rank {victim} is gone: see {output}")
        unit.kills += 1
        unit.by[way] = unit.by.get(way, 0) + 1

    def _finish(self, unit: Unit, folder: Path) -> None:
        output = self.out / f"{unit.name} end.txt"
        code = self.start(unit, folder, output).wait(RUN_SECONDS)
        if code:
            unit.faults.append(f"the last run ended with exit code {code}: see {output}")


def last_step(log: Path) -> int:
    """The last whole line's step; 0 without one."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def complete_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """The complete code shards of a folder by name: (inode, time of change). One that is made again is another file."""
    found = {}
    for path in folder.glob("codes-*.tar"):
        with contextlib.suppress(FileNotFoundError):  # an extraction that begins anew removed it since it was listed
            status = path.stat()
            found[path.name] = (status.st_ino, status.st_mtime_ns)
    return found


def rank_processes(launcher: int) -> list[psutil.Process]:
    """The ranks below a launcher, in order: processes with a RANK whose parent has none (loaders' workers have one)."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            own, above = process.environ().get("RANK"), process.parent()
            if own is not None and (above is None or "RANK" not in above.environ()):
                found[int(own)] = process
        except psutil.Error:  # it ended while we looked
            continue
    return [found[rank] for rank in sorted(found)]


def end_group(process: subprocess.Popen) -> None:
    """Nothing of a unit may run on beside the next one."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def differences(unit: Unit, expected: Path, found: Path) -> list[str]:
    """What differs between the undisturbed run's folder and the other's: weights by bits, and the whole log."""
    if unit.stage == "codes":
        return [] if contents(expected) == contents(found) else ["the code shards differ"]
    faults = []
    if digests(expected / "export") != digests(found / "export"):
        faults.append("the exported weights differ")
    logs = [read_log(folder / "log.jsonl") for folder in (expected, found)]
    if [record["step"] for record in logs[1]] != list(range(1, STEPS + 1)) or logs[1][-1]["samples"] != 4 * STEPS:
        faults.append("steps or samples are missing or repeated")
    if logs[0] != logs[1]:
        faults.append("the logs differ")
    return faults


def digests(folder: Path) -> dict[str, str]:
    """Hash of every weight file."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.safetensors"))
    }


def contents(folder: Path) -> dict[str, str]:
    """Hash of every member of every shard (a tar also holds times)."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as file:
            for member in file:
                found[member.name] = hashlib.sha256(file.extractfile(member).read()).hexdigest()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 if every run ended as it must."""
    from unitok.eval.results import print_table, write_results

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in all, in turn over the units (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="replaced if it is there")
    arguments = parser.parse_args(argv)
    started, out = time.monotonic(), arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    soak, units = Soak(out, arguments.seed), all_units()
    for number, unit in enumerate(units):
        soak.undisturbed(unit)
        soak.disturbed(unit, (arguments.kills + len(units) - 1 - number) // len(units))
        print(
            f"{unit.name}: {unit.kills} kills, {'; '.join(unit.faults) or 'ended as the undisturbed run'}", flush=True
        )
    rows = [
        (u.name, u.launcher or "-", f"ZeRO {u.zero}", u.kills, " ".join(f"{n} {w}" for w, n in sorted(u.by.items())),
         f"{u.longest_end:.1f} s", u.kept if u.ranks == 0 else "-", "no" if u.faults else "yes") for u in units
    ]  # fmt: skip
    headers = ("unit", "launcher", "engine", "kills", "of these", "longest end", "shards kept", "equal")
    print_table([tuple(map(str, row)) for row in rows], headers)
    minutes, failed = (time.monotonic() - started) / 60, [u for u in units if u.faults]
    results = {"kills": sum(u.kills for u in units), "minutes": round(minutes, 1), "units": [asdict(u) for u in units]}
    write_results(out / "results.json", results | {"seed": arguments.seed, "passed": not failed})
    print(f"{results['kills']} kills, {minutes:.1f} minutes; {out / 'results.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
