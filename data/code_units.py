"""Code shards written by many processes: which part of a source becomes which shard, and what is done already.

A unit is one shard of the source, or a range of its samples where it has no shards (behind the images: those of
conversations without one). Unit u becomes `codes-UUUUU.tar`
and, written just before it, `codes-UUUUU.json`: whose codes they are, from which samples, how many, and what failed. It
is complete when both are there and fit together. No process needs to know of another; equal input gives equal bytes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unitok.core.errors import DataError
from unitok.data.bad import SourceError, patiently
from unitok.data.codes import (
    HEADER_FILE,
    PREPROCESS,
    TEXT_ONLY,
    UNSAID,
    CodeSample,
    code_record,
    header_fields,
    text_only_field,
    write_json,
)
from unitok.data.paths import file_stamp
from unitok.data.shards import reader_of, temporary_name, write_shard
from unitok.data.source import Source
from unitok.data.words import load_json_object, text_of

UNIT_SIZE = 10_000  # samples of a unit, where the source has no shards

Failure = tuple[str, str]  # key, reason


@dataclass(frozen=True)
class Unit:
    """Samples start to stop of a source. `shard` is its number in the source's reader, where it is a shard."""

    number: int
    start: int
    stop: int
    shard: int | None = None

    @property
    def name(self) -> str:
        return f"codes-{self.number:05d}"


def units_of(source: Source, size: int = UNIT_SIZE) -> list[Unit]:
    """The parts of a source, in order: its shards, or ranges of `size` samples."""
    reader = reader_of(source)
    if reader is None:
        total = len(source) + source.num_text_only
        return [Unit(number, start, min(start + size, total)) for number, start in enumerate(range(0, total, size))]
    ends = np.cumsum([0, *reader.sizes]).tolist()
    return [Unit(n, start, stop, n) for n, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True))]


def input_of(source: Source, unit: Unit) -> str:
    """A name for what a unit reads that changes with it: of a shard, its file and the places and sizes of all members;
    else what `Source.stamp` says of each sample."""
    digest = hashlib.blake2b(digest_size=8)
    reader = reader_of(source)
    if reader is None or unit.shard is None:
        for index in range(unit.start, unit.stop):
            stamp = patiently(lambda index=index: source.stamp(index), lambda index=index: source.place(index))
            digest.update(stamp + b"\0")
        return f"{Path(source.name).name}[{unit.start}:{unit.stop}] {digest.hexdigest()}"
    table, path = reader.table(unit.shard), reader.paths[unit.shard]
    digest.update(patiently(lambda: file_stamp(path), lambda: str(path)))
    for array in (table.starts, table.key_ends, table.members["block"], table.members["size"], table.keys):
        digest.update(array.tobytes())
    return f"{path.name} {digest.hexdigest()}"


def known_failures(source: Source, unit: Unit) -> list[Failure]:
    """What the reader of shards has left out of this one; of other sources the first unit tells of broken files."""
    reader = reader_of(source)
    if reader is None or unit.shard is None:
        lost = [item for leaf in source.leaves() for item in leaf.lost.items()]
        return [(Path(place).name, reason) for place, reason in lost] if unit.number == 0 else []
    path = reader.paths[unit.shard]
    problem = [(path.name, reader.bad_shards[path])] if path in reader.bad_shards else []
    bad = reader.table(unit.shard).bad
    return problem + [(f"{path.name}:{key}", reason) for key, reason in bad.items()]


