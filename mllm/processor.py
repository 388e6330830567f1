"""Text tokenizer and processor of the unified model: texts and images in, ids with expanded image placeholders out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from unitok.core.errors import CheckpointError, DataError, UserError
from unitok.core.pretrained import read_json
from unitok.data.conversations import BEGIN_IMAGE, END_IMAGE, IMAGE_MARK, Turn
from unitok.data.preprocess import PREPROCESS
from unitok.data.sentencepieces import load_sentencepiece
from unitok.data.transforms import eval_transform, load_image
from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.mllm.sequence import Sequence, SequenceBuilder, chat_template, pad_left

PROCESSOR_FILE = "processor_config.json"
TEXT_MODEL_FILE = "tokenizer.model"
_SPACE = "\u2581"  # sentencepiece's sign for a space
_LLAMA_TOKENIZERS = ("LlamaTokenizer", "LlamaTokenizerFast")


class UniTokTextTokenizer(SentencePieceBackend):
    """A transformers tokenizer straight on a sentencepiece file (`tokenizer.model`): own small models, Llama-2's.

    With `legacy=False` a space is put before the text alone; without, before every part of it between special tokens.
    """

    vocab_files_names = {"vocab_file": TEXT_MODEL_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        load_sentencepiece(Path(vocab_file))  # one clear error for a missing or damaged file
        defaults = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        super().__init__(vocab_file=vocab_file, **(defaults | kwargs))
        if kwargs.get("special_tokens_pattern") is not None:
            self.init_kwargs["special_tokens_pattern"] = kwargs["special_tokens_pattern"]  # saved with the rest

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Pieces of a text. Spaces at its beginning stay, each as it is."""
        if self.legacy or not text:
            return super().tokenize(text, **kwargs)
        pieces = super().tokenize(_SPACE + text.replace(_SPACE, " "), **kwargs)
        lone = len(pieces) > 1 and pieces[0] == _SPACE and pieces[1] in self.all_special_tokens
        return pieces[1:] if lone else pieces

    def _convert_id_to_token(self, index: int) -> str:
        """A backbone's vocabulary may be padded: rows that stand for no piece are no text."""
        return super()._convert_id_to_token(index) if index < self.sp_model.get_piece_size() else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces; those that are single bytes are put together to characters."""
        if any(self.sp_model.is_byte(self.sp_model.piece_to_id(piece)) for piece in tokens):
            return self.sp_model.decode_pieces(tokens).strip()
        return super().convert_tokens_to_string(tokens)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the image marks, for the model's configuration; UserError when the tokenizer lacks one of them."""
    names = {"begin_image_id": BEGIN_IMAGE, "end_image_id": END_IMAGE, "image_token_id": IMAGE_MARK}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    missing = [names[name] for name, index in ids.items() if index is None or index == tokenizer.unk_token_id]
    if missing:
        raise UserError(f"the text tokenizer has no tokens {', '.join(missing)}: add them before making the model")
    return ids


