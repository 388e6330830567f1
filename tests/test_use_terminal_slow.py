"""`unitok chat` in a real terminal (tmux): streaming, Ctrl-C in an answer and at the prompt, dragged files, status."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from pipelines import make_pipeline, picture

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, a terminal that programs can type into"),
]
START, SOON = 180.0, 60.0  # seconds, on a busy machine


class Terminal:
    """A shell in a window of tmux's own server, which ends with it."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "tmux")
        start = [f"cd {shlex.quote(str(folder))}", f"export PYTHONPATH={shlex.quote(str(ROOT))} OMP_NUM_THREADS=1"]
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "200", "sh")
        self.type(f"{' && '.join(start)}; PS1='shell> '")
        self.wait_for("shell>")

    def tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-S", self.socket, *words], capture_output=True, text=True, check=True)
        return done.stdout

    def type(self, text: str) -> None:
        """A line, and the return key."""
        self.press("-l", text)
        self.tmux("send-keys", "Enter")

    def press(self, *keys: str) -> None:
        self.before = len(self.lines())
        self.tmux("send-keys", *keys)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.tmux("capture-pane", "-p").splitlines() if line.strip()]

    def wait_for(self, last: str, seconds: float = SOON) -> list[str]:
        """The screen, once its last line is `last` below what was there when keys were last pressed."""
        deadline = time.monotonic() + seconds
        while len(lines := self.lines()) <= self.before or lines[-1] != last:
            assert time.monotonic() < deadline, lines
            time.sleep(0.1)
        return lines


@pytest.fixture
def terminal(tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.tmux("kill-server")


def test_a_conversation(terminal, tmp_path):
    make_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    picture("red").save(tmp_path / "my red.png")
    chat = f"{shlex.quote(sys.executable)} -m unitok chat --model model"
    terminal.type(f"{chat} --max-new-tokens 1900")
    terminal.wait_for("you:", START)

    terminal.type(f"'{tmp_path}/my red.png' ")
    terminal.wait_for("you [my red.png]:")
    terminal.type("what color is the circle?")  # random weights: a long answer
    deadline = time.monotonic() + SOON
    # More than is compared below: when Ctrl-C comes, the last piece may be kept and not yet shown.
    while terminal.lines()[-1].startswith("you") or len("".join(terminal.lines()[terminal.before :])) < 80:
        assert time.monotonic() < deadline, terminal.lines()
        time.sleep(0.02)
    terminal.press("C-c")
    lines = terminal.wait_for("you:")
    # joined: the two characters may stand on both sides of the window's edge. A piece may have been on its way.
    assert "^C" in "".join(lines[:-1])[-40:], "the answer was stopped while it was written"

    terminal.type("/generate a photo of a red circle")
    lines = terminal.wait_for("you [a_photo_of_a_red_circle.png]:")
    assert "image position 4/4" in lines and "a_photo_of_a_red_circle.png" in lines
    assert Image.open(tmp_path / "a_photo_of_a_red_circle.png").text["Description"] == "a photo of a red circle"
    terminal.type("/save talk.jsonl")
    lines = terminal.wait_for("you [a_photo_of_a_red_circle.png]:")
    saved = json.loads((tmp_path / "talk.jsonl").read_text())
    assert saved["image"] == "my red.png" and len(saved["conversations"]) == 2
    stopped = saved["conversations"][1]["content"]
    assert 0 < len(stopped) and stopped[:40] in "".join(lines)
    terminal.type("/reset")
    terminal.wait_for("you:")
    terminal.type("/save again.jsonl")
    lines = terminal.wait_for("you:")
    assert lines[-2] == "unitok: error: /save: nothing has been said yet"
    terminal.type("/paint")
    assert "/paint: no such command" in " ".join(terminal.wait_for("you:")[-4:])

    terminal.press("C-c")
    terminal.wait_for("shell>")
    terminal.type("echo status $?")
    lines = terminal.wait_for("shell>")
    assert lines[-2] == "status 0" and not any("Traceback" in line for line in lines)

    terminal.type(f"{chat} --max-new-tokens 4")  # Ctrl-D leaves in the same way
    terminal.wait_for("you:", START)
    terminal.press("C-d")
    terminal.wait_for("shell>")
    terminal.type("echo status $?")
    assert terminal.wait_for("shell>")[-2] == "status 0"
