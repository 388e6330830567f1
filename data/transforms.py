"""Between PIL images and pixels: float32 [3, H, W] in [-1, 1], channels first."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from unitok.core.errors import UserError

# What the released code does before its tokenizer: the shorter side becomes int(ratio * size), then a centre crop.
RELEASED_PREPROCESS = {
    "inference": (1.125, Image.Resampling.BILINEAR),  # its reconstruction script
    "vae_val": (1.125, Image.Resampling.LANCZOS),  # reconstruction measures (rFID) during training
    "clip_val": (1.0, Image.Resampling.BICUBIC),  # zero-shot classification
}
VQA_BACKGROUND = (122, 116, 104)  # what the released chat pads images with: CLIP's mean colour
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
# What PIL raises on broken or oversized files, beside OSError (which UnidentifiedImageError is).
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def load_image(path: Path | str) -> Image.Image:
    """Reads an image file as RGB; UserError naming the file when it is missing or not an image."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read image {str(path)!r}: {reason}; give an existing image file") from None
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decodes an image file's bytes as RGB: upright by its EXIF tag, transparency laid over white.

    Raises:
        UserError: the bytes are not an image; the message begins with `name`.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            return to_rgb(ImageOps.exif_transpose(file))
    except _DECODE_ERRORS as error:
        raise UserError(f"{name} is not a readable image ({type(error).__name__}); give a png, jpg or webp") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; what is transparent becomes white, and 16 bits become 8. ValueError for floating point."""
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("an image of floating point numbers has no range of its own; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # PIL would cut everything above 255
        grey = np.asarray(image, dtype=np.float64) / 257
        return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def eval_transform(image: Image.Image, size: int, preprocess: str = "plain") -> torch.Tensor:
    """Shorter side to `size`, centre crop; an image of that size is not touched. [3, size, size]

    `preprocess` names one of RELEASED_PREPROCESS instead, for the numbers of the released tokenizer.
    """
    image = to_rgb(image)
    if preprocess != "plain":
        return _released(image, size, preprocess)
    width, height = image.size
    if (width, height) != (size, size):
        # The crop is taken in the source, in one resampling, so that no side is rounded.
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        image = _resize(image, size, (left, top, left + side, top + side))
    return to_pixels(image)


def _released(image: Image.Image, size: int, preprocess: str) -> torch.Tensor:
    from torchvision.transforms import functional as tv

    if preprocess not in RELEASED_PREPROCESS:
        known = ", ".join(("plain", *RELEASED_PREPROCESS))
        raise UserError(f"preprocess={preprocess!r}: expected one of {known}")
    return tv.to_tensor(tv.center_crop(_shorter_side(image, size, preprocess), size)) * 2 - 1


def _shorter_side(image: Image.Image, size: int, preprocess: str) -> Image.Image:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    ratio, resampling = RELEASED_PREPROCESS[preprocess]
    return tv.resize(image, int(ratio * size), InterpolationMode(resampling.name.lower()))


def released_train_transform(image: Image.Image, size: int, rng: np.random.Generator) -> torch.Tensor:
    """As "vae_val" of RELEASED_PREPROCESS, but the crop may lie anywhere. [3, size, size]"""
    image = _shorter_side(to_rgb(image), size, "vae_val")
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return to_pixels(image.crop((left, top, left + size, top + size)))


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
    image = to_rgb(image)
    box = _random_box(*image.size, rng, min_area)
    mirrored = flip and rng.random() < 0.5
    pixels = to_pixels(_resize(image, size, box))
    return pixels.flip(-1) if mirrored else pixels


def _random_box(
    width: int, height: int, rng: np.random.Generator, min_area: float
) -> tuple[float, float, float, float]:
    """A box of random area and aspect ratio (3:4 to 4:3); the largest centred square if ten tries do not fit."""
    for _ in range(10):
        area = rng.uniform(min_area, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        box_width, box_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if box_width <= width and box_height <= height:
            left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
            return left, top, left + box_width, top + box_height
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _resize(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> float32 [3, H, W] in [-1, 1], without resizing."""
    array_HW3 = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(array_HW3.transpose(2, 0, 1)))


def to_pil(pixels: torch.Tensor, truncate: bool = False) -> Image.Image:
    """Pixels [3, H, W] in [-1, 1] (clamped) -> RGB image, rounded to the nearest of 256 values.

    `truncate`: to the next lower of them, as the released text-to-image scripts do.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"to_pil got pixels of shape {tuple(pixels.shape)}; expected one image [3, H, W]")
    pixels = pixels.detach().float().cpu().clamp(-1, 1)
    levels = ((pixels + 1) / 2 * 255).to(torch.uint8) if truncate else ((pixels + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
