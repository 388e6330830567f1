"""The load test on a tiny model: no wrong, crossed or lost answer, memory that stays, a clean end. How fast it goes is
for the script to say (`--least-ratio`), on a machine that does nothing else."""

import json
from collections import Counter

import pytest
from pipelines import make_pipeline

from unitok.scripts.load_test import Ask, Outcome, failures, main, summary


@pytest.mark.slow
def test_many_clients_get_their_own_answers(tmp_path):
    make_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    out = tmp_path / "figures.json"
    options = ["--clients", "32", "--seconds", "8", "--out", str(out), "--most-growth", "1.4"]
    assert main(["--model", str(tmp_path / "model"), *options]) == 0
    figures = json.loads(out.read_text())
    assert set(figures["counts"]) <= {"right", "refused"} and figures["counts"]["right"] > 100
    assert figures["ratio"] > 0
    memory = figures["memory_mib"]  # it still warms up: oneDNN keeps what it made for each shape
    assert memory["last quarter"] < 1.4 * memory["second quarter"]
    assert figures["server_exit_code"] == 0


def test_answers_are_compared():
    one = Ask("/v1/chat/completions", {}, "red")
    assert one.fits("red") and not one.fits("blue") and not one.fits([])


def test_streams_are_held_to_the_whole_answer():
    one = Ask("/v1/chat/completions", {}, "red")
    chunks = [f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}" for piece in ("", "re", "d")]
    chunks.append('data: {"choices": [{"delta": {}}]}')
    assert one.answer("\n\n".join([*chunks, "data: [DONE]", ""]), stream=True) == "red"
    assert one.answer("\n\n".join(chunks), stream=True) is None and not one.fits(None)
    assert not Ask("/v1/images/generations", {}, []).fits(None)


def test_a_server_that_has_ended_is_told():
    nothing = summary(Outcome(1.0), Outcome(2.0, Counter({"lost: ConnectError": 7})), 4, 1)
    assert nothing["p95_seconds"] is None and nothing["ratio"] == 0 and nothing["memory_mib"]["last quarter"] is None
    told = failures(nothing | {"failed": nothing["counts"], "server_exit_code": -9}, 0, 1.1)
    assert told == ["7 x lost: ConnectError", "the server ended with exit code -9"]


def test_what_makes_the_test_fail():
    figures = {"failed": {}, "server_exit_code": 0, "ratio": 2.0}
    figures["memory_mib"] = {"second quarter": 100.0, "last quarter": 110.0}
    assert failures(figures, 2.0, 1.1) == []
    (slow,) = failures(figures, 2.1, 1.1)
    (large,) = failures(figures, 2.0, 1.05)
    assert "expected at least 2.1" in slow and "1.100 times" in large
    assert failures(figures | {"failed": {"crossed": 2}, "server_exit_code": 1}, 0, 2) == [
        "2 x crossed", "the server ended with exit code 1",
    ]  # fmt: skip
