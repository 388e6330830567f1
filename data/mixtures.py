"""Several sources as one, each with its share of every epoch.

An epoch of a mixture has as many samples as its members have together; member k gets its weight's share of them, an
equal number in every epoch. Each member goes round: counted after any number of epochs, none of its samples has come
more than once oftener than another. The order of `unitok.core.sampling` shuffles the members' places.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import yaml
from pydantic import Field, ValidationError

from unitok.core.config import Config
from unitok.core.errors import DataError
from unitok.core.rng import derive_seed
from unitok.core.sampling import SampleOrder
from unitok.data.decoding import Decoded, Shrink
from unitok.data.samples import Sample, ShrinkOf, Source
from unitok.data.words import Words

_PREFIX = "mix:"
_YAML = (".yaml", ".yml")


class SourceShare(Config):
    """A member of a mixture. `weight`: its share of the samples, relative to the others' (default: its own number of
    samples). `name`: what the log calls it."""

    source: str
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    name: str | None = None


P = TypeVar("P")


class Mixed(Generic[P]):
    """What mixtures of any kind of source share: whose turn it is at each place of an epoch.

    Place `index` of epoch `epoch` takes the sample that `turn(index, epoch)` says, which depends on the seed and both.

    parts: the members. counts: samples of each in an epoch. names: of the members, for the log.

    Raises:
        DataError: weights are given for some members only, or one is too small for a single sample.
    """

    name: str
    parts: list[P]

    def share_out(self, members: Sequence[P], shares: Sequence[SourceShare], seed: int) -> None:
        """Called once, when `name` is set."""
        self.parts = list(members)
        given = [share.weight for share in shares if share.weight is not None]
        if given and len(given) < len(shares):
            raise DataError(f"{self.name}: {len(given)} of {len(shares)} sources have a weight; give it to all or none")
        sizes = [len(member) for member in members]
        weights = given or sizes
        self.names = _names([share.name or share.source for share in shares])
        self.counts = _divide(sum(sizes), weights)
        for name, count, weight in zip(self.names, self.counts, weights, strict=True):
            if count < 1:
                raise DataError(
                    f"source {name} with weight {weight} gets no sample of {len(self)}; give it more or drop it"
                )
        self._ends = np.cumsum(self.counts)
        self._orders = [SampleOrder(size, derive_seed("mixture", seed, k)) for k, size in enumerate(sizes)]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def shares(self) -> list[list[int]]:
        """Of each member: its samples in an epoch, and its size. With the seed they decide whose turn it is."""
        return [[count, len(member)] for count, member in zip(self.counts, self.parts, strict=True)]

    def member(self, index: int) -> int:
        """The number of the member that place `index` belongs to, in every epoch."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def turn(self, index: int, epoch: int) -> tuple[P, int]:
        """The source and its sample that place `index` of an epoch takes."""
        k = self.member(index)
        position = epoch * self.counts[k] + index - (int(self._ends[k - 1]) if k else 0)
        return self.parts[k].turn(self._orders[k].index(position), self._orders[k].epoch(position))

    def describe(self) -> str:
        """One line: what an epoch is made of."""
        rows = zip(self.names, self.counts, self.parts, strict=True)
        passes = ", ".join(f"{name} {count} ({count / len(member):.3g} passes)" for name, count, member in rows)
        return f"an epoch of {len(self)} samples: {passes}"


class MixtureSource(Mixed[Source], Source):
    """A mixture of sources of images. As a plain source, `mixture[index]` is that of epoch 0."""

    def __init__(self, members: Sequence[Source], shares: Sequence[SourceShare], seed: int = 0) -> None:
        super().__init__(" + ".join(member.name for member in members), 1.0)  # members watch over their own
        self.share_out(members, shares, seed)

    @property
    def num_text_only(self) -> int:  # type: ignore[override]
        return sum(part.num_text_only for part in self.parts)

    def turn(self, index: int, epoch: int) -> tuple[Source, int]:
        number = index - len(self)  # of the members' conversations without an image, each once
        if number < 0:
            return super().turn(index, epoch)
        for part in self.parts:
            if number < part.num_text_only:
                return part, len(part) + number
            number -= part.num_text_only
        raise IndexError(f"text-only sample {index - len(self)} of {self.name}, which has {self.num_text_only}")

    def key(self, index: int) -> str:
        source, number = self.turn(index, 0)
        return source.key(number)

    def place(self, index: int) -> str:
        source, number = self.turn(index, 0)
        return source.place(number)

    def stamp(self, index: int) -> bytes:
        source, number = self.turn(index, 0)
        return source.stamp(number)

    def read(self, index: int, shrink_of: ShrinkOf | None = None) -> Sample:
        source, number = self.turn(index, 0)
        return source.read(number, shrink_of)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        source, number = self.turn(index, 0)
        sample = source[number]
        if number in source.bad:
            self.bad[index] = source.bad[number]
        return sample

    def words(self, index: int) -> Words:
        source, number = self.turn(index, 0)
        return source.words(number)

    def _read_words(self, index: int) -> Words:
        source, number = self.turn(index, 0)
        return source._read_words(number)

    def _read_image(self, index: int, shrink: Shrink | None) -> Decoded:
        source, number = self.turn(index, 0)
        return source._read_image(number, shrink)


def parse_mixture(spec: Any) -> list[SourceShare] | None:
    """The members of a mixture: of a list of {source, weight}, "mix:WEIGHT=SOURCE;WEIGHT=SOURCE", or a YAML file that
    holds such a list. None if `spec` is no mixture.

    Raises:
        DataError: it is one, but not of that form.
    """
    if isinstance(spec, str | Path):
        text = str(spec)
        if text.startswith(_PREFIX):
            spec = [_parse_part(part, text) for part in text.removeprefix(_PREFIX).split(";") if part.strip()]
        elif text.lower().endswith(_YAML):
            spec = _read_yaml(Path(text))
        else:
            return None
        where = text
    else:
        where = "the mixture"
    if not isinstance(spec, list) or not spec:
        raise DataError(f"{where}: expected a list of {{source, weight}} or {_PREFIX}WEIGHT=SOURCE;WEIGHT=SOURCE")
    try:
        return [SourceShare.model_validate(item) for item in spec]
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise DataError(f"{where}: {field or 'a member'}: {problem['msg']}; expected {{source, weight}}") from None


def _parse_part(part: str, text: str) -> dict[str, Any]:
    weight, _, source = part.partition("=")
    try:
        return {"source": source.strip(), "weight": float(weight)} if source else {"source": part.strip()}
    except ValueError:  # a name that holds an =
        return {"source": part.strip()}


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML ({type(error).__name__}); expected a list of sources") from None


def _divide(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts as the weights say; the largest remainders get what rounding left over."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda k: parts[k] - exact[k])
    for k in by_remainder[: total - sum(parts)]:
        parts[k] += 1
    return parts


def _names(names: Sequence[str]) -> list[str]:
    """Distinct short names: the last two parts of a path, and a number where they are equal."""
    short = [
        name if "://" not in name and "/" not in name else "/".join(name.rstrip("/").split("/")[-2:]) for name in names
    ]
    return [name if short.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(short)]
