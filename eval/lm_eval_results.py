"""lm-eval's own results files in the form of every run, so that `unitok report` shows them beside others.

Any model's file can be read: `hf` on the language model before image training is the row beside which ours stands.
"""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unitok.core.errors import DataError
from unitok.eval.benchmarks import BENCHMARKS
from unitok.eval.results import Metric, read_results, run_results

OURS = "unitok_"
_PREFIX = "results_"


def is_ours(task: str) -> bool:
    """Is this one of our VQA tasks?"""
    return task.startswith(OURS) and task.removeprefix(OURS) in BENCHMARKS


def is_lm_eval(data: Mapping[str, Any]) -> bool:
    """Is this what lm-eval wrote as results_DATE.json?"""
    return all(isinstance(data.get(part), Mapping) for part in ("results", "configs", "n-samples", "config"))


def lm_eval_runs(data: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """A run for each task and group of `data`, which was read from `path`; of our VQA tasks named by the benchmark.

    Raises:
        DataError: a task has no metric.
    """
    config = data["config"]
    model = _argument(config, "pretrained")
    digest = config.get("model_sha")
    checkpoint = {"path": str(model), "sha256": str(digest)} if digest else None
    seed = _argument(config, "seed")
    if seed is None and config.get("model") != "unitok":  # ours draws by its own seed alone
        seed = config.get("random_seed")
    seeds = [int(seed or 0)]
    runs = {}
    for task, figures in data["results"].items():
        if not (count := _count(data, task)):
            continue
        metrics = _metrics(figures, count)
        if not metrics:
            raise DataError(f"{path}: {task} has no figures; was the run cut off?")
        name = task.removeprefix(OURS)
        block = _protocol(data, task) | {"answers": count}
        runs[task] = run_results(name, metrics, block, seeds, None) | {"checkpoint": checkpoint}
    return runs


def beside(samples: Path, task: str) -> dict[str, Any] | None:
    """The protocol of the run whose answers `samples_TASK_DATE.jsonl` holds; None where its results are not there."""
    for results in sorted(samples.parent.glob(f"*_{glob.escape(date_of(samples))}.json")):
        data = read_results(results)
        if is_lm_eval(data) and task in data["configs"]:
            return _protocol(data, task)
    return None


def samples_beside(results: Path, task: str) -> Path | None:
    """The answers of a task that lie beside lm-eval's results, where the run kept them."""
    path = results.with_name(f"samples_{task}_{date_of(results)}.jsonl")
    return path if path.is_file() else None


def date_of(path: Path) -> str:
    """The date in the name of a file that lm-eval wrote: results_DATE.json, samples_TASK_DATE.jsonl."""
    return path.stem.rpartition("_")[2]


def newest(output: Path, since: float) -> Path | None:
    """lm-eval's results file of --output_path (a folder and those below, or FILE.json, of which it makes
    FILE_DATE.json) that was written at `since` (seconds) or later."""
    named = output.suffix == ".json"
    files = output.parent.glob(f"{glob.escape(output.stem)}_*.json") if named else output.rglob(f"{_PREFIX}*.json")
    found = [path for path in files if path.stat().st_mtime >= since]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _leaves(data: Mapping[str, Any], task: str) -> list[str]:
    below = (data.get("group_subtasks") or {}).get(task)
    return [leaf for one in below for leaf in _leaves(data, one)] if below else [task]


def _count(data: Mapping[str, Any], task: str) -> int:
    """Documents of a task, or of all tasks of a group."""
    counts = [data["n-samples"].get(leaf) or {} for leaf in _leaves(data, task)]
    return sum(count.get("effective") or 0 for count in counts)


def _metrics(figures: Mapping[str, Any], count: int) -> list[Metric]:
    """`acc,none` is acc; with another filter than none both are named."""
    out = []
    for key, value in figures.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{name}_stderr,{kind}")
        label = name if kind == "none" else f"{name} ({kind})"
        out.append(Metric(label, float(value), float(error) if isinstance(error, int | float) else None, count))
    return out


def _protocol(data: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What decides the figures; of a group what its first task has.

    The cache mode is about pictures: text tasks have none, and there `hf` on the same backbone is the same protocol.
    """
    leaf, model = _leaves(data, task)[0], data["config"]
    config = data["configs"].get(leaf) or {}
    known = BENCHMARKS[task.removeprefix(OURS)] if is_ours(task) else None
    documents = model.get("documents") or {}
    return {
        "task": task,
        "version": (data.get("versions") or {}).get(task),
        "num_fewshot": (data.get("n-shot") or {}).get(leaf),
        "generation": config.get("generation_kwargs") if config.get("output_type") == "generate_until" else None,
        "precision": str(model.get("model_dtype")).removeprefix("torch."),
        "weights": model.get("weights"),
        "embedder_cache": model.get("embedder_cache") if config.get("doc_to_image") else None,
        "documents": documents.get(leaf.removeprefix(OURS)) if known else None,
        "chat_template": data.get("chat_template_sha"),
        "system_instruction": data.get("system_instruction_sha"),
        **(known.setting if known else {}),
    }


def _argument(config: Mapping[str, Any], name: str) -> Any:
    """One of --model_args, which lm-eval keeps as an object or as the text that was given."""
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    return arguments.get(name)
