"""Batches of images with captions for stage one, over any source."""

from typing import Any, Literal

import torch
from pydantic import Field

from unitok.core.config import Config
from unitok.core.rng import numpy_rng
from unitok.data.source import Source, open_source
from unitok.data.transforms import eval_transform, released_train_transform, train_transform


class ImageDataConfig(Config):
    """Where images come from and how they are cut to size.

    `augment: crop` takes a random resized crop with flip (natural images); `released` resizes a little larger and crops
    anywhere, without flip; `none` takes a centre crop, which shows the whole scene. `cache` holds decoded images in
    memory (only with `none`).
    """

    source: str = "shapes:train?num=16000&seed=0"
    augment: Literal["none", "crop", "released"] = "none"
    cache: bool = False
    max_bad_fraction: float = Field(0.01, ge=0, le=1)


class ImageBatches:
    """`load(indices, epoch)` is a pure function of the source, the seed and its arguments."""

    def __init__(self, config: ImageDataConfig, image_size: int, seed: int) -> None:
        self.config, self.image_size, self.seed = config, image_size, seed
        self.source: Source = open_source(config.source, max_bad_fraction=config.max_bad_fraction)
        self._cache: dict[int, tuple[torch.Tensor, list[str]]] = {}  # index -> uint8 pixels [3, H, W], captions

    def __len__(self) -> int:
        return len(self.source)

    def all_captions(self) -> list[str]:
        """Every caption of the source, to train a text tokenizer on."""
        return [text for index in range(len(self.source)) for text in self.source.texts(index)]

    def load(self, indices: list[int], epoch: int) -> dict[str, Any]:
        """`pixels` float32 `[B, 3, H, W]` in [-1, 1] and one caption per image ("" where it has none)."""
        pixels, captions = zip(*(self._one(index, epoch) for index in indices), strict=True)
        return {"pixels": torch.stack(pixels), "captions": list(captions)}

    def _one(self, index: int, epoch: int) -> tuple[torch.Tensor, str]:
        pixels, captions = self._read(index, epoch)
        if not captions:
            return pixels, ""
        chosen = int(numpy_rng("caption", self.seed, epoch, index).integers(len(captions)))
        return pixels, captions[chosen]

    def _read(self, index: int, epoch: int) -> tuple[torch.Tensor, list[str]]:
        if index in self._cache:
            stored, captions = self._cache[index]
            return stored.float() / 127.5 - 1, captions
        sample = self.source[index]
        if self.config.augment != "none":
            transform = train_transform if self.config.augment == "crop" else released_train_transform
            rng = numpy_rng("augment", self.seed, epoch, sample.key)
            return transform(sample.image, self.image_size, rng), sample.captions
        pixels = eval_transform(sample.image, self.image_size)
        if self.config.cache:
            self._cache[index] = ((pixels + 1) * 127.5).round().to(torch.uint8), sample.captions
        return pixels, sample.captions
