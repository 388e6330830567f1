"""Answers to several conversations at once, each with its own settings, each coming piece by piece.

B conversations (rows), V text vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from unitok.core.rng import torch_rng
from unitok.mllm.chat import Prompt, TextRows, TextSampling
from unitok.mllm.model import UniTokMLLM
from unitok.mllm.session import answer_text

_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of ids that are pushed one by one: what `unitok.mllm.session.text_deltas` gives, and `stop` strings.

    White space and incomplete characters are held back until something follows them, and so is an end that could be
    the beginning of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [one for one in stop if one]
        self.ids: list[int] = []
        self.shown, self.stopped = "", False
        self._special = set(tokenizer.all_special_ids)
        self._in_bytes = False

    def push(self, new: int) -> str:
        """The characters that are complete with this id."""
        self.ids.append(new)
        if new not in self._special:
            piece = str(self.tokenizer.convert_ids_to_tokens(new))
            self._in_bytes = len(piece) == 6 and piece.startswith("<0x")  # a byte of a character without a piece
        text = self._cut(answer_text(self.tokenizer, self.ids))
        if self.stopped:
            return self._show(text)
        if self._in_bytes:
            return ""
        text = text.rstrip(_INCOMPLETE)
        for one in self.stop:
            held = next((size for size in range(len(one) - 1, 0, -1) if text.endswith(one[:size])), 0)
            text = text[: len(text) - held]
        return self._show(text.rstrip())

    def end(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._show(self._cut(answer_text(self.tokenizer, self.ids)))

    def _cut(self, text: str) -> str:
        places = [place for one in self.stop if (place := text.find(one)) >= 0]
        if not places:
            return text
        self.stopped = True
        return text[: min(places)].rstrip()

    def _show(self, text: str) -> str:
        new = text[len(self.shown) :]
        self.shown = text if new else self.shown
        return new


@dataclass
class Row:
    """One answer: what is asked, how, and where its pieces go.

    `emit(delta)` is called in the thread of the model; `wanted()` says whether somebody still waits for the answer.
    """

    prompt: Prompt
    stream: TextStream
    sampling: TextSampling
    seed: int
    max_new_tokens: int
    emit: Callable[[str], None]
    wanted: Callable[[], bool]
    finish_reason: str | None = field(default=None)  # None: left before its end

    def take(self, new: int, eos_id: int | None) -> bool:
        """Add an id; whether the answer goes on."""
        if new == eos_id:
            self.finish_reason = "stop"
        else:
            self._emit(self.stream.push(new))
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif len(self.stream.ids) >= self.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self._emit(self.stream.end())
        return self.finish_reason is None

    def _emit(self, delta: str) -> None:
        if delta:
            self.emit(delta)


@torch.no_grad()
def answer_rows(model: UniTokMLLM, rows: Sequence[Row], eos_id: int | None, pad_id: int) -> None:
    """Decode all rows together until each has ended or is not wanted any more.

    An answer depends on its own prompt, settings and seed alone, as with `generate_answers`.
    """
    generators = {id(row): torch_rng("answer", row.seed, device=model.device) for row in rows}
    held = TextRows(model, room=max(row.max_new_tokens for row in rows))
    logits_BV = held.start([row.prompt for row in rows], pad_id)
    live = list(rows)
    while True:
        ids = _choose(logits_BV, live, generators)
        going = [
            i for i, (row, new) in enumerate(zip(live, ids, strict=True)) if row.wanted() and row.take(new, eos_id)
        ]
        if not going:
            return
        if len(going) < len(live):
            held.select(going)
            live, ids = [live[i] for i in going], [ids[i] for i in going]
        logits_BV = held.feed(torch.tensor(ids, device=model.device).unsqueeze(1))


def _choose(logits_BV: torch.Tensor, rows: Sequence[Row], generators: dict[int, torch.Generator]) -> list[int]:
    """The next id of every row; rows of equal settings are drawn together."""
    chosen = [0] * len(rows)
    for sampling in {row.sampling for row in rows}:
        places = [i for i, row in enumerate(rows) if row.sampling == sampling]
        ids = sampling.choose(logits_BV[places], [generators[id(rows[i])] for i in places])
        for place, new in zip(places, ids.tolist(), strict=True):
            chosen[place] = new
    return chosen
