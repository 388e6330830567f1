"""From what clients send to what the pipeline takes. Images come as data URLs only: nothing is fetched or opened."""

import base64
import binascii
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, UnidentifiedImageError

from unitok.core.errors import UserError
from unitok.data.conversations import MARKS
from unitok.data.transforms import decode_image, eval_transform, reduced
from unitok.serve.errors import bad
from unitok.serve.schemas import AnyMessage, ImagePart
from unitok.serve.settings import ServeSettings

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SCANS = 100  # of a JPEG: each goes over all of its pixels, and costs its sender a few bytes
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # within a scan FF is followed by 00 or D0 to D7
_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"
_WITHOUT_LENGTH = (b"\x01", b"\xd8")
_DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+);base64,", re.ASCII)
# What PIL raises for a file whose header it cannot read, beside OSError.
_HEADER_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError)


@dataclass(frozen=True)
class Views:
    """How a model sees pictures: its size, and how those of chats and those of the tokenizer are brought to it."""

    size: int
    chat: str
    own: str

    def seen(self, image: Image.Image) -> Image.Image:
        """The picture as chats see it: a large one is not kept while its request waits."""
        return reduced(image, self.size, self.chat)

    def pixels(self, image: Image.Image) -> "torch.Tensor":
        """The picture as the visual tokenizer's own evaluation sees it, `[3, H, W]`."""
        return eval_transform(image, self.size, self.own)


def unpacked(
    urls: Mapping[str, str], settings: ServeSettings, go_on: Callable[[], None], seen: Callable[[Image.Image], T]
) -> list[T]:
    """`seen(picture)` of each data URL; ApiError 400 for anything else, and for too many pixels before one is unpacked.

    `urls` by their place in the request, for messages. `go_on` is called before each picture, and may raise.
    """
    files, total = [], 0
    for param, url in urls.items():
        go_on()
        data, pixels = _file_of(url, param, settings)
        files.append((param, data))
        total += pixels
        if total > settings.max_total_pixels:
            raise bad(
                "image_too_large",
                f"{param}: with it the pictures have {total} pixels; expected at most {settings.max_total_pixels} in a "
                "request; scale them down or leave some out",
                param,
            )
    images = []
    for param, data in files:
        go_on()
        try:
            images.append(seen(decode_image(data, param)))
        except UserError as error:
            raise bad("invalid_image", str(error), param) from None
    return images


def _file_of(url: str, param: str, settings: ServeSettings) -> tuple[bytes, int]:
    """The file of a data URL and its number of pixels; ApiError 400 for anything else."""
    head = _DATA_URL.match(url)
    if head is None:
        shown = url[:40].encode("ascii", "backslashreplace").decode()
        raise bad(
            "invalid_image_url",
            f"{param}: {shown!r} is not a data URL; send the picture itself as data:image/png;base64,... (addresses "
            "and files of the server are never read)",
            param,
        )
    if head["kind"].lower() not in ("image/png", "image/jpeg", "image/jpg", "image/webp"):
        raise bad(
            "unsupported_image", f"{param}: {head['kind'][:60]}: expected image/png, image/jpeg or image/webp", param
        )
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad("invalid_base64", f"{param}: the data URL is not base64", param) from None
    size = _size_of(data, param)
    if size is None or size[0] * size[1] > settings.max_pixels:
        shown = "far too many" if size is None else f"{size[0]} x {size[1]}"
        expected = f"expected at most {settings.max_pixels} in all; scale it down"
        raise bad("image_too_large", f"{param}: {shown} pixels; {expected}", param)
    return data, size[0] * size[1]


