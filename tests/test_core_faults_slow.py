"""Faults over ranks, ZeRO stages and launchers, with the real stage one where it counts."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from core_toys import ToyTask, largest_difference, run_toy
from equal_runs import differences
from ranks import run_ranks
from stages import make_task, run_stage, write_configs
from test_core_non_finite import BAD, Infinite

from unitok import cli
from unitok.core.checkpoint import latest_complete, verify
from unitok.core.distributed import free_port
from unitok.core.errors import CheckpointError
from unitok.data.transforms import as_pixels
from unitok.scripts.soak import end_group, last_step, main, rank_processes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The configuration file of each stage."""
    return write_configs(tmp_path_factory.mktemp("stages"))


def _toy(task: Any, out: Path, world: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    return run_toy(task, out, world=world, **settings)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_skipped_steps_leave_no_trace_in_any_stage(tmp_path: Path, stage: int, precision: str) -> None:
    """Accumulated gradients of the skipped steps are gone: two ranks log what one process without ZeRO logs."""
    settings = {"non_finite": "skip", "steps": 12, "save_every": 4, "engine_precision": precision}
    one = run_ranks(1, _toy, Infinite(BAD), tmp_path / "one", 1, settings)[0]
    two = run_ranks(2, _toy, Infinite(BAD), tmp_path / "two", 2, settings | {"engine_zero_stage": stage})[0]
    assert largest_difference(two, one, ("loss", "grad_norm", "skipped")) < (1e-4 if precision == "fp32" else 1e-2)
    assert [record["step"] for record in two if "loss" not in record] == [3, 6, 7]
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_12")
    again = run_ranks(2, _toy, Infinite(BAD), tmp_path / "two", 2, settings | {"engine_zero_stage": stage})[0]
    assert again == two


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_stage_one_skips_with_both_networks(files: dict[str, Path], tmp_path: Path, zero: int) -> None:
    """A picture that is not finite, also after the discriminator has started: its step is left out in both networks."""

    def spoil(task: Any) -> None:
        micro_step = task.micro_step

        def spoiled(engines: Any, batch: Any, micro_index: int, step: int) -> Any:
            if step in (4, 12):
                batch["pixels"] = as_pixels(batch["pixels"])
                batch["pixels"][0, 0, 0, 0] = float("nan")
            return micro_step(engines, batch, micro_index, step)

        task.micro_step = spoiled

    options = ["non_finite=skip", "ema_decay=0.9", "revive.every=4"]
    one = run_ranks(1, run_stage, "tokenizer", files["tokenizer"], tmp_path / "one", 1, options, None, spoil)[0]
    options.append(f"engine.zero_stage={zero}")
    two = run_ranks(2, run_stage, "tokenizer", files["tokenizer"], tmp_path / "two", 2, options, None, spoil)[0]
    assert [r["step"] for r in one if "loss" not in r] == [5, 13] and one[-1]["skipped"] == 2
    found = differences(two, one)
    assert max(value for name, value in found.items() if not name.startswith("grad_norm")) < 1e-3, found


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
@pytest.mark.parametrize("stage,zero", [*(("tokenizer", zero) for zero in range(4)), ("mllm", 2), ("mllm", 3)])
def test_universal_checkpoint(
    files: dict[str, Path], tmp_path: Path, stage: str, zero: int, before: int, after: int
) -> None:
    """All engines and the average, converted by one command; the run goes on elsewhere with other ranks. Stage two's
    backbone and text tokenizer travel with it."""
    options = ["save_every=4", "keep_last=9", "ema_decay=0.9", f"engine.zero_stage={zero}"]
    run = (run_stage, stage, files[stage])
    log = run_ranks(before, *run, tmp_path / "run", before, options)[0]
    source, out = tmp_path / "run" / "checkpoints" / "step_12", tmp_path / "universal"
    assert cli.main(["checkpoint", "universal", str(source), str(out)]) == 0
    verify(out)
    engines = {"tokenizer": {"tokenizer", "discriminator"}, "mllm": {"mllm"}}[stage]
    assert {path.name for path in out.iterdir()} >= {*engines, f"{stage}.ema.safetensors", "run"}
    shutil.rmtree(tmp_path / "run")  # nothing of the old run is needed
    moved = run_ranks(after, *run, tmp_path / "moved", after, [*options, f"resume={out}"])[0]
    found = differences(moved, log[12:])
    losses = {name: value for name, value in found.items() if not name.startswith(("grad_norm", "adversarial_weight"))}
    print(zero, before, after, max(losses.values()), found)
    assert max(losses.values()) < 1e-5, found
    assert [record["samples"] for record in moved] == [record["samples"] for record in log[12:]]


def test_tasks_name_their_samples(files: dict[str, Path], tmp_path: Path) -> None:
    """As the sources do; a place of stage two's epoch that a document takes has the document's number."""
    assert make_task("tokenizer", files["tokenizer"], tmp_path, 1)[0].sample_keys([0, 3], 0) == [
        "train-0-000000", "train-0-000003"
    ]  # fmt: skip
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n\nthree\n")
    options = [f"data.texts=[{tmp_path / 'texts.txt'}]", "data.mixture.text=0.5"]
    task = make_task("mllm", files["mllm"], tmp_path, 1, options)[0]
    keys = task.sample_keys(list(range(48)), 0)
    documents = [key for key in keys if key.startswith("text ")]
    assert len(documents) == 16 and set(documents) <= {"text 0", "text 1", "text 2"}
    assert all(key == f"train-0-{index:06d}" for index, key in enumerate(keys) if key not in documents)


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port"],
}


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("tool", LAUNCHERS)
def test_launchers_end_and_the_message_names_the_rank(
    files: dict[str, Path], tmp_path: Path, tool: str, victim: int
) -> None:
    """Real launchers: within 60 s all processes have ended, with one line that names the rank."""
    script = [str(ROOT / "scripts" / "train_tokenizer.py"), "--config", str(files["tokenizer"])]
    own = [f"output_dir={tmp_path / 'run'}", "steps=100000", "save_every=50"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "PATH": path}
    with (tmp_path / "output.txt").open("w") as file:
        command = [*LAUNCHERS[tool], str(free_port()), *script, *own]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while last_step(tmp_path / "run" / "log.jsonl") < 5:
            assert process.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.05)
        ranks = rank_processes(process.pid)
        ranks[victim].kill()
        process.wait(60)
        assert not psutil.wait_procs(ranks, timeout=1)[1]
    finally:
        end_group(process)
    lines = [line for line in (tmp_path / "output.txt").read_text().splitlines() if "unitok: error" in line]
    assert len(lines) == 1 and f"unitok: error: rank {victim} is gone" in lines[0], lines


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A small file system: no stub, the kernel's own error, in the middle of torch's writer."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid():
        pytest.skip("not root: a small file system cannot be mounted")
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:  # as in containers without the right to
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    try:
        with pytest.raises(CheckpointError, match="could not be written: .*MiB are free there: make room"):
            run_toy(ToyTask(), disk / "run", steps=20, save_every=1, keep_last=9)
        left = [path.name for path in (disk / "run" / "checkpoints").iterdir()]
        assert left and not [name for name in left if "partial" in name]
        verify(latest_complete(disk / "run" / "checkpoints"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_short_soak(tmp_path: Path) -> None:
    """Three kills; `make soak` does twenty."""
    assert main(["--kills", "3", "--out", str(tmp_path / "soak")]) == 0


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_other_ranks_take_over_what_no_optimizer_holds(tmp_path: Path, zero: int) -> None:
    """Buffers and frozen parameters, which DeepSpeed's universal format leaves out; built anew they are different."""
    settings = {"engine_zero_stage": zero, "save_every": 4, "steps": 8, "keep_last": 3}
    straight = run_ranks(2, _toy, _Partly(1.0), tmp_path / "run", 2, settings)[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_8")
    moved = run_ranks(1, _toy, _Partly(5.0), tmp_path / "run", 1, settings)[0]
    assert largest_difference(moved, straight, ("loss", "seen")) < 1e-5


class _Partly(ToyTask):
    """The first layer is frozen at what a new run gives it, and a buffer counts the forward passes."""

    def __init__(self, scale: float) -> None:
        super().__init__(ema=None)
        self.scale = scale

    def build(self) -> Any:
        networks = super().build()
        net = networks["net"].module
        net.register_buffer("seen", net.first.bias.detach().new_zeros(()))
        net.first.requires_grad_(False).weight.data.mul_(self.scale)
        return networks

    def micro_step(self, engines: Any, batch: Any, micro_index: int, step: int) -> Any:
        seen = engines["net"].module.seen.add_(1)
        return super().micro_step(engines, batch, micro_index, step) | {"seen": seen.clone()}
