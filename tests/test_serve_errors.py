"""Requests that cannot be answered: each gets its status and message, and the next request its answer."""

import base64
import io
import json
import logging
import socket
import struct
import threading
import time
import zlib

import httpx
import pytest
from PIL import Image
from serving import data_url, error_of, eventually, question, running
from test_mllm_pipeline import make_pipeline, picture

KEY = "a-key-of-tests"
CHAT, IMAGES, RECONSTRUCT = "/v1/chat/completions", "/v1/images/generations", "/v1/tokenizer/reconstruct"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = make_pipeline(tmp_path_factory.mktemp("errors"))
    pipe.model.config.text_config.max_position_embeddings = 500
    return pipe


@pytest.fixture(scope="module")
def server(pipe):
    settings = {
        "name": "tiny",
        "api_key": KEY,
        "allowed_hosts": ("127.0.0.1",),
        "max_body_bytes": 200_000,
        "body_seconds": 1.0,
        "max_pixels": 1_000_000,
        "max_images": 2,
        "max_prompt_chars": 2000,
        "max_new_tokens": 64,
        "max_n": 4,
    }
    with running(pipe, **settings) as (address, server):
        yield address, server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server[0], headers={"Authorization": f"Bearer {KEY}"}, timeout=20) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_failed_inside(caplog):
    with caplog.at_level(logging.ERROR):
        yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes and many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(width * height // 8, 1_000_000)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def gif() -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, format="GIF")
    return buffer.getvalue()


def cut_png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, format="PNG")
    return buffer.getvalue()[:-800]


def chat(**changes):
    return CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 3} | changes


def shown(*urls, text="what color is the circle?"):
    return chat(messages=question(text, *urls))


def image(**changes):
    return IMAGES, {"prompt": "a photo of a red circle"} | changes


def said(*roles):
    return chat(messages=[{"role": role, "content": "red"} for role in roles])


