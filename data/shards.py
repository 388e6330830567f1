"""Tar shards in webdataset's layout: written atomically, read at random by index.

Members of one sample share the key (the path up to the first dot of the file name) and stand side by side.
"""

import glob
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unitok.core.errors import DataError


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
    writer = _ShardFile(out, prefix)
    try:
        for sample in samples:
            if writer.count == max_per_shard:
                shards.append(writer.finish())
                writer = _ShardFile(out, prefix, len(shards))
            writer.write(sample)
        if writer.count:
            shards.append(writer.finish())
    finally:
        writer.discard()
    if not shards:
        raise DataError(f"no sample to write to {out}")
    return shards


class _ShardFile:
    """One tar under a temporary name until `finish`."""

    def __init__(self, out: Path, prefix: str, number: int = 0) -> None:
        import webdataset

        self.path = out / f"{prefix}-{number:05d}.tar"
        self.count = 0
        self._temporary = out / f".{self.path.name}.tmp"
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
        return self.path

    def discard(self) -> None:
        if not self._stream.closed:
            self._tar.close()
            self._stream.close()
        self._temporary.unlink(missing_ok=True)


class _Member(NamedTuple):
    offset: int
    size: int


class _Entry(NamedTuple):
    key: str
    path: Path
    members: dict[str, _Member]


class ShardReader:
    """Samples of tar shards by index: `reader[i] -> {"png": bytes, "txt": bytes, ...}`, `reader.keys[i]`.

    The headers are scanned once; a sample is then one seek. No file stays open, so a reader may be forked or pickled.

    Args:
        spec: a folder, a glob, a brace pattern ("shard-{00000..00003}.tar"), or a list of tar files.

    Raises:
        DataError: no shard is found, or one is not a whole tar file.
    """

    def __init__(self, spec: Path | str | Sequence[Path | str]) -> None:
        self.paths = expand_shards(spec)
        self._entries = [entry for path in self.paths for entry in _scan(path)]
        if not self._entries:
            raise DataError(f"{spec} holds no sample in {len(self.paths)} shards; write them again")
        self.keys = [entry.key for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        return self.read(index)

    def read(self, index: int, names: Iterable[str] | None = None) -> dict[str, bytes]:
        """The members of sample `index`; only those called `names`, where given."""
        entry = self._entries[index]
        wanted = set(entry.members) if names is None else set(names)
        out = {}
        with open(entry.path, "rb") as stream:
            for name, member in entry.members.items():
                if name in wanted:
                    stream.seek(member.offset)
                    out[name] = stream.read(member.size)
        return out


def expand_shards(spec: Path | str | Sequence[Path | str]) -> list[Path]:
    """The tar files that `spec` means, in order; DataError when there is none or one is missing."""
    if not isinstance(spec, Path | str):
        paths = [Path(item) for item in spec]
    elif Path(spec).is_dir():
        paths = sorted(Path(spec).glob("*.tar"))
    else:
        import braceexpand

        patterns = list(braceexpand.braceexpand(str(spec)))
        paths = [
            Path(found)
            for pattern in patterns
            for found in (sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern])
        ]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"shard {missing[0]} does not exist ({len(missing)} of {len(paths)} missing)")
    if not paths:
        raise DataError(f"{spec} matches no .tar file; expected a folder, a glob or a brace pattern of shards")
    return paths


def _scan(path: Path) -> list[_Entry]:
    entries: list[_Entry] = []
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isfile():
                    _add_member(entries, path, info, size)
            # tarfile takes a file cut at a header for a shorter archive; a whole one goes on with a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise DataError(f"{path} is not a whole tar file ({error}); copy or write it again") from None
    return entries


def _add_member(entries: list[_Entry], path: Path, info: tarfile.TarInfo, file_size: int) -> None:
    folder, _, name = info.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem or not extension:
        return
    if info.offset_data + info.size > file_size:
        raise DataError(f"{path} ends inside {info.name}; copy or write it again")
    key = f"{folder}/{stem}" if folder else stem
    if not entries or entries[-1].key != key:
        entries.append(_Entry(key, path, {}))
    extension = extension.lower()
    if extension in entries[-1].members:
        raise DataError(f"{path} holds {info.name} twice; keys must be unique")
    entries[-1].members[extension] = _Member(info.offset_data, info.size)
