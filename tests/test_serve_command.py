"""`unitok serve`: its options, its end, and that the page's files are part of the package."""

import ast
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from pipelines import make_pipeline
from serving import eventually

from unitok.cli import main as cli
from unitok.commands.serve import read_key
from unitok.core.errors import ConfigError
from unitok.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "--port 70000: expected 0"),
        (["--port", "x"], "--port"),
        (["--host", "no such host"], "cannot listen there"),
        (["--host", "192.0.2.1"], "cannot listen there"),
        (["--max-batch", "0"], "max_batch=0: expected"),
        (["--timeout", "nan"], "request_seconds=nan"),
        (["--api-key-file", "missing.txt"], "--api-key-file missing.txt: cannot be read"),
        (["--model", "missing"], "missing"),
    ],
)
def test_a_wrong_option_is_one_line(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = options if "--port" in options else [*options, "--port", "0"]
    assert cli(["serve", *given]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen there (Address already in use)" in capsys.readouterr().err


def test_keys_must_be_worth_the_name(tmp_path, capsys):
    (tmp_path / "key").write_text("short\n")
    assert cli(["serve", "--port", "0", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "at least 8 characters" in capsys.readouterr().err
    assert "short" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="ASCII"):
        ServeSettings(api_key="\u00e4" * 10)


def test_white_space_around_a_key_is_none_of_it(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("secret key 1 \r\n")
    for given, found in (("secret key 1\n", "secret key 1"), (" \n", None), ("", None)):
        monkeypatch.setenv("UNITOK_API_KEY", given)
        assert read_key(None) == found
    assert read_key(str(tmp_path / "key")) == "secret key 1"


def test_the_pages_files_are_packaged():
    (call,) = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "package_data"
    ]
    patterns = ast.literal_eval(call.value)["unitok"]
    folder = ROOT / "unitok" / "serve" / "web"
    packaged = {path for pattern in patterns for path in (ROOT / "unitok").glob(pattern)}
    assert {path.name for path in folder.iterdir()} >= {"index.html", "style.css", "app.js"}
    assert set(folder.iterdir()) <= packaged


def test_the_page_loads_nothing_from_elsewhere():
    for path in (ROOT / "unitok" / "serve" / "web").iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text, path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_answer_end(tmp_path, number):
    make_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "unitok", "serve", "--model", str(tmp_path / "model"), "--port", port]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "UNITOK_API_KEY": "a-key-of-tests"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer a-key-of-tests"}, timeout=60
        ) as client:

            def health():
                try:
                    return client.get("/health").json()
                except httpx.TransportError:
                    return {"running": 0}

            eventually(lambda: "status" in health(), 60)
            answers = []
            body = {"model": "model", "messages": [{"role": "user", "content": "red"}], "max_tokens": 500}
            body |= {"n": 16, "temperature": 5.0}
            thread = threading.Thread(target=lambda: answers.append(client.post("/v1/chat/completions", json=body)))
            thread.start()
            eventually(lambda: health()["running"] == 1)
            server.send_signal(number)
            thread.join(60)
            assert answers[0].status_code == 200
        assert server.wait(30) == 0
        output = server.stdout.read()
        assert "Traceback" not in output and "Finishing what runs" in output, output
    finally:
        server.kill()