BAD = {
    # malformed
    "no fields": ((CHAT, {}), 422, "missing_parameter", "model"),
    "a list": ((CHAT, []), 422, "invalid_value", "valid dictionary"),
    "unknown parameter": (chat(tools=[]), 422, "unknown_parameter", "tools"),
    "no messages": (chat(messages=[]), 422, "invalid_value", "at least 1"),
    "messages as text": (chat(messages="hi"), 422, "invalid_value", "valid list"),
    "unknown role": (said("tool"), 422, "invalid_value", "role"),
    "content of a number": (chat(messages=[{"role": "user", "content": 3}]), 422, "invalid_value", "content"),
    "unknown part": (
        chat(messages=[{"role": "user", "content": [{"type": "audio"}]}]), 422, "invalid_value", "'text', 'image_url'",
    ),
    "temperature as text": (chat(temperature="warm"), 422, "invalid_value", "temperature"),
    "temperature below 0": (chat(temperature=-1), 422, "invalid_value", "temperature"),
    "top_p of 0": (chat(top_p=0), 422, "invalid_value", "top_p"),
    "a penalty": (chat(presence_penalty=1), 422, "invalid_value", "presence_penalty"),
    "seed of a fraction": (chat(seed=1.5), 422, "invalid_value", "seed"),
    "huge seed": (image(seed=2**80), 422, "invalid_value", "seed"),
    "max_tokens of 0": (chat(max_tokens=0), 422, "invalid_value", "max_tokens"),
    "guidance of 1e9": (image(guidance=1e9), 422, "invalid_value", "guidance"),
    "empty prompt": (image(prompt=""), 422, "invalid_value", "prompt"),
    "a url is wanted": (image(response_format="url"), 422, "invalid_value", "b64_json"),
    # understood, but cannot be asked
    "blank prompt": (image(prompt="  "), 400, "empty_prompt", "prompt"),
    "blank question": (chat(messages=[{"role": "user", "content": " "}]), 400, "empty_message", "no text"),
    "image without text": (shown(data_url(picture()), text=""), 400, "empty_message", "no text"),
    "assistant last": (said("user", "assistant"), 400, "invalid_message", "user message at the end"),
    "two users": (said("user", "user"), 400, "invalid_message", "in turn"),
    "system alone": (said("system"), 400, "invalid_message", "user message"),
    "marks in text": (chat(messages=question("what is <image>?")), 400, "reserved_text", "<image>"),
    "marks in a prompt": (image(prompt="<boi> red"), 400, "reserved_text", "<boi>"),
    "stop of nothing": (chat(stop=""), 400, "invalid_value", "stop"),
    "stream_options alone": (chat(stream_options={}), 400, "invalid_value", "stream"),
    "other size": (image(size="1024x1024"), 400, "invalid_size", "32x32 only"),
    # over-long
    "too many characters": (chat(messages=question("red " * 600)), 400, "context_length_exceeded", "2400"),
    "too many ids": (chat(messages=question("blue green " * 150)), 400, "invalid_request", "reads"),
    "a long prompt": (image(prompt="red " * 600), 400, "context_length_exceeded", "2000"),
    "too many tokens": (chat(max_tokens=65), 400, "max_tokens_too_large", "64"),
    "too many answers": (chat(n=5), 400, "n_too_large", "at most 4"),
    "too many pictures": (image(n=1000), 400, "n_too_large", "at most 4"),
    "too many images": (shown(*[data_url(picture())] * 3), 400, "too_many_images", "at most 2"),
    "large body": (chat(messages=question("red " * 60_000)), 413, "body_too_large", "200000 bytes"),
    "very large body": (chat(messages=question("red " * 300_000)), 413, "body_too_large", "200000 bytes"),
    # unknown model
    "unknown model": (chat(model="gpt-4o"), 404, "model_not_found", "'tiny'"),
    "unknown image model": (image(model="\u00e9\u20ac"), 404, "model_not_found", "\\xe9"),
    # not an image
    "an address": (shown("https://example.com/cat.png"), 400, "invalid_image_url", "not a data URL"),
    "a loopback address": (shown("http://127.0.0.1:1/x.png"), 400, "invalid_image_url", "not a data URL"),
    "a file": (shown("file:///etc/passwd"), 400, "invalid_image_url", "never read"),
    "a path": (shown("/etc/passwd"), 400, "invalid_image_url", "never read"),
    "text as data": (shown(url_of(b"hello", "text/plain")), 400, "unsupported_image", "text/plain"),
    "svg": (shown(url_of(b"<svg/>", "image/svg+xml")), 400, "unsupported_image", "svg"),
    "gif called png": (shown(url_of(gif())), 400, "invalid_image", "png, jpeg or webp"),
    "bad base64": (shown("data:image/png;base64,@@@"), 400, "invalid_base64", "base64"),
    "no picture": (shown(url_of(b"nothing of a picture")), 400, "invalid_image", "messages.0.content.0.image_url"),
    "empty picture": (shown("data:image/png;base64,"), 400, "invalid_image", "readable"),
    "half a picture": (shown(url_of(cut_png())), 400, "invalid_image", "readable"),
    "image by the assistant": (
        chat(messages=[*question("red"), question("x", data_url(picture()))[0] | {"role": "assistant"},
                       *question("red")]), 400, "invalid_message", "user messages only",
    ),
    "reconstruct a path": ((RECONSTRUCT, {"image": "/etc/passwd"}), 400, "invalid_image_url", "image:"),
    # bombs
    "a bomb": (shown(url_of(bomb(30_000, 30_000))), 400, "image_too_large", "pixels"),
    "a small bomb": ((RECONSTRUCT, {"image": url_of(bomb(2000, 1000))}), 400, "image_too_large", "1000000 in all"),
    "a bomb of bombs": (shown(url_of(bomb(2**31 - 1, 2**31 - 1))), 400, "", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_and_the_next_one_answered(client, case):
    (path, body), status, code, words = BAD[case]
    response = client.post(path, json=body)
    error = error_of(response)
    assert response.status_code == status and error["code"].startswith(code), error
    assert words in error["message"], error
    assert "passwd" not in error["message"].replace("/etc/passwd", ""), "nothing was opened"
    path, body = chat()
    assert client.post(path, json=body).status_code == 200


RAW = {
    "no JSON": (b"{", "application/json", 400, "invalid_json"),
    "no UTF-8": (b'{"model": "\xff"}', "application/json", 400, ""),
    "deep JSON": (b"[" * 90_000, "application/json", 400, ""),
    "long number": (b'{"seed": ' + b"9" * 9000 + b"}", "application/json", 400, ""),
    "nothing": (b"", "application/json", 422, "missing_parameter"),
    "NaN": (json.dumps(image(guidance=float("nan"))[1]).encode(), "application/json", 422, ""),
    "infinite": (json.dumps(image(temperature=float("inf"))[1]).encode(), "application/json", 422, ""),
    "half a character": (b'{"prompt": "\\ud800"}', "application/json", 422, "invalid_value"),
    "half a name": (b'{"prompt": "red", "\\ud800": 1}', "application/json", 422, ""),
    "a form": (b"prompt=red", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    "plain text": (b'{"prompt": "red"}', "text/plain", 415, "unsupported_media_type"),
}


@pytest.mark.parametrize("case", RAW)
def test_a_body_that_is_not_the_right_json(client, case):
    body, kind, status, code = RAW[case]
    response = client.post(IMAGES, content=body, headers={"Content-Type": kind})
    assert response.status_code == status, response.text
    assert error_of(response)["code"].startswith(code)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("text", ["\x00", "\u0301" * 100, "\U0001f600 \u05d0", "</s><s>", "\u2581", "USER: ASSISTANT:"])
def test_odd_text_is_only_text(client, text):
    path, body = chat(messages=[{"role": "user", "content": text}])
    assert client.post(path, json=body).status_code == 200
    assert client.post(IMAGES, json={"prompt": text}).status_code == 200


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong-key"}, {"Authorization": f"Basic {KEY}"},
                                    {"Authorization": "Bearer"}, {"Authorization": b"Bearer \xff\xfe"}])  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
def test_wrong_keys(server, path, header):
    response = httpx.get(server[0] + path, headers=header)
    assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{server[0]}/health").status_code == 200, "health and the page need no key"
    assert httpx.get(f"{server[0]}/").status_code == 200


def test_unknown_paths_methods_and_hosts(client):
    response = client.get("/v1/nothing")
    assert response.status_code == 404 and error_of(response)["type"] == "not_found_error"
    response = client.get(CHAT)
    assert response.status_code == 405 and error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert client.delete("/").status_code == 405
    assert error_of(client.get("/v1/models/other"))["code"] == "model_not_found"
    response = client.get("/health", headers={"Host": "evil.example:8000"})
    assert response.status_code == 400 and error_of(response)["code"] == "unknown_host"
    assert client.get("/health", headers={"Host": "127.0.0.1:99"}).status_code == 200


def test_files_of_the_package_are_not_served(client):
    for path in ("/../settings.py", "/%2e%2e/settings.py", "/web/index.html", "/app.py"):
        assert client.get(path).status_code == 404


def test_a_slow_body_is_given_up(server):
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as one:
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        one.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        answer = b""
        while piece := one.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer


def test_security_headers(client):
    headers = client.get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


# ---- a queue that is full, work that takes too long, a server that stops


class SlowModel:
    """Stands before a served model: waits at each batch until it is let go."""

    def __init__(self, model):
        self.model, self.gate, self.batches = model, threading.Event(), []

    def run(self, jobs):
        self.batches.append(len(jobs))
        self.gate.wait(10)
        self.model.run(jobs)


@pytest.fixture
def slow(pipe):
    """Starts a server whose model waits; (address, server, model)."""
    opened = []

    def start(**settings):
        context = running(pipe, name="tiny", **settings)
        address, server = context.__enter__()
        model = SlowModel(server.service.model)
        server.service.scheduler.model = model
        opened.append((context, model))
        return address, server, model

    yield start
    for context, model in opened:
        model.gate.set()
        context.__exit__(None, None, None)


def ask_in_threads(address, count, **changes):
    """Answers of `count` clients, in a list that fills, and their threads."""
    answers = []
    path, body = chat(**changes)
    threads = [
        threading.Thread(target=lambda: answers.append(httpx.post(address + path, json=body, timeout=20)))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return answers, threads


def test_waiting_requests_go_together(slow):
    address, server, model = slow(max_batch=4, max_wait_ms=1)
    scheduler = server.service.scheduler
    first, threads = ask_in_threads(address, 1)
    eventually(lambda: model.batches == [1])
    others, more = ask_in_threads(address, 6)
    eventually(lambda: len(scheduler.waiting) == 6)
    model.gate.set()
    for thread in [*threads, *more]:
        thread.join()
    assert model.batches == [1, 4, 2]
    assert {answer.status_code for answer in [*first, *others]} == {200}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in [*first, *others]}) == 1


