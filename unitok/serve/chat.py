"""/v1/chat/completions: whole answers, and streamed ones as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from unitok.serve.content import check_conversation, image_urls, pipeline_messages, unpacked
from unitok.serve.errors import ApiError, bad
from unitok.serve.jobs import ChatJob, Event
from unitok.serve.schemas import Answer, AnyMessage, ChatAnswer, ChatRequest, Choice, Usage
from unitok.serve.service import ERRORS, Service, while_connected

DEFAULT_NEW_TOKENS = 128


def add_chat(app: FastAPI, service: Service) -> None:
    """The endpoint."""
    streamed = {"text/event-stream": {"schema": {"type": "string"}}}

    @app.post("/v1/chat/completions", response_model=ChatAnswer, responses=ERRORS | {200: {"content": streamed}})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation. With `stream` the answer comes as chunks, the last of them `[DONE]`."""
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.settings.name}
        if not body.stream:
            return JSONResponse((await while_connected(request, _whole(service, body, about))).model_dump())
        # The first event is waited for, so that an early error has its own status.
        job, first, events = await while_connected(request, _begun(service, body))
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(
            _chunks(service, job, first, events, about, usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )


async def _job_of(body: ChatRequest, service: Service) -> ChatJob:
    """The request as a job; ApiError for what cannot be asked."""
    service.check_model(body.model)
    n = body.n or 1
    service.check_number(n, body.seed)
    limit = service.settings.max_new_tokens
    for name, value in (("max_tokens", body.max_tokens), ("max_completion_tokens", body.max_completion_tokens)):
        if value is not None and value > limit:
            raise bad("max_tokens_too_large", f"{name}={value}: expected at most {limit}", name)
    asked = body.max_completion_tokens or body.max_tokens
    if body.stream_options is not None and not body.stream:
        raise bad("invalid_value", "stream_options needs stream: true", "stream_options")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if any(not 0 < len(one) <= 100 for one in stop):
        raise bad("invalid_value", "stop: expected strings of 1 to 100 characters", "stop")
    messages = await _messages_of(body.messages, service)
    given = {"temperature": body.temperature, "top_k": body.top_k, "top_p": body.top_p}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if body.temperature == 0 or not sampling:  # without settings: the likeliest answer
        sampling = {"do_sample": False}
    else:
        sampling["do_sample"] = True
    return ChatJob(
        messages=messages,
        max_new_tokens=asked or min(DEFAULT_NEW_TOKENS, limit),
        sampling=sampling,
        seed=body.seed or 0,
        n=n,
        stop=stop,
        stream=bool(body.stream),
        may_be_fewer=asked is None,
    )


async def _messages_of(messages: list[AnyMessage], service: Service) -> list[dict[str, Any]]:
    """Messages as the pipeline takes them; what has no pictures needs no thread."""
    check_conversation(messages, service.settings)
    urls = image_urls(messages)
    if not urls:
        return pipeline_messages(messages, {})

    def images(go_on: Callable[[], None]) -> list[Image.Image]:
        return unpacked(urls, service.settings, go_on, service.model.views.seen)

    return pipeline_messages(messages, dict(zip(urls, await service.unpack(images), strict=True)))


async def _begun(service: Service, body: ChatRequest) -> tuple[ChatJob, Event, AsyncIterator[Event]]:
    """The queued job, its first event and those that follow."""
    job = await service.scheduler.prepare(lambda: _job_of(body, service))
    events = service.scheduler.events(job)
    return job, await anext(events), events


async def _whole(service: Service, body: ChatRequest, about: dict[str, Any]) -> ChatAnswer:
    job = await service.scheduler.prepare(lambda: _job_of(body, service))
    texts = [""] * job.n
    async with aclosing(service.scheduler.events(job)) as events:
        async for kind, value in events:
            if kind == "delta":
                texts[value[0]] += value[1]
                continue
            usage = _usage(service, value)
            choices = [
                Choice(index=i, message=Answer(content=text), finish_reason=reason)
                for i, (text, reason) in enumerate(zip(texts, value[2], strict=True))
            ]
            return ChatAnswer(choices=choices, usage=usage, **about)
    raise AssertionError("events end with done or raise")


async def _chunks(
    service: Service,
    job: ChatJob,
    first: Event,
    events: AsyncIterator[Event],
    about: dict[str, Any],
    with_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events; closing this generator cancels the job."""
    about = {"object": "chat.completion.chunk", **about}

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**about, 'choices': choices, **more})}\n\n"

    def choice(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}

    async with aclosing(events):
        for index in range(job.n):
            yield chunk([choice(index, {"role": "assistant", "content": ""})])
        kind, value = first
        try:
            while kind == "delta":
                yield chunk([choice(value[0], {"content": value[1]})])
                kind, value = await anext(events)
        except ApiError as error:  # the status is sent already: the error is the last event
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        for index, reason in enumerate(value[2]):
            yield chunk([choice(index, {}, reason)])
        usage = _usage(service, value)
        if with_usage:
            yield chunk([], usage=usage.model_dump())
        yield "data: [DONE]\n\n"


def _usage(service: Service, done: tuple[int, int, list[str]]) -> Usage:
    read, written, _ = done
    service.metrics.tokens.labels("read").inc(read)
    service.metrics.tokens.labels("written").inc(written)
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
