"""`results.json` of a run, its protocol block, and plain tables for the terminal."""

import hashlib
import json
import math
import os
import platform
import resource
import shlex
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from unitok import __version__
from unitok.core.errors import CheckpointError, DataError
from unitok.core.rng import numpy_rng

_LEFT_OUT = frozenset(
    {"pairs", "records", "rows", "images"}
)  # large parts of an evaluation, kept in files of their own
_VERSIONS_OF = ("torch", "transformers", "deepspeed", "numpy", "torch-fidelity", "open_clip_torch", "lm_eval")


def protocol(what: str, seed: int, counts: Mapping[str, int], **details: Any) -> dict[str, Any]:
    """What somebody needs to repeat a measurement: description, seed, numbers of items, settings, versions."""
    block = {"what": what, "seed": seed, "counts": dict(counts), **details, "versions": _versions()}
    machine = {"cpus": os.cpu_count(), "system": platform.system(), "architecture": platform.machine()}
    return block | {"machine": machine}


def _versions() -> dict[str, str]:
    versions = {"unitok": __version__, "python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            versions[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class Metric:
    """One figure of a run: its mean over `n` items and the standard error of that mean (None: not known)."""

    name: str
    value: float
    standard_error: float | None
    n: int


def share(name: str, outcomes: Sequence[float | bool]) -> Metric:
    """Mean of outcomes (right or wrong, or scores) with the standard error of the mean, sd / sqrt(n)."""
    n = len(outcomes)
    if not n:
        raise DataError(f"{name}: nothing was scored, so there is no mean")
    mean = math.fsum(outcomes) / n
    variance = math.fsum((value - mean) ** 2 for value in outcomes) / (n - 1) if n > 1 else None
    return Metric(name, mean, None if variance is None else math.sqrt(variance / n), n)


def bootstrap_error(
    total: Callable[[Sequence[Any]], float],
    items: Sequence[Any],
    unit: Callable[[Any], Hashable] | None = None,
    rounds: int = 200,
) -> float | None:
    """Standard error of `total(items)` where it is no mean: its deviation over draws of as many units with replacement.

    unit: of an item, what was drawn by itself (None: the item). None where there is a single unit.
    """
    units: dict[Hashable, list[Any]] = {}
    for number, item in enumerate(items):
        units.setdefault(number if unit is None else unit(item), []).append(item)
    groups = list(units.values())
    if len(groups) < 2:
        return None
    rng = numpy_rng("bootstrap", len(groups))
    draws = (rng.integers(len(groups), size=len(groups)) for _ in range(rounds))
    totals = [total([item for number in draw for item in groups[number]]) for draw in draws]
    mean = math.fsum(totals) / rounds
    return math.sqrt(math.fsum((value - mean) ** 2 for value in totals) / (rounds - 1))


def run_results(
    benchmark: str,
    metrics: Sequence[Metric],
    protocol: Mapping[str, Any],
    seeds: Sequence[int],
    checkpoint: Path | None,
) -> dict[str, Any]:
    """The `results.json` of one evaluation, the same form for every benchmark; `write_run` writes it.

    Args:
        protocol: everything that changes the figures: data file, limit, sampler settings, cache mode, thresholds.
            Two runs may share a column of `unitok report` only where it is equal.
        checkpoint: folder (or file) of the model that was measured; None for images that came from elsewhere.

    Raises:
        DataError: there is no metric, or two of one name.
        CheckpointError: `checkpoint` holds no weights.
    """
    names = [metric.name for metric in metrics]
    if not names or len(set(names)) < len(names):
        raise DataError(f"{benchmark}: metrics {names}; expected at least one, each name once")
    return {
        "benchmark": benchmark,
        "metrics": metrics_form(metrics),
        "protocol": dict(protocol),
        "seeds": list(seeds),
        "checkpoint": None if checkpoint is None else {"path": str(checkpoint), "sha256": checkpoint_hash(checkpoint)},
        "versions": _versions(),
        "command": shlex.join([_program(), *sys.argv[1:]]),
    }


def metrics_form(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Metrics as a `results.json` holds them."""
    return [
        {"metric": metric.name, **{key: value for key, value in asdict(metric).items() if key != "name"}}
        for metric in metrics
    ]


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "unitok" if name == "__main__.py" else name  # python -m unitok


def checkpoint_hash(checkpoint: Path | str) -> str:
    """SHA-256 over names and contents of all safetensors files of a folder and its sub-folders (of others' weights
    files where it has none), or over one file.

    Raises:
        CheckpointError: there is no such file.
    """
    checkpoint = Path(checkpoint)
    files = [checkpoint] if checkpoint.is_file() else []
    for pattern in ("*.safetensors", "*.bin", "*.pth", "*.pt"):
        files = files or sorted(checkpoint.rglob(pattern))
    if not files:
        raise CheckpointError(f"{checkpoint}: no weights file in it, so there is no model to name in the results")
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        name = file.name if file == checkpoint else file.relative_to(checkpoint).as_posix()
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def protocol_differences(a: Mapping[str, Any], b: Mapping[str, Any], name: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings, by dotted names, in which two protocols differ, with both values (None: not set)."""
    out: dict[str, tuple[Any, Any]] = {}
    for key in {**a, **b}:
        one, other, full = a.get(key), b.get(key), f"{name}.{key}" if name else str(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            out |= protocol_differences(one, other, full)
        elif one != other:
            out[full] = (one, other)
    return out


def print_run(results: Mapping[str, Any]) -> None:
    """A run's metrics as a table."""
    rows = []
    for row in results["metrics"]:
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        rows.append((row["metric"], f"{row['value']:.4f}", error, row["n"]))
    print_table(rows, (results["benchmark"], "value", "standard error", "n"))


def write_run(path: Path | str, results: Mapping[str, Any]) -> Path:
    """Writes what `run_results` gave to `path`, or to `path/results.json` where `path` is a folder."""
    path = Path(path)
    return write_results(path / "results.json" if path.is_dir() else path, results)


def demo_results(
    *,
    tokenizer: Mapping[str, Any],
    vqa: Mapping[str, Any],
    geneval: Mapping[str, Any],
    random_codes: Mapping[str, Any] | float,
    reconstruction_ceiling: Mapping[str, Any] | float,
    wall_seconds: float,
    protocol_block: Mapping[str, Any],
    retrieval: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The demo's figures in the form of `results.json`, from what the evaluators returned.

    `random_codes` and `reconstruction_ceiling` are those helpers' results (their overall score is stored, and their
    scores by tag under `random_codes_by_tag` and `reconstruction_ceiling_by_tag`) or plain numbers.
    """
    generation = figures_only(geneval)
    for name, value in (("random_codes", random_codes), ("reconstruction_ceiling", reconstruction_ceiling)):
        if isinstance(value, Mapping):
            generation |= {name: value["overall"], f"{name}_by_tag": dict(value["by_tag"])}
        else:
            generation[name] = float(value)
    results = {"tokenizer": figures_only(tokenizer), "vqa": figures_only(vqa), "geneval": generation}
    if retrieval is not None:
        results["tokenizer"]["retrieval"] = figures_only(retrieval)
    return results | {
        "wall_seconds": wall_seconds,
        "peak_memory_mb": peak_memory_mb(),
        "protocol": dict(protocol_block),
    }


def figures_only(values: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation's figures without its images and records."""
    return {key: value for key, value in values.items() if key not in _LEFT_OUT}


def peak_memory_mb() -> float:
    """Largest resident memory of this process or of any child it has waited for, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return round(max(resource.getrusage(kind).ru_maxrss for kind in who) * unit / 1e6, 1)


def write_results(path: Path | str, results: Mapping[str, Any]) -> Path:
    """Writes `results` as JSON, all at once; a value that is not finite is refused with its name.

    Raises:
        DataError: a number is NaN or infinite.
    """
    path = Path(path)
    bad = _not_finite(results)
    if bad:
        raise DataError(f"{path} not written: {bad} is not a finite number; check the evaluation that gave it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _not_finite(value: Any, name: str = "") -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else name
    if isinstance(value, Mapping):
        entries = [(f"{name}.{key}" if name else str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        entries = [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    else:
        return None
    return next((bad for key, entry in entries if (bad := _not_finite(entry, key))), None)


def read_results(path: Path | str) -> dict[str, Any]:
    """Reads a `results.json`.

    Raises:
        DataError: the file is missing or not JSON.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read {path} ({type(error).__name__}); expected a results.json of a run") from None
    if not isinstance(results, dict):
        raise DataError(f"{path} holds a {type(results).__name__}; expected the JSON object of a results.json")
    for part in ("tokenizer", "vqa", "geneval"):
        if not isinstance(results.get(part, {}), dict):
            raise DataError(f"{path}: {part} is {str(results[part])[:40]!r}; expected an object")
    return results


def demo_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows [measure, value, baseline, ceiling] of a demo's results, for `print_table`; missing parts are left out."""
    tokenizer, vqa, geneval = (results.get(part) or {} for part in ("tokenizer", "vqa", "geneval"))
    retrieval = tokenizer.get("retrieval") or {}
    measures = [
        ("reconstruction PSNR (dB)", tokenizer.get("psnr_db"), None, None, ".2f"),
        ("reconstruction SSIM", tokenizer.get("ssim"), None, None, ".3f"),
        (
            "scene found again by the detector",
            tokenizer.get("detector_agreement"),
            None,
            tokenizer.get("detector_agreement_originals"),
            ".3f",
        ),
        ("codebook usage", tokenizer.get("usage"), None, 1.0, ".3f"),
        ("caption retrieval, top 1", retrieval.get("top1"), retrieval.get("chance"), None, ".3f"),
        ("VQA accuracy", vqa.get("accuracy"), vqa.get("majority"), None, ".3f"),
        (
            "GenEval-style score",
            geneval.get("overall"),
            geneval.get("random_codes"),
            geneval.get("reconstruction_ceiling"),
            ".3f",
        ),
    ]
    rows = []
    for name, value, baseline, ceiling, form in measures:
        if value is not None:
            rows.append([name, *("" if entry is None else format(entry, form) for entry in (value, baseline, ceiling))])
    return rows


DEMO_HEADERS = ("measure", "this run", "baseline", "ceiling")


def format_table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """A plain text table; a column whose entries are all numbers (or empty) is set flush right."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])


def _is_number(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return False
    return True


def print_table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> None:
    """Prints `format_table` to stdout."""
    print(format_table(rows, headers), flush=True)
