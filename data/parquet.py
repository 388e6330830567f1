"""Parquet files as the datasets library writes them: a column of images {bytes, path} and columns of words.

Files are read by row groups, so a sample costs its whole row group unless that was read just before; see docs/data.md.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from unitok.core.errors import DataError
from unitok.data.bad import SampleError, is_of_the_file, patiently
from unitok.data.decoding import Decoded, Shrink
from unitok.data.paths import file_stamp, matching_files, printable
from unitok.data.samples import Source
from unitok.data.urls import is_url, local_files
from unitok.data.words import Words, words_from_json

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_CAPTION_COLUMNS = ("text", "txt")  # of other names for captions
_WORDS = ("caption", "captions", "questions", "conversations", "id", *_CAPTION_COLUMNS)
_KEPT_GROUPS = 4


class ParquetSource(Source):
    """Rows of parquet files by index. Image bytes stand in the file, or in the file that `path` names beside it.

    A file that is not whole counts for as many bad samples as the others hold.

    Args:
        files: those that `spec` means, where they are known.

    Raises:
        DataError: no such file, none that is whole, none of IMAGE_COLUMNS in it, or too many are not whole.
    """

    def __init__(self, spec: str, max_bad_fraction: float, files: Sequence[Path] | None = None) -> None:
        super().__init__(spec, max_bad_fraction)
        self.files, self.fetched = list(files or _expand(spec)), is_url(spec)
        groups = [_row_groups(file) for file in self.files]
        broken = {str(f): found for f, found in zip(self.files, groups, strict=True) if isinstance(found, str)}
        whole = [found if isinstance(found, list) else [] for found in groups]
        self._groups = [(number, group) for number, sizes in enumerate(whole) for group in range(len(sizes))]
        self._ends = np.cumsum([size for sizes in whole for size in sizes], dtype=np.int64)
        self._before = np.cumsum([0, *map(sum, whole)])  # rows before each file
        if not len(self):
            why = next((f"; {file} {problem}" for file, problem in broken.items()), "")
            raise DataError(f"{spec} holds no row in {len(self.files)} files; expected images and captions{why}")
        self.image_column = _image_column(next(f for f in self.files if str(f) not in broken))
        self._kept: OrderedDict[int, Any] = OrderedDict()  # the row groups read last
        self.broken = frozenset(broken)
        typical = median(map(sum, (found for found in groups if isinstance(found, list))))
        self.report_lost(broken, len(broken) * max(1, round(typical)))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def key(self, index: int) -> str:
        number, _ = self._groups[self._place(index)[0]]
        return f"{printable(self.files[number].stem)}-{index - int(self._before[number]):06d}"

    def place(self, index: int) -> str:
        group, row = self._place(index)
        file, number = self._groups[group]
        return f"{self.files[file]}: row {row} of group {number}"

    def stamp(self, index: int) -> bytes:
        """Of images that stand beside the file, only their paths' file tells."""
        return super().stamp(index) + file_stamp(self.files[self._groups[self._place(index)[0]][0]])

    def _place(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def _row(self, index: int) -> dict[str, Any]:
        import pyarrow as pa

        group, row = self._place(index)
        values = self._table(group, index).slice(row, 1)
        try:
            return values.to_pylist()[0]
        except UnicodeDecodeError:  # the format promises UTF-8 and nobody looks
            raise SampleError(f"{self.place(index)}: text is not UTF-8", "not UTF-8") from None
        except (ValueError, OverflowError, pa.ArrowException) as error:  # such as a date of the year 300000
            what = " ".join(str(error).split())[:200]
            raise SampleError(f"{self.place(index)} holds a value that cannot be read ({what})", "wrong type") from None

    def _table(self, group: int, index: int) -> Any:
        import pyarrow as pa

        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        number, of_file = self._groups[group]
        try:
            file = _open(self.files[number])
            columns = [name for name in file.schema_arrow.names if name in (self.image_column, *_WORDS)]
            table = file.read_row_group(of_file, columns=columns)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and not is_of_the_file(error):
                raise
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
        if not isinstance(data.get("id"), str | int):  # bytes, dates: what JSON has no form for
            data.pop("id", None)
        if "caption" not in data:
            data["caption"] = next((data.pop(name) for name in _CAPTION_COLUMNS if name in data), None)
        if isinstance(data["caption"], list) and isinstance(data.get("captions", []), list):
            data["captions"] = [*data.pop("caption"), *data.get("captions", [])]
        return words_from_json(data, self.place(index))

    def _read_image(self, index: int, shrink: Shrink | None) -> Decoded:
        value = self._row(index).get(self.image_column)
        path = value if isinstance(value, str) else None
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if isinstance(path, str) and path and not isinstance(value, bytes):
            if self.fetched:  # whatever it names would be a file of this machine
                reason = f"{self.place(index)} names the image {path!r}, which a URL does not bring"
                raise SampleError(reason, "missing image")
            return self._load(self.files[self._groups[self._place(index)[0]][0]].parent / path, shrink)
        if not isinstance(value, bytes):
            raise SampleError(f"{self.place(index)} has no image in column {self.image_column}", "missing image")
        return self._decode(value, index, shrink)


def _expand(spec: str) -> list[Path]:
    files = local_files(spec) if is_url(spec) else matching_files(spec)
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{missing[0] if missing else spec} does not exist; expected .parquet files")
    return files


def _row_groups(file: Path) -> list[int] | str:
    """The rows of each group of a file; what is wrong with it where it is not whole."""
    import pyarrow as pa

    try:
        metadata = patiently(lambda: _open(file).metadata, lambda: str(file))
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        return f"is not a whole parquet file ({' '.join(str(error).split())[:200]}); copy or write it again"


def _image_column(file: Path) -> str:
    names = _open(file).schema_arrow.names
    found = next((name for name in IMAGE_COLUMNS if name in names), None)
    if found is None:
        raise DataError(f"{file} has columns {', '.join(names)}; expected images in {', '.join(IMAGE_COLUMNS)}")
    return found


def _open(file: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)
