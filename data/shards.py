"""Tar shards in webdataset's layout: written atomically, read at random by index.

Members of one sample share the key (the path up to the first dot of the file name) and stand side by side.
"""

import contextlib
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unitok.core.errors import DataError
from unitok.data.bad import SourceError
from unitok.data.paths import files_ending, matching_files
from unitok.data.shard_index import index_shards
from unitok.data.tar_table import TarTable

_OPEN_TABLES = 256  # views of mapped files, a few hundred bytes each


def write_shards(
    samples: Iterable[Mapping[str, Any]],
    out: Path | str,
    max_per_shard: int = 1000,
    prefix: str = "shard",
) -> list[Path]:
    """Writes samples to `OUT/PREFIX-00000.tar`, ...; equal samples give equal bytes.

    Args:
        samples: dicts with "__key__" and one entry per member, named by its extension and encoded by webdataset:
            "png" or "jpg" (PIL image or bytes), "txt" (str), "json" (JSON-able), "npy" (array).

    Returns:
        The shards. Each appears under its name only when it is complete.

    Raises:
        DataError: the folder holds shards of that prefix already, or there is no sample.
    """
    if max_per_shard < 1:
        raise DataError(f"max_per_shard is {max_per_shard}; expected at least 1")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if next(out.glob(f"{prefix}-*.tar"), None) is not None:
        raise DataError(f"{out} already holds {prefix}-*.tar; remove them or give another folder")
    shards: list[Path] = []
    writer = _ShardFile(out / f"{prefix}-00000.tar")
    try:
        for sample in samples:
            if writer.count == max_per_shard:
                shards.append(writer.finish())
                writer = _ShardFile(out / f"{prefix}-{len(shards):05d}.tar")
            writer.write(sample)
        if writer.count:
            shards.append(writer.finish())
    finally:
        writer.discard()
    if not shards:
        raise DataError(f"no sample to write to {out}")
    return shards


