"""From what clients send to what the pipeline takes. Images come as data URLs only: nothing is fetched or opened."""

import base64
import binascii
import io
import re
from collections.abc import Callable
from typing import Any

from PIL import Image, UnidentifiedImageError

from unitok.core.errors import UserError
from unitok.data.conversations import MARKS
from unitok.data.transforms import decode_image
from unitok.serve.errors import bad
from unitok.serve.schemas import ImagePart, Message
from unitok.serve.settings import ServeSettings

FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+);base64,", re.ASCII)
# What PIL raises for a file whose header it cannot read, beside OSError.
_HEADER_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError)


def image_of(url: str, param: str, settings: ServeSettings) -> Image.Image:
    """The picture of a data URL as RGB; ApiError 400 for anything else, before its pixels are unpacked."""
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
    try:
        return decode_image(data, param)
    except UserError as error:
        raise bad("invalid_image", str(error), param) from None


def _size_of(data: bytes, param: str) -> tuple[int, int] | None:
    """Width and height as the file's head says; None where PIL refuses so many pixels itself."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            return file.size
    except Image.DecompressionBombError:
        return None
    except _HEADER_ERRORS:
        raise bad("invalid_image", f"{param}: not a readable png, jpeg or webp", param) from None


def conversation_of(
    messages: list[Message], settings: ServeSettings, seen: Callable[[Image.Image], Image.Image]
) -> list[dict[str, Any]]:
    """Messages as the pipeline takes them, with PIL images after `seen`; ApiError 400 for what cannot be asked."""
    _check_roles([message.role for message in messages])
    texts, urls = 0, 0
    for number, message in enumerate(messages):
        parts = [] if isinstance(message.content, str) else message.content
        words = (
            message.content if isinstance(message.content, str) else "".join(p.text for p in parts if p.type == "text")
        )
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
        raise bad("too_many_images", f"{urls} images; expected at most {settings.max_images}", "messages")
    return [_pipeline_message(number, message, settings, seen) for number, message in enumerate(messages)]


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


def _pipeline_message(
    number: int, message: Message, settings: ServeSettings, seen: Callable[[Image.Image], Image.Image]
) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for place, part in enumerate(message.content):
        if isinstance(part, ImagePart):
            param = f"messages.{number}.content.{place}.image_url"
            parts.append({"type": "image", "image": seen(image_of(part.image_url.url, param, settings))})
        else:
            parts.append({"type": "text", "text": part.text})
    return {"role": role, "content": parts}


def png(image: Image.Image, record: str | None = None) -> str:
    """The picture as PNG in base64; `record`: a text that tells how it was made."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    if record is not None:
        info.add_text("unitok", record)
    image.save(buffer, format="PNG", pnginfo=info)
    return base64.b64encode(buffer.getvalue()).decode()
