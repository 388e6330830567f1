"""Sources of JSON records that name image files: JSON lines, and LLaVA's instruction files.

Text of records is held as bytes or left in the file, which worker processes share; a record is parsed when it is read.
"""

import json
import logging
import os
import re
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from unitok.core.errors import DataError
from unitok.data.bad import SampleError
from unitok.data.decoding import Decoded, Shrink
from unitok.data.paths import file_stamp, leads_out, printable
from unitok.data.samples import Source
from unitok.data.words import Words, is_unicode, load_json_object, text_of, words_from_json

_LOGGER = logging.getLogger(__name__)
# An image behind nothing but plain values, as LLaVA's: deeper ones are somebody's meta.
_HAS_IMAGE = re.compile(rb'\s*\{\s*(?:"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*,\s*)*"image"\s*:\s*[^\sn]')


class RecordSource(Source):
    """Records {"image", "id"?, "caption"?, "captions"?, "questions"?, "conversations"?}.

    Image paths are relative to the file and are used as they are, `..` and absolute ones too; with `images`, they are
    relative to that folder and must not lead out of it. Records with conversations and without an image (absent or
    null) are text-only: not counted in the length, and numbered behind those with one.
    """

    def __init__(self, path: Path, images: Path | None, max_bad_fraction: float) -> None:
        super().__init__(str(path), max_bad_fraction)
        self.path, self.images = path, images
        self._numbers: np.ndarray | None = None  # of the records in the file, where that is not their order here
        if images is not None and not images.is_dir():
            raise DataError(f"{path}: images={images} is no folder")

    @abstractmethod
    def _line(self, number: int) -> bytes:
        """The text of record `number` of the file."""

    @abstractmethod
    def _num_records(self) -> int:
        """How many there are, text-only ones too."""

    def __len__(self) -> int:
        return self._num_records() - self.num_text_only

    def _set_text_only(self, flags: np.ndarray) -> None:
        """Called once, with a flag for each record."""
        self.num_text_only = int(flags.sum())
        if self.num_text_only:
            _LOGGER.info("%s: %d of %d records have no image", self.path, self.num_text_only, len(flags))
            self._numbers = np.argsort(flags, kind="stable")

    def _number(self, index: int) -> int:
        return index if self._numbers is None else int(self._numbers[index])

    def key(self, index: int) -> str:
        try:
            name = self._record(index).get("id")
        except DataError:
            name = None
        usable = isinstance(name, int) or (isinstance(name, str) and is_unicode(name))
        return str(name) if usable else f"{printable(self.path.stem)}-{self._number(index):06d}"

    def stamp(self, index: int) -> bytes:
        line = self._line(self._number(index))
        try:
            path = self._image_path(self._image_name(index), index)
        except SampleError:  # also of conversations without an image
            return line
        return line + file_stamp(path)

    def place(self, index: int) -> str:
        return f"{self.path}: record {self._number(index)}"

    def _record(self, index: int) -> dict[str, Any]:
        where = self.place(index)
        return load_json_object(text_of(self._line(self._number(index)), where), where)

    def _read_words(self, index: int) -> Words:
        return words_from_json(self._record(index), self.place(index), has_image=index < len(self))

    def _read_image(self, index: int, shrink: Shrink | None) -> Decoded:
        return self._load(self._image_path(self._image_name(index), index), shrink)

    def _image_name(self, index: int) -> str:
        name = self._record(index).get("image")
        if not isinstance(name, str) or not name:
            raise SampleError(f"{self.place(index)} has no image path; expected a string under image", "missing image")
        return name

    def _image_path(self, name: str, index: int) -> Path:
        if self.images is None:
            return self.path.parent / name
        if leads_out(name):
            raise SampleError(
                f"{self.place(index)}: image {name!r} leads out of the folder {self.images}; give a path inside it",
                "path outside",
            )
        return self.images / name


class JsonlSource(RecordSource):
    """JSON lines. Where each line begins is indexed once, at the start; empty lines are passed over."""

    def __init__(self, path: Path, images: Path | None, max_bad_fraction: float) -> None:
        super().__init__(path, images, max_bad_fraction)
        try:
            found = np.fromiter(
                ((start, _is_text_only(line)) for start, line in _lines(path)),
                dtype=np.dtype([("start", np.int64), ("text_only", bool)]),
            )
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}); expected JSON lines in UTF-8") from None
        if not len(found):
            raise DataError(f"{path} holds no record; expected one JSON object a line with image and caption")
        self._starts = found["start"].copy()
        self._set_text_only(found["text_only"])

    def _num_records(self) -> int:
        return len(self._starts)

    def _line(self, number: int) -> bytes:
        with self.path.open("rb") as lines:
            lines.seek(int(self._starts[number]))
            return lines.readline()


class LlavaSource(RecordSource):
    """LLaVA's list of {"id", "image"?, "conversations"} in one JSON file. Records with neither image nor conversations
    are bad samples, as in JSON lines."""

    def __init__(self, path: Path, images: Path | None, max_bad_fraction: float) -> None:
        super().__init__(path, images, max_bad_fraction)
        records = _load_list(path)
        if all(_lacks_image(record) and not record.get("conversations") for record in records):
            raise DataError(f"{path}: none of {len(records)} records can be used; expected LLaVA's instruction file")
        self._set_text_only(np.array([_is_conversation_alone(record) for record in records]))
        lines = [json.dumps(record).encode() for record in records]
        self._ends = np.cumsum([len(line) for line in lines])
        self._text = b"".join(lines)

    def _num_records(self) -> int:
        return len(self._ends)

    def _line(self, number: int) -> bytes:
        return self._text[int(self._ends[number - 1]) if number else 0 : int(self._ends[number])]


def open_records(spec: str, max_bad_fraction: float) -> RecordSource:
    """Opens FILE.jsonl or FILE.json (a LLaVA list), either with "?images=DIR" behind it."""
    name, _, query = spec.partition("?")
    folder = query.removeprefix("images=")
    if folder != query and os.path.isdir(folder):  # as it stands: its name may hold + or %
        query, settings = "", {"images": folder}
    else:
        settings = dict(parse_qsl(query, keep_blank_values=True))
    images = settings.pop("images", None)
    if settings or images == "" or (query and images is None):
        raise DataError(f"{spec!r}: {query!r} is not understood; expected ?images=FOLDER")
    kind = JsonlSource if name.lower().endswith(".jsonl") else LlavaSource
    return kind(Path(name), None if images is None else Path(images), max_bad_fraction)


def line_starts(path: Path) -> Iterator[int]:
    """Where each line of a file begins, in bytes, that is not empty."""
    yield from (start for start, _ in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    position = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield position, line
            position += len(line)


def _is_text_only(line: bytes) -> bool:
    """Whether it is a conversation without an image."""
    if b'"conversations"' not in line or _HAS_IMAGE.match(line):  # nearly all lines, which are not parsed for this
        return False
    try:
        record = load_json_object(text_of(line, ""), "")
    except SampleError:  # told when it is read
        return False
    return _is_conversation_alone(record)


def _load_list(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{path} cannot be read as JSON ({type(error).__name__}); give a LLaVA .json") from None
    if not isinstance(records, list):
        raise DataError(f"{path} holds a JSON {type(records).__name__}; expected a list of records with conversations")
    return records


def _lacks_image(record: Any) -> bool:
    return isinstance(record, dict) and record.get("image") is None


def _is_conversation_alone(record: Any) -> bool:
    return _lacks_image(record) and bool(record.get("conversations"))
