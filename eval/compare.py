"""Any number of `results.json` files side by side with the paper's rows: one table a benchmark, one column a metric.

Figures of one column must come from one protocol. Where they do not, that is an error, or, where it is wanted, said
below the table with every setting that differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from unitok.core.errors import DataError, UserError
from unitok.eval.lm_eval_results import is_lm_eval, lm_eval_runs
from unitok.eval.paper import paper_rows
from unitok.eval.results import format_table, protocol_differences, read_results

# What a protocol block may hold that does not belong to the protocol: the same measurement elsewhere or once more.
_NOT_PROTOCOL = frozenset({"versions", "machine", "seed", "seeds"})
_FIELDS = ("benchmark", "metrics", "protocol", "seeds", "checkpoint")


@dataclass(frozen=True)
class Run:
    """One measurement: `label` names its file, `metrics` are (value, standard error or None, n) by name."""

    label: str
    benchmark: str
    metrics: Mapping[str, tuple[float, float | None, int]]
    protocol: Mapping[str, Any]
    checkpoint: str
    seeds: str


@dataclass(frozen=True)
class Table:
    """One benchmark; `notes` are lines below it."""

    benchmark: str
    headers: list[str]
    rows: list[list[str]]
    notes: list[str]


def read_runs(path: Path | str) -> list[Run]:
    """The run of a `results.json`, or its `runs`, where one file holds those of several systems, or the tasks of a
    results file of lm-eval.

    Raises:
        DataError: the file is not of that form.
    """
    data = read_results(path)
    if is_lm_eval(data):
        data = {"runs": lm_eval_runs(data, Path(path))}
    runs = data.get("runs") or {"": data}
    if not isinstance(runs, Mapping):
        raise DataError(f"{path}: runs is a {type(runs).__name__}; expected an object of results by system")
    return [_run(entry, f"{path}:{name}" if name else str(path)) for name, entry in runs.items()]


def _run(data: Any, label: str) -> Run:
    missing = [key for key in _FIELDS if not isinstance(data, Mapping) or key not in data]
    if missing:
        raise DataError(
            f"{label} has no {', '.join(missing)}; expected what `unitok eval ... --out FILE` writes (for a demo's run "
            "give its folder)"
        )
    try:
        metrics = {row["metric"]: (float(row["value"]), row["standard_error"], row["n"]) for row in data["metrics"]}
        protocol = {key: value for key, value in data["protocol"].items() if key not in _NOT_PROTOCOL}
        checkpoint = "" if data["checkpoint"] is None else str(data["checkpoint"]["sha256"])[:8]
        seeds = ",".join(map(str, data["seeds"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{label}: not the form of results ({type(error).__name__}: {error}); measure again") from None
    return Run(label, str(data["benchmark"]), metrics, protocol, checkpoint, seeds)


def compare(paths: Sequence[Path | str], mixed_protocols: bool = False) -> list[Table]:
    """A table for each benchmark in the files.

    Raises:
        DataError: a file is not a run's results.
        UserError: a column would hold figures of different protocols, and `mixed_protocols` is not set.
    """
    runs = [run for path in paths for run in read_runs(path)]
    runs.sort(key=lambda run: run.benchmark)  # stable: files of one benchmark stay in the order given
    return [_table(name, list(own), mixed_protocols) for name, own in groupby(runs, key=lambda run: run.benchmark)]


def _table(benchmark: str, runs: list[Run], mixed_protocols: bool) -> Table:
    theirs = paper_rows(benchmark)
    published = () if all(_of_the_world(run) for run in runs) else theirs
    names = list(dict.fromkeys(name for row in (*runs, *published) for name in row.metrics))
    kinds = _protocol_kinds(runs)
    clashes = _clashes(names, runs, kinds)
    if clashes and not mixed_protocols:
        columns, one, other = clashes[0]
        differences = _listed(protocol_differences(one.protocol, other.protocol))
        raise UserError(
            f"{benchmark}: {one.label} and {other.label} were measured by different protocols ({differences}), so they "
            f"share no column ({columns[0]}); compare them apart, or give --mixed-protocols"
        )
    mark = (lambda run: f" [{kinds[id(run)]}]") if clashes else (lambda run: "")
    rows = [
        [
            run.label + mark(run),
            run.checkpoint or "-",
            run.seeds or "-",
            *(_figure(run.metrics.get(name)) for name in names),
        ]
        for run in runs
    ]
    for row in published:
        cells = [f"{row.metrics[name]:g}" if name in row.metrics else "" for name in names]
        rows.append([f"{row.system} (published)", "-", "-", *cells])
    notes = [
        f"{', '.join(columns)}: [{kinds[id(one)]}] and [{kinds[id(other)]}] differ in "
        + _listed(protocol_differences(one.protocol, other.protocol))
        for columns, one, other in clashes
    ]
    notes += [f"{row.system}: {row.source}" + (f"; {row.protocol}" if row.protocol else "") for row in published]
    if published:
        notes.append(
            "Published rows are no part of any protocol above: their data, and what they do not state, may differ."
        )
    elif theirs:
        notes.append("Measured on the embedded world; the published rows are of other data, and left out.")
    return Table(benchmark, ["run", "checkpoint", "seeds", *names], rows, notes)


def _of_the_world(run: Run) -> bool:
    """Was it measured on the embedded world (by its source, its scenes as classes, or its detector)?"""
    source, scoring = str(run.protocol.get("source")), run.protocol.get("scoring")
    detector = scoring.get("detector") if isinstance(scoring, Mapping) else None
    return "shapes" in (source.partition(":")[0], run.protocol.get("world"), detector)


def _protocol_kinds(runs: Sequence[Run]) -> dict[int, str]:
    """A letter for each run's protocol, equal ones alike."""
    seen: list[Mapping[str, Any]] = []
    kinds = {}
    for run in runs:
        if run.protocol not in seen:
            seen.append(run.protocol)
        kinds[id(run)] = _letter(seen.index(run.protocol))
    return kinds


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else str(index)


