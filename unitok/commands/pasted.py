"""Paths of pictures in a typed line, as terminals write them when a file is dragged into the window:
'quoted', "quoted", with back\\ slashes, or as file:// URL; several at once, and text around them."""

import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote, urlsplit

from unitok.core.errors import UserError
from unitok.data.decoding import IMAGE_EXTENSIONS, RARE_EXTENSIONS

_ENDINGS = tuple(f".{extension}" for extension in (*IMAGE_EXTENSIONS, *RARE_EXTENSIONS, "ico", "tga"))
# 'it'\''s.png' is how a quote within quotes is written.
_QUOTED = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*")(?:\\'(?:'[^']*')?)*""")
_WORD = re.compile(r"(?:\\.|\S)+")
_PUNCTUATION = "?!.,;:)"


def split_pictures(line: str) -> tuple[list[Path], str]:
    """The pictures that a line names, and the text around them (as it is where there is no picture).

    A word is a picture's path if there is such a file, or if it has a slash and ends like one. UserError for folders
    and URLs of other machines.
    """
    line = line.strip()
    if line.lower().endswith(_ENDINGS) and os.path.isfile(_from_home(line)):
        return [Path(_from_home(line))], ""  # spaces as they are
    pictures: list[Path] = []
    text, at = "", 0
    while at < len(line):
        word = ""
        for pattern in (_QUOTED, _WORD):
            match = pattern.match(line, at)
            word = match.group() if match else line[at]
            path = _path_of(word) if match else None
            if path is None and match and pattern is _WORD:  # at the end of a sentence
                word = word.rstrip(_PUNCTUATION) or word
                path = _path_of(word)
            if path is not None:
                pictures.append(path)
                break
        else:  # a word, or the space between words
            word = match.group() if match else line[at]
            text += word
        at += len(word)
    if not pictures:
        return [], line
    asks = any(character.isalnum() for character in text)  # else what stood between them
    return pictures, " ".join(text.split()) if asks else ""


def unquoted(text: str) -> str:
    """One path as a shell would read it; as it is where that is not one word."""
    words = _shell_words(text.strip())
    return _from_home(words[0] if len(words) == 1 else text.strip())


def _from_home(name: str) -> str:
    """With a home folder in place of ~, where there is one: Python looks for a user even of a name with a NUL."""
    return name if "\0" in name else os.path.expanduser(name)


def _path_of(word: str) -> Path | None:
    """The picture that one word names, or None: it is text."""
    if word.lower().startswith("file:"):
        try:
            parts = urlsplit(word)
        except ValueError as error:
            raise UserError(f"{word}: is no address of a file ({error})") from error
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{word}: a file of another machine; copy it to this one")
        return Path(unquote(parts.path)) if parts.path.startswith("/") else None
    words = _shell_words(word)
    if len(words) != 1:
        return None
    name = _from_home(words[0])
    ends_like_one, has_slash = name.lower().endswith(_ENDINGS), "/" in name
    if "://" in name and ends_like_one:
        raise UserError(f"{name}: pictures are files of this machine; download it first")
    if os.path.isfile(name) and (ends_like_one or has_slash):
        return Path(name)
    if len(name) > 1 and os.path.isabs(name) and os.path.isdir(name):
        raise UserError(f"{name}: is a folder; name the pictures in it")
    return Path(name) if ends_like_one and has_slash else None


def _shell_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quote that is not closed: an apostrophe
        return [text]