def test_a_full_queue_refuses_and_says_when_to_come_again(slow):
    address, server, model = slow(max_queue=2, max_batch=1, max_wait_ms=0)
    answers, threads = ask_in_threads(address, 1)
    eventually(lambda: model.batches == [1])
    more, others = ask_in_threads(address, 2)
    eventually(lambda: len(server.service.scheduler.waiting) == 2)
    path, body = chat()
    refused = httpx.post(address + path, json=body)
    assert refused.status_code == 429 and error_of(refused)["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    model.gate.set()
    for thread in [*threads, *others]:
        thread.join()
    assert [answer.status_code for answer in [*answers, *more]] == [200] * 3
    assert httpx.post(address + path, json=body).status_code == 200
    assert "unitok_refused_total 1.0" in httpx.get(f"{address}/metrics").text


def test_too_many_connections_are_refused_before_their_bodies_are_read(slow):
    address, _, model = slow(max_queue=1, max_batch=1)
    model.gate.set()
    host, port = address.removeprefix("http://").split(":")
    path, body = chat()
    held = [socket.create_connection((host, int(port)), timeout=10) for _ in range(3)]  # max_queue + 2 * max_batch
    try:
        for one in held:
            one.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode())
        eventually(lambda: httpx.post(address + path, json=body).status_code == 429)
        refused = httpx.post(address + path, json=body)
        assert error_of(refused)["code"] == "too_many_requests" and "retry-after" in refused.headers
        assert httpx.get(f"{address}/health").status_code == 200
    finally:
        for one in held:
            one.close()
    eventually(lambda: httpx.post(address + path, json=body).status_code == 200)


