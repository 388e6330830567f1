"""A queue that is full, work that takes too long, clients that leave, a server that stops."""

import asyncio
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from pipelines import make_pipeline
from serving import chat, error_of, eventually, running

from unitok.serve.guard import Guard
from unitok.serve.metrics import Metrics
from unitok.serve.settings import ServeSettings

pytestmark = pytest.mark.usefixtures("nothing_failed_inside")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = make_pipeline(tmp_path_factory.mktemp("queue"))
    pipe.model.config.text_config.max_position_embeddings = 500
    return pipe


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


def test_what_is_no_request_of_the_model_is_not_counted(slow):
    """Pages and what has no key would else keep everybody out."""
    address, server, model = slow(max_queue=1, max_batch=1, api_key="a-key-of-tests")
    model.gate.set()
    host, port = address.removeprefix("http://").split(":")
    held = []
    for head in ("GET /", "POST /", "GET /health", "POST /v1/chat/completions", "PUT /"):
        held.append(socket.create_connection((host, int(port)), timeout=10))
        held[-1].sendall(f"{head} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode())
    path, body = chat()
    try:
        time.sleep(0.3)
        response = httpx.post(address + path, json=body, headers={"Authorization": "Bearer a-key-of-tests"})
        assert response.status_code == 200, response.text
    finally:
        for one in held:
            one.close()


@pytest.mark.parametrize(("each", "sent"), [(0.6, 6), (60.0, 0)])
def test_who_reads_slowly_gets_all_and_who_does_not_read_is_given_up(each, sent):
    seen = []

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200})
        for number in range(5):
            await send({"type": "http.response.body", "body": b"x", "more_body": number < 4})

    async def send(message):
        await asyncio.sleep(each)
        seen.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    guard = Guard(app, ServeSettings(request_seconds=3.0), SimpleNamespace(draining=False), Metrics(), frozenset())
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    start = time.monotonic()
    asyncio.run(guard(scope, receive, send))
    assert guard.active == 0 and len(seen) == sent and time.monotonic() - start < 20


def test_the_connection_of_a_client_that_does_not_read_ends(pipe):
    with running(pipe, name="tiny", request_seconds=2.0) as (address, server):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as one:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:  # pages that are asked for and not read, until no more are taken
                    one.send(b"GET /app.js HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
            eventually(lambda: server.server_state.connections)
            eventually(lambda: not server.server_state.connections)


def test_a_stream_that_nobody_reads_ends_and_so_does_its_work(pipe):
    class Endless:
        alive, jobs = True, ()

        def run(self, jobs):
            self.jobs = jobs
            while not jobs[0].cancelled:
                jobs[0].emit("delta", (0, "x" * 50_000))
                time.sleep(0.002)

    with running(pipe, name="tiny", request_seconds=1.0) as (address, server):
        server.service.scheduler.model = model = Endless()
        host, port = address.removeprefix("http://").split(":")
        data = json.dumps(chat(stream=True)[1])
        with socket.create_connection((host, int(port))) as one:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            one.sendall(f"{head}{len(data)}\r\n\r\n{data}".encode())
            eventually(lambda: model.jobs)
            eventually(lambda: model.jobs[0].cancelled and not server.server_state.connections, 20)
        eventually(lambda: server.service.scheduler.idle)


def test_what_takes_too_long_gets_504(slow):
    address, server, model = slow(request_seconds=2.0)
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
        httpx.post(address + path, json=body, timeout=1.5)
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
def echo(pipe, request):
    seconds = getattr(request, "param", 60.0)
    with running(pipe, name="tiny", request_seconds=seconds, max_queue=200) as (address, server):
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


@pytest.mark.parametrize("echo", [1.0], indirect=True)
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
