"""The paper's questions about codebooks, asked of the shapes world: eight tokenizers, each with its language model.

    python scripts/study_codebooks.py [--out runs/study] [--seeds 0 1] [--workers 2]

Every variant gets the same data and the same number of steps. What it measures and says: docs/codebooks.md. A study
that was stopped goes on when the same command is given again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unitok.cli import main as unitok
from unitok.cli import positive_int
from unitok.commands.train import stage_config
from unitok.core.errors import UserError
from unitok.core.launch import PARENT, end_processes
from unitok.eval.results import protocol, read_results, write_results
from unitok.scripts.study_report import QUESTIONS, write_report

# What replaces settings of configs/tokenizer/shapes.yaml in every variant, and what makes a variant of it. The code
# vector has 32 channels and the codebooks hold 512 entries together throughout.
# Dead codes are revived everywhere: without it some variants and seeds collapse to one entry a codebook (LOG.md).
TOKENIZER_BASE = (
    "discriminator.enabled=false",
    "loss.adversarial=0",
    "optimizer.warmup_steps=200",
    "revive.every=20",
    "revive.below=0.1",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "8x64": (),
    "1x512": ("model.num_codebooks=1", "model.codebook_size=512", "model.code_dim=32"),
    "2x256": ("model.num_codebooks=2", "model.codebook_size=256", "model.code_dim=16"),
    "4x128": ("model.num_codebooks=4", "model.codebook_size=128", "model.code_dim=8"),
    "residual": ("model.quantizer=residual", "model.code_dim=32"),
    "reconstruction": ("loss.contrastive=0",),
    "contrastive": ("loss.l1=0", "loss.l2=0", "loss.contrastive=1"),
    "linear": ("model.projection=linear",),
}
# Only reading is measured, so the language model learns conversations alone.
MLLM_BASE = (
    "data.mixture.text_to_image=0",
    "data.mixture.caption=0",
    "data.mixture.chat=1",
    "engine.micro_batch_size=16",
)
HELD_OUT_IMAGES, HELD_OUT_QUESTIONS, HELD_OUT_SEED = 500, 1000, 0


def overrides(variant: str, seed: int, steps: int, mllm_steps: int, train_images: int) -> dict[str, list[str]]:
    """Settings of both stages, on top of tokenizer/shapes.yaml and mllm/shapes.yaml."""
    source = f"data.source={train_source(train_images)}"
    return {
        "tokenizer": [*TOKENIZER_BASE, *VARIANTS[variant], source, *_length(seed, steps)],
        "mllm": [*MLLM_BASE, *_length(seed, mllm_steps)],
    }


def _length(seed: int, steps: int) -> list[str]:
    return [f"seed={seed}", f"steps={steps}", f"save_every={max(1, steps // 3)}"]


def train_source(train_images: int) -> str:
    """The training scenes, the same for all variants and seeds."""
    return f"shapes:train?num={train_images}&seed=0"


def run_folder(out: Path, variant: str, seed: int) -> Path:
    """Where one (variant, seed) lives."""
    return out / f"{variant}-seed{seed}"


# ---- one variant with one seed, in a process of its own


def run_one(variant: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train both stages and measure them; `result.json` is written last."""
    started = time.monotonic()
    folder = run_folder(arguments.out, variant, seed)
    tokenizer, codes, model = folder / "tokenizer", folder / "codes", folder / "mllm"
    settings = overrides(variant, seed, **budget(arguments))
    _train("tokenizer", tokenizer, arguments.steps, settings["tokenizer"])
    if not (codes / "header.json").is_file():
        shutil.rmtree(codes, ignore_errors=True)
        source = train_source(arguments.train_images)
        _unitok(["data", "codes", "--tokenizer", str(tokenizer / "export"), "--shards", source, "--out", str(codes)])
    places = [f"tokenizer={tokenizer / 'export'}", f"data.codes={codes}"]
    _train("mllm", model, arguments.mllm_steps, [*settings["mllm"], *places])
    result = measure(variant, model / "export") | {"variant": variant, "seed": seed, "budget": budget(arguments)}
    result["overrides"] = settings
    result["wall_seconds"] = round(time.monotonic() - started, 1)
    write_results(folder / "result.json", result)


