"""Pictures of benchmarks that are read when they are looked at.

lm-eval holds the pictures of all questions before it asks the first: decoded, those of VQAv2 would be 200 GB.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from unitok.core.errors import DataError
from unitok.data.transforms import decode_image, load_image


class LazyPicture:
    """Stands for a `PIL.Image.Image` to any model: everything that is asked of it is asked of the picture, which is
    decoded each time and not kept. `opened` gives it to those who ask for more than one thing."""

    def __init__(self, value: bytes | str, name: str) -> None:
        self._value, self._name = value, name

    @property
    def __class__(self) -> type:  # for `isinstance`
        return Image.Image

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.opened(), attribute)

    def __reduce__(self) -> tuple[type, tuple[bytes | str, str]]:  # ranks send each other what they have answered
        return LazyPicture, (self._value, self._name)

    def opened(self) -> Image.Image:
        """The picture; DataError where it is damaged."""
        return decode_image(self._value, self._name) if isinstance(self._value, bytes) else load_image(self._value)


def opened(picture: Image.Image) -> Image.Image:
    """The picture itself, decoded once."""
    return picture.opened() if type(picture) is LazyPicture else picture


def picture_of(value: Any, name: str) -> Image.Image:
    """A picture of a document: a picture, its bytes or its path. What is no image at all is a DataError here, also what
    is not there; what is cut off is one when it is looked at."""
    if isinstance(value, Image.Image):
        return value
    data = value.get("bytes") if isinstance(value, Mapping) else None
    path = value.get("path") if isinstance(value, Mapping) else value
    if not data and not isinstance(path, str):
        raise DataError(f"{name}: {str(value)[:60]!r} is no picture; expected the path of a file or its bytes")
    lazy = LazyPicture(data or path, name)
    try:
        with Image.open(io.BytesIO(data) if data else Path(path)):
            pass  # its first bytes say what it is
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError):
        lazy.opened()  # says what is wrong with it, or reads what PIL alone does not
    return lazy  # type: ignore[return-value]
