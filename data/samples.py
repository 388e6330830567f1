"""What a source of images with words is: `source[i] -> Sample`, in any order, from any process."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unitok.data.bad import BadSamples
from unitok.data.decoding import MAX_PIXELS, Decoded, Shrink, decode, read_file
from unitok.data.words import Words

ShrinkOf = Callable[[str], Shrink]  # of a sample's key


@dataclass(kw_only=True)
class Sample(Words):
    """An RGB image and what is said about it; `key` names it within its source.

    `full_size`: width and height of the upright image in its file, which may have been decoded smaller.
    """

    key: str
    image: Image.Image
    full_size: tuple[int, int] | None = None


class Source(BadSamples, ABC):
    """Map-style source that survives bad samples (unreadable image, malformed text).

    `max_pixels`: images of more are bad samples. `parts`: what a mixture is made of (empty otherwise). `num_text_only`:
    conversations without an image, which training on images does not see: they stand behind the images, under numbers
    from `len(source)` on, for `key`, `place` and `read_words` alone. `broken`: of `lost`, the places that are whole
    files. `passed_over`: what stands there and is no sample, by kind.
    """

    max_pixels: int = MAX_PIXELS
    num_text_only: int = 0
    parts: "list[Source]" = []  # noqa: RUF012 - never changed
    broken: frozenset[str] = frozenset()
    passed_over: dict[str, int] = {}  # noqa: RUF012 - never changed

    @abstractmethod
    def _read_words(self, index: int) -> Words:
        """Captions, questions, conversations and meta of a sample; UserError when malformed."""

    @abstractmethod
    def _read_image(self, index: int, shrink: Shrink | None) -> Decoded:
        """The image of a sample; UserError when unreadable."""

    def read(self, index: int, shrink_of: ShrinkOf | None = None) -> Sample:
        """Sample `index` itself; UserError or OSError when it is bad.

        shrink_of: how much smaller its image may be decoded (see `decode_image`).
        """
        words, key = self._read_words(index), self.key(index)
        image = self._read_image(index, shrink_of(key) if shrink_of else None)
        return Sample(**vars(words), key=key, image=image.image, full_size=image.full_size)

    def stamp(self, index: int) -> bytes:
        """What changes when sample `index` does, told without reading its image: the key, and of files the time."""
        return self.key(index).encode("utf-8", "surrogatepass")

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        return self.first_good(index, self.read)

    def turn(self, index: int, epoch: int) -> "tuple[Source, int]":
        """The source and its sample that place `index` of an epoch takes: other ones every epoch, in a mixture."""
        return self, index

    def leaves(self) -> "list[Source]":
        """The sources behind this one: of a mixture, also of mixtures, all members that are none themselves."""
        return [leaf for part in self.parts for leaf in part.leaves()] or [self]

    def read_words(self, index: int) -> Words:
        """Words of sample `index` itself, or of a conversation without an image; UserError when it is bad."""
        return self._read_words(index)

    def words(self, index: int) -> Words:
        """Like `source[index]` without its image. A bad image is not noticed here."""
        return self.first_good(index, self._read_words)

    def texts(self, index: int) -> list[str]:
        """The captions of a sample, read without its image."""
        return self.words(index).captions

    def _decode(self, data: bytes, index: int, shrink: Shrink | None) -> Decoded:
        return decode(data, self.place(index), self.max_pixels, shrink)

    def _load(self, path: Path, shrink: Shrink | None) -> Decoded:
        return decode(read_file(path), str(path), self.max_pixels, shrink)


class Picked:
    """Some samples of a source, in the order of `indices`; a bad one is bad here too."""

    def __init__(self, source: Any, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.indices[index]]

    @property
    def bad(self) -> set[int]:
        """Of those that were read, the numbers here of bad ones."""
        return {at for at, index in enumerate(self.indices) if index in getattr(self.source, "bad", {})}


def good_samples(source: Any, limit: int | None = None) -> Iterator[tuple[int, Any]]:
    """(index, sample) of the readable ones of the first `limit` samples: no stand-in for a bad one."""
    for index in range(len(source) if limit is None else min(limit, len(source))):
        sample = source[index]
        if index not in getattr(source, "bad", {}):
            yield index, sample