def load_text_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an export folder, of a backbone's folder or name on the hub, or of a released model.

    Llama's sentencepiece files are read as they are: transformers' own reader loses leading spaces and `legacy`.
    """
    config_file = Path(folder) / "tokenizer_config.json"
    settings = read_json(config_file) if config_file.is_file() else {}
    text_model = Path(folder) / TEXT_MODEL_FILE
    if settings.get("tokenizer_class") == UniTokTextTokenizer.__name__:
        if not text_model.is_file():
            raise CheckpointError(f"{folder}: has no {TEXT_MODEL_FILE}; copy it there from where the model came from")
        return UniTokTextTokenizer.from_pretrained(folder)
    if text_model.is_file() and settings.get("tokenizer_class", _LLAMA_TOKENIZERS[0]) in _LLAMA_TOKENIZERS:
        ends = [settings.get("add_bos_token", True), settings.get("add_eos_token", False)]
        pattern = "_".join(name for name, wanted in zip(("bos", "eos"), ends, strict=True) if wanted) or None
        padding = {} if settings.get("pad_token") is not None else {"pad_token": "<unk>"}
        return UniTokTextTokenizer.from_pretrained(folder, special_tokens_pattern=pattern, **padding)
    return AutoTokenizer.from_pretrained(folder)


class UniTokProcessor:
    """Chat template, layouts and image preprocessing of one model.

    `image_preprocess` of chat images, one of `unitok.data.preprocess.PREPROCESS`: that of the codes that the model was
    trained on; "padded" adds borders, as the released model expects. `truncate_pixels`: drawn images get the next lower
    of 256 values, as the released scripts save them.

    `processor(text, images)` expands every `<image>` of the text to what the chat layout puts there and returns
    `input_ids`, `attention_mask` (left-padded) and `pixels` `[I, 3, H, W]`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: UniTokMLLMConfig,
        image_size: int,
        image_preprocess: str = "plain",
        truncate_pixels: bool = False,
    ) -> None:
        if image_preprocess not in PREPROCESS:
            raise CheckpointError(f"image_preprocess={image_preprocess!r}: expected one of {', '.join(PREPROCESS)}")
        self.tokenizer, self.config = tokenizer, config
        self.image_size, self.image_preprocess, self.truncate_pixels = image_size, image_preprocess, truncate_pixels
        self.builder = SequenceBuilder(config, tokenizer)
        self.chat_template = chat_template(config)

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as text with `<image>` marks; `content` is a string or a list of typed parts."""
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def __call__(
        self,
        text: str | list[str],
        images: Image.Image | list[Image.Image] | None = None,
        return_tensors: str | None = "pt",
    ) -> dict[str, torch.Tensor]:
        if return_tensors not in ("pt", None):
            raise UserError(f"return_tensors={return_tensors!r}: this processor gives torch's tensors alone ('pt')")
        texts = [text] if isinstance(text, str) else text
        images = [images] if isinstance(images, Image.Image) else images
        marks = sum(one.count(IMAGE_MARK) for one in texts)
        if marks != len(images or []):
            raise DataError(f"{marks} {IMAGE_MARK} marks in the text, but {len(images or [])} images given")
        rows = [self._expand(one) for one in texts]
        input_ids, mask = pad_left(rows, self.tokenizer.pad_token_id)
        batch = {"input_ids": input_ids, "attention_mask": mask}
        return batch | ({"pixels": self.pixels(images)} if images else {})

    def _expand(self, text: str) -> list[int]:
        sequence, begin = Sequence(), self.tokenizer.bos_token
        if begin is not None and text.startswith(begin):  # what follows is a text that begins anew
            sequence.add([self.tokenizer.bos_token_id])
            text = text.removeprefix(begin)
        for position, piece in enumerate(text.split(IMAGE_MARK)):
            if position:
                self.builder.chat_image(sequence)
            sequence.add(self.tokenizer.encode(piece, add_special_tokens=False) if piece else [])
        return sequence.ids

    def pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """`[I, 3, H, W]` in [-1, 1] at the tokenizer's image size."""
        return torch.stack([eval_transform(image, self.image_size, self.image_preprocess) for image in images])

    def chat_prompt(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[Image.Image]]:
        """Ids of a conversation that ends with a user turn, and its images in order of appearance."""
        turns, images = split_messages(messages)
        return self.builder.chat(turns, prompt=True).ids, images

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of ids, as the text tokenizer gives it."""
        return self.tokenizer.decode(ids, **options)

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """The texts of rows of ids."""
        return self.tokenizer.batch_decode(ids, **options)

    def save_pretrained(self, folder: str | Path, **hub_options: Any) -> None:
        """Write what `from_pretrained` reads. A config.json that is there stays: it is the model's."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").is_file():
            self.config.save_pretrained(folder)
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(folder)
        settings = {
            "processor_class": type(self).__name__,
            "image_size": self.image_size,
            "image_preprocess": self.image_preprocess,
            "truncate_pixels": self.truncate_pixels,
        }
        (folder / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub_options: Any) -> "UniTokProcessor":
        """From an export folder; UserError when it is none. What `AutoProcessor` hands on besides (revision and the
        like) is about the hub and has no meaning here."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: not an export of the unified model (config.json is missing)")
        if not (folder / PROCESSOR_FILE).is_file():
            raise UserError(
                f"{folder}: not a whole export of the unified model ({PROCESSOR_FILE} is missing); a released model "
                f"must be converted with its {TEXT_MODEL_FILE} beside it"
            )
        settings = read_json(folder / PROCESSOR_FILE)
        image_size = settings.get("image_size")
        if type(image_size) is not int or image_size < 1:
            raise CheckpointError(f"{folder / PROCESSOR_FILE}: image_size is {image_size!r}, expected pixels of a side")
        config = UniTokMLLMConfig.from_pretrained(folder)
        more = {name: settings[name] for name in ("image_preprocess", "truncate_pixels") if name in settings}
        return cls(load_text_tokenizer(folder), config, image_size, **more)


def split_messages(messages: list[dict[str, Any]]) -> tuple[list[Turn], list[Image.Image]]:
    """Chat messages (string content, or parts of type "image" and "text") -> turns with `<image>` marks, and images.

    Images are PIL images or paths of files. The text of a leading "system" message begins the first user turn, as in
    training. Raises UserError for a message of another form.
    """
    turns: list[Turn] = []
    images: list[Image.Image] = []
    system = ""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f"message {number} is {str(message)[:80]!r}: expected a dict with role and content")
        text = _message_text(message["content"], images, number)
        if message["role"] == "system" and number == 0:
            system = text.strip() + "\n"
            continue
        turns.append(Turn(message["role"], system + text))
        system = ""
    return turns, images


def _message_text(content: Any, images: list[Image.Image], number: int) -> str:
    """The text of a message's content with marks for its images, which are added to `images`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UserError(f"message {number} has content {str(content)[:80]!r}: expected text or a list of parts")
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("image", "text"):
            raise UserError(f"message part of type {kind!r}: expected 'image' or 'text'")
        value = part.get(kind)
        if kind == "image" and isinstance(value, str | Path):
            value = load_image(value)
        if not isinstance(value, Image.Image if kind == "image" else str):
            wanted = "a PIL image or the path of a file" if kind == "image" else "a text"
            raise UserError(f"message {number} has a part of type {kind!r} with {str(value)[:80]!r}: expected {wanted}")
        if kind == "image":
            images.append(value)
        text += IMAGE_MARK + "\n" if kind == "image" else value
    return text
