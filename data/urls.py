"""Files that sources name by URL (http, s3, hf, gs, file ...): fetched once through fsspec into a cache folder."""

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from unitok.core.errors import DataError
from unitok.data.paths import cache_folder, expand_braces

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://")
_RECORDS = re.compile(r"\.(jsonl?|parquet)\?")


def is_url(spec: str) -> bool:
    """Whether a source is named by a URL rather than a path."""
    return bool(_SCHEME.match(spec))


def suffix_of(spec: str) -> str:
    """The ending of a source's file (".tar", ".jsonl"), without settings after a "?"; "" where it has none."""
    if is_url(spec):
        spec = urlsplit(spec).path
    elif _RECORDS.search(spec):
        spec = spec.partition("?")[0]
    return Path(spec).suffix.lower()


def local_files(spec: str) -> list[Path]:
    """The files that a URL, also one with braces or *, means: fetched if they are not in the cache yet.

    What is in the cache is not asked for again: training goes on without the network.

    Raises:
        DataError: no such file, no connection, a file of another size than announced, or the package that speaks the
            protocol is not installed.
    """
    files = [_local(url) for pattern in expand_braces(spec) for url in _matches(pattern)]
    if not files:
        raise DataError(f"{spec} matches no file; check the URL")
    return files


def _matches(pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    fs = _file_system(pattern)
    return sorted(str(fs.unstrip_protocol(path)) for path in _asked(pattern, fs.glob, pattern))


def _local(url: str) -> Path:
    from filelock import FileLock

    folder, _, name = url.partition("?")[0].rpartition("/")
    digest = hashlib.blake2b(url.removesuffix(name).encode(), digest_size=8).hexdigest()
    target = cache_folder() / f"{_readable(folder)}-{digest}" / unquote(name)
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # the other ranks of this machine wait for it
            if not target.is_file():
                _fetch(url, target)
    except PermissionError as error:
        raise DataError(f"{target.parent} cannot be written ({error.strerror}); set UNITOK_CACHE") from None
    return target


def _readable(folder: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", folder.rpartition("/")[2])[:40]


def _fetch(url: str, target: Path) -> None:
    fs = _file_system(url)
    size = _asked(url, fs.info, url).get("size")
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        _asked(url, fs.get_file, url, str(temporary))
        got = temporary.stat().st_size
        if size is not None and got != size:
            raise DataError(f"{url}: got {got} of {size} bytes; try again")
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _file_system(url: str) -> Any:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise DataError(f"{url}: {' '.join(str(error).split())} (what reads {protocol}:// is not installed)") from None
    except ValueError:
        raise DataError(
            f"{url}: {protocol}:// is no protocol that fsspec knows; expected http, s3, hf, gs ..."
        ) from None


def _asked(url: str, ask: Any, *arguments: Any) -> Any:
    """What a file system answers; its libraries' many errors as one."""
    try:
        return ask(*arguments)
    except _network_errors() as error:
        # fsspec says "not found" of servers that cannot be reached, too
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise DataError(f"{url} does not exist; check the URL") from None
        what = " ".join(str(cause).split()) or type(cause).__name__
        raise DataError(f"{url} cannot be fetched ({what}); check the connection, or copy the files here") from None


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError, and what the libraries behind fsspec raise beside it; only those in use are loaded."""
    found: list[type[Exception]] = [OSError, EOFError]
    known = (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError"))
    for module, name in (*known, ("httpx", "HTTPError"), ("httpx2", "HTTPError")):  # these two: huggingface_hub's
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)
