"""What the task files call; everything about a benchmark is in `unitok.eval.benchmarks`."""

from collections.abc import Callable
from typing import Any

from unitok.eval import benchmark_data, benchmarks


def load(benchmark: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """The documents as lm-eval's only split. `data`: folder of all data (`--metadata '{"data": ...}'`), else
    $UNITOK_DATA, else the hub."""
    return {"test": benchmark_data.load_documents(benchmark, data)}


def load_texts(source: str, **_: Any) -> dict[str, Any]:
    """The first caption of every sample of a source, as documents of text."""
    from datasets import Dataset

    from unitok.data.source import open_source

    opened = open_source(source)
    texts = [words.captions[0] for words in map(opened.words, range(len(opened))) if words.captions]
    return {"test": Dataset.from_list([{"text": text} for text in texts])}


def question(doc: dict[str, Any]) -> str:
    return benchmark_data.question(doc)


def pictures(doc: dict[str, Any]) -> list[Any]:
    return benchmark_data.pictures(doc)


def target(doc: dict[str, Any]) -> str:
    """Shown in logs only."""
    return str(doc.get("answer", doc.get("answers")))


def score(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """What each metric keeps of the answer."""
    return benchmarks.score(doc["benchmark"], doc, results[0])


def __getattr__(name: str) -> Callable[[list[Any]], float]:
    """`pope__f1`: how POPE's F1 follows from what was kept of all answers."""
    benchmark, _, metric = name.partition("__")
    if benchmark not in benchmarks.BENCHMARKS or metric not in benchmarks.BENCHMARKS[benchmark].metrics:
        raise AttributeError(f"{name}: no such metric; expected BENCHMARK__METRIC of unitok.eval.benchmarks")
    return benchmarks.BENCHMARKS[benchmark].metrics[metric].total
