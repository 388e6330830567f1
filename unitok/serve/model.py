"""What the service asks of a pipeline: batches of conversations, of pictures, of reconstructions.

Everything here runs in the one thread that owns the model. Events of a job are (kind, value): see each function.
"""

import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from unitok.core.errors import ContextError, UserError
from unitok.data.transforms import to_pil
from unitok.mllm.chat import TextSampling
from unitok.mllm.pipeline import UniTokPipeline
from unitok.serve.answers import Row, TextStream, answer_rows
from unitok.serve.content import Views, png
from unitok.serve.errors import ApiError, bad
from unitok.serve.jobs import ChatJob, ImageJob, Job, ReconstructJob


class _NobodyWaitsError(Exception):
    """All clients of a batch of pictures have gone."""


class ServedModel:
    """A pipeline as the service uses it, in this process. At most `max_batch` conversations or pictures go through it
    together, also where one request asks for more."""

    def __init__(self, pipeline: UniTokPipeline, max_batch: int = 16) -> None:
        self.pipeline, self.max_batch = pipeline, max_batch
        self.tokenizer = pipeline.tokenizer  # loaded now, and not within somebody's request
        sizes, processor = self.tokenizer.config, pipeline.processor
        self.views = Views(sizes.image_size, processor.image_preprocess, sizes.preprocess)

    alive, workers = True, 1

    def kill(self) -> None:
        """Of a model in this process nothing can be killed; see `RemoteModels`."""

    def close(self) -> None:
        """Nothing to do; see `RemoteModels`."""

    def facts(self) -> dict[str, Any]:
        """What clients must know: sizes, context, sampler of pictures."""
        config = self.pipeline.model.config
        side = self.tokenizer.config.image_size
        return {
            "image_size": f"{side}x{side}",
            "image_positions": config.num_image_positions,
            "num_codebooks": config.num_codebooks,
            "codebook_size": config.codebook_size,
            "context": config.context_length,
            "draws": config.visual_input == "codes",
            "image_sampler": self.pipeline.image_sampler,
        }

    def run(self, jobs: Sequence[Job]) -> None:
        """Do jobs of one key together. A job that cannot be asked gets ("error", ApiError); the others are done."""
        first = jobs[0]
        if isinstance(first, ChatJob):
            self._chat([job for job in jobs if isinstance(job, ChatJob)])
        elif isinstance(first, ImageJob):
            self._images([job for job in jobs if isinstance(job, ImageJob)])
        else:
            self._reconstruct([job for job in jobs if isinstance(job, ReconstructJob)])

    def _chat(self, jobs: Sequence[ChatJob]) -> None:
        """("delta", (choice, text)), as it comes where it is to be streamed, then ("done", (prompt ids, answer ids,
        finish reasons))."""
        pipeline, asked = self.pipeline, []
        tokenizer, limit = pipeline.processor.tokenizer, self.facts()["context"]
        # Few passes of the visual tokenizer for all pictures; the prompts then find their codes kept.
        images = [part["image"] for job in jobs for m in job.messages if not isinstance(m["content"], str)
                  for part in m["content"] if part["type"] == "image"]  # fmt: skip
        if len(images) <= pipeline.image_cache_size:
            for start in range(0, len(images), self.max_batch):
                pipeline.image_codes(images[start : start + self.max_batch])
        for job in jobs:
            try:
                sampling = TextSampling(**job.sampling)
                (prompt,) = pipeline._chat_prompts([job.messages], 1 if job.may_be_fewer else job.max_new_tokens)
            except UserError as error:
                job.emit("error", _refusal(error, "messages"))
                continue
            room = job.max_new_tokens if limit is None else min(job.max_new_tokens, limit - len(prompt.ids))
            rows = [
                Row(
                    prompt=prompt,
                    stream=TextStream(tokenizer, job.stop),
                    sampling=sampling,
                    seed=job.seed + choice,
                    max_new_tokens=room,
                    emit=partial(_stream, job, choice) if job.stream else _keep,
                    wanted=lambda job=job: not job.cancelled,
                )
                for choice in range(job.n)
            ]
            asked.append((job, prompt, rows))
        flat = [row for _, _, rows in asked for row in rows]
        for start in range(0, len(flat), self.max_batch):
            rows = flat[start : start + self.max_batch]
            answer_rows(pipeline.model, rows, tokenizer.eos_token_id, tokenizer.pad_token_id)
        for job, prompt, rows in asked:
            for choice, row in enumerate(() if job.stream else rows):
                job.emit("delta", (choice, row.stream.shown))
            if not job.cancelled:
                counts = len(prompt.ids), sum(len(row.stream.ids) for row in rows)
                job.emit("done", (*counts, [row.finish_reason for row in rows]))

    def _images(self, jobs: Sequence[ImageJob]) -> None:
        """("done", (prompt ids, PNGs in base64)) for each job; all have the same settings."""

        def look(_done: int, _total: int) -> None:
            if all(job.cancelled for job in jobs):
                raise _NobodyWaitsError

        good, builder = [], self.pipeline.processor.builder
        limit = self.facts()["context"]
        for job in jobs:
            job.prompt_ids = 0
            try:
                job.prompt_ids = len(builder.text_to_image_prompt(job.prompt))
                total = job.prompt_ids + self.pipeline.model.config.num_image_positions
                if limit is not None and total > limit:
                    raise ContextError(
                        f"a prompt and its picture take {total} ids: the model reads {limit}; shorten it"
                    )
                good.append(job)
            except UserError as error:
                job.emit("error", _refusal(error, "prompt"))
        prompts = [job.prompt for job in good for _ in range(job.n)]
        seeds = [job.seed + i for job in good for i in range(job.n)]
        if not good:
            return
        try:
            drawn = iter(
                self.pipeline.generate_images(
                    prompts, seed=seeds, batch_size=self.max_batch, on_position=look, graph=False, **good[0].sampler
                )
            )
        except _NobodyWaitsError:
            return
        settings = self.pipeline.image_sampler | good[0].sampler
        for job in good:
            records = [{"prompt": job.prompt, "seed": job.seed + i, "settings": settings} for i in range(job.n)]
            files = [png(next(drawn), json.dumps(record)) for record in records]
            job.emit("done", (job.prompt_ids, files))

    @torch.no_grad()
    def _reconstruct(self, jobs: Sequence[ReconstructJob]) -> None:
        """("done", the answer's fields) for each job."""
        config = self.tokenizer.config
        pixels = torch.stack([job.pixels for job in jobs])
        codes_BKL = self.tokenizer.encode(pixels.to(self.pipeline.model.device))
        made = self.tokenizer.decode(codes_BKL)
        for job, own, new, codes_KL in zip(jobs, pixels, made, codes_BKL, strict=True):
            original, reconstruction = to_pil(own), to_pil(new)
            side = math.isqrt(codes_KL.shape[1])
            job.emit(
                "done",
                {
                    "original": png(original),
                    "reconstruction": png(reconstruction),
                    "size": f"{config.image_size}x{config.image_size}",
                    "psnr": round(_psnr(original, reconstruction), 3),
                    "grid": (side, codes_KL.shape[1] // side),
                    "codes": codes_KL.tolist(),
                    "usage": [{"used": len(row.unique()), "entries": config.codebook_size} for row in codes_KL],
                },
            )


def _refusal(error: UserError, param: str) -> ApiError:
    code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_request"
    return bad(code, str(error), param)


def _stream(job: ChatJob, choice: int, text: str) -> None:
    job.emit("delta", (choice, text))


def _keep(_text: str) -> None:
    """The row has it all at its end."""


def _psnr(one: Image.Image, other: Image.Image) -> float:
    """dB of two pictures of 8 bits; 100 for identical ones."""
    error = np.square(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)).mean()
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))
