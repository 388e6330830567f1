"""The load test on a tiny model: no wrong, crossed or lost answer, faster than one at a time, a clean end."""

import json

import pytest
from pipelines import make_pipeline

from unitok.scripts.load_test import Ask, main

pytestmark = pytest.mark.slow


def test_many_clients_get_their_own_answers(tmp_path):
    make_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    out = tmp_path / "figures.json"
    options = ["--clients", "32", "--seconds", "8", "--out", str(out)]
    assert main(["--model", str(tmp_path / "model"), *options]) == 0
    figures = json.loads(out.read_text())
    assert set(figures["counts"]) <= {"right", "refused"} and figures["counts"]["right"] > 100
    assert figures["ratio"] > 1.5, figures  # most of a tiny model's time is not the model
    memory = figures["memory_mib"]  # it still warms up: oneDNN keeps what it made for each shape
    assert memory["last quarter"] < 1.4 * memory["second quarter"]
    assert figures["server_exit_code"] == 0


def test_answers_are_compared():
    one = Ask("/v1/chat/completions", {}, "red")
    assert one.fits("red") and not one.fits("blue") and not one.fits([])
