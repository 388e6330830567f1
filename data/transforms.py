"""Between PIL images and pixels: float32 [3, H, W] in [-1, 1], channels first."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from unitok.core.errors import UserError
from unitok.data.bad import SampleError
from unitok.data.decoding import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS
from unitok.data.decoding import MAX_PIXELS, to_rgb
from unitok.data.decoding import decode_image as decode_image
from unitok.data.decoding import load_image as load_image
from unitok.data.preprocess import PREPROCESS

Box = tuple[float, float, float, float]  # left, top, right, bottom

# What the released code does before its tokenizer: the shorter side becomes int(ratio * size), then a centre crop.
RELEASED_PREPROCESS = {
    "inference": (1.125, Image.Resampling.BILINEAR),  # its reconstruction script
    "vae_val": (1.125, Image.Resampling.LANCZOS),  # reconstruction measures (rFID) during training
    "clip_val": (1.0, Image.Resampling.BICUBIC),  # zero-shot classification
}
# An image decoded at a part of its size keeps at least so many times the pixels that a crop needs. At 1.25 crops of two
# photographs differ by 2.4 of 255 levels on average (35 dB) from those of the whole image.
DRAFT_SURPLUS = 1.25
VQA_BACKGROUND = (122, 116, 104)  # what the released chat pads images with: CLIP's mean colour


def eval_transform(image: Image.Image, size: int, preprocess: str = "plain") -> torch.Tensor:
    """Shorter side to `size`, centre crop; an image of that size is not touched. [3, size, size]

    `preprocess` names one of RELEASED_PREPROCESS instead, for the numbers of the released tokenizer, or "padded", as
    the released chat does.
    """
    if preprocess == "padded":
        return padded_transform(image, size)
    image = to_rgb(image)
    return to_pixels(centred(image, size)) if preprocess == "plain" else _released(image, size, preprocess)


def reduced(image: Image.Image, size: int, preprocess: str = "plain") -> Image.Image:
    """A small image of which `eval_transform` gives the same pixels, for those who keep it a while."""
    if preprocess in RELEASED_PREPROCESS:
        return _shorter_side(to_rgb(image), size, preprocess)
    return to_pil(eval_transform(image, size, preprocess))


def centred(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of an RGB image at `size` pixels a side."""
    if image.size == (size, size):
        return image
    # The crop is taken in the source, in one resampling, so that no side is rounded.
    return _resize(image, size, _centred_square(*image.size))


def _released(image: Image.Image, size: int, preprocess: str) -> torch.Tensor:
    from torchvision.transforms import functional as tv

    if preprocess not in RELEASED_PREPROCESS:
        known = ", ".join(PREPROCESS)
        raise UserError(f"preprocess={preprocess!r}: expected one of {known}")
    return tv.to_tensor(tv.center_crop(_shorter_side(image, size, preprocess), size)) * 2 - 1


def _shorter_side(image: Image.Image, size: int, preprocess: str) -> Image.Image:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    ratio, resampling = RELEASED_PREPROCESS[preprocess]
    width, height = image.size
    if max(width, height) / min(width, height) * (ratio * size) ** 2 > MAX_PIXELS:
        raise SampleError(
            f"an image of {width}x{height} pixels is too long for {preprocess!r}, which makes its shorter side "
            f"{int(ratio * size)}; leave it out",
            "too many pixels",
        )
    return tv.resize(image, int(ratio * size), InterpolationMode(resampling.name.lower()))


def released_train_transform(image: Image.Image, size: int, rng: np.random.Generator) -> torch.Tensor:
    """`released_crop` as pixels. [3, size, size]"""
    return to_pixels(released_crop(image, size, rng))


def released_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """As "vae_val" of RELEASED_PREPROCESS, but the crop may lie anywhere."""
    image = _shorter_side(to_rgb(image), size, "vae_val")
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def pad_to_square(image: Image.Image, background: tuple[int, int, int] = VQA_BACKGROUND) -> Image.Image:
    """The image in the middle of a square of its longer side."""
    image, side = to_rgb(image), max(image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def padded_transform(image: Image.Image, size: int) -> torch.Tensor:
    """As the released chat does: padded to a square, resized bilinearly. [3, size, size]"""
    return to_pixels(pad_to_square(image).resize((size, size), Image.Resampling.BILINEAR))


def train_transform(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    min_area: float = 0.5,
    flip: bool = True,
) -> torch.Tensor:
    """Random resized crop of at least `min_area` of the image, mirrored half of the time. [3, size, size]

    Not for captions that tell left from right: pass `flip=False` there.
    """
    return to_pixels(random_crop(image, size, rng, min_area, flip))


def random_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    min_area: float = 0.5,
    flip: bool = True,
    full_size: tuple[int, int] | None = None,
) -> Image.Image:
    """`train_transform` as an image.

    full_size: of the image in its file, where it was decoded smaller; the crop shows the same part of it.
    """
    image = to_rgb(image)
    full_width, full_height = full_size or image.size
    left, top, right, bottom = random_box(full_width, full_height, rng, min_area)
    mirrored = flip and rng.random() < 0.5
    x, y = image.width / full_width, image.height / full_height
    image = _resize(image, size, (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height)))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def shrink_for_crop(
    width: int, height: int, size: int, rng: np.random.Generator, min_area: float = 0.5, surplus: float = DRAFT_SURPLUS
) -> int:
    """How much smaller (1, 2, 4 or 8 times) an image may be decoded so that the box which `random_crop` takes of it
    with an equal `rng` still has `surplus` x `size` pixels a side."""
    left, top, right, bottom = random_box(width, height, rng, min_area)
    ratio = min(right - left, bottom - top) / (surplus * size)
    return max((factor for factor in (2, 4, 8) if factor <= ratio), default=1)


def random_box(width: int, height: int, rng: np.random.Generator, min_area: float) -> Box:
    """A box of random area and aspect ratio (3:4 to 4:3); the largest centred square if ten tries do not fit."""
    for _ in range(10):
        area = rng.uniform(min_area, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width, box_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if box_width <= width and box_height <= height:
            left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
            return left, top, left + box_width, top + box_height
    return _centred_square(width, height)


def _centred_square(width: int, height: int) -> Box:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _resize(image: Image.Image, size: int, box: Box) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> float32 [3, H, W] in [-1, 1], without resizing."""
    array_HW3 = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(array_HW3.transpose(2, 0, 1)))


def to_levels(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> uint8 [B, 3, H, W]: a quarter of the pixels' memory until they are needed."""
    width, height = images[0].size
    levels_BHW3 = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for row, image in zip(levels_BHW3, images, strict=True):
        row[...] = np.asarray(image)
    return torch.from_numpy(levels_BHW3).permute(0, 3, 1, 2)


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], channels first in memory, equal to `to_pixels` bit for bit; floats as they are."""
    if images.dtype != torch.uint8:
        return images
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_pil(pixels: torch.Tensor, truncate: bool = False) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] (clamped) -> RGB image, rounded to the nearest of 256 values.

    `truncate`: to the next lower of them, as the released text-to-image scripts do.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"to_pil got pixels of shape {tuple(pixels.shape)}; expected one image [3, H, W]")
    pixels = pixels.detach().float().cpu().clamp(-1, 1)
    levels = ((pixels + 1) / 2 * 255).to(torch.uint8) if truncate else ((pixels + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
