"""README, "Use it": its commands and its Python examples run, in the order in which they stand there."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image
from pipelines import make_pipeline

from unitok.cli import main

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Use it\n")[1].split("\n## ")[0]
COMMANDS = re.search(r"```\n(.*?)```", SECTION, re.DOTALL).group(1).splitlines()
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the model where the README has it: that of the repository, or a tiny one."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "assets").mkdir()
    if (ROOT / "assets" / "shapes-mini").is_dir():
        (folder / "assets" / "shapes-mini").symlink_to(ROOT / "assets" / "shapes-mini")
    else:
        make_pipeline(folder).save_pretrained(folder / "assets" / "shapes-mini")
    (folder / "prompts.txt").write_text("a photo of a red circle\na photo of two blue squares\n")
    return folder


def words_of(command: str) -> list[str]:
    """The arguments, as a shell in the present folder would give them."""
    words = shlex.split(command, comments=True)
    assert words[0] == "unitok"
    return [name for word in words[1:] for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]


def test_commands(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    lines = iter(["/generate a red circle", "what color is the circle?", "/save out/talk.jsonl"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    ran = set()
    for command in COMMANDS:
        words = words_of(command)
        ran.add(words[0])
        if words[0] != "serve":  # tests/test_serve_command.py runs it
            assert main(words) == 0, (command, capsys.readouterr().err)
    assert ran == {"generate", "chat", "reconstruct", "serve"}
    assert (
        len(list((folder / "out" / "images").glob("*.png"))) == 6
        and len(list((folder / "out" / "many").glob("*.png"))) == 2
    )
    for name in ("red_circle.png", "grid.png", "pairs.png", "psnr.json", "talk.jsonl", "a_red_circle.png"):
        assert (folder / "out" / name).is_file(), name


def test_python_examples(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    picture = Path("out/red_circle.png")
    if not picture.exists():  # this test alone
        picture.parent.mkdir()
        Image.new("RGB", (32, 32), "red").save(picture)
    assert len(EXAMPLES) == 3
    for number, example in enumerate(EXAMPLES):
        assert 5 <= len(example.splitlines()) <= 10
        script = folder / f"example_{number}.py"
        script.write_text(example)
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 3 and "torch.Size([1, " in "".join(printed), printed
    sizes = {Image.open(folder / "out" / name).size for name in ("drawn_0.png", "drawn_1.png", "again.png")}
    assert len(sizes) == 1