def _size_of(data: bytes, param: str) -> tuple[int, int] | None:
    """Width and height as the file's head says; None where PIL refuses so many pixels itself."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.format in ("JPEG", "MPO") and count_scans(data) > MAX_SCANS:
                raise bad("invalid_image", f"{param}: a jpeg of more than {MAX_SCANS} scans; save it anew", param)
            return file.size
    except Image.DecompressionBombError:
        return None
    except _HEADER_ERRORS:
        raise bad("invalid_image", f"{param}: not a readable png, jpeg or webp", param) from None


def count_scans(data: bytes) -> int:
    """Scans of a JPEG, as decoders find them: from marker to marker, what stands between segments passed over, until
    its end (behind which phones put a film)."""
    count, place = 0, 2
    while (found := _MARKER.search(data, place)) and found[1] != _END_OF_IMAGE:
        count += found[1] == _SCAN
        place = found.end()
        if found[1] not in _WITHOUT_LENGTH:
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
    return count


def check_conversation(messages: list[AnyMessage], settings: ServeSettings) -> None:
    """ApiError 400 for what cannot be asked; pictures are counted only."""
    _check_roles([message.role for message in messages])
    texts, urls = 0, 0
    for number, message in enumerate(messages):
        content = message.content or ""
        parts = [] if isinstance(content, str) else content
        words = content if isinstance(content, str) else "".join(p.text for p in parts if p.type == "text")
        images = [part for part in parts if isinstance(part, ImagePart)]
        check_text(words, f"messages.{number}.content")
        if images and message.role != "user":
            raise bad("invalid_message", f"messages.{number}: images stand in user messages only", "messages")
        if not words.strip() and message.role != "assistant" and (not images or number == len(messages) - 1):
            raise bad("empty_message", f"messages.{number}: has no text; say what you want to know", "messages")
        texts, urls = texts + len(words), urls + len(images)
    if texts > settings.max_prompt_chars:
        raise bad(
            "context_length_exceeded",
            f"the messages have {texts} characters; expected at most {settings.max_prompt_chars}; shorten them",
            "messages",
        )
    if urls > settings.max_images:
        raise bad(
            "too_many_images",
            f"{urls} images in the conversation; expected at most {settings.max_images}; leave out earlier ones, or "
            "begin a new conversation",
            "messages",
        )


def check_text(text: str, param: str) -> None:
    """ApiError 400 for text that would be read as the model's own signs."""
    found = [mark for mark in MARKS if mark in text]
    if found:
        raise bad(
            "reserved_text", f"{param}: holds {found[0]}, which only the model's layout may set; take it out", param
        )


def _check_roles(roles: list[str]) -> None:
    turns = roles[1:] if roles[0] in ("system", "developer") else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)] or turns[-1] != "user":
        shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise bad(
            "invalid_message",
            f"the roles are {shown}; expected an optional system message, then user and assistant in turn, with a user "
            "message at the end",
            "messages",
        )


def image_urls(messages: list[AnyMessage]) -> dict[str, str]:
    """The URLs of the pictures, by their place in the request."""
    return {
        f"messages.{number}.content.{place}.image_url": part.image_url.url
        for number, message in enumerate(messages)
        for place, part in enumerate(message.content or ())
        if isinstance(part, ImagePart)
    }


def pipeline_messages(messages: list[AnyMessage], images: Mapping[str, Image.Image]) -> list[dict[str, Any]]:
    """Messages as the pipeline takes them, with `images` by the places of `image_urls`."""
    made = []
    for number, message in enumerate(messages):
        content: Any = message.content or ""
        if not isinstance(content, str):
            content = [
                {"type": "text", "text": part.text}
                if not isinstance(part, ImagePart)
                else {"type": "image", "image": images[f"messages.{number}.content.{place}.image_url"]}
                for place, part in enumerate(content)
            ]
        made.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    return made


def png(image: Image.Image, record: str | None = None) -> str:
    """The picture as PNG in base64; `record`: a text that tells how it was made."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    if record is not None:
        info.add_text("unitok", record)
    image.save(buffer, format="PNG", pnginfo=info)
    return base64.b64encode(buffer.getvalue()).decode()
