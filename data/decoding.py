"""Bytes of image files -> upright RGB images, whatever is in them: other modes, other endings, damage, size."""

import io
import struct
import threading
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from unitok.core.errors import UserError
from unitok.data.bad import SampleError, is_of_the_file, patiently
from unitok.data.urls import is_url

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
RARE_EXTENSIONS = ("gif", "bmp", "tif", "tiff", "avif", "jfif", "jpe", "jp2", "ppm", "pgm")  # read as well
MAX_PIXELS = 2**28  # 16384 x 16384: 0.8 GB while it is decoded
# By content, not by ending. Formats that run programs (EPS) or draw (WMF) are not among them.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "MPO", "ICO", "TGA")
# What PIL raises on broken files, beside OSError (which UnidentifiedImageError is).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_pil_limit = threading.Lock()

Shrink = Callable[[int, int], int]  # width and height of an upright image -> how much smaller it may be decoded


class Decoded(NamedTuple):
    """An upright RGB image, and the width and height that it has in its file."""

    image: Image.Image
    full_size: tuple[int, int]


def read_file(path: Path | str) -> bytes:
    """The bytes of an image file; SampleError naming it when it is missing or no file, OSError when the disk fails."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(None, "it is not a file")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        if isinstance(error, OSError) and not is_of_the_file(error):
            raise
        reason = getattr(error, "strerror", None) or error
        message = f"cannot read image {str(path)!r}: {reason}; give an existing image file"
        raise SampleError(message, "missing image") from None


def load_image(path: Path | str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image file as RGB; UserError naming the file when it is missing or not an image."""
    if is_url(str(path)):
        raise UserError(f"{path}: images are read from files; fetch it first")
    return decode_image(patiently(lambda: read_file(path), lambda: "an image"), str(path), max_pixels)


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image file's bytes as RGB: upright by its EXIF tag, transparency laid over white, the first frame.

    Raises:
        UserError: the bytes are not an image, or one of more than `max_pixels`; the message begins with `name`.
    """
    return decode(data, name, max_pixels).image


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS, shrink: Shrink | None = None) -> Decoded:
    """As `decode_image`.

    shrink: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster, but never smaller than this allows.
    """
    try:
        with _open(data) as file:
            if file.width * file.height > max_pixels:
                raise SampleError(
                    f"{name} has {file.width}x{file.height} pixels, more than max_pixels={max_pixels}; leave it out, "
                    "make it smaller or raise max_pixels",
                    "too many pixels",
                )
            return _load(file, shrink)
    except SampleError:
        raise
    except _DECODE_ERRORS as error:
        message = f"{name} is not a readable image ({type(error).__name__}); give a png, jpg or webp"
        raise SampleError(message, "unreadable image") from None


def _open(data: bytes) -> Image.Image:
    """Only headers are read here. PIL's own limit of pixels, one for all programs, gives way to ours."""
    with _pil_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = before


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _load(file: Image.Image, shrink: Shrink | None) -> Decoded:
    full_size = None
    if shrink is not None and file.format in ("JPEG", "MPO"):
        width, height = file.size
        full_size = (height, width) if _orientation(file) >= 5 else (width, height)
        factor = shrink(*full_size)
        # it takes the largest of 1, 2, 4 and 8 that leaves at least so many pixels
        file.draft(None, (max(1, width // factor), max(1, height // factor)))
    file.load()
    image = to_rgb(file)
    turned = _orientation(file)  # after loading: TIFF and AVIF are turned by it
    if turned != 1:
        image = image.transpose(_UPRIGHT[turned])
    elif image is file and file.format not in ("JPEG", "PNG"):
        image = file.copy()  # such as a film, which would be read on
    return Decoded(image, full_size or image.size)


def _orientation(file: Image.Image) -> int:
    """The EXIF tag that says how the image is turned; 1, upright, where there is none or it cannot be read."""
    try:
        value = file.getexif().get(_ORIENTATION, 1)
    except _DECODE_ERRORS:
        return 1  # as all viewers do: damage of a note about the camera does not make the picture bad
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; what is transparent becomes white, and 16 bits become 8. ValueError for floating point, and for
    the 32 bits that TIFF has."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ValueError("an image of floating point numbers has no range of its own; convert it to 8 or 16 bits")
    if image.mode == "I" and image.format == "TIFF":  # of PGM and PNG that mode holds 16 bits
        raise ValueError("an image of 32-bit or signed numbers has no range of its own; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # PIL would cut everything above 255
        values = np.asarray(image, dtype=np.float64)
        grey = np.where(values == image.info.get("transparency"), 65535, values) / 257
        return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