class CodeFolder:
    """The folder that units are written to.

    Args:
        header: as for `write_codes`.
    """

    def __init__(self, out: Path, header: Mapping[str, Any]) -> None:
        self.out, self.header = out, header
        self.fields = header_fields(header)
        self._text_only = 0  # samples without an image of the unit that is written
        out.mkdir(parents=True, exist_ok=True)

    def done(self, unit: Unit, source: Source) -> dict[str, Any] | None:
        """What the unit's file says if it is complete; None if it is to be made.

        Raises:
            DataError: it was made from other samples or by another tokenizer, or is not ours.
        """
        tar, said = self.out / f"{unit.name}.tar", self._said(unit)
        if said is None:
            if tar.exists():
                raise DataError(f"{tar} stands there without its {unit.name}.json; give another --out")
            return None
        found = UNSAID | {PREPROCESS: self.fields.get(PREPROCESS)} | said
        for name, value in {**UNSAID, **self.fields, "input": input_of(source, unit)}.items():
            if found.get(name) != value:
                raise DataError(
                    f"{self.out / unit.name}.json: {name} is {found.get(name)!r}, this run has {value!r}; remove the "
                    "folder or give another --out"
                )
        return said if self._is_whole(tar, said) else None

    def write(
        self, unit: Unit, source: Source, samples: Iterable[CodeSample], failures: list[Failure]
    ) -> dict[str, Any]:
        """Writes a unit. `failures` may grow while `samples` are taken. Killed at any moment, it is made again.

        Raises:
            SourceError: what it was made from changed meanwhile.
        """
        tar = self.out / f"{unit.name}.tar"
        whole = temporary_name(tar)
        (self.out / HEADER_FILE).unlink(missing_ok=True)  # of a source that has grown since
        read = input_of(source, unit)
        try:
            count = write_shard(self._records(unit, samples), whole)
            if input_of(source, unit) != read:
                raise SourceError(
                    f"{source.name}: samples {unit.start} to {unit.stop - 1} changed while they were encoded; leave "
                    "them alone meanwhile, and give the same command again"
                )
            said = {
                **self.fields,
                "input": read,
                "samples": unit.stop - unit.start,
                "count": count,
                "bytes": whole.stat().st_size,
                "failures": failures,
                **text_only_field(self._text_only),
            }
            write_json(tar.with_suffix(".json"), said)
            whole.replace(tar)
        except OSError as error:
            raise not_written(tar, error) from None
        finally:
            whole.unlink(missing_ok=True)
        return said

    def _records(self, unit: Unit, samples: Iterable[CodeSample]) -> Iterator[dict[str, Any]]:
        self._text_only = 0
        for number, sample in enumerate(samples):
            self._text_only += not sample.has_image
            # unique in the folder without knowing how many samples of other units failed
            yield code_record(sample, self.header, unit.start + number)

    def finish(self, units: list[Unit], max_bad_fraction: float) -> list[Unit]:
        """Writes the header if all units are complete, and returns those that are not.

        Raises:
            DataError: more samples failed than allowed, or the folder holds shards of another job.
        """
        totals = {"count": 0, "failed": 0, "shards": len(units)}
        samples, text_only, missing = 0, 0, []
        for unit in units:
            said = self._said(unit)
            if said is None or not self._is_whole(self.out / f"{unit.name}.tar", said):
                missing.append(unit)
                continue
            totals["count"] += said["count"]
            totals["failed"] += len(said["failures"])
            samples += said["samples"]
            text_only += said.get(TEXT_ONLY, 0)
        if missing:
            return missing
        names = {f"{unit.name}.tar" for unit in units}
        foreign = sorted(path.name for path in self.out.glob("*.tar") if path.name not in names)
        if foreign:
            raise DataError(f"{self.out} holds {foreign[0]}, which this source does not give; remove it or the folder")
        check_failures(self.out, totals["failed"], totals["count"] + totals["failed"], max_bad_fraction)
        if totals["count"] == 0:
            raise DataError(f"{self.out}: none of {samples} images could be encoded")
        try:
            write_json(self.out / HEADER_FILE, {**self.fields, **totals, **text_only_field(text_only)})
        except OSError as error:
            # another process may finish too, and has then just cleaned up after its equal header
            if not (isinstance(error, FileNotFoundError) and (self.out / HEADER_FILE).is_file()):
                raise not_written(self.out / HEADER_FILE, error) from None
        for pattern in (".*codes-*.tmp", f".{HEADER_FILE}.*.tmp"):  # of processes that were killed
            for path in self.out.glob(pattern):
                path.unlink(missing_ok=True)
        return []

    def _said(self, unit: Unit) -> dict[str, Any] | None:
        path = self.out / f"{unit.name}.json"
        if not path.is_file():
            return None
        try:
            return load_json_object(text_of(path.read_bytes(), str(path)), str(path))
        except DataError as error:
            if path.with_suffix(".tar").exists():
                raise DataError(f"{error}; remove it and its .tar, and they are made again") from None
            return None  # of a machine that failed: the unit is made again

    @staticmethod
    def _is_whole(tar: Path, said: dict[str, Any]) -> bool:
        return tar.is_file() and tar.stat().st_size == said["bytes"]


def not_written(path: Path, error: OSError) -> DataError:
    """What is said where the disk does not take a file of the folder, as it is full."""
    return DataError(f"{path} cannot be written ({error.strerror or error}); what is complete stays")


def check_failures(out: Path, failed: int, total: int, max_bad_fraction: float) -> None:
    """DataError when more than the allowed share of all images failed."""
    if failed > max_bad_fraction * total:
        raise DataError(
            f"{out}: {failed} of {total} images failed, more than max_bad_fraction={max_bad_fraction}; the reasons "
            "are on the log and in codes-*.json: mend the source, or allow more (--max-bad-fraction)"
        )
