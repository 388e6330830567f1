"""Index files beside tar shards: opening millions of samples costs a look at each shard and (nearly) no memory.

A folder's `.unitok-index` holds the tables (see `tar_table`) of its shards one after the other and is mapped, so all
processes of a machine share it. Each table counts only as long as its shard has the size and the time of change that it
had when it was read. Where the folder cannot be written, the file stands in the user's cache folder.

Layout: the tables' arrays; ROW [s]; the shards' names, separated by zero bytes; JSON {"extensions", "problems", "bad"};
FOOTER. Everything is little-endian.
"""

import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from unitok.core.errors import DataError
from unitok.data.tar_table import MEMBER, MOST_EXTENSIONS, TarTable, scan

INDEX_FILE = ".unitok-index"
_MAGIC = b"unitok-index-002"  # 1 took zeros in place of samples for the end of a shard
_FOOTER = struct.Struct("<QQQ16s")  # shards, bytes of names, bytes of JSON, _MAGIC
_ROW = np.dtype([(name, "<i8") for name in ("size", "mtime", "start", "samples", "members", "key_bytes")])
_LOGGER = logging.getLogger(__name__)


class IndexFile:
    """One mapped index file. `rows`: ROW [s], `names`: the shards' file names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        shards, names, words, magic = _FOOTER.unpack(self._bytes[-_FOOTER.size :].tobytes())
        ends = np.cumsum([0, _FOOTER.size, words, names, shards * _ROW.itemsize])[::-1]
        at = [len(self._bytes) - int(end) for end in ends]
        if magic != _MAGIC or at[0] < 0:
            raise ValueError(f"{path} is no index of this version")
        self.rows = np.frombuffer(self._bytes[at[0] : at[1]], dtype=_ROW)
        text = self._bytes[at[1] : at[2]].tobytes().decode("utf-8", "surrogateescape")
        self.names = text.split("\0") if shards else []
        notes = json.loads(self._bytes[at[2] : at[3]].tobytes())
        self.extensions, self.problems, self.bad = notes["extensions"], notes["problems"], notes["bad"]
        if len(self.names) != shards:
            raise ValueError(f"{path} names {len(self.names)} shards and describes {shards}")

    def table(self, row: int) -> TarTable:
        """The table of one shard, as views of the file."""
        size, mtime, start, samples, members, key_bytes = self.rows[row].tolist()
        sizes = (4 * (samples + 1), 4 * (samples + 1), MEMBER.itemsize * members, key_bytes)
        ends = np.cumsum([start, *sizes])
        parts = [self._bytes[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        name = self.names[row]
        arrays = [part.view(kind) for part, kind in zip(parts, ("<u4", "<u4", MEMBER, np.uint8), strict=True)]
        notes = (self.problems.get(name, ""), self.bad.get(name, {}))
        return TarTable(*arrays, self.extensions, *notes, stat=(size, mtime))


Place = tuple[IndexFile, int] | TarTable  # row of an index file; or the table itself, where no file can be written


class _Stat(NamedTuple):
    size: int
    mtime: int  # in nanoseconds


def index_shards(paths: Sequence[Path], processes: int = 1) -> list[Place]:
    """Where each shard's table stands. Shards without a valid entry are read now, by `processes`, and entered.

    Raises:
        DataError: a shard cannot be read, or the disk is full.
    """
    folders: dict[Path, list[str]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path.name)
    places = {folder: _index_folder(folder, names, processes) for folder, names in folders.items()}
    return [places[path.parent][path.name] for path in paths]


def _index_folder(folder: Path, names: list[str], processes: int) -> dict[str, Place]:
    stats = {name: _stat(folder / name) for name in names}
    files = [index for path in _index_paths(folder) if (index := _open(path)) is not None]
    found = [(index, _valid_rows(index, stats)) for index in files]
    index, rows = max(found, key=lambda one: len(one[1]), default=(None, {}))
    missing = [name for name in stats if name not in rows]
    if index is not None and not missing:
        return {name: (index, row) for name, row in rows.items()}
    tables = zip(missing, _scan_all([folder / name for name in missing], processes), strict=True)
    target = _writable_file(folder)
    if target is None:
        _LOGGER.warning("neither %s nor the cache folder can be written; its shards are read at every start", folder)
        return {name: (index, row) for name, row in rows.items() if index is not None} | {
            name: replace(table, stat=stats[name]) for name, table in tables
        }
    entries = ((name, stats[name], table) for name, table in tables)
    kept = () if index is None else _kept(index, folder, set(missing))
    written = _write(*target, chain(kept, entries))
    return {name: (written, row) for name, row in _valid_rows(written, stats).items()}


def _stat(path: Path) -> _Stat:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; a shard must be readable") from None
    return _Stat(found.st_size, found.st_mtime_ns)


def _index_paths(folder: Path) -> tuple[Path, Path]:
    """Beside the shards, or else in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.blake2b(str(folder.resolve()).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    return folder / INDEX_FILE, cache / "unitok" / "shards" / name


def _open(path: Path) -> IndexFile | None:
    """The index file; None where there is none, or one that is broken or of another version: it is made again."""
    try:
        return IndexFile(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        _LOGGER.warning("%s is made again: %s", path, error)
        return None


def _valid_rows(index: IndexFile, stats: dict[str, _Stat]) -> dict[str, int]:
    known = zip(index.rows["size"].tolist(), index.rows["mtime"].tolist(), strict=True)
    return {
        name: row for row, (name, stat) in enumerate(zip(index.names, known, strict=True)) if stats.get(name) == stat
    }


def _kept(index: IndexFile, folder: Path, replaced: set[str]) -> Iterator[tuple[str, _Stat, TarTable]]:
    """The entries of an index that are still true."""
    there, stats = {entry.name for entry in os.scandir(folder)}, {}
    for name in index.names:
        if name in there and name not in replaced:
            with suppress(DataError):  # a link to nothing, or just removed: nobody asked for it
                stats[name] = _stat(folder / name)
    for name, row in _valid_rows(index, stats).items():
        yield name, stats[name], index.table(row)


def _scan_all(paths: list[Path], processes: int) -> Iterator[TarTable]:
    if processes == 1 or len(paths) < 2:
        yield from map(_scan, paths)
        return
    with ProcessPoolExecutor(min(processes, len(paths)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_scan, paths, chunksize=max(1, min(16, len(paths) // (4 * processes))))


def _scan(path: Path) -> TarTable:
    try:
        return scan(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check the disk and its rights") from None


def _writable_file(folder: Path) -> tuple[Path, Path] | None:
    """A new temporary file beside the first place that can be written, and that place."""
    for place in _index_paths(folder):
        try:
            if place.parent != folder:
                place.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f"{INDEX_FILE}.", suffix=".tmp", dir=place.parent)
        except OSError:  # read-only, or not ours: the next place is the documented one
            continue
        os.close(handle)
        return Path(name), place
    return None


def _write(temporary: Path, place: Path, entries: Iterable[tuple[str, _Stat, TarTable]]) -> IndexFile:
    """Writes tables one after the other and puts the file in its place: other processes see the old one or the new."""
    try:
        with temporary.open("wb") as stream:
            _write_tables(stream, entries)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's are for the owner alone
        written = IndexFile(temporary)  # before another process may put its own in this place
        os.replace(temporary, place)
    except OSError as error:
        raise DataError(f"the index of shards {place} cannot be written ({error.strerror}); free some space") from None
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _write_tables(stream: BinaryIO, entries: Iterable[tuple[str, _Stat, TarTable]]) -> None:
    rows, names, problems, bad = [], [], {}, {}
    extensions: dict[str, int] = {}
    for name, stat, table in entries:
        if len(extensions.keys() | table.extensions) > MOST_EXTENSIONS:
            raise DataError(
                f"shards up to {name} have more than {MOST_EXTENSIONS} kinds of members, and a key ends at its first "
                "dot; write them without dots in the keys"
            )
        own = [extensions.setdefault(extension, len(extensions)) for extension in table.extensions]
        members = table.members.copy()
        members["name"] = np.array(own, dtype="<u2")[members["name"]] if len(members) else 0
        rows.append((*stat, stream.tell(), len(table), len(members), len(table.keys)))
        for array in (table.starts, table.key_ends, members, table.keys):
            stream.write(array.tobytes())
        names.append(name)
        if table.problem:
            problems[name] = table.problem
        if table.bad:
            bad[name] = table.bad
    notes = json.dumps({"extensions": list(extensions), "problems": problems, "bad": bad}).encode("utf-8")
    text = "\0".join(names).encode("utf-8", "surrogateescape")
    stream.write(np.array(rows, dtype=_ROW).tobytes() + text + notes)
    stream.write(_FOOTER.pack(len(rows), len(text), len(notes), _MAGIC))
