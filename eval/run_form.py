"""What an evaluator returns, brought into the form of every run (`unitok.eval.results.run_results`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unitok.eval.results import Metric, run_results


def figures_as_metrics(figures: Mapping[str, Any], n: int) -> list[Metric]:
    """The plain numbers among an evaluation's figures; `NAME_se` is the standard error of NAME."""
    out = []
    for name, value in figures.items():
        if (
            name.endswith("_se")
            or name.startswith("num_")
            or isinstance(value, bool)
            or not isinstance(value, int | float)
        ):
            continue
        out.append(Metric(name, float(value), figures.get(f"{name}_se"), n))
    return out


def with_errors(figures: Mapping[str, Any], names: Sequence[str], n: int) -> dict[str, Any]:
    """Figures with "NAME_se" for shares of `n` items that are right or wrong: sqrt(p (1 - p) / (n - 1))."""
    errors = {}
    for name in names:
        if isinstance(figures.get(name), float) and n > 1:
            errors[f"{name}_se"] = (figures[name] * (1 - figures[name]) / (n - 1)) ** 0.5
    return {**figures, **errors}


def system_runs(
    benchmark: str,
    figures: Mapping[str, Mapping[str, Any]],
    n: int,
    protocol: Mapping[str, Any],
    seeds: Sequence[int],
    paths: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """The results of each of several systems that one command measured; `paths` of their weights, in the same order.

    The checkpoint is None where a path is a name that a library resolves, as of the hub.
    """
    runs = {}
    for (name, own), path in zip(figures.items(), paths, strict=True):
        checkpoint = Path(path) if Path(path).exists() else None
        runs[name] = run_results(benchmark, figures_as_metrics(own, n), protocol, seeds, checkpoint)
    return runs
