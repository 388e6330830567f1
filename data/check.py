"""Reads a whole source once and says what is in it: `unitok data check`."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from unitok.core.errors import UserError
from unitok.data.bad import SourceError, kind_of, patiently
from unitok.data.samples import Sample, Source
from unitok.data.source import open_source
from unitok.data.words import Words

_LISTED = 1000  # duplicate keys that are named; all are counted


@dataclass
class SourceReport:
    """What a source holds.

    bad: place and reason of all samples that cannot be used, and of shards that are cut off; `bad_kinds` counts them.
    `duplicate_keys` (across shards or records, the first 1000) are told, but not bad. `num_text_only`: of the samples,
    conversations without an image. `image_sizes`: the ten most frequent; `smallest`, `largest`: by pixels.
    `example`: the first good sample, with an image if any has one. `parts`: of a mixture, each alone. `passed_over`:
    what stands in image folders and is neither image nor words, by ending.
    """

    name: str
    num_samples: int = 0
    num_text_only: int = 0
    num_bad: int = 0
    num_captions: int = 0
    num_distinct_captions: int = 0
    num_questions: int = 0
    num_conversations: int = 0
    num_without_words: int = 0
    num_duplicate_keys: int = 0
    question_types: dict[str, int] = field(default_factory=dict)
    image_sizes: dict[str, int] = field(default_factory=dict)
    smallest: str = ""
    largest: str = ""
    bad_kinds: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)
    duplicate_keys: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_source(spec: str, split: str | None = None, limit: int | None = None) -> SourceReport:
    """Decodes every sample (the first `limit`) of a source and counts; bad ones are listed, not replaced.

    Raises:
        DataError: the source cannot be opened at all.
    """
    return check_opened(open_source(spec, split, max_bad_fraction=1.0, text_only=True), limit)


def check_opened(source: Source, limit: int | None = None) -> SourceReport:
    """`check_source` of an opened one; each member of a mixture, also of a mixture of mixtures, is read as a whole (its
    first `limit` samples)."""
    report, counts = SourceReport(source.name), _Counts()
    for number, part in enumerate(source.leaves()):
        for place, reason in part.lost.items():
            _note_bad(report, counts, place, reason, "broken shard" if place in part.broken else "duplicate key")
        counts.passed_over.update(part.passed_over)
        for index in _indices(part, limit):
            counts.keys[f"{number}/{part.key(index)}" if source.parts else part.key(index)] += 1
            _count_sample(part, index, report, counts)
    if source.parts:
        report.parts = [_part(source, number) for number in range(len(source.parts))]
    counts.fill(report)
    return report


class _Counts:
    """What is counted besides the report's own numbers."""

    def __init__(self) -> None:
        self.keys: Counter[str] = Counter()
        self.types: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.kinds: Counter[str] = Counter()
        self.passed_over: Counter[str] = Counter()
        self.captions: set[int] = set()

    def fill(self, report: SourceReport) -> None:
        report.num_distinct_captions = len(self.captions)
        report.question_types = dict(self.types.most_common())
        report.image_sizes = {f"{w}x{h}": times for (w, h), times in self.sizes.most_common(10)}
        if self.sizes:
            by_pixels = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
            report.smallest, report.largest = (f"{w}x{h}" for w, h in (by_pixels[0], by_pixels[-1]))
        report.bad_kinds = dict(self.kinds.most_common())
        report.passed_over = dict(self.passed_over.most_common())
        twice = [key for key, times in self.keys.items() if times > 1]
        report.num_duplicate_keys, report.duplicate_keys = len(twice), twice[:_LISTED]


def _indices(source: Source, limit: int | None) -> Iterator[int]:
    from tqdm import tqdm

    total = len(source) + source.num_text_only
    count = total if limit is None else min(limit, total)
    yield from tqdm(range(count), desc="check", unit="sample", disable=None, leave=False)


def _count_sample(source: Source, index: int, report: SourceReport, counts: _Counts) -> None:
    has_image = index < len(source)
    read = source.read if has_image else source.read_words
    try:
        sample = patiently(lambda: read(index), lambda: source.place(index))
    except SourceError:
        raise
    except (UserError, OSError) as error:
        _note_bad(report, counts, source.place(index), str(error), kind_of(error))
        return
    report.num_samples += 1
    report.num_text_only += not has_image
    report.num_captions += len(sample.captions)
    report.num_questions += len(sample.questions)
    report.num_conversations += len(sample.conversations)
    report.num_without_words += not (sample.captions or sample.questions or sample.conversations)
    counts.captions.update(map(hash, sample.captions))
    counts.types.update(question.type for question in sample.questions)
    if isinstance(sample, Sample):
        counts.sizes[sample.image.size] += 1
    # of a mixture, members with images may come behind one without
    if not report.example or (has_image and "size" not in report.example):
        report.example = _example(sample, source.key(index), source.place(index))


def _note_bad(report: SourceReport, counts: _Counts, place: str, reason: str, kind: str) -> None:
    report.num_bad += 1
    counts.kinds[kind] += 1
    report.bad.append((place, reason))


def _example(words: Words, key: str, place: str) -> dict[str, Any]:
    found = {
        "key": key,
        "place": place,
        "size": f"{words.image.width}x{words.image.height}" if isinstance(words, Sample) else "",
        "captions": [text[:200] for text in words.captions[:3]],
        "questions": [f"{item.question} -> {item.answer}"[:200] for item in words.questions[:3]],
        "conversation": [f"{turn.role}: {turn.content}"[:200] for turn in (words.conversations or [[]])[0][:4]],
        "meta": sorted(words.meta),
    }
    return {name: value for name, value in found.items() if value}


def _part(mixture: Any, number: int) -> dict[str, Any]:
    part = mixture.parts[number]
    return {"name": mixture.names[number], "num_samples": len(part), "of_an_epoch": mixture.counts[number]}
