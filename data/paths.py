"""What names of sources mean on the disk: patterns with braces and *, and what stands in a folder."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from unitok.core.errors import DataError
from unitok.data.bad import is_of_the_file


def files_ending(folder: Path, ending: str) -> list[Path]:
    """What stands in a folder under names that end so, in any case, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name.lower().endswith(ending))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); folders of data must be") from None


def printable(name: str) -> str:
    r"""A file's name as Unicode, for keys: bytes that are not UTF-8 become \xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def leads_out(name: str) -> bool:
    """Whether a path that is meant to be within a folder names another place."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def matching_files(spec: str) -> list[Path]:
    """The files that a path, a glob or a brace pattern of these means, sorted by pattern; a path need not exist.

    What is there under that very name comes first: "data[1]/a.tar" and "{a}.tar" are names that files may have.
    """
    if os.path.exists(spec):
        return [Path(spec)]
    return [path for pattern in expand_braces(spec) for path in _matching(pattern)]


def _matching(pattern: str) -> list[Path]:
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return [Path(pattern)]
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder):
        pattern = os.path.join(glob.escape(folder), name)
    return [Path(found) for found in sorted(glob.glob(pattern))]


def expand_braces(spec: str) -> list[str]:
    """Every name that a brace pattern stands for; DataError where its braces do not close."""
    import braceexpand

    try:
        return list(braceexpand.braceexpand(spec))
    except braceexpand.UnbalancedBracesError:
        raise DataError(f"{spec}: a brace has no partner; expected a pattern such as part-{{00..09}}.tar") from None


def cache_folder() -> Path:
    """Where fetched files stay: `$UNITOK_CACHE/urls`, or `unitok/urls` in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "unitok"
    return Path(os.environ.get("UNITOK_CACHE") or cache) / "urls"


def file_stamp(path: Path) -> bytes:
    """What changes when a file is written anew: its size and time of change (of a fetched one, whose time is that of
    the fetch, its size); of no file, that it is none."""
    try:
        found = os.stat(path)
    except ValueError:  # a null byte
        return b"none"
    except OSError as error:
        if not is_of_the_file(error):
            raise
        return b"none"
    return stamp_of(path, found.st_size, found.st_mtime_ns)


def stamp_of(path: Path, size: int, mtime_ns: int) -> bytes:
    """`file_stamp` of a file of which both are known."""
    if f"{os.sep}urls{os.sep}" in str(path) and path.is_relative_to(cache_folder()):  # mostly told by the first
        return str(size).encode()
    return f"{size} {mtime_ns}".encode()


def walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """(path, whether it is a folder) of all that is in a folder and its sub-folders, in no order.

    Hidden names are passed over. Folders that are links are read where what they lead to has not been met; those last,
    so that what a folder holds itself goes by its own name. OSError where one cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    links = [str(folder)]
    while links:
        left = [links.pop(0)]
        while left:
            current = left.pop()
            found = os.stat(current)
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(current) as entries:  # which mostly know what is a folder, without a look at each
                shown = [e for e in entries if not e.name.startswith(".")]
                kinds = sorted((e.path, e.is_symlink(), e.is_dir(follow_symlinks=False)) for e in shown)
            for path, is_link, is_folder in kinds:
                is_folder = is_folder or (is_link and os.path.isdir(path))
                yield Path(path), is_folder
                if is_folder:
                    (links if is_link else left).append(path)
