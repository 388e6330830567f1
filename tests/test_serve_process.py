"""The model in a process of its own: it answers as in this one, stops for nobody, and its end is told."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import httpx
import pytest
import torch
from pipelines import make_pipeline, picture
from serving import eventually, question, running

from unitok.core.errors import UserError
from unitok.mllm.pipeline import UniTokPipeline
from unitok.serve import child
from unitok.serve.jobs import ChatJob
from unitok.serve.process import RemoteModels

CHAT, IMAGES, RECONSTRUCT = "/v1/chat/completions", "/v1/images/generations", "/v1/tokenizer/reconstruct"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("process") / "model"
    make_pipeline(path.parent).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def remote(folder):
    model = RemoteModels(partial(UniTokPipeline.from_pretrained, folder), 4, 1, workers=2)
    yield model
    model.close()
    assert not model.alive


def run(model, *messages, cancel_after=None, **changes):
    """The events of conversations that go through `model.run` together; the seconds it took."""

    async def ask():
        jobs = [ChatJob(text, **({"max_new_tokens": 6, "sampling": {}, "seed": 0} | changes)) for text in messages]
        if cancel_after is not None:
            threading.Timer(cancel_after, lambda: [setattr(job, "cancelled", True) for job in jobs]).start()
        start = time.monotonic()
        await asyncio.to_thread(model.run, jobs)
        took = time.monotonic() - start
        await asyncio.sleep(0)
        return [[job.events.get_nowait() for _ in range(job.events.qsize())] for job in jobs], took

    return asyncio.run(ask())


def answers(server):
    """Every kind of answer, without what differs from call to call."""
    from serving import data_url

    url = data_url(picture(3))
    body = {
        "model": "model",
        "messages": question("red", url, url),
        "max_tokens": 8,
        "n": 2,
        "temperature": 1.5,
        "seed": 3,
    }
    found = [httpx.post(server + CHAT, json=body, timeout=60).json() for _ in range(2)]
    streamed = httpx.post(server + CHAT, json=body | {"stream": True}, timeout=60).text
    found.append(httpx.post(server + IMAGES, json={"prompt": "red", "n": 3, "seed": 5}, timeout=60).json())
    found.append(httpx.post(server + RECONSTRUCT, json={"image": url}, timeout=60).json())
    found.append(httpx.post(server + IMAGES, json={"prompt": "r " * 7000}, timeout=60).json())  # refused by the model
    for one in found:
        one.pop("id", None), one.pop("created", None)
    pieces = [line.split('"delta": ')[1] for line in streamed.splitlines() if '"delta"' in line]
    return found, sorted(pieces)


def test_it_answers_as_in_this_process(folder, remote):
    with running(UniTokPipeline.from_pretrained(folder), name="model") as (address, server):
        expected, facts = answers(address), server.service.facts
    with running(remote, name="model") as (address, server):
        assert server.service.facts == facts
        assert answers(address) == expected
    assert expected[0][-1]["error"]["code"] == "context_length_exceeded" and "choices" in expected[0][0]


def test_only_what_is_streamed_comes_in_pieces(remote):
    (streamed,), _ = run(remote, question("red"), max_new_tokens=30, sampling={"do_sample": True, "temperature": 3.0})
    (whole,), _ = run(
        remote, question("red"), max_new_tokens=30, sampling={"do_sample": True, "temperature": 3.0}, stream=False
    )
    assert len(streamed) > 3 and len(whole) == 2
    assert "".join(value[1] for kind, value in streamed if kind == "delta") == whole[0][1][1]
    assert streamed[-1] == whole[-1]


def test_clients_that_have_gone_stop_their_work(remote):
    long = {"max_new_tokens": 900, "n": 4}  # the likeliest answer of this model has no end
    events, took = run(remote, question("red"), cancel_after=0.3, **long)
    assert took < 5 and all(kind == "delta" for kind, _ in events[0])
    (again,), _ = run(remote, question("red"))
    assert again[-1][0] == "done"


def test_an_unforeseen_error_is_told_and_the_next_batch_runs(remote):
    with pytest.raises(RuntimeError, match=r"(?s)in the model's process: Traceback.*NoneType"):
        run(remote, None)
    (events,), _ = run(remote, question("red"))
    assert events[-1][0] == "done"


def test_what_cannot_be_loaded_is_the_same_mistake(tmp_path):
    with pytest.raises(UserError) as here:
        UniTokPipeline.from_pretrained(tmp_path / "missing")
    with pytest.raises(UserError) as there:
        RemoteModels(partial(UniTokPipeline.from_pretrained, tmp_path / "missing"), 4, 1)
    assert str(there.value) == str(here.value)


def test_the_end_of_the_process_ends_the_server(folder):
    model = RemoteModels(partial(UniTokPipeline.from_pretrained, folder), 4, 1)
    try:
        with running(model, name="model") as (address, server):
            asked = []
            body = {"model": "model", "messages": question("red"), "max_tokens": 500, "n": 4, "temperature": 0}
            thread = threading.Thread(target=lambda: asked.append(httpx.post(address + CHAT, json=body, timeout=60)))
            thread.start()
            eventually(lambda: server.service.scheduler.running)
            os.kill(model.models[0]._process.pid, signal.SIGKILL)
            thread.join(30)
            assert asked[0].status_code in (500, 503) and "error" in asked[0].json()
            eventually(lambda: server.lost_model and server.should_exit)
        with pytest.raises(RuntimeError, match="exit code -9"):
            run(model, question("red"))
    finally:
        model.close()


def test_a_process_that_hangs_does_not_keep_the_server(folder):
    model = RemoteModels(partial(UniTokPipeline.from_pretrained, folder), 4, 1)
    try:
        with running(model, name="model", grace_seconds=0.5) as (address, server):
            os.kill(model.models[0]._process.pid, signal.SIGSTOP)
            body = {"model": "model", "messages": question("red")}
            asked = []
            thread = threading.Thread(target=lambda: asked.append(httpx.post(address + CHAT, json=body, timeout=60)))
            thread.start()
            eventually(lambda: server.service.scheduler.running)
            server.drain()
            thread.join(10)
            assert asked[0].status_code == 503
            model.kill()  # as a second signal does; without one it takes some seconds more
        assert not model.alive
    finally:
        model.close()


def test_events_of_a_batch_that_was_left_are_no_answer(remote, monkeypatch):
    """An error while events are handed on leaves some in the pipe."""

    class BrokenJob(ChatJob):
        def emit(self, kind, value):
            raise MemoryError

    async def ask():
        with pytest.raises(MemoryError):
            remote.run([BrokenJob(question("red"), 6, {}, 0, stream=False)])

    for _ in remote.models:  # whichever is next
        monkeypatch.setattr("unitok.serve.process._order", lambda job: (ChatJob, _fields(job)))
        asyncio.run(ask())
    monkeypatch.undo()
    (expected,), _ = run(remote, question("two"))
    for _ in remote.models:
        assert run(remote, question("two"))[0] == [expected]


def _fields(job):
    return {name: getattr(job, name) for name in ("messages", "max_new_tokens", "sampling", "seed", "stream")}


def test_each_copy_has_a_gpu_of_its_own_as_far_as_there_are(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for number, launched in ((0, {}), (1, {}), (2, {}), (0, {"LOCAL_RANK": "1"})):
        monkeypatch.setattr(os, "environ", launched)  # that of the process
        child._take_gpu(number)
        assert os.environ["LOCAL_RANK"] == str(taken[-1])
    assert taken == [0, 1, 0, 1]


PROGRAM = """
import sys
from functools import partial
from unitok.mllm.pipeline import UniTokPipeline
from unitok.serve.process import RemoteModels

if __name__ == "__main__":
    models = RemoteModels(partial(UniTokPipeline.from_pretrained, sys.argv[1]), 4, 1)
    print("ready", models.models[0]._process.pid, flush=True)
"""


def test_a_program_that_forgets_to_close_it_ends_all_the_same(folder, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    word, process = found.stdout.split()
    assert word == "ready" and not os.path.exists(f"/proc/{process}") and "Traceback" not in found.stderr
