"""Parquet files as the datasets library writes them: a column of images {bytes, path} and columns of words.

Files are read by row groups, so a sample costs its whole row group unless that was read just before; see docs/data.md.
"""

import glob
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from unitok.core.errors import DataError
from unitok.data.bad import SampleError
from unitok.data.decoding import Decoded, Shrink
from unitok.data.samples import Source
from unitok.data.urls import is_url, local_files
from unitok.data.words import Words, words_from_json

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_CAPTION_COLUMNS = ("text", "txt")  # of other names for captions
_WORDS = ("caption", "captions", "questions", "conversations", "id", *_CAPTION_COLUMNS)
_KEPT_GROUPS = 4


class ParquetSource(Source):
    """Rows of parquet files by index. Image bytes stand in the file, or in the file that `path` names beside it.

    Raises:
        DataError: no such file, one that is not whole, or none of IMAGE_COLUMNS in it.
    """

    def __init__(self, spec: str, max_bad_fraction: float) -> None:
        super().__init__(spec, max_bad_fraction)
        self.files = _expand(spec)
        self._groups: list[tuple[int, int]] = []  # file, row group in it
        sizes: list[int] = []
        for number, file in enumerate(self.files):
            metadata = _open(file).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                sizes.append(metadata.row_group(group).num_rows)
        self._ends = np.cumsum(sizes, dtype=np.int64)
        if not len(self):
            raise DataError(f"{spec} holds no row in {len(self.files)} files; expected images and captions")
        names = _open(self.files[0]).schema_arrow.names
        self.image_column = next((name for name in IMAGE_COLUMNS if name in names), None)
        if self.image_column is None:
            raise DataError(
                f"{self.files[0]} has columns {', '.join(names)}; expected images in {', '.join(IMAGE_COLUMNS)}"
            )
        self._kept: OrderedDict[int, Any] = OrderedDict()  # the row groups read last

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def key(self, index: int) -> str:
        group, row = self._place(index)
        number, _ = self._groups[group]
        before = int(self._ends[self._groups.index((number, 0)) - 1]) if number else 0
        return f"{self.files[number].stem}-{index - before:06d}"

    def place(self, index: int) -> str:
        group, row = self._place(index)
        file, number = self._groups[group]
        return f"{self.files[file]}: row {row} of group {number}"

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def _row(self, index: int) -> dict[str, Any]:
        group, row = self._place(index)
        return self._table(group, index).slice(row, 1).to_pylist()[0]

    def _table(self, group: int, index: int) -> Any:
        import pyarrow as pa

        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        number, of_file = self._groups[group]
        file = _open(self.files[number])
        columns = [name for name in file.schema_arrow.names if name in (self.image_column, *_WORDS)]
        try:
            table = file.read_row_group(of_file, columns=columns)
        except (pa.ArrowException, OSError) as error:
            what = " ".join(str(error).split())[:200]
            raise SampleError(f"{self.place(index)} cannot be read ({what}); write the file again", "file") from None
        if len(self._kept) >= _KEPT_GROUPS:
            self._kept.popitem(last=False)
        self._kept[group] = table
        return table

    def _read_words(self, index: int) -> Words:
        row = self._row(index)
        row.pop(self.image_column, None)
        data = {name: value for name, value in row.items() if value is not None}
        if "caption" not in data:
            data["caption"] = next((data.pop(name) for name in _CAPTION_COLUMNS if name in data), None)
        if isinstance(data["caption"], list):
            data["captions"] = [*data.pop("caption"), *data.get("captions", [])]
        return words_from_json(data, self.place(index))

    def _read_image(self, index: int, shrink: Shrink | None) -> Decoded:
        value = self._row(index).get(self.image_column)
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
            if value is None and isinstance(path, str):
                return self._load(self.files[self._groups[self._place(index)[0]][0]].parent / path, shrink)
        if not isinstance(value, bytes):
            raise SampleError(f"{self.place(index)} has no image in column {self.image_column}", "missing image")
        return self._decode(value, index, shrink)


def _expand(spec: str) -> list[Path]:
    if is_url(spec):
        return local_files(spec)
    import braceexpand

    patterns = list(braceexpand.braceexpand(spec))
    files = [
        Path(found)
        for pattern in patterns
        for found in (sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern])
    ]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{missing[0] if missing else spec} does not exist; expected .parquet files")
    return files


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        what = " ".join(str(error).split())[:200]
        raise DataError(f"{file} is not a whole parquet file ({what}); copy or write it again") from None
