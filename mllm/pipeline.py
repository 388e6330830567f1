"""Everything a user needs from one export folder: pictures from text, and conversations about pictures."""

import logging
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unitok.core.errors import UserError
from unitok.core.pretrained import check_model_folder, load_model_folder
from unitok.data.conversations import IMAGE_MARK
from unitok.data.transforms import to_pil
from unitok.mllm.model import UniTokMLLM, check_same_codes
from unitok.mllm.processor import UniTokProcessor, split_messages
from unitok.mllm.sequence import pad_left
from unitok.tokenizer import UniTok

_LOGGER = logging.getLogger(__name__)
TOKENIZER_FOLDER = "visual_tokenizer"


class UniTokPipeline:
    """Model, processor and visual tokenizer of an export folder. The tokenizer is loaded on first use and frozen."""

    def __init__(self, model: UniTokMLLM, processor: UniTokProcessor, tokenizer: UniTok | Path) -> None:
        self.model, self.processor = model.eval(), processor
        self._tokenizer_source, self._tokenizer = tokenizer, None

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> "UniTokPipeline":
        """From an export folder; UserError when the folder is missing or something else."""
        folder = Path(path)
        check_model_folder(folder, UniTokMLLM.config_class.model_type)
        if not (folder / TOKENIZER_FOLDER / "config.json").is_file():
            raise UserError(f"{folder}: not an export of the unified model (no {TOKENIZER_FOLDER}/config.json in it)")
        processor = UniTokProcessor.from_pretrained(folder)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_model_folder(UniTokMLLM, folder).to(device)
        return cls(model, processor, folder / TOKENIZER_FOLDER)

    @classmethod
    def from_official(
        cls, path: str | Path, tokenizer: str | Path | UniTok, device: str | torch.device | None = None
    ) -> "UniTokPipeline":
        """From the released model's folder and its visual tokenizer, a released file or a UniTok folder."""
        from unitok.mllm.official import official_processor

        model = UniTokMLLM.from_official(path, tokenizer=tokenizer)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model.to(device), official_processor(Path(path), model), model.visual_tokenizer)

    @property
    def tokenizer(self) -> UniTok:
        """The visual tokenizer, checked against the model's code sizes."""
        if self._tokenizer is None:
            source = self._tokenizer_source
            tokenizer = load_model_folder(UniTok, source) if isinstance(source, Path) else source
            check_same_codes(self.model, tokenizer)
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
        seed: int | Sequence[int] = 0,
        batch_size: int = 32,
    ) -> list[Image.Image]:
        """One PIL image per prompt.

        `seed`: one number (image i gets seed + i) or one per prompt; the same prompt and seed give the same image
        whatever the batch. Sampler settings default to the export's generation_config.json.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not isinstance(seed, Integral | Sequence):
            raise UserError(f"seed={seed!r}: expected a whole number, or a list of one per prompt")
        seeds = [int(seed) + i for i in range(len(prompts))] if isinstance(seed, Integral) else list(seed)
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed, or one per prompt")
        given = {
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "depth_temperature": depth_temperature,
        }
        settings = self.image_sampler | {name: value for name, value in given.items() if value is not None}
        images: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            codes = self._generate_batch(
                prompts[start : start + batch_size], seeds[start : start + batch_size], settings
            )
            images += [to_pil(pixels) for pixels in self.tokenizer.decode(codes)]
        return images

    def _generate_batch(self, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]) -> torch.Tensor:
        builder = self.processor.builder
        rows = [builder.text_to_image_prompt(prompt) for prompt in prompts]
        self._check_prompts(rows, prompts, self.model.config.num_image_positions)
        if settings["guidance_scale"] > 1:
            rows += [builder.text_to_image_prompt("", unconditional=True)] * len(prompts)
        input_ids, mask = pad_left(rows, self.processor.tokenizer.pad_token_id)
        device = self.model.device
        return self.model.generate_codes(input_ids.to(device), mask.to(device), seeds=seeds, **settings)

    def _check_prompts(self, rows: Sequence[Sequence[int]], texts: Sequence[Any], new: int) -> None:
        """UserError when a prompt and its `new` ids do not fit the backbone; a warning when one has unknown words."""
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        for row, text in zip(rows, texts, strict=True):
            if limit is not None and len(row) + new > limit:
                raise UserError(
                    f"a prompt of {len(row)} ids and {new} new ones: the backbone reads {limit}; shorten the prompt"
                )
            if self.processor.tokenizer.unk_token_id in row:
                _LOGGER.warning(
                    "%.200r has characters that the text tokenizer does not know; they are read as unknown", text
                )

    @torch.no_grad()
    def chat(self, messages: list[dict[str, Any]], max_new_tokens: int = 128, **generate: Any) -> str:
        """The assistant's answer to a conversation that ends with a user message."""
        return self.chat_batch([messages], max_new_tokens, **generate)[0]

    @torch.no_grad()
    def chat_batch(
        self, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int = 128, **generate: Any
    ) -> list[str]:
        """Answers to several conversations at once; greedy unless `do_sample=True` and friends are given."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: expected at least 1")
        prompts, images = [], []
        for messages in conversations:
            turns, own = split_messages(messages)
            if not turns or not turns[-1].content.strip():
                raise UserError("empty question: say what you want to know")
            marks = sum(turn.content.count(IMAGE_MARK) for turn in turns)
            if marks != len(own):
                raise UserError(f"{marks} x {IMAGE_MARK} in a conversation with {len(own)} images: expected as many")
            prompts.append(self.processor.builder.chat(turns, prompt=True).ids)
            images += own
        tokenizer = self.processor.tokenizer
        self._check_prompts(prompts, [messages[-1]["content"] for messages in conversations], max_new_tokens)
        input_ids, mask = pad_left(prompts, tokenizer.pad_token_id)
        device = self.model.device
        codes = self.tokenizer.encode(self.processor.pixels(images).to(device)) if images else None
        output = self.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            codes=codes,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **({"do_sample": False, "temperature": None, "top_k": None, "top_p": None} | generate),
        )
        answers = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str], batch_size: int = 64) -> list[str]:
        """Short answers to one question about each image."""
        answers: list[str] = []
        for start in range(0, len(questions), batch_size):
            pairs = zip(images[start : start + batch_size], questions[start : start + batch_size], strict=True)
            conversations = [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
                for image, question in pairs
            ]
            answers += self.chat_batch(conversations, max_new_tokens=16)
        return answers

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, processor and visual tokenizer into one export folder."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(Path(folder) / TOKENIZER_FOLDER)
