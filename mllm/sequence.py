"""The one place where sequences are laid out, for training and for prompting alike.

    text to image   bos  text suffix  boi  <img> * L  eoi eos          learnt: boi, the image's codes, eoi, eos
    caption         bos  boi  <img> * L  eoi  text  eos                learnt: text, eos
    plain           bos  <img> * L  text newline                       learnt: text, newline
    text            bos  text  eos                                     learnt: all
    chat            bos  system  (user_prefix content assistant_prefix  answer eos) ...     learnt: answer, eos

A prompt is the beginning of the training sequence up to the first learnt id (text to image: boi included, because
whoever asks for an image has already decided on one). Text is tokenized piece by piece: a piece ends where an image, a
special id or a learnt part begins, so that prompt and training agree id for id. The turn after an answer is tokenized
as it stands behind the answer's end, where some tokenizers put no space.

What is longer than a builder's limits is cut: a caption that is to be drawn before the image, other captions at the end
(their own end is then not learnt), a conversation behind the last answer that fits whole.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from unitok.core.errors import DataError, UserError
from unitok.data.bad import SampleError
from unitok.data.conversations import IMAGE_MARK, Turn
from unitok.mllm.configuration import IGNORE, UniTokMLLMConfig

_KEPT_TEXTS = 4096  # those that come again: system prompts, suffixes, common questions. Captions are too many to keep


class TextTokenizer(Protocol):
    """What a layout needs of a transformers tokenizer."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str
    eos_token_id: int
    pad_token_id: int

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass
class Sequence:
    """Ids and labels of equal length (IGNORE where nothing is learnt); one flag per image: are its codes learnt?

    `is_cut`: it was too long, and something of it is missing.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    learn_image: list[bool] = field(default_factory=list)
    is_cut: bool = False

    def add(self, ids: SequenceOf[int], learn: bool = False) -> "Sequence":
        self.ids += ids  # a copy, so `ids` may be kept
        self.labels += ids if learn else [IGNORE] * len(ids)
        return self

    def cut(self, length: int) -> "Sequence":
        """Leave out what stands behind the first `length` ids, if anything does."""
        if len(self.ids) > length:
            self.ids, self.labels, self.is_cut = self.ids[:length], self.labels[:length], True
        return self


class TooLongError(DataError):
    """Even cut, nothing of a sample would be learnt."""

    def __init__(self, length: int | None, what: str) -> None:
        super().__init__(f"too long: {what} do not fit into data.max_length={length}; raise it or take the sample out")


class SequenceBuilder:
    """Builds sequences for one model configuration and its text tokenizer.

    Args:
        max_length: ids of a training sequence. max_caption: of them before an image that is drawn. None: any number.
            TooLongError for a sample that these leave nothing to be learnt of.

    Raises UserError when the configuration lacks the special ids.
    """

    def __init__(
        self,
        config: UniTokMLLMConfig,
        tokenizer: TextTokenizer,
        max_length: int | None = None,
        max_caption: int | None = None,
    ) -> None:
        self.max_length, self.max_caption = max_length, max_caption
        for name in ("begin_image_id", "end_image_id", "image_token_id"):
            if getattr(config, name) is None:
                raise UserError(f"{name} is not set: special ids come from the text tokenizer the model was made with")
        self.config, self.tokenizer = config, tokenizer
        self._cache: dict[tuple[str, bool], list[int]] = {}
        # read once: attributes of configurations and tokenizers are slow, and every sample of a training needs these
        self._begin_image, self._end_image = config.begin_image_id, config.end_image_id
        self._image_ids = [config.image_token_id] * config.num_image_positions
        self._marks = {config.begin_image_id, config.end_image_id, config.image_token_id}
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._eos, self._ends = tokenizer.eos_token_id, [t for t in (tokenizer.bos_token, tokenizer.eos_token) if t]
        # Between prefix and answer stands a space: that which sentencepiece puts before every text, or one of our own
        word = self._encode("a")
        self._space = "" if self._encode("a a")[-len(word) :] == word else " "

    def text_to_image(self, caption: str, unconditional: bool = False) -> Sequence:
        """Training sequence; `unconditional` replaces the text (the share that classifier-free guidance needs)."""
        sequence = self._start().add(self._text(self._instruction(self._own(caption), unconditional)))
        limits = [] if self.max_caption is None else [self.max_caption]
        if self.max_length is not None:
            limits.append(self.max_length - len(self._image_ids) - 3)  # boi, eoi, eos
        if limits:
            if min(limits) < 2:
                raise TooLongError(self.max_length, "an image and a word before it")
            sequence.cut(min(limits))
        self._image(sequence.add([self._begin_image], learn=True), learn=True)
        return sequence.add([self._end_image, self._eos], learn=True)

    def text_to_image_prompt(self, caption: str, unconditional: bool = False) -> list[int]:
        """Ids up to and with the begin-of-image id."""
        if not unconditional and not caption.strip():
            raise UserError("empty prompt: say what the image should show")
        return self._start().add(self._text(self._instruction(caption, unconditional))).ids + [self._begin_image]

    def caption(self, caption: str) -> Sequence:
        """Image to text, as in pre-training."""
        sequence = self._image(self._start().add([self._begin_image]), learn=False).add([self._end_image])
        sequence.add(self._text(self._own(caption)), learn=True).add([self._eos], learn=True)
        return self._fitted(sequence)

    def plain(self, caption: str) -> Sequence:
        """Image to text as LLaVA aligns with: a conversation of nothing but the image and the caption."""
        return self._fitted(
            self._image(self._start(), learn=False).add(self._text(self._own(caption) + "\n"), learn=True)
        )

    def text(self, text: str, max_length: int, part: int = 0) -> Sequence:
        """A document without images, of at most `max_length` ids; of a longer one part number `part`, counted anew
        behind the last. `eos` ends the last part only. Documents are not kept in memory as other texts are."""
        ids = [*self._encode(self._own(text)), self._eos]
        size = max_length - len(self._bos)
        first = part % -(-len(ids) // size) * size
        return Sequence().add([*self._bos, *ids[first : first + size]], learn=True)

    def chat(self, turns: SequenceOf[Turn], prompt: bool = False) -> Sequence:
        """A conversation of user and assistant turns in alternation.

        As a `prompt` it ends with a user turn and the assistant's prefix; else with an answer. Answers are learnt.
        """
        if not turns or turns[0].role != "user" or (turns[-1].role == "user") != prompt:
            roles = [turn.role for turn in turns]
            raise DataError(
                f"a conversation of roles {roles}: expected user and assistant in turn, "
                f"{'ending with the user' if prompt else 'ending with the assistant'}"
            )
        sequence, own = self._start(), str if prompt else self._own  # nothing is learnt from a prompt
        answered: list[tuple[int, int]] = []  # ids and images up to the end of each answer
        text = self.config.system_prompt
        for index, turn in enumerate(turns):
            if turn.role != ("assistant" if index % 2 else "user"):
                raise DataError(f"turn {index} is by {turn.role!r}: user and assistant must alternate")
            if turn.role == "user":
                pieces = (text + self.config.user_prefix + own(turn.content)).split(IMAGE_MARK)
                pieces[-1] += self.config.assistant_prefix
                for position, piece in enumerate(pieces):
                    if position > 0:
                        self.chat_image(sequence)
                    sequence.add(self._text(piece, after_end=index > 0 and position == 0))
                text = ""
            elif IMAGE_MARK in turn.content:
                raise DataError(f"turn {index} holds {IMAGE_MARK} in an answer: images stand in user turns only")
            else:
                sequence.add(self._text(self._space + own(turn.content)), learn=True).add([self._eos], learn=True)
                answered.append((len(sequence.ids), len(sequence.learn_image)))
        return sequence if prompt else self._fitted(sequence, answered)

    def chat_image(self, sequence: Sequence) -> None:
        """Add an image as it stands in a conversation: placeholders, between the two marks if the layout has them."""
        if self.config.chat_image_marks:
            sequence.add([self._begin_image])
        self._image(sequence, learn=False)
        if self.config.chat_image_marks:
            sequence.add([self._end_image])

    def _fitted(self, sequence: Sequence, ends: SequenceOf[tuple[int, int]] = ()) -> Sequence:
        """`sequence`, cut to `max_length`: behind the last of `ends` (ids, images) that fits, anywhere if none does."""
        if self.max_length is None or len(sequence.ids) <= self.max_length:
            return sequence
        whole = [end for end in ends if end[0] <= self.max_length]
        length, images = whole[-1] if whole else (self.max_length, ends[0][1] if ends else len(sequence.learn_image))
        sequence.cut(length).learn_image = sequence.learn_image[:images]
        if all(label == IGNORE for label in sequence.labels):
            raise TooLongError(self.max_length, "image, question and an id of what is learnt")
        return sequence

    def _instruction(self, caption: str, unconditional: bool) -> str:
        return self.config.unconditional_text if unconditional else caption + self.config.instruction_suffix

    def _own(self, text: str) -> str:
        """A text that is not the layout's, as it is; SampleError if it holds what the tokenizer would read as the begin
        or the end of it all (in an answer it would be learnt as its end)."""
        for token in self._ends:
            if token in text:
                message = f"the text {text[:80]!r} holds {token!r}, by which a sequence begins or ends; take it out"
                raise SampleError(message, "mark in text")
        return text

    def _start(self) -> Sequence:
        return Sequence().add(self._bos)

    def _text(self, text: str, after_end: bool = False) -> list[int]:
        ids = self._cache.pop((text, after_end), None)
        if ids is None:
            ids = self._encode(text, after_end)
        self._cache[text, after_end] = ids  # the last used stand last
        if len(self._cache) > _KEPT_TEXTS:
            self._cache.pop(next(iter(self._cache)))
        return ids

    def _encode(self, text: str, after_end: bool = False) -> list[int]:
        """Ids of a text that begins anew, or (`after_end`) that stands right behind an answer's end."""
        before = self.tokenizer.eos_token if after_end and text else ""
        ids = list(self.tokenizer.encode(before + text, add_special_tokens=False)) if text else []
        if before and ids.pop(0) != self._eos:
            raise UserError(f"the text tokenizer does not read its own end {before!r} as one id; give another backbone")
        if not self._marks.isdisjoint(ids):
            raise DataError(f"the text {text[:80]!r} holds a mark that stands for images; take it out")
        return ids

    def _image(self, sequence: Sequence, learn: bool) -> Sequence:
        sequence.learn_image.append(learn)
        return sequence.add(self._image_ids)