def write_shard(samples: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes one shard, which appears when it is complete, over an older one; the number of its samples."""
    writer = _ShardFile(path)
    try:
        for sample in samples:
            writer.write(sample)
        writer.finish()
    finally:
        writer.discard()
    return writer.count


def temporary_name(path: Path) -> Path:
    """Where this process writes a file of that name until it is complete; of such a name, that name itself."""
    end = f".{socket.gethostname()}-{os.getpid()}.tmp"
    return path if path.name.endswith(end) else path.with_name(f".{path.name}{end}")


class _ShardFile:
    """One tar under a temporary name until `finish`."""

    def __init__(self, path: Path) -> None:
        import webdataset

        self.path = path
        self.count = 0
        self._finished = False
        self._temporary = temporary_name(path)
        self._stream = open(self._temporary, "wb")
        self._tar = webdataset.TarWriter(self._stream, mtime=0, user="user", group="group")

    def write(self, sample: Mapping[str, Any]) -> None:
        self._tar.write(dict(sample))
        self.count += 1

    def finish(self) -> Path:
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._temporary, self.path)
        self._finished = True
        return self.path

    def discard(self) -> None:
        """Delete what is not finished. On a full disk closing fails as writing has: that error is on its way already,
        and the space must be free again."""
        if self._finished:
            return
        with contextlib.suppress(OSError):
            self._tar.close()
        with contextlib.suppress(OSError):  # closes the file even where it cannot write the rest
            self._stream.close()
        self._temporary.unlink(missing_ok=True)


class Keys(Sequence[str]):
    """The samples' keys, read when they are asked for."""

    def __init__(self, reader: "ShardReader") -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        table, number = self._reader.place(index)
        return table.key(number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class ShardReader:
    """Samples of tar shards by index: `reader[i] -> {"png": bytes, "txt": bytes, ...}`, `reader.keys[i]`.

    Headers are read once and kept in an index file (see `shard_index`); a sample is then one seek. A reader may be
    forked or pickled. `sizes`: samples of each shard of `paths`.

    Args:
        spec: a folder, a glob, a brace pattern ("shard-{00000..00003}.tar"), or a list of tar files.
        on_bad: "raise", or "skip" to go on without what is broken: `bad_shards` (shard -> what is wrong with it; its
            whole samples before the cut are kept) and `bad_samples` ("SHARD:KEY" -> why that sample is left out).

    Raises:
        DataError: no shard is found or none holds a sample; with "raise" also where one is not a whole tar file or
            holds a key twice.
        SourceError: in reading: the shard was written anew since it was indexed.
    """

    def __init__(self, spec: Path | str | Sequence[Path | str], on_bad: Literal["raise", "skip"] = "raise") -> None:
        self.paths = expand_shards(spec)
        self.on_bad = on_bad
        self.bad_shards: dict[Path, str] = {}
        self.bad_samples: dict[str, str] = {}
        self._places = index_shards(self.paths)
        self.sizes = [
            len(place) if isinstance(place, TarTable) else int(place[0].rows["samples"][place[1]])
            for place in self._places
        ]
        self._ends = np.cumsum(self.sizes)
        self._tables: dict[int, TarTable] = {}  # those read last
        self._note_what_is_bad()
        if len(self) == 0:
            why = next((f"; {path}: {problem}" for path, problem in self.bad_shards.items()), "")
            raise DataError(f"{spec} holds no sample in {len(self.paths)} shards{why}; write them again")
        self.keys = Keys(self)

    def _note_what_is_bad(self) -> None:
        for path, place in zip(self.paths, self._places, strict=True):
            if isinstance(place, TarTable):
                problem, bad = place.problem, place.bad
            else:
                index, row = place
                problem, bad = index.problems.get(path.name, ""), index.bad.get(path.name, {})
            if problem:
                self.bad_shards[path] = problem
            self.bad_samples |= {f"{path}:{key}": reason for key, reason in bad.items()}
        if self.on_bad == "raise":
            for path, problem in self.bad_shards.items():
                raise DataError(f"{path} is not a whole tar file ({problem}); copy or write it again")
            for name, reason in self.bad_samples.items():
                raise DataError(f"{name}: {reason}; write the shard again")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.paths, self.on_bad)  # to be mapped there, not sent

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, bytes]:
        return self.read(index)

    def place(self, index: int) -> tuple[TarTable, int]:
        """The table of the shard that holds sample `index`, and its number in there."""
        shard, number = self._shard(index)
        return self.table(shard), number

    def _shard(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = index % len(self)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.sizes[shard]

    def table(self, shard: int) -> TarTable:
        """What stands where in shard number `shard`."""
        table = self._tables.get(shard)
        if table is None:
            if len(self._tables) >= _OPEN_TABLES:
                self._tables.pop(next(iter(self._tables)), None)
            place = self._places[shard]
            table = self._tables[shard] = place if isinstance(place, TarTable) else place[0].table(place[1])
        return table

    def read(self, index: int, names: Iterable[str] | None = None) -> dict[str, bytes]:
        """The members of sample `index`; only those called `names`, where given."""
        shard, number = self._shard(index)
        table = self.table(shard)
        wanted = None if names is None else set(names)
        out = {}
        with open(self.paths[shard], "rb", buffering=0) as stream:
            self._check_unchanged(self.paths[shard], table, os.fstat(stream.fileno()))
            for name, offset, size in table.members_of(number):
                if wanted is None or name in wanted:
                    out[name] = os.pread(stream.fileno(), size, offset)
                    if len(out[name]) != size:
                        raise SourceError(f"{self.paths[shard]} is shorter than it was; copy or write it again")
        return out

    @staticmethod
    def _check_unchanged(path: Path, table: TarTable, found: os.stat_result) -> None:
        """What stands where in a shard holds for the file that was indexed alone: at its places, another one has pieces
        of other samples."""
        if table.stat is not None and (found.st_size, found.st_mtime_ns) != table.stat:
            raise SourceError(
                f"{path} has changed since it was indexed ({found.st_size} bytes, it had {table.stat[0]}); leave "
                "shards alone while they are read, and give the same command again"
            )


def reader_of(source: Any) -> ShardReader | None:
    """The reader of a source of samples whose numbers are those of its shards; None of any other source."""
    reader = getattr(source, "reader", None)
    return reader if isinstance(reader, ShardReader) and len(reader) == len(source) else None


def expand_shards(spec: Path | str | Sequence[Path | str]) -> list[Path]:
    """The tar files that `spec` means, in order; DataError when there is none or one is missing."""
    if not isinstance(spec, Path | str):
        paths = [Path(item) for item in spec]
    elif os.path.isdir(spec):
        paths = files_ending(Path(spec), ".tar")
    else:
        paths = matching_files(str(spec))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"shard {missing[0]} does not exist ({len(missing)} of {len(paths)} missing)")
    if not paths:
        raise DataError(f"{spec} matches no .tar file; expected a folder, a glob or a brace pattern of shards")
    return paths
