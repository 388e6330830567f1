"""What is said about an image, and how it is read from and written to text and JSON."""

import json
from dataclasses import dataclass, field
from typing import Any

from unitok.core.errors import DataError
from unitok.data.captions import QA
from unitok.data.conversations import MARKS, Conversation, parse_conversations
from unitok.data.shapes import Scene, is_scene_dict, scene_from_dict


@dataclass
class Words:
    """What is said about an image. `meta` may hold "scene" (a `Scene`) and "geneval" (a prompt's metadata)."""

    captions: list[str] = field(default_factory=list)
    questions: list[QA] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


def parse_words(text: bytes | None, data: bytes | None, where: str) -> Words:
    """Words from a sample's txt (one caption a line) and json; DataError when one is malformed."""
    try:
        lines = text.decode("utf-8-sig").splitlines() if text else []
        words = words_from_json(load_json_object(data.decode("utf-8-sig"), where), where) if data else Words()
    except UnicodeDecodeError:
        raise DataError(f"{where}: text is not UTF-8") from None
    # A caption may stand in both files; it counts once.
    words.captions = list(dict.fromkeys([line.strip() for line in lines if line.strip()] + words.captions))
    return _without_marks(words, where)


def load_json_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object; DataError beginning with `where` when `text` is none."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise DataError(f"{where} is JSON nested too deeply to be read") from None
    if not isinstance(data, dict):
        raise DataError(f"{where} is a JSON {type(data).__name__}; expected an object")
    return data


def words_from_json(data: dict[str, Any], where: str) -> Words:
    """Words from a sample's JSON; keys that are not words become its meta."""
    several = data.get("captions", [])
    if not isinstance(several, list):
        raise DataError(f"{where}: captions is {str(several)[:80]!r}; expected a list of texts")
    # null and blank text are no caption, as an empty .txt is none
    captions = [item for item in (data.get("caption"), *several) if item is not None and item != ""]
    if not all(isinstance(item, str) for item in captions):
        raise DataError(f"{where}: captions are {str(captions)[:80]!r}; expected texts")
    captions = [item for item in captions if item.strip()]
    asked = data.get("questions", [])
    if not isinstance(asked, list):
        raise DataError(f"{where}: questions is {str(asked)[:80]!r}; expected a list")
    talks = parse_conversations(data["conversations"], where) if data.get("conversations") else []
    reserved = ("caption", "captions", "questions", "conversations", "image")
    meta = {key: value for key, value in data.items() if key not in reserved}
    if is_scene_dict(meta.get("scene")):  # the word is common: another data set may mean something else by it
        meta["scene"] = scene_from_dict(meta["scene"])
    return _without_marks(Words(list(captions), [_question(item, where) for item in asked], talks, meta), where)


def _without_marks(words: Words, where: str) -> Words:
    """DataError when captions or questions hold a mark: it would be read as an image that is not there."""
    texts = [*words.captions, *(text for item in words.questions for text in (item.question, item.answer))]
    for text in texts:
        for mark in MARKS:
            if mark in text:
                raise DataError(f"{where}: {text[:80]!r} holds {mark}, which stands for images; take it out")
    return words


def _question(item: Any, where: str) -> QA:
    names = ("type", "question", "answer")
    if not isinstance(item, dict) or not all(isinstance(item.get(name), str) and item[name] for name in names):
        raise DataError(
            f"{where}: a question is {str(item)[:80]!r}; expected an object of texts type, question, answer"
        )
    return QA(*(item[name] for name in names))


def words_to_json(words: Words) -> dict[str, Any]:
    """JSON-able form of words, which `words_from_json` reads back."""
    out = dict(words.meta)
    if isinstance(out.get("scene"), Scene):
        out["scene"] = out["scene"].to_dict()
    out["captions"] = words.captions
    out["questions"] = [question._asdict() for question in words.questions]
    out["conversations"] = [[turn._asdict() for turn in turns] for turns in words.conversations]
    return {key: value for key, value in out.items() if value or key not in ("captions", "questions", "conversations")}