def test_what_takes_too_long_gets_504(slow):
    address, server, model = slow(request_seconds=0.3)
    path, body = chat()
    response = httpx.post(address + path, json=body)
    assert response.status_code == 504 and error_of(response)["code"] == "timeout"
    assert httpx.post(address + path, json={**body, "stream": True}).status_code == 504
    model.gate.set()
    eventually(lambda: server.service.scheduler.idle)
    assert httpx.post(address + path, json=body).status_code == 200


def test_a_client_that_leaves_the_queue_is_never_run(slow):
    address, server, model = slow(max_batch=1, max_wait_ms=0)
    scheduler = server.service.scheduler
    answers, threads = ask_in_threads(address, 1)
    eventually(lambda: model.batches == [1])
    path, body = chat()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address + path, json=body, timeout=0.3)
    eventually(lambda: not scheduler.waiting)
    model.gate.set()
    threads[0].join()
    eventually(lambda: scheduler.idle)
    assert model.batches == [1] and answers[0].status_code == 200


def test_pictures_stop_between_positions_when_nobody_waits(pipe):
    from unitok.serve.jobs import ImageJob
    from unitok.serve.model import ServedModel

    class Loop:
        def call_soon_threadsafe(self, *_):
            raise AssertionError("a cancelled job emits nothing")

    job = ImageJob("red", 1, 0, {}, loop=Loop(), events=None, cancelled=True)
    model, seen = ServedModel(pipe), []
    generate = pipe.generate_images

    def watched(*args, on_position, **options):
        def look(done, total):
            seen.append(done)
            on_position(done, total)

        return generate(*args, on_position=look, **options)

    pipe.generate_images = watched
    try:
        model.run([job])
    finally:
        del pipe.generate_images
    assert seen == [1], "stopped at the first of 4 positions"


