"""Reads a whole source once and says what is in it: `unitok data check`."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from unitok.core.errors import UserError
from unitok.data.source import Sample, Source, open_source


@dataclass
class SourceReport:
    """What a source holds. `bad` has key and reason of every sample that cannot be used."""

    name: str
    num_samples: int = 0
    num_captions: int = 0
    num_distinct_captions: int = 0
    num_questions: int = 0
    num_conversations: int = 0
    num_without_words: int = 0
    question_types: dict[str, int] = field(default_factory=dict)
    image_sizes: dict[str, int] = field(default_factory=dict)
    duplicate_keys: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_source(spec: str, split: str | None = None, limit: int | None = None) -> SourceReport:
    """Decodes every sample (the first `limit`) of a source and counts; bad ones are listed, not replaced.

    Raises:
        DataError: the source cannot be opened at all.
    """
    source = open_source(spec, split, max_bad_fraction=1.0)
    count = len(source) if limit is None else min(limit, len(source))
    report = SourceReport(source.name)
    keys, captions, types, sizes = Counter(), set(), Counter(), Counter()
    for index in range(count):
        keys[source.key(index)] += 1
        sample = _read(source, index, report)
        if sample is None:
            continue
        report.num_samples += 1
        report.num_captions += len(sample.captions)
        report.num_questions += len(sample.questions)
        report.num_conversations += len(sample.conversations)
        report.num_without_words += not (sample.captions or sample.questions or sample.conversations)
        captions.update(sample.captions)
        types.update(question.type for question in sample.questions)
        sizes[f"{sample.image.width}x{sample.image.height}"] += 1
    report.num_distinct_captions = len(captions)
    report.question_types = dict(types.most_common())
    report.image_sizes = dict(sizes.most_common(10))
    report.duplicate_keys = [key for key, times in keys.items() if times > 1]
    return report


def _read(source: Source, index: int, report: SourceReport) -> Sample | None:
    try:
        return source.read(index)
    except (UserError, OSError) as error:
        report.bad.append((source.key(index), str(error)))
        return None
