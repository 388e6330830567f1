"""Make the small model that comes with the project of a finished run of its recipe.

    unitok demo --recipe shapes_mini --seed 2 --out runs/mini        # resumable: the same command goes on
    python scripts/publish_mini.py runs/mini assets/shapes-mini

Weights are stored in half precision and computed with in single precision; the scores written beside them are those of
the stored weights, loaded again. Configurations and logs of both stages are copied from the run.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from unitok.core.errors import UserError
from unitok.demo import SECOND, evaluate_model

MOST_BYTES = 8_000_000
SHOWN_AS = "runs/mini"  # whatever folder the run was in


def halve(file: Path) -> None:
    """Round the float32 tensors of a safetensors file to float16, in place; UserError where one does not fit."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32:
            tensors[name] = tensor.half()
            if not torch.isfinite(tensors[name]).all():
                raise UserError(f"{file}: {name} has values beyond float16; publish it in float32")
    save_file(tensors, file, metadata={"format": "pt"})


def publish(run: Path, out: Path, seed: int) -> None:
    """Fill `out` from the run folder `run` and measure what was stored."""
    if not (run / "results.json").is_file():
        raise UserError(f"{run}: not a finished run (no results.json); run `unitok demo --recipe shapes_mini` on it")
    readme = out / "README.md"
    words = readme.read_text() if readme.is_file() else None
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run / "model", out)
    if words is not None:
        readme.write_text(words)
    for file in out.rglob("*.safetensors"):
        halve(file)
    recipe = out / "recipe"
    recipe.mkdir()
    for stage in ("tokenizer", "mllm", f"mllm{SECOND}"):
        shutil.copy(run / stage / "log.jsonl", recipe / f"{stage}.log.jsonl")
        config = (run / stage / "config.yaml").read_text().replace(str(run.resolve()), SHOWN_AS)
        (recipe / f"{stage}.yaml").write_text(config.replace(str(run), SHOWN_AS))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise UserError(f"{out}: {size} bytes, more than {MOST_BYTES}")
    spent = json.loads((run / "spent.json").read_text())["training"]
    results = evaluate_model(out, run / "published", seed)
    results |= {"training_cpu_minutes": round(spent["cpu_seconds"] / 60, 1), "bytes": size}
    (recipe / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{out}: {size / 1e6:.2f} MB, {spent['cpu_seconds'] / 60:.0f} CPU minutes of training")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("out", type=Path, help="folder to fill; replaced but for its README.md")
    parser.add_argument("--seed", type=int, default=0, help="of held-out data and sampling (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        publish(given.run, given.out, given.seed)
    except UserError as error:
        print(f"publish_mini.py: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
