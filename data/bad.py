"""What readers of samples do about bad ones: leave them out, name them, count them, and stop when they are many."""

import errno
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeVar

from unitok.core.bad_share import clearly_more
from unitok.core.errors import DataError, UserError

_LOGGER = logging.getLogger(__name__)
T = TypeVar("T")
# What the system says of a file itself; PIL and pyarrow say no number of files that are broken. All else passes, or is
# the machine's.
_OF_THE_FILE = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "EINVAL", "EACCES", "EPERM")
_OF_THE_FILE_NUMBERS = frozenset({None, *(getattr(errno, name) for name in _OF_THE_FILE)})
_PAUSES = (0.1, 0.5, 2.0)  # seconds before what may pass is tried again


class SampleError(DataError):
    """One sample cannot be used. `kind` is the short name that reports count it under."""

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


class SourceError(DataError):
    """A source cannot be read, which is no sample's fault: the run ends, and no other sample stands in."""


def is_of_the_file(error: OSError) -> bool:
    """Whether an error says something about the file that was asked for, and will again; if not, the disk, the network
    or the machine failed."""
    return error.errno in _OF_THE_FILE_NUMBERS


def patiently(read: Callable[[], T], place: Callable[[], str]) -> T:
    """`read()`; again, after pauses, where it fails for a reason that may pass.

    Raises:
        SourceError: it failed every time; names `place()`, the file and the reason.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if is_of_the_file(error):
                raise
            if pause is None:
                file = "" if error.filename is None else f"{error.filename}: "
                raise SourceError(
                    f"{place()}: {file}{error.strerror} (errno {error.errno}), {len(_PAUSES) + 1} times; the disk, the "
                    "network or the machine fails, not the sample: put it right and give the same command again"
                ) from None
            time.sleep(pause)
    raise AssertionError(_PAUSES)


def kind_of(error: Exception) -> str:
    """The kind that a sample's error is counted under."""
    return getattr(error, "kind", "file" if isinstance(error, OSError) else "other")


class BadSamples:
    """Base of map-style readers: a bad sample is logged with its place and replaced by the next good one.

    Which one stands in does not depend on what was read before. Reading stops when the bad samples found by this
    process are more than `max_bad_fraction` of all, or clearly more than that of those it has read. In training that
    is the first net only: `unitok.core.bad_share` holds the limit over all ranks and workers.
    """

    def __init__(self, name: str, max_bad_fraction: float = 0.01) -> None:
        self.name, self.max_bad_fraction = name, max_bad_fraction
        self.bad: dict[int, str] = {}  # index -> what is wrong
        self.lost: dict[str, str] = {}  # place -> why what stood there has no index (a shard that is cut off)
        self.num_lost = 0  # how many samples that is, as far as one can tell
        self._num_read = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of sample `index`."""

    def place(self, index: int) -> str:
        """Where sample `index` stands, for messages: its key, with the shard or file where there is one."""
        return self.key(index)

    def first_good(self, index: int, read: Callable[[int], T], always_bad: bool = True) -> T:
        """`read(index)`, or of the next index for which it raises neither UserError nor OSError. SourceErrors pass.

        always_bad: what was bad once is not read again. False if it depends on more than the index (an epoch's task).
        Raises DataError when too many samples are bad.
        """
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if always_bad and candidate in self.bad:
                continue
            self._num_read += 1
            try:
                return patiently(lambda candidate=candidate: read(candidate), lambda at=candidate: self.place(at))
            except SourceError:
                raise
            except (UserError, OSError) as error:
                if candidate not in self.bad:
                    self._report_bad(candidate, error)
        raise DataError(f"{self.name} has no readable sample")

    def _report_bad(self, index: int, error: Exception) -> None:
        self.bad[index] = str(error)
        _LOGGER.warning("%s: sample %s left out: %s", self.name, self.place(index), error)
        self._stop_if_too_many(str(error))

    def report_lost(self, reasons: Mapping[str, str], count: int) -> None:
        """Counts what is missing without having an index: `count` samples, named by `reasons` (place -> reason)."""
        self.lost.update(reasons)
        self.num_lost += count
        for place, reason in reasons.items():
            _LOGGER.warning("%s: %s: %s", self.name, place, reason)
        if reasons:
            place, reason = list(reasons.items())[-1]
            self._stop_if_too_many(f"{place}: {reason}")

    def _stop_if_too_many(self, last: str) -> None:
        bad, total = len(self.bad) + self.num_lost, len(self) + self.num_lost
        if clearly_more(len(self.bad), self._num_read, self.max_bad_fraction):
            bad, total = len(self.bad), self._num_read
        elif bad <= self.max_bad_fraction * total:
            return
        raise DataError(
            f"{self.name}: {bad} of {total} samples are bad, more than max_bad_fraction={self.max_bad_fraction}; "
            f"the last one: {last}"
        )
