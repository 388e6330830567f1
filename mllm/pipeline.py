"""Everything a user needs from one export folder: pictures from text, and conversations about pictures."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unitok.core.distributed import inference_device
from unitok.core.errors import ContextError, UserError
from unitok.core.pretrained import check_model_folder, load_model_folder
from unitok.core.texts import check_unicode
from unitok.data.conversations import IMAGE_MARK
from unitok.data.transforms import to_pil
from unitok.mllm.chat import KeptConversation, Prompt, TextSampling, generate_answers
from unitok.mllm.model import UniTokMLLM, check_same_codes
from unitok.mllm.processor import UniTokProcessor, split_messages
from unitok.mllm.quantize import WeightKind, quantize_weights
from unitok.mllm.sequence import pad_left
from unitok.mllm.session import ChatSession, answer_text, text_deltas
from unitok.tokenizer import UniTok

_LOGGER = logging.getLogger(__name__)
TOKENIZER_FOLDER = "visual_tokenizer"
Seeds = int | Sequence[int] | torch.Tensor  # or a numpy array


def check_export(folder: Path) -> None:
    """UserError unless it looks like a whole export of the unified model; weights are not read."""
    check_model_folder(folder, UniTokMLLM.config_class.model_type)
    if not (folder / TOKENIZER_FOLDER / "config.json").is_file():
        raise UserError(
            f"{folder}: not a whole export of the unified model (no {TOKENIZER_FOLDER}/config.json in it); a "
            "released model must be converted with --tokenizer"
        )


class UniTokPipeline:
    """Model, processor and visual tokenizer of an export folder. The tokenizer is loaded on first use and frozen.

    `image_cache_size`: of how many pictures of conversations the codes are kept.
    """

    def __init__(
        self, model: UniTokMLLM, processor: UniTokProcessor, tokenizer: UniTok | Path, image_cache_size: int = 256
    ) -> None:
        self.model, self.processor, self.image_cache_size = model.eval(), processor, image_cache_size
        self._tokenizer_source, self._tokenizer = tokenizer, None
        self._image_codes: dict[bytes, torch.Tensor] = {}  # by hash, the longest unused first

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        weights: WeightKind | None = None,
    ) -> "UniTokPipeline":
        """From an export folder; UserError when the folder is missing or something else.

        `dtype` of the unified model (the visual tokenizer computes in fp32); `weights`: see `quantize_weights`.
        """
        folder = Path(path)
        check_export(folder)
        processor = UniTokProcessor.from_pretrained(folder)
        model = load_model_folder(UniTokMLLM, folder, dtype=dtype).to(device or inference_device())
        if weights is not None:
            quantize_weights(model, weights)
        return cls(model, processor, folder / TOKENIZER_FOLDER)

    @classmethod
    def from_official(
        cls, path: str | Path, tokenizer: str | Path | UniTok, device: str | torch.device | None = None
    ) -> "UniTokPipeline":
        """From the released model's folder and its visual tokenizer, a released file or a UniTok folder."""
        from unitok.mllm.official import official_processor

        model = UniTokMLLM.from_official(path, tokenizer=tokenizer)
        processor = official_processor(Path(path), model)
        return cls(model.to(device or inference_device()), processor, model.visual_tokenizer)

    @property
    def tokenizer(self) -> UniTok:
        """The visual tokenizer, checked against the model's code sizes."""
        if self._tokenizer is None:
            source = self._tokenizer_source
            tokenizer = source
            if isinstance(source, Path):  # also where its weights are stored in half as many bits
                tokenizer = load_model_folder(UniTok, source, dtype=torch.float32)
            check_same_codes(self.model, tokenizer)
            if self.processor.image_size != tokenizer.config.image_size:
                raise UserError(
                    f"image_size={self.processor.image_size} of the processor, but the visual tokenizer reads "
                    f"{tokenizer.config.image_size}; mend processor_config.json"
                )
            self._tokenizer = tokenizer.to(self.model.device).eval().requires_grad_(False)
        return self._tokenizer

    @property
    def image_sampler(self) -> dict[str, Any]:
        """Sampler settings of the export (`image_sampler` in generation_config.json)."""
        neutral = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return neutral | getattr(self.model.generation_config, "image_sampler", {})

    @torch.no_grad()
    def generate_images(
        self,
        prompts: str | Sequence[str],
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        depth_temperature: float | None = None,
        do_sample: bool | None = None,
        seed: Seeds = 0,
        batch_size: int = 32,
        on_position: Callable[[int, int], None] | None = None,
        graph: bool | None = None,
    ) -> list[Image.Image]:
        """One PIL image per prompt.

        `seed`: one number (image i gets seed + i) or one per prompt; the same prompt and seed give the same image
        whatever the batch, but for rounding (see `generate_codes` and `decode`). Sampler settings default to the
        export's generation_config.json; `do_sample=False` takes the likeliest codes, whatever the seed. `on_position`
        is called after each image position of a batch, with how many are done of how many. `graph`: see
        `generate_codes`; False on a GPU saves the minute of compiling where only a few images are made.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: expected at least 1")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = seeds_of(seed, len(prompts), "prompts")
        given = {
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "depth_temperature": depth_temperature,
            "do_sample": do_sample,
        }
        settings = self.image_sampler | {name: value for name, value in given.items() if value is not None}
        images: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            codes = self.sample_codes(prompts[part], seeds[part], settings, on_position, graph)
            images += [self.picture(pixels) for pixels in self.decode(codes)]
        return images

    def decode(self, codes_BKL: torch.Tensor) -> torch.Tensor:
        """Pixels `[B, 3, H, W]` of codes. On a CPU one image at a time: rounding does not depend on the batch then. On
        a GPU, where that would cost most of its speed, a pixel may differ by one grey level."""
        at_once = 1 if codes_BKL.device.type == "cpu" else max(1, len(codes_BKL))
        return torch.cat([self.tokenizer.decode(part) for part in codes_BKL.split(at_once)])

    def picture(self, pixels: torch.Tensor) -> Image.Image:
        """A drawn image of its pixels `[3, H, W]`."""
        return to_pil(pixels, truncate=self.processor.truncate_pixels)

    def sample_codes(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: dict[str, Any],
        on_position: Callable[[int, int], None] | None = None,
        graph: bool | None = None,
    ) -> torch.Tensor:
        """Codes `[B, K, L]` of one batch of prompts, with settings of `generate_codes`."""
        for prompt in prompts:
            check_unicode(prompt, "prompt")
        builder = self.processor.builder
        rows = [builder.text_to_image_prompt(prompt) for prompt in prompts]
        self._check_prompts(rows, prompts, self.model.config.num_image_positions)
        if settings["guidance_scale"] > 1:
            rows += [builder.text_to_image_prompt("", unconditional=True)] * len(prompts)
        input_ids, mask = pad_left(rows, self.processor.tokenizer.pad_token_id)
        device = self.model.device
        return self.model.generate_codes(
            input_ids.to(device), mask.to(device), seeds=seeds, on_position=on_position, graph=graph, **settings
        )

    def _check_prompts(self, rows: Sequence[Sequence[int]], texts: Sequence[Any], new: int) -> None:
        """ContextError when a prompt and its `new` ids do not fit the backbone; a warning when its text (of a
        conversation: the last turn) has unknown words."""
        limit = self.model.config.context_length
        for row, text in zip(rows, texts, strict=True):
            if limit is not None and len(row) + new > limit:
                raise ContextError(
                    f"a prompt of {len(row)} ids and {new} new ones: the backbone reads {limit}; give a shorter prompt "
                    "or ask for fewer ids"
                )
            tokenizer = self.processor.tokenizer
            if tokenizer.unk_token_id in row:
                words = text if isinstance(text, str) else " ".join(part.get("text", "") for part in text)
                if tokenizer.unk_token_id in tokenizer(words, add_special_tokens=False)["input_ids"]:
                    _LOGGER.warning(
                        "%.200r has characters that the text tokenizer does not know; they are read as unknown", words
                    )

    def chat(self, messages: list[dict[str, Any]], max_new_tokens: int = 128, seed: int = 0, **sampling: Any) -> str:
        """The assistant's answer to a conversation that ends with a user message; see `chat_batch`."""
        return self.chat_batch([messages], max_new_tokens, seed=seed, **sampling)[0]

    @torch.no_grad()
    def chat_batch(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        max_new_tokens: int = 128,
        seed: Seeds = 0,
        batch_size: int = 32,
        **sampling: Any,
    ) -> list[str]:
        """Answers to several conversations, `batch_size` of them decoded together.

        `sampling`: `do_sample`, `temperature`, `top_k`, `top_p` of `TextSampling`; without them the likeliest answer.
        `seed`: one number (conversation i gets seed + i) or one each. An answer does not depend on the others.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: expected at least 1")
        rule, seeds = TextSampling(**sampling), seeds_of(seed, len(conversations), "conversations")
        answers: list[str] = []
        for start in range(0, len(conversations), batch_size):
            prompts = self._chat_prompts(conversations[start : start + batch_size], max_new_tokens)
            answers += [
                answer_text(self.processor.tokenizer, ids)
                for ids in generate_answers(
                    self.model,
                    prompts,
                    self.processor.tokenizer.eos_token_id,
                    self.processor.tokenizer.pad_token_id,
                    max_new_tokens,
                    rule,
                    seeds[start : start + batch_size],
                )
            ]
        return answers

    def stream_chat(
        self,
        messages: list[dict[str, Any]],
        max_new_tokens: int = 128,
        seed: int = 0,
        kept: KeptConversation | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The answer in pieces, as soon as their characters are complete; together they are what `chat` returns.

        `kept`: a conversation whose beginning is in the backbone's cache (see `new_session`). Errors come when the
        first piece is asked for.
        """
        rule = TextSampling(**sampling)
        (prompt,) = self._chat_prompts([messages], max_new_tokens)
        kept = kept or KeptConversation(self.model)
        ids = kept.answer(prompt, self.processor.tokenizer.eos_token_id, max_new_tokens, rule, seed)
        yield from text_deltas(self.processor.tokenizer, ids)

    def new_session(self) -> ChatSession:
        """A conversation over several turns, whose earlier turns stay in the backbone's cache."""
        return ChatSession(self)

    def _chat_prompts(self, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int) -> list[Prompt]:
        """Ids and codes of each conversation; UserError when one cannot be asked."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: expected at least 1")
        rows, images = [], []
        for messages in conversations:
            turns, own = split_messages(messages)
            if not turns or not turns[-1].content.strip():
                raise UserError("empty question: say what you want to know")
            for turn in turns:
                check_unicode(turn.content, turn.role)
            marks = sum(turn.content.count(IMAGE_MARK) for turn in turns)
            if marks != len(own):
                raise UserError(f"{marks} x {IMAGE_MARK} in a conversation with {len(own)} images: expected as many")
            rows.append(self.processor.builder.chat(turns, prompt=True).ids)
            images.append(own)
        self._check_prompts(rows, [messages[-1]["content"] for messages in conversations], max_new_tokens)
        codes = self.image_codes([image for own in images for image in own])
        prompts = []
        for ids, own in zip(rows, images, strict=True):
            prompts.append(Prompt(ids, torch.stack(codes[: len(own)]) if own else None))
            codes = codes[len(own) :]
        return prompts

    @torch.no_grad()
    def image_codes(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """Codes `[K, L]` (or latents `[C, L]`) of every image. Those of the last `image_cache_size` different pictures
        are kept, by a hash of the pixels that the visual tokenizer sees."""
        if not images:
            return []
        pixels_I3HW = self.processor.pixels(list(images))
        keys = [hashlib.sha256(pixels.numpy().tobytes()).digest() for pixels in pixels_I3HW]
        known = {key: self._image_codes.pop(key) for key in dict.fromkeys(keys) if key in self._image_codes}
        new = {key: index for index, key in enumerate(keys) if key not in known}
        if new:
            codes_NKL = self._read(pixels_I3HW[list(new.values())].to(self.model.device))
            known |= dict(zip(new, codes_NKL, strict=True))
        self._image_codes |= known  # the newest stand last
        for key in list(self._image_codes)[: max(0, len(self._image_codes) - self.image_cache_size)]:
            del self._image_codes[key]
        return [known[key] for key in keys]

    def _read(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the model takes for pixels `[I, 3, H, W]`: codes `[I, K, L]`, or latents `[I, C, L]`."""
        if self.model.config.visual_input == "continuous":
            return self.tokenizer.latents(pixels).transpose(1, 2)
        return self.tokenizer.encode(pixels)

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], batch_size: int = 64) -> list[str]:
        """Short answers to one question about each image."""
        if len(images) != len(questions):
            raise UserError(f"{len(questions)} questions about {len(images)} images: give one for each")
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image, question in zip(images, questions, strict=True)
        ]
        return self.chat_batch(conversations, max_new_tokens=16, batch_size=batch_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, processor and visual tokenizer into one export folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(Path(folder) / TOKENIZER_FOLDER)


def seeds_of(seed: Seeds, count: int, what: str) -> list[int]:
    """One seed each: those given, or `seed` and the numbers after it."""
    given = seed.tolist() if hasattr(seed, "tolist") else seed  # tensors and arrays
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    if not all(isinstance(one, Integral) for one in (given if listed else [given])):
        raise UserError(f"seed={str(seed)[:80]}: expected a whole number, or a list of one for each of the {what}")
    seeds = [int(one) for one in given] if listed else [int(given) + i for i in range(count)]
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} {what}: give one seed, or one for each")
    return seeds