def _clashes(names: Sequence[str], runs: Sequence[Run], kinds: Mapping[int, str]) -> list[tuple[list[str], Run, Run]]:
    """(columns, first run, run of another protocol in them), one entry for every pair of protocols."""
    found: dict[tuple[str, str], tuple[list[str], Run, Run]] = {}
    for name in names:
        first, *others = [run for run in runs if name in run.metrics] or [None]
        for other in others:
            pair = kinds[id(first)], kinds[id(other)]
            if pair[0] != pair[1]:
                columns = found.setdefault(pair, ([], first, other))[0]
                columns += [name] if name not in columns else []
    return list(found.values())


def _listed(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {_short(one)} | {_short(other)}" for name, (one, other) in differences.items())


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _figure(metric: tuple[float, float | None, int] | None) -> str:
    if metric is None:
        return ""
    value, error, _ = metric
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def as_text(tables: Sequence[Table]) -> str:
    """The tables for a terminal."""
    parts = []
    for table in tables:
        notes = "".join(f"\n  {note}" for note in table.notes)
        parts.append(f"{table.benchmark}\n{format_table(table.rows, table.headers)}{notes}")
    return "\n\n".join(parts)


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Results side by side</title>
<style>body{font:15px system-ui;margin:2rem}table{border-collapse:collapse;margin:.5rem 0}
td,th{padding:.2rem .7rem;border-bottom:1px solid #ccc;text-align:left}li{color:#555}</style>
{% for table in tables %}<h2>{{ table.benchmark }}</h2>
<table><tr>{% for name in table.headers %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table><ul>{% for note in table.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% endfor %}</html>
"""


def as_html(tables: Sequence[Table]) -> str:
    """The tables as one page, with nothing from elsewhere."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(tables=tables)
