"""What is said about an image, and how it is read from and written to text and JSON."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from unitok.data.bad import SampleError
from unitok.data.captions import QA
from unitok.data.conversations import MARKS, Conversation, parse_conversations
from unitok.data.shapes import Scene, is_scene_dict, scene_from_dict

MAX_TEXT = 2**16  # characters of a caption, a question or a turn; more is a whole document, or damage
MAX_BYTES = 2**24  # of a sample's txt or json
MAX_DEPTH = 200  # of lists and objects in a sample's json: deeper ones cannot be written again
_LINES = re.compile(r"\r\n|\n|\r")


@dataclass
class Words:
    """What is said about an image. `meta` may hold "scene" (a `Scene`) and "geneval" (a prompt's metadata)."""

    captions: list[str] = field(default_factory=list)
    questions: list[QA] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


def parse_words(text: bytes | None, data: bytes | None, where: str) -> Words:
    """Words from a sample's txt (one caption a line) and json; DataError when one is malformed."""
    lines = _LINES.split(text_of(text, where)) if text else []
    words = words_from_json(load_json_object(text_of(data, where), where), where) if data else Words()
    found = [line.strip() for line in lines if line.strip()]
    # A caption may stand in both files; it counts once. img2dataset's may have several lines, which belong together.
    if len(found) < 2 or " ".join(found).split() not in [caption.split() for caption in words.captions]:
        words.captions = list(dict.fromkeys(found + words.captions))
    return _checked(words, where)


def text_of(data: bytes, where: str) -> str:
    """UTF-8 text without a byte order mark; DataError beginning with `where` when it is none."""
    if len(data) > MAX_BYTES:
        raise SampleError(f"{where}: text of {len(data)} bytes; expected at most {MAX_BYTES}", "too long")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SampleError(f"{where}: text is not UTF-8", "not UTF-8") from None


def load_json_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object; DataError beginning with `where` when `text` is none."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise SampleError(f"{where} is not JSON ({error.msg} at character {error.pos})", "not JSON") from None
    except RecursionError:
        raise SampleError(f"{where} is JSON nested too deeply to be read", "not JSON") from None
    except ValueError as error:  # a number of thousands of digits
        raise SampleError(f"{where} is JSON that cannot be read ({str(error)[:80]})", "not JSON") from None
    if not isinstance(data, dict):
        raise SampleError(f"{where} is a JSON {type(data).__name__}; expected an object", "wrong type")
    return data


def words_from_json(data: dict[str, Any], where: str, has_image: bool = True, written: bool = False) -> Words:
    """Words from a sample's JSON; keys that are not words become its meta. null is as good as absent. A sample without
    an image has conversations alone. What `words_to_json` has `written` has a meta that can be written."""
    several = _list_of(data, "captions", where)
    # null and blank text are no caption, as an empty .txt is none
    captions = [item for item in (data.get("caption"), *several) if item is not None]
    if not all(isinstance(item, str) for item in captions):
        raise SampleError(f"{where}: captions are {str(captions)[:80]!r}; expected texts", "wrong type")
    captions = list(dict.fromkeys(item.strip() for item in captions if item.strip()))
    asked = [_question(item, where) for item in _list_of(data, "questions", where)]
    if not has_image and (captions or asked):
        raise SampleError(f"{where} has no image, but captions or questions, which are about one", "missing image")
    talks = parse_conversations(data["conversations"], where, has_image) if data.get("conversations") else []
    reserved = ("caption", "captions", "questions", "conversations", "image")
    meta = {key: value for key, value in data.items() if key not in reserved}
    if not written:
        _check_meta(meta, where)
    if is_scene_dict(meta.get("scene")):  # the word is common: another data set may mean something else by it
        meta["scene"] = scene_from_dict(meta["scene"])
    return _checked(Words(captions, asked, talks, meta), where)


def _list_of(data: dict[str, Any], name: str, where: str) -> list[Any]:
    value = data.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise SampleError(f"{where}: {name} is {str(value)[:80]!r}; expected a list", "wrong type")
    return value


def _checked(words: Words, where: str) -> Words:
    """SampleError when a text is damaged, or holds a mark, which would be read as an image that is not there."""
    marked = [*words.captions, *(text for item in words.questions for text in (item.question, item.answer))]
    turns = (turn.content for talk in words.conversations for turn in talk)
    texts = [*marked, *(item.type for item in words.questions), *turns]
    # all at once, because nearly all are right and training reads them in every epoch
    whole = " ".join(marked)
    has_mark = any(mark in whole for mark in MARKS)
    if not has_mark and _is_clean(" ".join(texts)) and max(map(len, texts), default=0) <= MAX_TEXT:
        return words
    for text in marked:
        for mark in MARKS:
            if mark in text:
                message = f"{where}: {text[:80]!r} holds {mark}, which stands for images; take it out"
                raise SampleError(message, "mark in text")
    for text in texts:
        if len(text) > MAX_TEXT:
            raise SampleError(f"{where}: a text of {len(text)} characters; expected at most {MAX_TEXT}", "too long")
        check_text(text, where)
    return words


def _is_clean(text: str) -> bool:
    return "\0" not in text and is_unicode(text)


def _check_meta(meta: dict[str, Any], where: str) -> None:
    """SampleError when a text in there, at any depth, could not be written again. Other fields are nobody's business,
    but they travel with the codes."""
    left: list[tuple[Any, int]] = [(meta, 1)]
    while left:
        value, depth = left.pop()
        if isinstance(value, str):
            check_unicode(value, where)
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise SampleError(f"{where} is JSON nested more than {MAX_DEPTH} deep", "not JSON")
            inside = [*value, *value.values()] if isinstance(value, dict) else value
            left.extend((item, depth + 1) for item in inside if isinstance(item, str | dict | list))


def check_text(text: str, where: str) -> None:
    """SampleError where `text` cannot be learnt from, whatever it says."""
    if "\0" in text:
        message = f"{where}: {text[:80]!r} holds a NUL character; is it UTF-16? Write it as UTF-8"
        raise SampleError(message, "not UTF-8")
    check_unicode(text, where)


def check_unicode(text: str, where: str) -> None:
    """SampleError where `text` holds half a surrogate pair, as JSON may; no file of UTF-8 could hold it."""
    if not is_unicode(text):
        raise SampleError(f"{where}: {ascii(text[:80])} holds half a surrogate pair; write it anew", "not UTF-8")


def is_unicode(text: str) -> bool:
    """Whether `text` can be encoded. Names of files that are not UTF-8 cannot, nor can some of JSON's escapes."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _question(item: Any, where: str) -> QA:
    values = [item.get(name) for name in ("type", "question", "answer")] if isinstance(item, dict) else []
    if set(map(type, values)) == {str} and all(values):
        return QA(*values)
    raise SampleError(
        f"{where}: a question is {str(item)[:80]!r}; expected an object of texts type, question, answer", "wrong type"
    )


def words_to_json(words: Words) -> dict[str, Any]:
    """JSON-able form of words, which `words_from_json` reads back."""
    out = dict(words.meta)
    if isinstance(out.get("scene"), Scene):
        out["scene"] = out["scene"].to_dict()
    out["captions"] = words.captions
    out["questions"] = [question._asdict() for question in words.questions]
    out["conversations"] = [[turn._asdict() for turn in turns] for turns in words.conversations]
    return {key: value for key, value in out.items() if value or key not in ("captions", "questions", "conversations")}
