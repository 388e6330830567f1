"""Stored answers of an lm-eval run (`--log_samples`) scored again, without the model; MM-Vet's by a judge."""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from unitok.core.errors import DataError, UserError
from unitok.eval.benchmark_data import documents_hash
from unitok.eval.benchmarks import benchmark, score, totals
from unitok.eval.lm_eval_results import beside
from unitok.eval.results import Metric, bootstrap_error, run_results, share
from unitok.eval.vqa_metrics import by_group, mean

Judge = Callable[[str, str, str], float]  # (question, reference, answer) -> score in [0, 1]
Sample = Mapping[str, Any]


def read_samples(path: Path | str, limit: int | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Name of the benchmark and the samples of a file.

    Raises:
        DataError: the file cannot be read, or is not of one of our VQA tasks.
    """
    path, samples = Path(path), []
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}); give a samples_*.jsonl file") from None
    for number, line in enumerate(lines[:limit], 1):
        try:
            sample = json.loads(line)
            answer, settings = _answer(sample["resps"]), _settings(sample.get("arguments"))
            samples.append({"doc": dict(sample["doc"]), "answer": answer, "settings": settings})
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise DataError(f"{path}, line {number}: expected a sample of lm-eval with doc and resps") from None
    names = {str(sample["doc"].get("benchmark")) for sample in samples}
    if len(names) != 1 or names == {"None"}:
        raise DataError(f"{path}: documents of {sorted(names) or 'nothing'}; expected those of one task unitok_*")
    (name,) = names
    benchmark(name)
    return name, samples


def _answer(resps: Any) -> str:
    """The one raw answer of a sample: [["text"]]."""
    while isinstance(resps, list):
        resps = resps[0] if resps else None
    if not isinstance(resps, str):
        raise ValueError(resps)
    return resps


def _settings(arguments: Any) -> dict[str, Any]:
    """How the answer was generated: the dictionary among the request's arguments (after the question)."""
    try:
        settings = arguments["gen_args_0"]["arg_1"] if isinstance(arguments, dict) else arguments[0][1]
    except (KeyError, IndexError, TypeError):
        return {}
    return dict(settings) if isinstance(settings, dict) else {}


def rescore_samples(
    name: str, samples: Sequence[Sample], judge: str | None = None
) -> tuple[list[Metric], list[tuple[str, str, float]]]:
    """Metrics over all samples, and (metric, group, value) of the groups that documents name.

    judge: "module:function" of (question, reference, answer) -> score in [0, 1].
    """
    items = [score(name, sample["doc"], sample["answer"]) for sample in samples]
    metrics = [
        _metric(name, metric, value, [item[metric] for item in items]) for metric, value in totals(name, items).items()
    ]
    groups: list[tuple[str, str, float]] = []
    if judge is not None:
        scores = judged(samples, load_judge(judge))
        metrics.append(share("score", scores))
        pairs = [
            (capability, value)
            for sample, value in zip(samples, scores, strict=True)
            for capability in str(sample["doc"].get("capability") or "").split(",")
            if capability
        ]
        groups += [("score", group, value) for group, value in by_group(pairs).items()]
    return metrics, groups


def _metric(benchmark_name: str, name: str, value: float, items: Sequence[Any]) -> Metric:
    """With a standard error: of a mean by its formula, of anything else by drawing again."""
    if all(isinstance(item, float | bool) for item in items) and abs(mean(items) - value) < 1e-12:
        return share(name, items)
    rule = benchmark(benchmark_name).metrics[name]
    units = len(items) if rule.unit is None else len({rule.unit(item) for item in items})
    return Metric(name, value, bootstrap_error(rule.total, items, rule.unit), units)


def load_judge(spec: str) -> Judge:
    """The function that "module:function" names; UserError when there is none."""
    module, _, function = spec.partition(":")
    if not module or not function:
        raise UserError(f"--judge {spec}: expected MODULE:FUNCTION, such as my_judge:score")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--judge {spec}: {error}; the module must be on PYTHONPATH") from None
    return found


def judged(samples: Sequence[Sample], judge: Judge) -> list[float]:
    """The judge's score of every answer; DataError where one is no number in [0, 1]."""
    scores = []
    for sample in samples:
        doc = sample["doc"]
        value = judge(doc["question"], str(doc.get("answer")), sample["answer"])
        if not isinstance(value, Real) or not 0 <= value <= 1:
            raise DataError(f"the judge gave {value!r} for {doc['question'][:60]!r}; expected a number in [0, 1]")
        scores.append(float(value))
    return scores


def rescored_run(
    name: str,
    metrics: Sequence[Metric],
    samples: Sequence[Sample],
    path: Path,
    seed: int,
    judge: str | None,
    model: Path | None,
) -> dict[str, Any]:
    """The run in the form that `unitok report` reads; its protocol is that of the run which gave the answers, where
    lm-eval's results still lie beside them. `model`: the folder whose answers they are, for its hash."""
    protocol = beside(path, f"unitok_{name}") or {
        "task": f"unitok_{name}",
        "generation": samples[0]["settings"],
        "documents": documents_hash(name, [sample["doc"] for sample in samples]),
    }
    protocol |= {"answers": len(samples), **benchmark(name).setting} | ({"judge": judge} if judge else {})
    return run_results(name, metrics, protocol, [seed], model) | {"samples": path.name}
