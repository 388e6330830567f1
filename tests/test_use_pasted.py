"""Lines of a conversation: which words are pictures, in every way in which terminals write a dragged file."""

from pathlib import Path

import pytest

from unitok.commands.pasted import split_pictures, unquoted
from unitok.core.errors import UserError

NAMES = ["cat.png", "my cat.png", "it's.jpg", 'a "b".webp', "100% ä#1.png", "(1) [x] $HOME.png", "scan.tiff", "photo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures of me")
    for name in NAMES:
        (folder / name).write_bytes(b"")
    return folder


def backslashed(path: str) -> str:
    return "".join(c if c.isalnum() or c in "/._-" else f"\\{c}" for c in path)


WAYS = {
    "GNOME and KDE": lambda path: "'" + path.replace("'", "'\\''") + "'",
    "macOS, kitty": backslashed,
    "double quotes": lambda path: '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"',
    "file URL": lambda path: Path(path).as_uri(),
    "file URL of localhost": lambda path: Path(path).as_uri().replace("file://", "file://localhost"),
}


@pytest.mark.parametrize("way", WAYS)
def test_dragged_files(folder, way):
    paths = [folder / name for name in NAMES]
    words = [WAYS[way](str(path)) for path in paths]
    for path, word in zip(paths, words, strict=True):
        assert split_pictures(word) == ([path], "")
        assert split_pictures(f"what's in {word}  and what's left?") == ([path], "what's in and what's left?")
    assert split_pictures(" ".join(words) + " ") == (paths, "")
    assert split_pictures("\r\n".join(words)) == (paths, "")


def test_typed_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert split_pictures("cat.png") == ([Path("cat.png")], "")
    assert split_pictures("'cat.png', 'my cat.png'.") == ([Path("cat.png"), Path("my cat.png")], "")
    assert split_pictures("cat.png.") == ([Path("cat.png")], "")
    assert split_pictures("what is in cat.png?") == ([Path("cat.png")], "what is in ?")
    assert split_pictures("./cat.png ~/cat.png") == ([Path("./cat.png"), folder / "cat.png"], "")
    assert split_pictures(f"{folder}/my cat.png") == ([folder / "my cat.png"], ""), "spaces as they are"
    assert split_pictures("./photo") == ([Path("photo")], ""), "no ending, but a slash and a file"
    assert split_pictures("/nowhere/dog.png what is it?") == ([Path("/nowhere/dog.png")], "what is it?")
    assert unquoted(" 'my talk.json' ") == unquoted("my\\ talk.json") == unquoted("my talk.json") == "my talk.json"


@pytest.mark.parametrize(
    "text",
    [
        "what's in the picture,  and what's left?",
        "is 'red' or \"blue\" right?",
        "a dog.png that is not there",
        "what does this file: show?",
        "what is file:x.png or file: here?",
        "is it red/blue?",
        "a photo of that",
        "~nobody said 3 / 4",
        "say 'one",
        "a trailing \\",
        '"' + "long " * 200 + '"',
        "x\0y.png",
        "~\0",
        "~x\0.png",
        "",
    ],
)
def test_text_stays_as_it_is(folder, monkeypatch, text):
    monkeypatch.chdir(folder)
    assert split_pictures(text) == ([], text)


def test_what_is_no_picture_here(folder):
    refused = {
        "https://example.org/cat.png": "download it first",
        "file://elsewhere/cat.png": "another machine",
        "file://[bad/cat.png": "no address of a file",
        f"'{folder}'": "is a folder",
    }
    for line, message in refused.items():
        with pytest.raises(UserError, match=message):
            split_pictures(f"what is {line}")
