"""The limit on bad samples over all ranks and workers of a run.

A process alone knows little: of 16 on 10,000 samples each sees a few hundred in an epoch. So every batch says what it
asked of each source and how much of that was bad, the all-reduce of each step sums it, and every rank decides alike.
What is counted are places of the sample order, a bad sample again in every epoch: the counts do not depend on the
number of ranks and workers, nor on interruptions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unitok.core.errors import DataError

_ENOUGH_READ = 1000  # samples from which on the share of bad ones among those read tells something about all


@dataclass(frozen=True)
class Reading:
    """A source that a task reads from.

    size: its samples. per_epoch: places of an epoch that ask for one of them. lost: samples that it lacks (a shard that
    is cut off), for which no place ever asks. max_bad_fraction: the limit, of all samples.
    """

    name: str
    size: int
    per_epoch: int
    max_bad_fraction: float
    lost: int = 0


def clearly_more(bad: int, read: int, fraction: float) -> bool:
    """Whether more than `fraction` of all samples must be bad, when `bad` of `read` drawn ones are."""
    allowed = fraction * read
    # four standard deviations of what chance brings into as many draws, and a few
    return read >= _ENOUGH_READ and bad > allowed + 4 * allowed**0.5 + 3


class BadCounts:
    """Samples read, and bad ones of these, of each source, by all ranks since the run began."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.readings = list(readings)
        self.read, self.bad = [0] * len(readings), [0] * len(readings)

    def add(self, places: Sequence[float]) -> None:
        """What a step has read: [read, bad] of each source, one after the other."""
        for k in range(len(self.readings)):
            self.read[k] += round(places[2 * k])
            self.bad[k] += round(places[2 * k + 1])

    def check(self, epochs: int) -> None:
        """DataError when a source holds too many bad samples. `epochs`: those begun, the present one included.

        Exact by the end of the first epoch: a sample cannot have come oftener than its source was begun. Before that
        (no run ever reads a noticeable share of a billion) where the share of those read leaves no doubt.
        """
        for one, read, bad in zip(self.readings, self.read, self.bad, strict=True):
            passes = max(1, math.ceil(epochs * one.per_epoch / one.size))
            total = (one.size + one.lost) * passes
            if bad + one.lost * passes > one.max_bad_fraction * total:
                text = f"{bad + one.lost * passes} of {total} samples"
            elif clearly_more(bad, read, one.max_bad_fraction):
                text = f"{bad} of {read} samples read"
            else:
                continue
            more = f", in {passes} passes over it" if passes > 1 else ""
            raise DataError(
                f"{one.name}: over all ranks {text} are bad{more}, more than max_bad_fraction="
                f"{one.max_bad_fraction}; the ranks' messages name them: mend the data, or allow more"
            )

    def metrics(self) -> dict[str, int]:
        """For the log: `read` and `bad` of all sources, and `bad/NAME` of each where there are several."""
        if not self.readings:
            return {}
        several = zip(self.readings, self.bad, strict=True) if len(self.readings) > 1 else ()
        return {"read": sum(self.read), "bad": sum(self.bad)} | {f"bad/{one.name}": bad for one, bad in several}

    def state(self) -> list[list]:
        """What a checkpoint holds: [name, read, bad] of each source."""
        names = [one.name for one in self.readings]
        return [list(row) for row in zip(names, self.read, self.bad, strict=True)]

    def load(self, state: Sequence[Sequence]) -> None:
        """Go on from what `state` gave. A source that is not in it begins anew."""
        saved = {name: (read, bad) for name, read, bad in state}
        for k, one in enumerate(self.readings):
            self.read[k], self.bad[k] = saved.get(one.name, (0, 0))
