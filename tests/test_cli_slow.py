"""The quick demo, stopped and continued, and the wheel in an empty environment."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import TINY_MODEL, TINY_TOKENIZER, model_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


def test_quick_demo_writes_everything_and_goes_on_after_a_stop(tmp_path):
    """`unitok demo --quick`: stopped in its first stage, then run to the end."""
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "unitok", "demo", "--quick", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "was stopped; the same command goes on" in rest, rest
    assert [path.name for path in (out / "tokenizer" / "checkpoints").iterdir()] != []
    assert not (out / "results.json").exists()
    spent = json.loads((out / "spent.json").read_text())["training"]["seconds"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "resuming tokenizer from" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert {"tokenizer", "vqa", "geneval", "wall_seconds", "peak_memory_mb"} <= results.keys()
    assert results["wall_seconds"] > spent > 0
    assert (out / "model" / "config.json").is_file() and (out / "report.html").stat().st_size > 10_000


def test_wheel_generates_and_trains_from_another_folder(tiny_run, tmp_path):
    """The wheel with the libraries that it names, in an empty environment: nothing of this one is on its path."""
    own = ROOT / ".venv-uv" / "bin" / "uv"
    uv = str(own) if own.is_file() else shutil.which("uv")
    assert uv is not None, "needs uv to build and install the wheel: `make setup` puts it into .venv-uv"

    def do(*command: str) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=clean, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    foreign = ("PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")
    clean = {name: value for name, value in os.environ.items() if name not in foreign} | {"OMP_NUM_THREADS": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would put what lies there into the wheel
    do(uv, "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), str(ROOT))
    versions = ["--frozen", "--no-default-groups", "--no-emit-project", "--no-hashes", "--project", str(ROOT)]
    do(uv, "export", "--quiet", *versions, "--output-file", str(tmp_path / "versions.txt"))
    do(uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "env"))
    python, unitok = (str(tmp_path / "env" / "bin" / name) for name in ("python", "unitok"))
    wheel = str(next(tmp_path.glob("unitok-*.whl")))
    do(uv, "pip", "install", "--quiet", "--python", python, "--constraint", str(tmp_path / "versions.txt"), wheel)
    where = do(python, "-c", "import sys, unitok.tokenizer as t; print(t.__file__, *sys.path)").split()
    assert str(tmp_path / "env") in where[0] and str(ROOT) not in " ".join(where)
    do(unitok, "generate", "a photo of a circle", *model_of(tiny_run), "--out", "circle.png")
    assert (elsewhere / "circle.png").is_file()
    data = ["data.source=shapes:train?num=8&size=32", "output_dir=trained"]
    do(unitok, "train", "tokenizer", "--config", "tokenizer/shapes.yaml", *data, *TINY_TOKENIZER)
    assert (elsewhere / "trained" / "export" / "model.safetensors").is_file()
    places = ["output_dir=mllm", f"tokenizer={tiny_run / 'tokenizer' / 'export'}", f"data.codes={tiny_run / 'codes'}"]
    do(unitok, "train", "mllm", "--config", "mllm/shapes.yaml", *places, *TINY_MODEL)
    assert (elsewhere / "mllm" / "export" / "model.safetensors").is_file()
