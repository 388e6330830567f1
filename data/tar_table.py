"""What stands where in one tar shard: its samples' keys and members as a few small arrays.

Members of one sample share the key (the path up to the first dot of the file name) and stand side by side.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unitok.data.paths import printable

MEMBER = np.dtype([("block", "<u4"), ("size", "<u4"), ("name", "<u2")])  # where its data begin, in blocks of 512 bytes
_MOST_BLOCKS, _MOST_BYTES = 2**32 - 1, 2**31 - 2**12  # of a shard before a member; of a member, for one read
MOST_EXTENSIONS = 2**16
_LARGE_RECORDS = tuple(2**n for n in range(14, 21))  # bytes: 16 KiB to 1 MiB
_TWICE = "its key stands in the shard twice; this later one is left out"


@dataclass
class TarTable:
    """n samples of one shard. Arrays may be views of a mapped file; nothing is read before it is asked for.

    starts: uint32 [n + 1], sample i has members[starts[i]:starts[i + 1]]. key_ends: uint32 [n + 1], likewise in `keys`.
    members: MEMBER [m], `name` a number in `extensions`. keys: uint8, UTF-8 without separators.
    stat: size and time of change (in nanoseconds) that the shard had before it was read; where that is known.
    problem: why the shard is no whole tar ("" if it is). bad: key -> why a sample of that key is left out; of further
    ones of the same key "KEY #3" and so on.
    """

    starts: np.ndarray
    key_ends: np.ndarray
    members: np.ndarray
    keys: np.ndarray
    extensions: list[str]
    problem: str = ""
    bad: dict[str, str] = field(default_factory=dict)
    stat: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def key(self, index: int) -> str:
        return self.keys[self.key_ends[index] : self.key_ends[index + 1]].tobytes().decode("utf-8")

    def members_of(self, index: int) -> Iterator[tuple[str, int, int]]:
        """(extension, offset in bytes, size in bytes) of a sample's members, in the order of the file."""
        for block, size, name in self.members[self.starts[index] : self.starts[index + 1]].tolist():
            yield self.extensions[name], block * tarfile.BLOCKSIZE, size


def scan(path: Path) -> TarTable:
    """Reads the headers of a tar. What is wrong with it is told in the result; OSError where it cannot be read at all.

    Of a shard that is cut off, or filled up with zeros, the samples before that are kept; the last one only where its
    members were all read, as far as one can tell: it has as many as the one before it.
    """
    found = _Samples()
    size = path.stat().st_size
    problem = "it is empty" if size == 0 else ""
    try:
        if size:
            with tarfile.open(path, "r:") as tar:
                problem = _read_headers(tar, found, size)
    except tarfile.TarError as error:
        problem = str(error)
    if problem:
        found.drop_incomplete()
    return found.table(" ".join(problem.split()))


def _read_headers(tar: tarfile.TarFile, found: "_Samples", size: int) -> str:
    for info in tar:
        if info.isfile():
            if info.offset_data + info.size > size:
                found.begin_member(info)
                return f"it ends inside {info.name}"
            found.add(info)
    # tarfile takes a file cut at a header for a shorter archive; a whole one goes on with a block of zeros.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        return "its end is missing"
    behind = size - tar.offset
    if _may_be_padding(behind, size) and not tar.fileobj.read().strip(tarfile.NUL):
        return ""
    found.drop_if_zeros_begin_in_it(tar)
    return f"after its last sample come {behind} bytes, more than end a tar: zeros for samples, or a second tar"


def _may_be_padding(count: int, size: int) -> bool:
    """Whether a tar of `size` bytes may end with so many zeros: two blocks, and what fills its last record up.

    A record is 10240 bytes for everything that makes shards (Python's tarfile, and with it webdataset and img2dataset;
    GNU tar and bsdtar; Go's and Rust's fill up nothing). Of `tar --blocking-factor` the powers of two up to 1 MiB are
    known here, where the file's size fits them; by chance a damaged file's does one time in 8 or less.
    """
    limit = 2 * tarfile.BLOCKSIZE
    if count < limit + tarfile.RECORDSIZE:
        return True
    return any(size % record == 0 and count < limit + record for record in _LARGE_RECORDS)


class _Samples:
    """Samples of a shard as its members are met one after the other."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.members: list[list[tuple[int, int, int]]] = []  # of each sample
        self.extensions: dict[str, int] = {}
        self.bad: dict[str, str] = {}
        self._seen: set[str] = set()
        self._times: Counter[str] = Counter()  # how often a key was left out
        self._key: str | None = None  # of the member met last
        self._group: set[int] = set()  # extensions of the sample met last
        self._last: tarfile.TarInfo | None = None  # the member met last, if it belongs to the last sample
        self._left_out = False

    def begin_member(self, info: tarfile.TarInfo) -> str | None:
        """Turns to the sample that a member belongs to; its extension, or None where it belongs to none."""
        name = printable(info.name)
        folder, _, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        if not stem or not extension:
            return None
        key = f"{folder}/{stem}" if folder else stem
        if key != self._key:
            self._key, self._left_out, self._group = key, key in self._seen, set()
            if self._left_out:
                self._leave_out(key, _TWICE)
            else:
                self._seen.add(key)
                self.keys.append(key)
                self.members.append([])
        return extension.lower()

    def add(self, info: tarfile.TarInfo) -> None:
        extension, self._last = self.begin_member(info), None
        if extension is None:
            return
        number = self.extensions.setdefault(extension, len(self.extensions))
        if number >= MOST_EXTENSIONS:
            raise tarfile.TarError(f"{info.name}: more than {number} kinds of members; a key ends at its first dot")
        block = info.offset_data // tarfile.BLOCKSIZE
        if number in self._group:  # another sample of the same key, side by side
            self._leave_out(self._key or "", _TWICE)
            self._group, self._left_out = {number}, True
            return
        self._group.add(number)
        if self._left_out:
            return
        if info.size > _MOST_BYTES or block > _MOST_BLOCKS:
            why = f"its {extension} has {info.size} bytes at {info.offset_data}, too large for us"
            self._leave_out(self.keys.pop(), why)
            self.members.pop()
            self._left_out = True
        else:
            self.members[-1].append((block, info.size, number))
            self._last = info

    def _leave_out(self, key: str, why: str) -> None:
        self._times[key] += 1
        times = self._times[key]
        self.bad[key if times == 1 else f"{key} #{times + 1}"] = why

    def drop_if_zeros_begin_in_it(self, tar: tarfile.TarFile) -> None:
        """Leave out the last sample if its last member ends with a zero: what comes next is zeros, too."""
        if self._last is None or not self._last.size:
            return
        assert tar.fileobj is not None
        tar.fileobj.seek(self._last.offset_data + self._last.size - 1)
        if tar.fileobj.read(1) == tarfile.NUL:
            self.members.pop()
            self.keys.pop()

    def drop_incomplete(self) -> None:
        """Leave out the last sample if the shard ended before it was whole."""
        if self.members and (len(self.members) < 2 or len(self.members[-1]) < len(self.members[-2])):
            self.members.pop()
            self.keys.pop()

    def table(self, problem: str) -> TarTable:
        encoded = [key.encode("utf-8") for key in self.keys]
        return TarTable(
            np.cumsum([0, *map(len, self.members)], dtype="<u4"),
            np.cumsum([0, *map(len, encoded)], dtype="<u4"),
            np.array([member for members in self.members for member in members], dtype=MEMBER),
            np.frombuffer(b"".join(encoded), dtype=np.uint8),
            list(self.extensions),
            problem,
            self.bad,
        )