def chat_template(config: UniTokMLLMConfig) -> str:
    """The chat layout as a jinja template, for `apply_chat_template` (a rendered text, image marks included)."""
    literals: dict[str, Any] = {
        "system": config.system_prompt,
        "user": config.user_prefix,
        "assistant": config.assistant_prefix,
        "mark": IMAGE_MARK + "\n",  # as `split_messages` writes an image part
    }
    quoted = {name: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'" for name, text in literals.items()}
    template = (
        "{{ bos_token }}{{ @system }}{% set ns = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' and loop.first %}{% set ns.system = message['content'] | trim + '\n' %}"
        "{% elif message['role'] == 'user' %}{{ @user }}{{ ns.system }}{% set ns.system = '' %}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ @mark }}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% if not loop.last or add_generation_prompt %}{{ @assistant }}{% endif %}"
        "{% elif message['role'] != 'assistant' %}"
        "{{ raise_exception('roles are user and assistant, after one system') }}"
        "{% else %}{{ ' ' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{{ message['content'][0]['text'] }}{% endif %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    for name, text in quoted.items():
        template = template.replace(f"@{name}", text)
    return template


def pad_right(sequences: SequenceOf[Sequence], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels`, each `[B, T]`."""
    longest = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE)
    mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        input_ids[row, :length] = torch.tensor(sequence.ids)
        labels[row, :length] = torch.tensor(sequence.labels)
        mask[row, :length] = 1
    return input_ids, mask, labels


def pack_right(
    sequences: SequenceOf[Sequence], rows: SequenceOf[SequenceOf[int]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed `input_ids`, `position_ids`, `labels`, each `[B, T]`: row r holds the sequences `rows[r]`, end to end.

    Positions count from 0 in every sequence. Padding has position 0 throughout, so that it is nobody's continuation.
    What a sequence begins with has no label: it would be learnt from the end of the one before.
    """
    longest = max(sum(len(sequences[number].ids) for number in row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    labels, position_ids = torch.full_like(input_ids, IGNORE), torch.zeros_like(input_ids)
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            length = len(sequences[number].ids)
            place = slice(start, start + length)
            input_ids[row, place] = torch.tensor(sequences[number].ids)
            labels[row, place] = torch.tensor(sequences[number].labels)
            position_ids[row, place] = torch.arange(length)
            labels[row, start] = IGNORE
            start += length
    return input_ids, position_ids, labels


def pad_left(prompts: SequenceOf[SequenceOf[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-padded `input_ids` and `attention_mask` `[B, T]` for generation."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return input_ids, mask