def test_a_stopping_server_finishes_what_it_accepted(slow):
    address, server, model = slow()
    answers, threads = ask_in_threads(address, 1)
    eventually(lambda: model.batches == [1])
    server.drain()
    path, body = chat()
    late = httpx.post(address + path, json=body)
    assert late.status_code == 503 and error_of(late)["code"] == "stopping" and "retry-after" in late.headers
    assert httpx.get(f"{address}/health").status_code == 503
    model.gate.set()
    threads[0].join()
    assert answers[0].status_code == 200
    eventually(lambda: server.should_exit)


def test_what_does_not_finish_in_the_grace_is_told(slow):
    address, server, model = slow(grace_seconds=0.3, max_batch=1, max_wait_ms=0)
    answers, threads = ask_in_threads(address, 2)
    eventually(lambda: len(server.service.scheduler.waiting) == 1)
    start = time.monotonic()
    server.drain()
    time.sleep(1.0)
    model.gate.set()
    for thread in threads:
        thread.join(15)
    assert time.monotonic() - start < 10 and len(answers) == 2
    assert [answer.status_code for answer in answers].count(503) >= 1


class BrokenModel:
    alive = True

    def run(self, jobs):
        raise RuntimeError("nobody foresaw this")


@pytest.mark.parametrize("stream", [False, True])
def test_an_unforeseen_error_costs_its_batch_only(pipe, stream, caplog):
    with running(pipe, name="tiny") as (address, server):
        scheduler = server.service.scheduler
        good, scheduler.model = scheduler.model, BrokenModel()
        path, body = chat(stream=stream)
        response = httpx.post(address + path, json=body)
        assert response.status_code == 500 and error_of(response)["code"] == "internal_error"
        assert "foresaw" not in response.text
        assert "nobody foresaw this" in caplog.text
        caplog.clear()
        scheduler.model = good
        assert httpx.post(address + path, json=body).status_code == 200


class EchoModel:
    """Says what it was asked, in two pieces; may stop between them."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()

    def run(self, jobs):
        texts = [job.messages[0]["content"] for job in jobs]
        for job, text in zip(jobs, texts, strict=True):
            job.emit("delta", (0, text[:3]))
        self.gate.wait(10)
        for job, text in zip(jobs, texts, strict=True):
            job.emit("delta", (0, text[3:]))
            job.emit("done", (1, 2, ["stop"]))


@pytest.fixture
def echo(pipe):
    with running(pipe, name="tiny", request_seconds=1.0, max_queue=200) as (address, server):
        server.service.scheduler.model = model = EchoModel()
        yield address, server, model
        model.gate.set()


def test_many_at_once_each_get_their_own(echo):
    import asyncio

    async def ask(client, number):
        path, body = chat(messages=[{"role": "user", "content": f"question {number}"}], stream=number % 2 == 0)
        response = await client.post(path, json=body)
        if number % 2:
            return response.json()["choices"][0]["message"]["content"]
        events = [line[6:] for line in response.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in events[:-1])

    async def ask_all():
        async with httpx.AsyncClient(base_url=echo[0], timeout=30) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(120)))

    assert asyncio.run(ask_all()) == [f"question {number}" for number in range(120)]


def test_an_error_within_a_stream_is_its_last_event(echo):
    import openai

    address, _, model = echo
    model.gate.clear()
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
    pieces = []
    with pytest.raises(openai.APIError, match="no answer within 1 seconds"):
        for chunk in client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "red circle"}], stream=True
        ):
            pieces.append(chunk.choices[0].delta.content)
    assert pieces == ["", "red"]


def test_openais_client_knows_our_errors(server, pipe):
    import openai

    def ask(key=KEY, **changes):
        client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key=key, max_retries=0)
        return client.chat.completions.create(**chat(**changes)[1])

    for error, changes in (
        (openai.AuthenticationError, {"key": "wrong-key-of-tests"}),
        (openai.NotFoundError, {"model": "other"}),
        (openai.BadRequestError, {"messages": question("what?", "file:///etc/passwd")}),
        (openai.UnprocessableEntityError, {"temperature": 99}),
    ):
        with pytest.raises(error) as caught:
            ask(**changes)
        assert caught.value.code and caught.value.body["message"]