def _unitok(command: Sequence[str]) -> None:
    print(f"\n$ unitok {' '.join(command)}", flush=True)
    code = unitok(command)
    if code:
        raise SystemExit(code)


def _train(stage: str, folder: Path, steps: int, overrides: Sequence[str]) -> None:
    _unitok(["train", stage, "--config", f"{stage}/shapes.yaml", f"output_dir={folder}", *overrides])
    if not (folder / "checkpoints" / f"step_{steps}").is_dir():
        raise UserError(f"{folder} was stopped before step {steps}; the same command goes on from there")


def measure(variant: str, export: Path) -> dict[str, Any]:
    """Held-out figures of a tokenizer and its language model; None where the variant does not train what they need."""
    from unitok.data.captions import paraphrase
    from unitok.data.source import open_source
    from unitok.eval.reconstruction import evaluate_reconstruction
    from unitok.eval.results import figures_only
    from unitok.eval.retrieval import evaluate_retrieval
    from unitok.eval.vqa import evaluate_vqa
    from unitok.mllm.pipeline import UniTokPipeline

    source = open_source(f"shapes:val?num={HELD_OUT_IMAGES}&seed={HELD_OUT_SEED}")
    pipeline = UniTokPipeline.from_pretrained(export)
    tokenizer = pipeline.tokenizer
    reconstruction = figures_only(evaluate_reconstruction(tokenizer, source, device=tokenizer.device))
    retrieval = figures_only(evaluate_retrieval(tokenizer, source, device=tokenizer.device))
    vqa = evaluate_vqa(pipeline.answer, source, HELD_OUT_QUESTIONS, HELD_OUT_SEED, batch_size=64, rephrase=paraphrase)
    if variant == "contrastive":  # its decoder has learnt nothing
        reconstruction |= dict.fromkeys(("psnr_db", "ssim", "detector_agreement"))
    if variant == "reconstruction":  # its text tower has learnt nothing
        retrieval |= dict.fromkeys(("top1", "top5"))
    sizes = {name: getattr(tokenizer.config, name) for name in ("num_codebooks", "codebook_size")}
    return {"sizes": sizes, "tokenizer": reconstruction, "retrieval": retrieval, "vqa": figures_only(vqa)}


# ---- the whole study


def budget(arguments: argparse.Namespace) -> dict[str, int]:
    """What must be equal for figures to be compared."""
    return {name: getattr(arguments, name) for name in ("steps", "mllm_steps", "train_images")}


def finished(arguments: argparse.Namespace, variant: str, seed: int) -> dict[str, Any] | None:
    """The result of one (variant, seed) if it is there.

    Raises:
        UserError: it was made with other settings, so that it cannot be compared.
    """
    file = run_folder(arguments.out, variant, seed) / "result.json"
    if not file.is_file():
        return None
    result = read_results(file)
    if not arguments.report_only and result["overrides"] != overrides(variant, seed, **budget(arguments)):
        raise UserError(f"{file} was made with other settings (budget {result['budget']}); take another --out")
    return result


