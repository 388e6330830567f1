"""`unitok chat`: one question, or a conversation on the terminal in which pictures are also drawn."""

import argparse
import importlib.util
import io
import json
import os
import sys
from collections.abc import Generator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from unitok.commands.pasted import split_pictures, unquoted
from unitok.commands.use import file_stem, load_pipeline, progress, small_model
from unitok.core.errors import UserError
from unitok.core.signals import interrupt_ends
from unitok.core.texts import check_unicode

if TYPE_CHECKING:
    from unitok.mllm.session import ChatSession

FILE = "file"  # entry of a picture's info: where it is on the disk
HELP = """\
QUESTION          ask; earlier turns are remembered
FILE ...          pictures for the next question, alone or within it: type paths,
                  or drag files into the window; /image FILE ... is the same
/generate PROMPT  draw a picture, which then waits for the next question
/save FILE        write the conversation as one line of JSON, with paths of pictures
/reset            begin a new conversation
/help             this
/quit             leave, as Ctrl-D does
Ctrl-C stops an answer or a drawing; at the prompt it leaves."""


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `unitok chat`."""
    from unitok.cli import positive_int

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = f"Ask one question, or without one hold a conversation (exit code 0 when you leave):\n\n{HELP}"
    parser.add_argument("question", nargs="?", metavar="QUESTION")
    parser.add_argument("--model", default=small_model(), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128, help="default: %(default)s")
    parser.add_argument("--out", default=".", metavar="DIR", help="where /generate writes pictures (default: here)")
    parser.add_argument("--seed", type=int, default=0, help="of the first /generate, the next S + 1 (default: 0)")
    parser.set_defaults(run=("chat", "chat"), positional="question")


def chat(arguments: argparse.Namespace) -> int:
    """Answer one question, or hold a conversation on the terminal."""
    check_unicode(arguments.question or "", "question")
    if arguments.question is not None and not arguments.question.strip():
        raise UserError("empty question: say what you want to know")
    with interrupt_ends():
        images = [_load(Path(name)) for name in arguments.image]
    session = load_pipeline(arguments.model, arguments.precision, arguments.weights).new_session()
    if arguments.question is not None:
        print_answer(session.stream(arguments.question, images, max_new_tokens=arguments.max_new_tokens))
        return 0
    return converse(Conversation(session, images, arguments.max_new_tokens, Path(arguments.out), arguments.seed))


class Conversation:
    """What a line does. Pictures wait for the next question, before whose text they stand."""

    def __init__(
        self,
        session: "ChatSession",
        waiting: list[Image.Image],
        max_new_tokens: int = 128,
        out: Path = Path("."),
        seed: int = 0,
    ) -> None:
        self.session, self.waiting, self.max_new_tokens = session, waiting, max_new_tokens
        self.out, self.seed = out, seed
        self.saved: set[Path] = set()
        self.commands = {
            "/image": self._image,
            "/generate": self._generate,
            "/save": self._save,
            "/reset": self._reset,
            "/help": lambda _: print(HELP),
            "/quit": self._quit,
        }
        self.left = False

    def take(self, line: str) -> None:
        """Do what a line says. Raises UserError for what cannot be done; the conversation then is as it was."""
        command, rest = (*line.split(maxsplit=1), "", "")[:2]
        command = command.lower() if command[:1] == "/" else command
        if command[:1] == "/" and command[1:].isalpha():
            if command not in self.commands:
                raise UserError(f"{command}: no such command; there are {', '.join(self.commands)}")
            self.commands[command](rest.strip())
            return
        paths, question = split_pictures(line)
        pictures = [_load(path) for path in paths]
        if question:
            self._ask(question, [*self.waiting, *pictures])
        else:
            self.waiting += pictures

    def _ask(self, question: str, images: list[Image.Image]) -> None:
        turns = len(self.session.messages)
        try:
            print_answer(self.session.stream(question, images, max_new_tokens=self.max_new_tokens))
        finally:
            if len(self.session.messages) > turns:  # asked, also where the answer was stopped
                self.waiting.clear()

    def _image(self, rest: str) -> None:
        if not rest:
            raise UserError("/image: name a file, as in `/image photo.png`")
        paths, text = split_pictures(rest)
        if not paths:
            paths, text = [Path(unquoted(rest))], ""  # of whatever name
        if text:
            raise UserError(f"/image: {text!r} names no picture; ask on a line of its own")
        self.waiting += [_load(path) for path in paths]

    def _generate(self, prompt: str) -> None:
        from unitok.mllm.many import image_records, write_image

        if not prompt:
            raise UserError("/generate: say what to draw, as in `/generate a photo of a red circle`")
        pipeline = self.session.pipeline
        # On a GPU compiling takes a minute, longer than a few pictures.
        (image,) = pipeline.generate_images([prompt], seed=self.seed, on_position=progress(), graph=False)
        names = (f"{file_stem(prompt)}{'' if n == 1 else f'_{n}'}.png" for n in count(1))
        path = self.out
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            path = next(self.out / name for name in names if not (self.out / name).exists())
            write_image(image, path, image_records(pipeline, [prompt], [self.seed])[0], prompt)
        except OSError as error:
            raise UserError(f"/generate: {path} cannot be written ({error.strerror}); give --out a folder") from error
        self.seed += 1
        image.info[FILE] = str(path)
        self.waiting.append(image)
        print(_shown(path), flush=True)

    def _save(self, rest: str) -> None:
        if not rest:
            raise UserError("/save: name a file, as in `/save talk.jsonl`")
        if not self.session.messages:
            raise UserError("/save: nothing has been said yet")
        path = Path(unquoted(rest))
        try:
            if path.exists() and path.resolve() not in self.saved:
                raise UserError(f"/save: {path} is there already; name another file")
            path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(as_record(self.session.messages, path), ensure_ascii=False)
            path.write_bytes(f"{line}\n".encode())
        except OSError as error:
            raise UserError(f"/save: {path} cannot be written ({error.strerror})") from error
        except UnicodeEncodeError as error:
            raise UserError("/save: a name of a file is not UTF-8, which JSON must be; rename the file") from error
        except ValueError as error:  # a NUL
            if isinstance(error, UserError):
                raise
            raise UserError(f"/save: {str(path)!r} cannot be a file's name ({error})") from error
        self.saved.add(path.resolve())
        print(_shown(path), flush=True)

    def _quit(self, _: str) -> None:
        self.left = True

    def _reset(self, _: str) -> None:
        self.session.reset()
        self.waiting.clear()
        self.saved.clear()  # a file of the former conversation stays


def converse(conversation: Conversation) -> int:
    """Lines from the standard input until it ends, or until Ctrl-C at the prompt.

    Ctrl-C during an answer stops it, and it stays as far as it got.
    """
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not UTF-8 then costs its line, not the conversation
        sys.stdin.reconfigure(errors="surrogateescape")
    if terminal:
        if importlib.util.find_spec("readline"):
            import readline  # noqa: F401  (input() then has line editing, history, and pasting of several lines)
        print("Ask, or /help; Ctrl-D leaves.", file=sys.stderr)
    while not conversation.left:
        names = ", ".join(_shown(Path(image.info[FILE]).name) for image in conversation.waiting if FILE in image.info)
        try:
            line = input(f"you [{names}]: " if names else "you: ") if terminal else input()
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if terminal else "")
            return 0
        try:
            conversation.take(line.strip())
        except UserError as error:  # one bad line does not end the conversation
            print(f"unitok: error: {error}", file=sys.stderr, flush=True)
        except BrokenPipeError:  # nobody reads what we say
            raise
        except OSError as error:
            print(f"unitok: error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(flush=True)
    return 0


def print_answer(deltas: Generator[str, None, None]) -> None:
    """The pieces of an answer as they come, then the end of the line."""
    with closing(deltas):  # so that an answer that is stopped is put on record at once
        for delta in deltas:
            print(delta, end="", flush=True)
    print(flush=True)


def as_record(messages: list[dict[str, Any]], file: Path) -> dict[str, Any]:
    """A conversation as a line of JSON Lines data (docs/data.md), to be written to `file`.

    Paths are relative to the file. A source of training data has one picture a record ("image"); several stand under
    "images", for which there is no such source.
    """
    turns, paths = [], []
    for message in messages:
        parts = message["content"]
        text = parts if isinstance(parts, str) else ""
        for part in () if isinstance(parts, str) else parts:
            if part["type"] == "image":
                paths.append(os.path.relpath(part["image"].info[FILE], file.resolve().parent))
            text += "<image>\n" if part["type"] == "image" else part["text"]
        turns.append({"role": message["role"], "content": text})
    images = {"image": paths[0]} if len(paths) == 1 else {"images": paths} if paths else {}
    return {"id": file.stem, **images, "conversations": turns}


def _shown(name: Path | str) -> str:
    """A name of a file as it can be printed: it need not be UTF-8."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def _load(path: Path) -> Image.Image:
    from unitok.data.transforms import load_image

    image = load_image(path)
    image.info[FILE] = str(path.absolute())
    return image
