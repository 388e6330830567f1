"""Odd but allowed requests, and what they cost others: cold temperatures, large pictures, answers sent back."""

import asyncio
import logging
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline, picture
from serving import CHAT, data_url, error_of, eventually, question, running

from unitok.data.conversations import Turn
from unitok.serve import answers, content, model

IMAGES, RECONSTRUCT = "/v1/images/generations", "/v1/tokenizer/reconstruct"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("limits"))


@pytest.fixture(scope="module")
def server(pipe):
    with running(pipe, name="tiny") as (address, server):
        yield address, server


def body(text="red", *urls, **changes):
    return {"model": "tiny", "messages": question(text, *urls), "max_tokens": 6} | changes


def said(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


# ---- settings at the ends of their ranges


@pytest.mark.parametrize("cold", [5e-324, 1e-300, 1e-40, 1e-10])
def test_a_cold_temperature_is_the_likeliest_answer(server, cold):
    likeliest = said(httpx.post(server[0] + CHAT, json=body(temperature=0)))
    assert said(httpx.post(server[0] + CHAT, json=body(temperature=cold))) == likeliest
    assert said(httpx.post(server[0] + CHAT, json=body(temperature=cold, top_k=1_000_000, top_p=1e-300))) == likeliest


def test_pictures_at_the_ends_of_all_ranges(server):
    for settings in (
        {"guidance": 50, "temperature": 0.011, "depth_temperature": 0.011, "top_k": 1_000_000, "top_p": 1},
        {"guidance": 50, "temperature": 5, "depth_temperature": 5, "top_k": 1, "top_p": 1e-300},
        {"guidance": 1, "temperature": 5, "top_p": 5e-324, "seed": 2**63 - 2, "n": 2},
    ):
        response = httpx.post(server[0] + IMAGES, json={"prompt": "red"} | settings)
        assert response.status_code == 200, (settings, response.text)


def ask_together(address, bodies):
    async def ask():
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            return await asyncio.gather(*(client.post(CHAT, json=one) for one in bodies))

    return asyncio.run(ask())


class Touchy:
    """A model that fails at what it foresaw nothing of, after some of the answers have begun."""

    alive = True

    def __init__(self, model):
        self.model, self.batches = model, []

    def run(self, jobs):
        self.batches.append(len(jobs))
        if any("two" in str(job.messages) for job in jobs):
            for job in jobs:
                job.emit("delta", (0, "".join(self.begins.get(str(job.messages), ""))))
            raise RuntimeError("nobody foresaw this")
        self.model.run(jobs)


def test_one_failing_request_costs_no_other_its_answer(pipe, server, caplog):
    texts = ["red", "yes", "two", "blue", "what color is the circle?"]
    alone = {text: said(httpx.post(server[0] + CHAT, json=body(text))) for text in texts}
    with running(pipe, name="tiny", max_batch=len(texts), max_wait_ms=20_000) as (address, own):
        scheduler = own.service.scheduler
        good, scheduler.model = scheduler.model, Touchy(scheduler.model)
        # what the failing batch had said by then is not said twice
        scheduler.model.begins = {
            str([{"role": "user", "content": [{"type": "text", "text": text}]}]): alone[text][:3] for text in texts
        }
        with caplog.at_level(logging.CRITICAL, logger="unitok"):
            got = ask_together(address, [body(text) for text in texts])
        assert [one.status_code for one in got] == [200, 200, 500, 200, 200], [one.text for one in got]
        assert [said(one) for one in got if one.status_code == 200] == [alone[text] for text in texts if text != "two"]
        assert scheduler.model.batches[0] == 5 and set(scheduler.model.batches[1:]) == {1}
        scheduler.model = good


def test_a_batch_is_no_larger_than_asked_for(pipe, server, monkeypatch):
    """Also where one request asks for more answers or pictures than go together."""
    seen = []
    rows_of, sample = answers.answer_rows, pipe.sample_codes

    def rows(model, rows, *rest):
        seen.append(len(rows))
        return rows_of(model, rows, *rest)

    def codes(prompts, *rest):
        seen.append(len(prompts))
        return sample(prompts, *rest)

    monkeypatch.setattr(model, "answer_rows", rows)
    monkeypatch.setattr(pipe, "sample_codes", codes)
    asked = body(n=5, temperature=2.0), {"prompt": "red", "n": 5, "temperature": 0.8}
    whole = [httpx.post(server[0] + path, json=one) for path, one in zip((CHAT, IMAGES), asked, strict=True)]
    assert seen == [5, 5]
    seen.clear()
    with running(pipe, name="tiny", max_batch=2) as (address, _):
        parts = [httpx.post(address + path, json=one) for path, one in zip((CHAT, IMAGES), asked, strict=True)]
    assert seen == [2, 2, 1, 2, 2, 1]
    assert parts[0].json()["choices"] == whole[0].json()["choices"]
    assert [one["seed"] for one in parts[1].json()["data"]] == [0, 1, 2, 3, 4]


# ---- pictures that take their time


@contextmanager
def slow_pictures(monkeypatch):
    """Unpacking stands still until the event is set; how many were begun."""
    gate, begun, decode = threading.Event(), [], content.decode_image

    def slow(data, param):
        begun.append(param)
        gate.wait(20)
        return decode(data, param)

    monkeypatch.setattr(content, "decode_image", slow)
    try:
        yield gate, begun
    finally:
        gate.set()


@pytest.mark.parametrize("path", [CHAT, RECONSTRUCT])
def test_unpacking_is_part_of_the_time_of_a_request(pipe, path, monkeypatch):
    with slow_pictures(monkeypatch) as (_, begun), running(pipe, name="tiny", request_seconds=1.5) as (address, server):
        one = body("what?", data_url(picture())) if path == CHAT else {"image": data_url(picture())}
        start = time.monotonic()
        response = httpx.post(address + path, json=one)
        assert response.status_code == 504 and error_of(response)["code"] == "timeout"
        assert time.monotonic() - start < 5 and len(begun) == 1
        assert server.service.scheduler.idle and server.service.metrics.timeouts._value.get() == 1


def test_who_has_gone_gets_no_pictures_unpacked_and_text_does_not_wait(pipe, monkeypatch):
    with slow_pictures(monkeypatch) as (gate, begun), running(pipe, name="tiny", max_queue=4) as (address, server):
        urls = [data_url(picture(color)) for color in ("red", "green", "blue")]
        scheduler = server.service.scheduler

        def leave():
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(address + CHAT, json=body("what?", *urls), timeout=6)

        threads = [threading.Thread(target=leave) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(lambda: scheduler.preparing == 3 and len(begun) == 2)
        assert httpx.get(f"{address}/health").json()["waiting"] == 3
        assert said(httpx.post(address + CHAT, json=body("red"), timeout=5)) is not None
        for thread in threads:
            thread.join()
        eventually(lambda: scheduler.idle)
        gate.set()
        assert said(httpx.post(address + CHAT, json=body("what?", urls[0]))) is not None
        assert len(begun) == 3, "of nine pictures those two at which the threads were, and the last one"
        assert server.service.metrics.cancelled._value.get() == 3


def test_requests_whose_pictures_are_unpacked_fill_the_queue(pipe, monkeypatch):
    with slow_pictures(monkeypatch) as (gate, _), running(pipe, name="tiny", max_queue=2) as (address, server):
        one, got = body("what?", data_url(picture())), []
        threads = [
            threading.Thread(target=lambda: got.append(httpx.post(address + CHAT, json=one, timeout=30)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: server.service.scheduler.preparing == 2)
        refused = httpx.post(address + CHAT, json=body())
        assert refused.status_code == 429 and error_of(refused)["code"] == "queue_full"
        server.drain()  # what was accepted is finished
        time.sleep(0.3)
        gate.set()
        for thread in threads:
            thread.join()
        assert [response.status_code for response in got] == [200, 200]


def test_the_pixels_of_a_request_are_bounded_before_any_are_unpacked(pipe, monkeypatch):
    with (
        slow_pictures(monkeypatch) as (gate, begun),
        running(pipe, name="tiny", max_total_pixels=25_000) as (address, _),
    ):
        gate.set()
        url = data_url(Image.new("RGB", (100, 100)))
        response = httpx.post(address + CHAT, json=body("what?", url, url, url))
        error = error_of(response)
        assert (response.status_code, error["code"], begun) == (400, "image_too_large", [])
        assert "30000 pixels" in error["message"] and error["param"] == "messages.0.content.2.image_url"
        assert httpx.post(address + CHAT, json=body("what?", url, url)).status_code == 200


# ---- conversations as clients hold them


def test_the_official_clients_answer_can_be_sent_back(pipe, server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "user", "content": "what color is the circle?"}]
        message = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6).choices[0].message
        last = {"role": "user", "content": "two"}
        plain = [*messages, {"role": "assistant", "content": message.content}, last]
        expected = pipe.chat(plain, max_new_tokens=6)
        for again in (message, message.model_dump(), message.to_dict()):
            answer = client.chat.completions.create(model="tiny", messages=[*messages, again, last], max_tokens=6)
            assert answer.choices[0].message.content == expected
        nothing = {"role": "assistant", "content": None, "annotations": [], "tool_calls": []}
        answer = client.chat.completions.create(model="tiny", messages=[*messages, nothing, last], max_tokens=6)
        empty = [*messages, {"role": "assistant", "content": ""}, last]
        assert answer.choices[0].message.content == pipe.chat(empty, max_new_tokens=6)


@pytest.mark.parametrize(
    ("number", "message", "param"),
    [
        (1, {"role": "assistant", "content": "red", "tool_calls": [{"id": "x"}]}, "messages.1.tool_calls"),
        (1, {"role": "assistant", "content": "red", "refusal": "no"}, "messages.1.refusal"),
        (0, {"role": "user", "content": "red", "refusal": None}, "messages.0.refusal"),
        (0, {"role": "user", "content": None}, "messages.0.content"),
        (0, {"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text"),
    ],
)
def test_what_is_not_empty_or_not_the_assistants_is_refused(server, number, message, param):
    messages = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "yes"}] * 2
    messages[number] = message
    response = httpx.post(server[0] + CHAT, json=body() | {"messages": messages[:3]})
    assert response.status_code == 422 and error_of(response)["param"] == param, response.text


def test_errors_name_what_was_given_and_what_to_do(server):
    error = error_of(httpx.post(server[0] + CHAT, json=body(max_completion_tokens=5000)))
    assert error["param"] == "max_completion_tokens" and error["message"].startswith("max_completion_tokens=5000")
    error = error_of(httpx.post(server[0] + CHAT, json=body("what?", *[data_url(picture())] * 9)))
    assert "9 images" in error["message"] and "begin a new conversation" in error["message"]


def test_without_a_number_of_ids_an_answer_ends_where_the_context_does(server, pipe, monkeypatch):
    words = "red " * 30
    length = len(pipe.processor.builder.chat([Turn("user", words)], prompt=True).ids)
    monkeypatch.setattr(pipe.model.config.text_config, "max_position_embeddings", length + 3)
    answer = httpx.post(server[0] + CHAT, json=body(words, max_tokens=None)).json()
    assert answer["usage"]["prompt_tokens"] == length and answer["usage"]["completion_tokens"] <= 3
    for more, status in ((3, 200), (4, 400)):
        assert httpx.post(server[0] + CHAT, json=body(words, max_tokens=more)).status_code == status
    monkeypatch.setattr(pipe.model.config.text_config, "max_position_embeddings", length)
    refused = httpx.post(server[0] + CHAT, json=body(words, max_tokens=None))
    assert error_of(refused)["code"] == "context_length_exceeded"


def test_a_models_name_may_have_a_slash(pipe):
    with running(pipe, name="group/tiny") as (address, _):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            assert client.models.retrieve("group/tiny").id == client.models.list().data[0].id == "group/tiny"
        assert "/v1/models/{model}" in httpx.get(f"{address}/openapi.json").json()["paths"]
        response = httpx.get(f"{address}/v1/models/group/other")
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
        assert 'path="/v1/models/{model}",status="200"' in httpx.get(f"{address}/metrics").text


def test_paths_with_names_have_figures_of_their_own(server):
    for name in ("tiny", "other"):
        httpx.get(f"{server[0]}/v1/models/{name}")
    httpx.get(f"{server[0]}/nothing")
    text = httpx.get(f"{server[0]}/metrics").text
    for status in ("200", "404"):
        assert f'unitok_requests_total{{path="/v1/models/{{model}}",status="{status}"}}' in text
    assert 'path="other",status="404"' in text


def test_a_broken_model_is_an_error_and_not_an_answer(pipe, tmp_path, caplog):
    broken = make_pipeline(tmp_path)
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(torch.nan)
        broken.model.depth.head.weight.fill_(torch.nan)
    with running(broken, name="tiny") as (address, _):
        for path, one in ((CHAT, body()), (CHAT, body(temperature=1)), (IMAGES, {"prompt": "red"})):
            assert httpx.post(address + path, json=one).status_code == 500
    assert caplog.text.count("NonFiniteError: the model's scores are not finite") == 3
