"""Requests that cannot be answered: each gets its status and message, and the next request its answer."""

import base64
import gzip
import io
import json
import socket
import struct
import zlib
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from pipelines import make_pipeline, picture
from pydantic import ValidationError
from serving import CHAT, chat, data_url, error_of, question, running

from unitok.serve.content import count_scans
from unitok.serve.schemas import ChatRequest

pytestmark = pytest.mark.usefixtures("nothing_failed_inside")
KEY = "a-key-of-tests"
IMAGES, RECONSTRUCT = "/v1/images/generations", "/v1/tokenizer/reconstruct"


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
        "body_seconds": 3.0,
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


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes `count` times."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, format="JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


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
    "unknown parameter": (chat(best_of=1), 422, "unknown_parameter", "best_of"),
    "a tool": (chat(tools=[{"type": "function"}]), 422, "invalid_value", "tools"),
    "logprobs": (chat(logprobs=True), 422, "invalid_value", "logprobs"),
    "a bias": (chat(logit_bias={"50256": -100}), 422, "invalid_value", "logit_bias"),
    "a quality": (image(quality="hd"), 422, "invalid_value", "quality"),
    "a streamed picture": (image(stream=True), 422, "invalid_value", "stream"),
    "no messages": (chat(messages=[]), 422, "invalid_value", "at least 1"),
    "messages as text": (chat(messages="hi"), 422, "invalid_value", "valid list"),
    "unknown role": (said("tool"), 422, "invalid_value", "role"),
    "no content": (chat(messages=[{"role": "user", "content": []}]), 422, "invalid_value", "at least 1"),
    "five stops": (chat(stop=["a", "b", "c", "d", "e"]), 422, "invalid_value", "at most 4"),
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
    "seeds beyond the last": (image(seed=2**63 - 1, n=2), 400, "invalid_value", "seed"),
    "choices beyond the last seed": (chat(seed=2**63 - 2, n=3), 400, "invalid_value", "seed"),
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
    "too many ids": (chat(messages=question("blue green " * 150)), 400, "context_length_exceeded", "reads"),
    "a prompt of too many ids": (image(prompt="blue green " * 150), 400, "context_length_exceeded", "reads"),
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
    "many scans": (shown(url_of(jpeg_of_scans(200), "image/jpeg")), 400, "invalid_image", "100 scans"),
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
    "no UTF-8": (b'{"model": "\xff"}', "application/json", 400, "invalid_json"),
    "deep JSON": (b"[" * 90_000, "application/json", 400, "invalid_json"),
    "long number": (b'{"seed": ' + b"9" * 9000 + b"}", "application/json", 400, "invalid_json"),
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


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat()[1], "x0"),
        ({"messages": [{"role": "user", "content": "red"}]}, "messages.0.x0"),
        ({"messages": question("red")}, "messages.0.content.0.x0"),
        ({"messages": question("red", "data:")}, "messages.0.content.0.image_url.x0"),
    ],
)
def test_many_unknown_keys_are_one_error(body, param):
    inner = body = json.loads(json.dumps({"model": "tiny"} | body))
    for part in param.split(".")[:-1]:
        inner = inner[int(part) if part.isdecimal() else part]
    inner |= {f"x{number}": 0 for number in range(100_000)}
    with pytest.raises(ValidationError) as error:
        ChatRequest(**body)
    *rest, last = error.value.errors()
    assert last["type"] == "extra_forbidden" and last["loc"][-1] == "x0" and len(rest) < 2


def test_of_many_wrong_messages_and_parts_the_first_is_told():
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "x": 1}] * 256}] * 256}
    with pytest.raises(ValidationError) as error:
        ChatRequest(**body)
    assert len(error.value.errors()) <= 3


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br", 415), ("identity", 200)])
def test_a_packed_body_is_refused(client, encoding, status):
    path, body = chat()
    packed = gzip.compress(json.dumps(body).encode()) if encoding == "gzip" else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    response = client.post(path, content=packed, headers=headers)
    assert response.status_code == status, response.text
    assert status == 200 or error_of(response)["code"] == "unsupported_media_type"


def test_an_ordinary_progressive_jpeg_is_seen(client):
    path, body = shown(url_of(jpeg_of_scans(1), "image/jpeg"))
    assert client.post(path, json=body).status_code == 200


def test_scans_are_counted_as_decoders_find_them():
    """Not in other segments, nor behind the end, where phones put a film; also where bytes lie between segments."""
    one = jpeg_of_scans(1)
    first = one.count(b"\xff\xda")
    assert count_scans(one) == first > 1 and count_scans(jpeg_of_scans(200)) == first + 199
    assert count_scans(one + b"\xff\xda\x00\x02" * 1000) == first
    note = b"\xff\xfe" + (2 + 400).to_bytes(2, "big") + b"\xff\xda\x00\x02" * 100
    assert count_scans(one[:2] + note + one[2:]) == first
    Image.open(io.BytesIO(one[:2] + note + one[2:])).load()
    last = one.rindex(b"\xff\xda")
    many = one[:last] + (b"\x00\xff\xff" + one[last + 1 : -2]) * 200 + one[-2:]
    assert count_scans(many) == first + 199
    assert count_scans(b"") == count_scans(b"\xff\xd8\xff") == 0 and count_scans(b"\xff\xd8\xff\xda") == 1


NOTHING: dict[str, dict[str, Any]] = {
    CHAT: {
        "tools": [], "functions": [], "tool_choice": "none", "function_call": "none", "parallel_tool_calls": True,
        "logit_bias": {}, "logprobs": False, "top_logprobs": None, "modalities": ["text"], "reasoning_effort": "none",
        "store": False, "metadata": {}, "service_tier": "auto", "presence_penalty": 0, "frequency_penalty": 0,
        "response_format": {"type": "text"},
    },
    IMAGES: {
        "quality": "auto", "style": None, "background": "auto", "moderation": "auto", "stream": False, "size": "auto",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", [chat, image])
def test_settings_that_ask_for_nothing_change_nothing(client, kind):
    path, plain = kind(seed=3)
    answers = [
        client.post(path, json=plain | more).json() for more in ({}, NOTHING[path], dict.fromkeys(NOTHING[path]))
    ]
    told = [answer.get("choices") or answer["data"] for answer in answers]
    assert told[0] == told[1] == told[2]


def test_openais_client_may_say_what_asks_for_nothing(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0) as official:
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "max_tokens": 2}
        one = official.chat.completions.create(**asked, tools=[], logprobs=False, logit_bias=None)
        options = {"include_usage": True, "include_obfuscation": False}
        pieces = list(official.chat.completions.create(**asked, stream=True, stream_options=options))
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == one.choices[0].message.content


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


@pytest.mark.parametrize("path", ["/", "/health", "/style.css", "/v1/models", "/v1/models/tiny", "/openapi.json"])
def test_head_is_get_without_a_body(client, path):
    got, head = client.get(path), client.head(path)
    assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) > 0
    assert head.headers["content-type"] == got.headers["content-type"]
    assert client.head(CHAT).status_code == 405


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


def test_openais_client_knows_our_errors(server, pipe):
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
