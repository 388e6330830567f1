"""`unitok lm-eval ...`: lm-eval's own command line with our model and task files; `unitok eval rescore`."""

import argparse
import fnmatch
import hashlib
import json
import os
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError

_USER_MISTAKES = ("Tasks not found", "No tasks specified")  # what lm-eval says, as a plain ValueError
_JUDGE = "give --judge MODULE:FUNCTION, (question, reference, answer) -> [0, 1]"
_TAG, _TEXTS = "unitok_vqa", "unitok_shapes_text"
_BATCH_SIZE = "32"  # lm-eval's default is 1


def add_lm_eval_command(commands: Any) -> None:
    """Only for the list of commands: what follows `lm-eval` goes to lm-eval as it stands."""
    commands.add_parser(
        "lm-eval",
        add_help=False,
        usage="unitok lm-eval ARGS...",
        description="lm-eval's own command line, where --model unitok (the default) is the unified model in "
        "--model_args pretrained=DIR, and the tasks unitok_* are VQA benchmarks on $UNITOK_DATA. --dry-run lists them "
        "and what data they lack; --out FILE writes the figures as `unitok report` reads them; --help is lm-eval's.",
        help="lm-eval's command line with the unified model (--model unitok) and VQA tasks; --dry-run lists their data",
    )


def lm_eval_namespace(argv: list[str]) -> argparse.Namespace:
    """What `parse` gives for `unitok lm-eval ARGS...`."""
    return argparse.Namespace(run=("lm_eval", "lm_eval"), arguments=argv)


def add_rescore_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", metavar="SAMPLES", help="samples_unitok_*.jsonl of a run with --log_samples")
    parser.add_argument("--judge", metavar="MODULE:FUNCTION", help="(question, reference, answer) -> score in [0, 1]")
    parser.add_argument("--model", metavar="DIR", help="the model that answered, to write its hash into the result")
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
    from unitok.core.distributed import init_distributed, is_main, shutdown_distributed

    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # under torchrun every rank answers its share
    if several:
        init_distributed()
    setup_logging()
    own, out = _take_out(arguments.arguments)
    sys.argv = ["unitok", "lm-eval", *arguments.arguments]  # as results name the command
    start, command = time.time(), _with_defaults(own)
    harness = HarnessCLI()
    with tempfile.TemporaryDirectory() as scratch:
        if out and not {one.split("=")[0] for one in command} & {"--output_path", "-o"}:
            command += ["--output_path", scratch]
        parsed = _parsed(harness, command)
        parsed.include_path = task_folders(getattr(parsed, "include_path", None))
        _seed_model(parsed)
        _own_cache(parsed)
        try:
            harness.execute(parsed)
        except ValueError as error:
            if not str(error).startswith(_USER_MISTAKES):
                raise
            raise UserError(f"{error} (`unitok lm-eval ls tasks` lists all, `unitok lm-eval --dry-run` ours)") from None
        if is_main() and getattr(parsed, "output_path", None):
            _write_runs(Path(parsed.output_path), start, out)
    if several:
        shutdown_distributed()
    return 0


def _parsed(harness: Any, command: list[str]) -> argparse.Namespace:
    """lm-eval reads sys.argv alone."""
    before, sys.argv = sys.argv, ["unitok lm-eval", *command]
    try:
        return harness.parse_args()
    finally:
        sys.argv = before


def _seed_model(parsed: argparse.Namespace) -> None:
    """--seed's first number is also our model's, where --model_args names none."""
    seeds = getattr(parsed, "seed", None)
    if getattr(parsed, "model", None) == "unitok" and not parsed.config and seeds and seeds[0] is not None:
        parsed.model_args = {"seed": seeds[0], **(parsed.model_args or {})}


def _own_cache(parsed: argparse.Namespace) -> None:
    """Answers are kept by model: lm-eval's file is told apart by the rank alone, and gives them to any other model."""
    if getattr(parsed, "model", None) != "unitok" or not getattr(parsed, "use_cache", None):
        return
    from unitok.eval.results import checkpoint_hash

    given = dict(parsed.model_args or {})
    folder = given.pop("pretrained", None)
    known = checkpoint_hash(folder) if folder and Path(folder).is_dir() else folder
    digest = hashlib.blake2b(repr((known, sorted(given.items()))).encode(), digest_size=6).hexdigest()
    parsed.use_cache = f"{parsed.use_cache}-{digest}"


