"""Sources of JSON records that name image files: JSON lines, and LLaVA's instruction files.

Text of records is held as bytes or left in the file, which worker processes share; a record is parsed when it is read.
"""

import json
import logging
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from unitok.core.errors import DataError
from unitok.data.bad import SampleError
from unitok.data.decoding import Decoded, Shrink
from unitok.data.paths import printable
from unitok.data.samples import Source
from unitok.data.words import Words, is_unicode, load_json_object, text_of, words_from_json

_LOGGER = logging.getLogger(__name__)


class RecordSource(Source):
    """Records {"image", "id"?, "caption"?, "captions"?, "questions"?, "conversations"?}.

    Image paths are relative to the file and are used as they are, `..` and absolute ones too; with `images`, they are
    relative to that folder and must not lead out of it.
    """

    def __init__(self, path: Path, images: Path | None, max_bad_fraction: float) -> None:
        super().__init__(str(path), max_bad_fraction)
        self.path, self.images = path, images
        if images is not None and not images.is_dir():
            raise DataError(f"{path}: images={images} is no folder")

    @abstractmethod
    def _line(self, index: int) -> bytes:
        """The text of one record."""

    def key(self, index: int) -> str:
        try:
            name = self._record(index).get("id")
        except DataError:
            name = None
        usable = isinstance(name, int) or (isinstance(name, str) and is_unicode(name))
        return str(name) if usable else f"{printable(self.path.stem)}-{index:06d}"

    def place(self, index: int) -> str:
        return f"{self.path}: record {index}"

    def _record(self, index: int) -> dict[str, Any]:
        where = self.place(index)
        return load_json_object(text_of(self._line(index), where), where)

    def _read_words(self, index: int) -> Words:
        return words_from_json(self._record(index), self.place(index))

    def _read_image(self, index: int, shrink: Shrink | None) -> Decoded:
        name = self._record(index).get("image")
        if not isinstance(name, str) or not name:
            raise SampleError(f"{self.place(index)} has no image path; expected a string under image", "missing image")
        return self._load(self._image_path(name, index), shrink)

    def _image_path(self, name: str, index: int) -> Path:
        if self.images is None:
            return self.path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
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
            self._starts = np.fromiter(line_starts(path), dtype=np.int64)
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}); expected JSON lines in UTF-8") from None
        if not len(self._starts):
            raise DataError(f"{path} holds no record; expected one JSON object a line with image and caption")

    def __len__(self) -> int:
        return len(self._starts)

    def _line(self, index: int) -> bytes:
        with self.path.open("rb") as lines:
            lines.seek(int(self._starts[index]))
            return lines.readline()


class LlavaSource(RecordSource):
    """LLaVA's list of {"id", "image", "conversations"} in one JSON file. Records without an image are left out."""

    def __init__(self, path: Path, images: Path | None, max_bad_fraction: float) -> None:
        super().__init__(path, images, max_bad_fraction)
        records = _load_list(path)
        kept = [json.dumps(record).encode() for record in records if not _is_text_only(record)]
        if len(kept) < len(records):
            _LOGGER.warning(
                "%s: %d of %d records have no image and are left out", path, len(records) - len(kept), len(records)
            )
        if not kept:
            raise DataError(f"{path}: none of {len(records)} records has an image; expected LLaVA's instruction file")
        self._ends = np.cumsum([len(line) for line in kept])
        self._text = b"".join(kept)

    def __len__(self) -> int:
        return len(self._ends)

    def _line(self, index: int) -> bytes:
        return self._text[int(self._ends[index - 1]) if index else 0 : int(self._ends[index])]


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
    position = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield position
            position += len(line)


def _load_list(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{path} cannot be read as JSON ({type(error).__name__}); give a LLaVA .json") from None
    if not isinstance(records, list):
        raise DataError(f"{path} holds a JSON {type(records).__name__}; expected a list of records with conversations")
    return records


def _is_text_only(record: Any) -> bool:
    return isinstance(record, dict) and record.get("image") is None
