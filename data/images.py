"""Batches of images with captions for stage one, over any source."""

import logging
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field

from unitok.core.config import Config
from unitok.core.rng import numpy_rng
from unitok.data.decoding import MAX_PIXELS, Shrink
from unitok.data.mixtures import MixtureSource, SourceShare
from unitok.data.samples import Source
from unitok.data.source import open_source
from unitok.data.transforms import (
    centred,
    random_crop,
    released_crop,
    shrink_for_crop,
    to_levels,
)

_LOGGER = logging.getLogger(__name__)


class ImageDataConfig(Config):
    """Where images come from and how they are cut to size.

    `source` is one source or a list of {source, weight} (see docs/data.md). `augment: crop` takes a random resized crop
    with flip (natural images); `released` resizes a little larger and crops anywhere, without flip; `none` takes a
    centre crop, which shows the whole scene. `cache` holds decoded images in memory (only with `none`). `draft`: with
    `crop`, JPEG files are decoded at 1/2, 1/4 or 1/8 of their size where the crop still has 1.25 x `image_size` pixels.
    Images of more than `max_pixels` are bad samples.
    """

    source: str | list[SourceShare] = "shapes:train?num=16000&seed=0"
    augment: Literal["none", "crop", "released"] = "none"
    cache: bool = False
    draft: bool = True
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    max_pixels: int = Field(MAX_PIXELS, ge=1)


class ImageBatches:
    """`load(indices, epoch)` is a pure function of the source, the seed and its arguments. Indices of `len(self)` or
    more are those of later epochs (see `unitok.core.task.Task.place`)."""

    def __init__(self, config: ImageDataConfig, image_size: int, seed: int) -> None:
        self.config, self.image_size, self.seed = config, image_size, seed
        self.source: Source = open_source(
            config.source, max_bad_fraction=config.max_bad_fraction, max_pixels=config.max_pixels, seed=seed
        )
        if isinstance(self.source, MixtureSource):
            _LOGGER.info("%s", self.source.describe())
        self._cache: dict[tuple[str, int], tuple[Image.Image, list[str]]] = {}  # images of that size, captions

    def __len__(self) -> int:
        return len(self.source)

    def all_captions(self) -> list[str]:
        """Every caption of the source, to train a text tokenizer on."""
        return [text for source in self.source.leaves() for index in range(len(source)) for text in source.texts(index)]

    def load(self, indices: list[int], epoch: int) -> dict[str, Any]:
        """`pixels` uint8 `[B, 3, H, W]`, to be made floats by `as_pixels` where they are used, and one caption per
        image ("" where it has none); of a mixture also `sources`, int64 `[B]`: the member that each one came from."""
        images, captions = zip(*(self._one(index, epoch) for index in indices), strict=True)
        batch: dict[str, Any] = {"pixels": to_levels(images), "captions": list(captions)}
        if isinstance(self.source, MixtureSource):
            batch["sources"] = torch.tensor([self.source.member(index % len(self)) for index in indices])
        return batch

    def count_sources(self, batch: dict[str, Any], times: int) -> dict[str, torch.Tensor]:
        """How many samples of a batch came from each member of a mixture, by names that are the same for every batch.

        times: the batches of a step, over all ranks, whose mean is logged: it is then the step's number of samples.
        """
        if not isinstance(self.source, MixtureSource):
            return {}
        counts = torch.bincount(batch["sources"], minlength=len(self.source.names)).float() * times
        return {f"samples/{name}": count for name, count in zip(self.source.names, counts, strict=True)}

    def _one(self, index: int, epoch: int) -> tuple[Image.Image, str]:
        later, index = divmod(index, len(self))
        epoch += later
        image, captions = self._read(index, epoch)
        if not captions:
            return image, ""
        chosen = int(numpy_rng("caption", self.seed, epoch, index).integers(len(captions)))
        return image, captions[chosen]

    def _read(self, index: int, epoch: int) -> tuple[Image.Image, list[str]]:
        source, number = self.source.turn(index, epoch)
        if (source.name, number) in self._cache:
            return self._cache[source.name, number]
        found = source.first_good(number, lambda candidate: self._cut(source, candidate, epoch))
        if self.config.cache and self.config.augment == "none":
            self._cache[source.name, number] = found
        return found

    def _cut(self, source: Source, number: int, epoch: int) -> tuple[Image.Image, list[str]]:
        """Sample `number` itself, cut to size; UserError or OSError when it is bad."""
        if self.config.augment == "none":
            sample = source.read(number)
            return centred(sample.image, self.image_size), sample.captions
        crop = self.config.augment == "crop"
        sample = source.read(number, (lambda key: self._shrink(key, epoch)) if crop and self.config.draft else None)
        rng = numpy_rng("augment", self.seed, epoch, sample.key)
        if crop:
            image = random_crop(sample.image, self.image_size, rng, full_size=sample.full_size)
        else:
            image = released_crop(sample.image, self.image_size, rng)
        return image, sample.captions

    def _shrink(self, key: str, epoch: int) -> Shrink:
        """How much smaller a sample may be decoded: its crop is drawn here as `random_crop` will draw it."""

        def shrink(width: int, height: int) -> int:
            return shrink_for_crop(width, height, self.image_size, numpy_rng("augment", self.seed, epoch, key))

        return shrink