def _take_out(argv: list[str]) -> tuple[list[str], str | None]:
    """lm-eval's arguments, and the file of --out, which is ours."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--out")
    try:
        known, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; give --out FILE") from None
    return rest, known.out


def _write_runs(folder: Path, since: float, out: str | None) -> None:
    """What lm-eval wrote, once more in the form of every run; figures of kept answers with their standard errors."""
    from unitok.eval.lm_eval_results import date_of, is_ours, lm_eval_runs, newest, samples_beside
    from unitok.eval.rescore import read_samples, rescore_samples
    from unitok.eval.results import metrics_form, read_results, write_results

    path = newest(folder, since)
    if path is None:  # `ls` and `validate` measure nothing
        if out:
            raise UserError(f"--out {out}: lm-eval wrote no results into {folder}, so there is nothing to write")
        return
    runs = lm_eval_runs(read_results(path), path)
    for task, run in runs.items():
        samples = samples_beside(path, task) if is_ours(task) else None
        if samples is not None:
            run["metrics"] = metrics_form(rescore_samples(*read_samples(samples))[0])
    target = Path(out) if out else path.with_name(f"runs_{date_of(path)}.json")
    print(write_results(target, {"runs": runs}))


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
    """Every VQA task with its data: where they are, or where they come from; and whether the model is there."""
    from unitok.eval.benchmark_data import missing_data
    from unitok.eval.benchmarks import BENCHMARKS
    from unitok.eval.lm_eval_results import OURS
    from unitok.eval.results import print_table

    data = _data(argv)
    ours = {f"{OURS}{name}": missing_data(name, data) or "there" for name in BENCHMARKS}
    known = ours | {_TEXTS: "there"}
    rows: dict[str, str] = {}
    for task in _values(argv, "--tasks", "-t") or ours:
        found = list(ours) if task == _TAG else fnmatch.filter(known, task)
        rows |= {name: known[name] for name in found}
        if not found:
            theirs = "lm-eval's own task: from the hub, as its task file says"
            rows[task] = f"no such task; ours are {OURS}*, see --dry-run" if task.startswith(OURS) else theirs
    print_table(list(rows.items()), ("task", "data"))
    given = ",".join(one.removeprefix("--model_args=") for one in argv)
    for part in given.split(","):
        name, _, path = part.partition("=")
        if name == "pretrained" and not Path(path).exists():
            print(f"missing: {path}: the unified model; train it (unitok demo), convert a release, or name another")
    return 0


def _values(argv: list[str], *names: str) -> list[str]:
    """What an option of lm-eval's is given, separated by commas or spaces."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*names, dest="given", nargs="*", action="extend", default=[])
    return [value for text in parser.parse_known_args(argv)[0].given for value in text.split(",") if value]


def _data(argv: list[str]) -> str | None:
    """The folder that --metadata names, as an object or as data=DIR."""
    text = ",".join(_values(argv, "--metadata"))
    if text.startswith("{"):
        try:
            return json.loads(text).get("data")
        except json.JSONDecodeError:
            raise UserError(f'--metadata {text[:60]}: is not JSON; expected \'{{"data": "DIR"}}\'') from None
    return dict(part.partition("=")[::2] for part in text.split(",")).get("data")


def rescore(arguments: argparse.Namespace) -> int:
    """Figures of stored answers, without the model."""
    from unitok.eval.rescore import load_judge, read_samples, rescore_samples, rescored_run
    from unitok.eval.results import print_table, write_results

    path = Path(arguments.samples)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: expected at least 1")
    if arguments.dry_run:
        there = "is there" if path.is_file() else "is missing: run `unitok lm-eval --tasks unitok_... --log_samples`"
        print(f"would score the stored answers of {path}, which {there}")
        if arguments.judge:
            load_judge(arguments.judge)
        else:
            print(f"left out: scores of a judge, which MM-Vet needs; {_JUDGE}")
        return 0
    model = Path(arguments.model) if arguments.model else None
    if model is not None and not model.exists():  # before a judge is asked, not after
        raise UserError(f"--model {model}: no such folder; give that of the model which answered, or leave it out")
    name, samples = read_samples(path, arguments.limit)
    metrics, groups = rescore_samples(name, samples, arguments.judge)
    rows = [(metric.name, f"{metric.value:.4f}", metric.n) for metric in metrics]
    rows += [(f"{metric} of {group}", f"{value:.4f}", "") for metric, group, value in groups]
    print_table(rows, (f"figure of {name}", "value", "n"))
    if name == "mmvet" and not arguments.judge:
        print(f"no score: MM-Vet is scored by a judge; {_JUDGE}")
    if arguments.out:
        run = rescored_run(name, metrics, samples, path, arguments.seed, arguments.judge, model)
        print(write_results(arguments.out, run))
    return 0