def start(arguments: argparse.Namespace, variant: str, seed: int) -> subprocess.Popen:
    """A process of one thread for one (variant, seed); what it prints goes to log.txt in its folder."""
    folder = run_folder(arguments.out, variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "unitok.scripts.study_codebooks", "--out", str(arguments.out)]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in budget(arguments).items()]
    command += ["--one", variant, "--seeds", str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", PARENT: str(os.getpid())}
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_all(arguments: argparse.Namespace) -> None:
    """Run what is not finished, `workers` at a time; the first failure ends the others and the study."""
    every = [(variant, seed) for seed in arguments.seeds for variant in arguments.variants]
    waiting = [job for job in every if finished(arguments, *job) is None]
    print(f"{len(every) - len(waiting)} of {len(every)} runs are there already", flush=True)
    running: dict[tuple[str, int], subprocess.Popen] = {}
    try:
        while waiting or running:
            while waiting and len(running) < arguments.workers:
                job = waiting.pop(0)
                running[job] = start(arguments, *job)
            time.sleep(0.5)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                _collect(arguments, *job, running.pop(job).returncode)
                print(f"{len(every) - len(waiting) - len(running)} of {len(every)} done", flush=True)
    finally:
        end_processes(list(running.values()))


def _collect(arguments: argparse.Namespace, variant: str, seed: int, code: int) -> None:
    folder = run_folder(arguments.out, variant, seed)
    result = finished(arguments, variant, seed)
    if code or result is None:
        log = folder / "log.txt"
        last = (log.read_text().strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{variant} with seed {seed} ended with exit code {code}; {log} ends with: {last}")
    psnr, vqa = result["tokenizer"]["psnr_db"], result["vqa"]["accuracy"]
    shown = "-" if psnr is None else f"{psnr:.2f} dB"
    print(f"{variant} seed {seed}: {shown}, VQA {vqa:.3f}, {result['wall_seconds'] / 60:.1f} minutes", flush=True)


def study_protocol(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the finished runs were made."""
    batches = {
        stage: stage_config(stage, f"{stage}/shapes.yaml", base).engine.micro_batch_size
        for stage, base in (("tokenizer", TOKENIZER_BASE), ("mllm", MLLM_BASE))
    }
    counts = {"images": HELD_OUT_IMAGES, "questions": HELD_OUT_QUESTIONS, "runs": len(runs)}
    details = {
        "seeds": sorted({run["seed"] for run in runs}),
        "budget": runs[0]["budget"],
        "batch": batches,
        "source": train_source(runs[0]["budget"]["train_images"]),
        "held_out": f"shapes:val?num={HELD_OUT_IMAGES}&seed={HELD_OUT_SEED}",
        "overrides": {"tokenizer": list(TOKENIZER_BASE), "mllm": list(MLLM_BASE)},
        "variants": {name: list(settings) for name, settings in VARIANTS.items()},
    }
    return protocol("codebooks study", HELD_OUT_SEED, counts, **details)


def report(arguments: argparse.Namespace) -> None:
    """results.json, codebooks.md and codebooks.png of what is finished."""
    found = [finished(arguments, variant, seed) for variant in arguments.variants for seed in arguments.seeds]
    runs = [result for result in found if result is not None]
    if not runs:
        raise UserError(f"{arguments.out} holds no finished run; start the study without --report-only")
    if any(run["budget"] != runs[0]["budget"] for run in runs):
        budgets = sorted({json.dumps(run["budget"]) for run in runs})
        raise UserError(f"{arguments.out} holds runs of unequal budgets, which cannot be compared: {budgets}")
    for path in write_report(arguments.out, runs, study_protocol(runs), QUESTIONS):
        print(path)


def parser() -> argparse.ArgumentParser:
    """The study's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument("--steps", type=positive_int, default=1200, help="of a tokenizer (default: %(default)s)")
    parser.add_argument("--mllm-steps", type=positive_int, default=400, help="of a language model (%(default)s)")
    parser.add_argument("--train-images", type=positive_int, default=8000, metavar="N", help="(%(default)s)")
    parser.add_argument("--workers", type=positive_int, default=2, help="processes at once (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--report-only", action="store_true", help="tables and plot of what is finished")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)  # how a worker process is started
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.one:
            run_one(arguments.one, arguments.seeds[0], arguments)
            return 0
        if not arguments.report_only:
            run_all(arguments)
        report(arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
