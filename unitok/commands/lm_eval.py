"""`unitok lm-eval ...`: lm-eval's own command line with our model and task files; `unitok eval rescore`."""

import argparse
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError

_BATCH_SIZE = "32"  # lm-eval's default is 1


def add_lm_eval_command(commands: Any) -> None:
    """Only for the list of commands: what follows `lm-eval` goes to lm-eval as it stands."""
    commands.add_parser(
        "lm-eval",
        add_help=False,
        description="All options are lm-eval's (`unitok lm-eval run --help`). Our model is --model unitok --model_args "
        "pretrained=DIR, our tasks are listed by `unitok lm-eval ls tasks`; --dry-run lists the data that they need.",
        help="lm-eval's command line with the unified model (--model unitok) and VQA tasks; --dry-run lists their data",
    )


def lm_eval_namespace(argv: list[str]) -> argparse.Namespace:
    """What `parse` gives for `unitok lm-eval ARGS...`."""
    return argparse.Namespace(run=("lm_eval", "lm_eval"), arguments=argv)


def add_rescore_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", metavar="SAMPLES", help="samples_unitok_*.jsonl of a run with --log_samples")
    parser.add_argument("--judge", metavar="MODULE:FUNCTION", help="(question, reference, answer) -> score in [0, 1]")
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N answers")
    parser.add_argument("--seed", type=int, default=0, help="written into the result; re-scoring draws nothing")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--dry-run", action="store_true", help="say what would be scored, and stop")
    parser.set_defaults(run=("lm_eval", "rescore"))


def lm_eval(arguments: argparse.Namespace) -> int:
    """Register the model, add the task folder, run lm-eval."""
    if "--dry-run" in arguments.arguments:
        return _list_data(arguments.arguments)
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import unitok.eval.lm_eval_model  # noqa: F401  (registers the model)
    from unitok.core.distributed import init_distributed, shutdown_distributed

    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # under torchrun every rank answers its share
    if several:
        init_distributed()
    setup_logging()
    sys.argv = ["unitok lm-eval", *_with_defaults(arguments.arguments)]
    harness = HarnessCLI()
    parsed = harness.parse_args()
    parsed.include_path = task_folders(getattr(parsed, "include_path", None))
    harness.execute(parsed)
    if several:
        shutdown_distributed()
    return 0


def _with_defaults(argv: list[str]) -> list[str]:
    """Our model and a batch, where a run names none."""
    if not argv or argv[0] not in ("run", *_options(argv)) or "--help" in argv or "-h" in argv:
        return argv
    given = {argument.split("=")[0] for argument in argv}
    for names, value in ((("--model", "-M"), "unitok"), (("--batch_size", "-b"), _BATCH_SIZE)):
        if not given & {*names, "--config", "-C"}:
            argv = [*argv, names[0], value]
    return argv


def _options(argv: list[str]) -> list[str]:
    return [argument for argument in argv if argument.startswith("-")]


def task_folders(given: str | list[str] | None = None) -> list[str]:
    """Ours, and what --include_path names."""
    ours = str(files("unitok.eval.lm_eval_tasks"))
    more = given.split(":") if isinstance(given, str) else list(given or [])
    return [ours, *more]


def _list_data(argv: list[str]) -> int:
    """Every VQA task with its data: where they are, or where they come from."""
    from unitok.eval.benchmark_data import missing_data
    from unitok.eval.benchmarks import BENCHMARKS
    from unitok.eval.results import print_table

    asked = [name for name in BENCHMARKS if any(f"unitok_{name}" in one.split(",") for one in argv)] or list(BENCHMARKS)
    rows = [(f"unitok_{name}", missing_data(name) or "there") for name in asked]
    print_table(rows, ("task", "data"))
    return 0


def rescore(arguments: argparse.Namespace) -> int:
    """Figures of stored answers, without the model."""
    from unitok.eval.rescore import read_samples, rescore_samples, rescored_run
    from unitok.eval.results import print_table, write_results

    path = Path(arguments.samples)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: expected at least 1")
    if arguments.dry_run:
        there = "is there" if path.is_file() else "is missing: run `unitok lm-eval --tasks unitok_... --log_samples`"
        print(f"would score the stored answers of {path}, which {there}")
        return 0
    name, samples = read_samples(path, arguments.limit)
    metrics, groups = rescore_samples(name, samples, arguments.judge)
    rows = [(metric.name, f"{metric.value:.4f}", metric.n) for metric in metrics]
    rows += [(f"{metric} of {group}", f"{value:.4f}", "") for metric, group, value in groups]
    print_table(rows, (f"figure of {name}", "value", "n"))
    if arguments.out:
        run = rescored_run(name, metrics, path, arguments.seed, arguments.limit, arguments.judge)
        print(write_results(arguments.out, run))
    return 0
