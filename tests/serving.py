"""A running service for tests: a tiny model of random weights behind uvicorn on a free port of loopback."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from PIL import Image

from unitok.core.heap import frozen_heap
from unitok.serve.app import create_app
from unitok.serve.server import Server
from unitok.serve.settings import ServeSettings

CHAT = "/v1/chat/completions"


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def unpacked(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def question(text: str, *urls: str) -> list[dict[str, Any]]:
    """One user message; its images stand before the text."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def chat(**changes: Any) -> tuple[str, dict[str, Any]]:
    """Path and body of a short question to the model "tiny"."""
    return CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 3} | changes


@contextmanager
def running(pipeline: Any, **settings: Any) -> Iterator[tuple[str, Server]]:
    """The address of a server, which runs in a thread, and the server."""
    server = Server(create_app(pipeline, ServeSettings(**settings)), "127.0.0.1", 0, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    with frozen_heap(collect=False):  # collections stop server and client alike
        thread.start()
        deadline = time.monotonic() + 20
        try:
            while not server.started:
                assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive(), "the server did not stop"


def eventually(check: Any, seconds: float = 10.0) -> None:
    """Wait until `check()` is true."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.01)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's form."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    return body["error"]
