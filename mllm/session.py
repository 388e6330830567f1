"""Conversations as people hold them: text that comes as it is written, turns that build on what was kept."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from unitok.data.decoding import load_image
from unitok.mllm.chat import KeptConversation

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline

_INCOMPLETE = "\ufffd"  # what decoding gives for a character of which not all bytes have come
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a piece that is one byte of a character that has no piece


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer's ids, without special tokens and outer white space."""
    # Cleaning up spaces would change text before the newest id, which may have been shown already.
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def text_deltas(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` in pieces, each as soon as its characters are complete; together they are `answer_text`.

    White space is held back until something follows it. So is a run of byte pieces: some tokenizers read it as a whole,
    and a byte that fits no character also changes those before it.
    """
    seen: list[int] = []
    special = set(tokenizer.all_special_ids)
    shown = text = ""
    in_bytes = False
    for new in ids:
        seen.append(new)
        text = answer_text(tokenizer, seen)
        if new not in special:  # left out of the text, so that a run goes on behind it
            in_bytes = _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(new))) is not None
        complete = text.rstrip(_INCOMPLETE).rstrip()
        if not in_bytes and len(complete) > len(shown):
            yield complete[len(shown) :]
            shown = complete
    if text != shown:
        yield text[len(shown) :]


class ChatSession:
    """A conversation over several turns: `pipeline.new_session()`.

    Ids of earlier turns stay in the backbone's cache, so that a turn costs only what is new in it. `messages` may be
    read, and also changed: what follows a change is then read anew.
    """

    def __init__(self, pipeline: "UniTokPipeline") -> None:
        self.pipeline, self.messages = pipeline, list[dict[str, Any]]()
        self.kept = KeptConversation(pipeline.model)

    def reset(self) -> None:
        """Begin a new conversation."""
        self.messages.clear()
        self.kept.reset()

    def ask(self, question: str, images: Sequence[Image.Image | str | Path] = (), **options: Any) -> str:
        """The answer to the next user turn, whose `images` stand before its text; options as `stream_chat` has them.

        Raises UserError, and forgets the turn, when it cannot be asked.
        """
        return "".join(self.stream(question, images, **options))

    def stream(self, question: str, images: Sequence[Image.Image | str | Path] = (), **options: Any) -> Iterator[str]:
        """As `ask`, but the answer comes in pieces. When it is left before its end, what has come stays its text."""
        # Pictures, not paths: a file may change or go while the conversation is about what it was.
        images = [images] if isinstance(images, str | Path | Image.Image) else images
        opened = [load_image(image) if isinstance(image, str | Path) else image for image in images]
        parts = [{"type": "image", "image": image} for image in opened]
        turn = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        answer, complete = "", False
        try:
            for delta in self.pipeline.stream_chat([*self.messages, turn], kept=self.kept, **options):
                answer += delta
                yield delta
            complete = True
        finally:
            if answer or complete:
                self.messages += [turn, {"role": "assistant", "content": answer}]
