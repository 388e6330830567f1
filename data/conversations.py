"""Conversations: turns of user and assistant, where `<image>` in a user's turn stands for the sample's image."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unitok.core.errors import DataError
from unitok.data.bad import SampleError
from unitok.data.paths import leads_out

IMAGE_MARK = "<image>"
BEGIN_IMAGE, END_IMAGE = "<boi>", "<eoi>"
MARKS = (IMAGE_MARK, BEGIN_IMAGE, END_IMAGE)  # pieces of the text tokenizer with a meaning of their own
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LOGGED_RECORDS = 10
_LOGGER = logging.getLogger(__name__)


class Turn(NamedTuple):
    """`role` is "user" or "assistant"."""

    role: str
    content: str


Conversation = list[Turn]


class ConversationError(SampleError):
    """A conversation that cannot be learnt from."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "conversation")


def parse_conversations(data: Any, where: str, has_image: bool = True) -> list[Conversation]:
    """Reads one conversation or a list of several, in LLaVA's (from, value) or the chat (role, content) form.

    Each is about one image; where it does not say where the image stands, it stands at the beginning. Or about none:
    such a one may begin in the middle, with an answer, which is left out, as LLaVA does with pieces of long ones.

    Raises:
        DataError: the form is unknown or a conversation cannot be learnt from; the message begins with `where`.
    """
    if not isinstance(data, list) or not data:
        raise ConversationError(f"{where}: conversations is {_short(data)}; expected a list of turns")
    several = data if isinstance(data[0], list) else [data]
    found = []
    for turns in several:
        conversation = _parse_turns(turns, where)
        marks = sum(turn.content.count(IMAGE_MARK) for turn in conversation)
        if not has_image and conversation[0].role == "assistant":
            conversation = conversation[1:]
        if has_image and marks == 0:
            conversation[0] = conversation[0]._replace(content=f"{IMAGE_MARK}\n{conversation[0].content}")
        validate_conversation(conversation, int(has_image), where)
        found.append(conversation)
    return found


def _parse_turns(data: Any, where: str) -> Conversation:
    if not isinstance(data, list) or not data:
        raise ConversationError(f"{where}: a conversation is {_short(data)}; expected a list of turns")
    turns, system = [], ""
    for number, item in enumerate(data):
        if not isinstance(item, dict):
            raise ConversationError(f"{where}: turn {number} is {_short(item)}; expected an object of role and content")
        role = _ROLES.get(str(item.get("from", item.get("role"))))
        content = item.get("value", item.get("content"))
        if role is None or not isinstance(content, str):
            raise ConversationError(
                f"{where}: turn {number} is {_short(item)}; expected role (user, assistant) and content, or from "
                "(human, gpt) and value"
            )
        if role == "system" and number == 0:
            system = content.strip() + "\n"
            continue
        turns.append(Turn(role, system + content))
        system = ""
    if not turns:
        raise ConversationError(f"{where}: a conversation holds a system turn only; expected a question and an answer")
    return turns


def validate_conversation(turns: Sequence[Turn], num_images: int, where: str = "conversation") -> None:
    """DataError unless user and assistant alternate, the assistant has the last word, no turn is empty, and the image
    marks stand in user turns and are as many as the images."""
    roles = [turn.role for turn in turns]
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or roles != expected:
        raise ConversationError(
            f"{where}: roles are {_short(roles)}; expected user, assistant in turn, ending with assistant"
        )
    for number, turn in enumerate(turns):
        if not turn.content.replace(IMAGE_MARK, "").strip() and not (turn.role == "user" and turn.content.strip()):
            raise ConversationError(f"{where}: turn {number} ({turn.role}) is empty; expected text")
        for mark in (BEGIN_IMAGE, END_IMAGE):
            if mark in turn.content:
                raise ConversationError(
                    f"{where}: turn {number} holds {mark}, which only the model's layout may set; take it out"
                )
        if turn.role == "assistant" and IMAGE_MARK in turn.content:
            raise ConversationError(
                f"{where}: turn {number} holds {IMAGE_MARK} in an answer; expected it in user turns only"
            )
    marks = sum(turn.content.count(IMAGE_MARK) for turn in turns)
    if marks != num_images:
        raise ConversationError(
            f"{where}: {marks} x {IMAGE_MARK} in the turns and {num_images} images; expected as many"
        )


def import_llava(json_path: Path | str, images: Path | str, out: Path | str) -> tuple[Path, int, int]:
    """Turns a LLaVA instruction file into `OUT/train.jsonl`, which `open_source` reads.

    Records without an image stay conversations without one. Those that cannot be learnt from are left out; the first
    few are logged.

    Args:
        json_path: LLaVA's list of {"id", "image"?, "conversations"}.
        images: the folder that the records' "image" is relative to.

    Returns:
        (the written file, records kept, records left out)

    Raises:
        DataError: the file cannot be read, no record is usable, there is no such folder or OUT/train.jsonl is there.
    """
    json_path, images, out = Path(json_path), Path(images), Path(out)
    if not images.is_dir():
        raise DataError(f"--images {images}: is no folder; give the one that the records' image paths start from")
    if (out / "train.jsonl").exists():
        raise DataError(f"{out / 'train.jsonl'} exists already; give a new folder or delete it")
    records = _load_llava(json_path)
    lines, dropped = [], 0
    for number, record in enumerate(records):
        where = f"{json_path}: record {number}"
        try:
            lines.append(json.dumps(_convert_llava(record, images, out, where, number)))
        except DataError as error:
            dropped += 1
            if dropped <= _LOGGED_RECORDS:
                _LOGGER.warning("left out: %s", error)
    if not lines:
        raise DataError(f"{json_path}: none of {len(records)} records is usable; check --images {images}")
    out.mkdir(parents=True, exist_ok=True)
    target = out / "train.jsonl"
    temporary = out / "train.jsonl.tmp"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(temporary, target)
    return target, len(lines), dropped


def _load_llava(json_path: Path) -> list[Any]:
    try:
        records = json.loads(json_path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{json_path} cannot be read as JSON ({type(error).__name__}); give a LLaVA .json") from None
    if not isinstance(records, list):
        raise DataError(f"{json_path} holds {_short(records)}; expected a list of records with conversations")
    return records


def _convert_llava(record: Any, images: Path, out: Path, where: str, number: int) -> dict[str, Any]:
    if not isinstance(record, dict) or "conversations" not in record:
        raise DataError(f"{where} is {_short(record)}; expected an object with conversations")
    name, place = record.get("image"), {}
    if name is not None:
        if not isinstance(name, str):
            raise DataError(f"{where}: image is {_short(name)}; expected a path")
        if leads_out(name):
            raise DataError(f"{where}: image {_short(name)} leads out of the folder {images}; give a path inside it")
        path = images / name
        if not path.is_file():
            raise DataError(f"{where}: image {path} does not exist")
        place = {"image": os.path.relpath(path, out)}
    conversations = parse_conversations(record["conversations"], where, has_image=name is not None)
    return {
        "id": str(record.get("id", number)),
        **place,
        "conversations": [turn._asdict() for turn in conversations[0]],
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
