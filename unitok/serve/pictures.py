"""/v1/images/generations, and /v1/tokenizer/reconstruct: pictures from text, and from their own codes."""

import time
from collections.abc import Callable

import torch
from fastapi import FastAPI, Request

from unitok.serve.content import check_text, unpacked
from unitok.serve.errors import bad
from unitok.serve.jobs import ImageJob, ReconstructJob
from unitok.serve.schemas import ImageAnswer, ImageRequest, ImageUsage, Picture, ReconstructAnswer, ReconstructRequest
from unitok.serve.service import ERRORS, Service, while_connected


def add_pictures(app: FastAPI, service: Service) -> None:
    """The endpoints."""

    @app.post("/v1/images/generations", responses=ERRORS)
    async def generations(body: ImageRequest, request: Request) -> ImageAnswer:
        """Draw `n` pictures, always as base64. `size` is the model's own or "auto"."""
        job = _job_of(body, service)

        async def ready() -> ImageJob:
            return job

        read, files = await while_connected(request, service.result(ready))
        written = job.n * service.facts["image_positions"]
        service.metrics.images.inc(job.n)
        service.metrics.tokens.labels("read").inc(read)
        service.metrics.tokens.labels("drawn").inc(written)
        usage = ImageUsage(
            input_tokens=read,
            output_tokens=written,
            total_tokens=read + written,
            input_tokens_details={"text_tokens": read, "image_tokens": 0},
        )
        pictures = [Picture(b64_json=file, seed=job.seed + i) for i, file in enumerate(files)]
        return ImageAnswer(created=int(time.time()), data=pictures, size=service.facts["image_size"], usage=usage)

    @app.post("/v1/tokenizer/reconstruct", responses=ERRORS)
    async def reconstruct(body: ReconstructRequest, request: Request) -> ReconstructAnswer:
        """What the visual tokenizer keeps of a picture: its codes and what they decode to."""
        service.check_model(body.model)

        def pixels(go_on: Callable[[], None]) -> torch.Tensor:
            (image,) = unpacked({"image": body.image}, service.settings, go_on, service.model.views.pixels)
            return image

        async def job() -> ReconstructJob:
            return ReconstructJob(pixels=await service.unpack(pixels))

        return ReconstructAnswer(**await while_connected(request, service.result(job)))


def _job_of(body: ImageRequest, service: Service) -> ImageJob:
    """The request as a job; ApiError for what cannot be drawn."""
    service.check_model(body.model)
    n = body.n or 1
    service.check_number(n, body.seed)
    own = service.facts["image_size"]
    if body.size not in (None, "auto", own):
        shown = str(body.size)[:40].encode("ascii", "backslashreplace").decode()
        raise bad("invalid_size", f"size={shown!r}: this model draws {own} only", "size")
    if not service.facts["draws"]:
        raise bad("unsupported", "this model only understands images; it cannot draw")
    if not body.prompt.strip():
        raise bad("empty_prompt", "prompt: say what the picture should show", "prompt")
    if len(body.prompt) > service.settings.max_prompt_chars:
        limit = service.settings.max_prompt_chars
        raise bad(
            "context_length_exceeded", f"prompt: {len(body.prompt)} characters, expected at most {limit}", "prompt"
        )
    check_text(body.prompt, "prompt")
    given = {
        "guidance_scale": body.guidance,
        "temperature": body.temperature,
        "depth_temperature": body.depth_temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
    }
    sampler = {name: value for name, value in given.items() if value is not None}
    return ImageJob(prompt=body.prompt, n=n, seed=body.seed or 0, sampler=sampler)
