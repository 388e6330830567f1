"""What readers of samples do about bad ones: leave them out, name them, count them, and stop when they are many."""

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import TypeVar

from unitok.core.errors import DataError, UserError

_LOGGER = logging.getLogger(__name__)
T = TypeVar("T")


class BadSamples:
    """Base of map-style readers: a bad sample is logged with its key and replaced by the next good one.

    Which one stands in does not depend on what was read before. When the share of bad samples found by this process
    exceeds `max_bad_fraction`, reading stops.
    """

    def __init__(self, name: str, max_bad_fraction: float = 0.01) -> None:
        self.name, self.max_bad_fraction = name, max_bad_fraction
        self.bad: dict[int, str] = {}  # index -> what is wrong

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of sample `index`."""

    def first_good(self, index: int, read: Callable[[int], T], always_bad: bool = True) -> T:
        """`read(index)`, or of the next index for which it raises neither UserError nor OSError.

        always_bad: what was bad once is not read again. False if it depends on more than the index (an epoch's task).
        Raises DataError when too many samples are bad.
        """
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if always_bad and candidate in self.bad:
                continue
            try:
                return read(candidate)
            except (UserError, OSError) as error:
                if candidate not in self.bad:
                    self._report_bad(candidate, error)
        raise DataError(f"{self.name} has no readable sample")

    def _report_bad(self, index: int, error: Exception) -> None:
        self.bad[index] = str(error)
        _LOGGER.warning("%s: sample %s left out: %s", self.name, self.key(index), error)
        share = len(self.bad) / len(self)
        if share > self.max_bad_fraction:
            raise DataError(
                f"{self.name}: {len(self.bad)} of {len(self)} samples are bad, more than max_bad_fraction="
                f"{self.max_bad_fraction}; the last one: {error}"
            )
