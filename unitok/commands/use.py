"""`unitok reconstruct`, `generate` and `chat`: a trained model in use."""

import argparse
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from unitok.core.errors import UserError
from unitok.data.transforms import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline
    from unitok.mllm.session import ChatSession


def reconstruct(arguments: argparse.Namespace) -> int:
    """Write the reconstruction of every image."""
    import torch

    from unitok.core.pretrained import load_model_folder
    from unitok.data.transforms import eval_transform, load_image, to_pil
    from unitok.tokenizer import UniTok

    images = [load_image(Path(name)) for name in arguments.images]
    names = [f"{Path(name).stem}_reconstruction.png" for name in arguments.images]
    targets = output_files(arguments.out, names)
    tokenizer = load_model_folder(UniTok, arguments.tokenizer).eval()
    with torch.no_grad():
        for image, target in zip(images, targets, strict=True):
            pixels = eval_transform(image, tokenizer.config.image_size, tokenizer.config.preprocess).unsqueeze(0)
            _save(to_pil(tokenizer.reconstruct(pixels)[0]), target)
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """Write `--num` images per prompt."""
    from unitok.mllm.many import generate_many

    prompts = list(arguments.prompts) + _prompts_of(arguments.from_file)
    if not prompts:
        raise UserError("no prompt: give one, as in `unitok generate 'a photo of a red circle'`, or --from-file FILE")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("empty prompt: say what the image should show")
    if arguments.num < 1:
        raise UserError(f"--num {arguments.num}: expected at least 1")
    jobs = [(prompt, number) for prompt in prompts for number in range(arguments.num)]
    targets = output_files(arguments.out, [_file_name(prompt, n, arguments.num) for prompt, n in jobs])
    pipeline = _pipeline(arguments)
    texts, seeds = [prompt for prompt, _ in jobs], [arguments.seed + number for _, number in jobs]
    sampler = {
        "guidance_scale": arguments.guidance,
        "temperature": arguments.temperature,
        "depth_temperature": arguments.depth_temperature,
    }
    graph = False if arguments.no_graph else None
    if arguments.from_file:  # many: each file is written when it is there, and what is there is not made again
        if {target.suffix for target in targets} != {".png"} or len({target.parent for target in targets}) > 1:
            raise UserError(
                f"--out {arguments.out}: with --from-file images are .png files in one folder; give a folder"
            )
        names = [target.name for target in targets]
        generate_many(
            pipeline,
            texts,
            targets[0].parent,
            seeds,
            names,
            graph=graph,
            on_image=lambda _, path: print(path, flush=True),
            **sampler,
        )
        return 0
    images = pipeline.generate_images(texts, seed=seeds, on_position=_progress(), graph=graph, **sampler)
    for image, target in zip(images, targets, strict=True):
        _save(image, target)
    return 0


def _pipeline(arguments: argparse.Namespace) -> "UniTokPipeline":
    """The model that a command uses, in the precision that its options ask for."""
    import torch

    from unitok.mllm.pipeline import UniTokPipeline

    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    return UniTokPipeline.from_pretrained(arguments.model, dtype=dtype, weights=arguments.weights)


def _progress() -> Callable[[int, int], None] | None:
    """Shows on a terminal how many image positions of a batch are sampled."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\rposition {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def chat(arguments: argparse.Namespace) -> int:
    """Answer one question, or hold a conversation on the terminal."""
    from unitok.data.transforms import load_image

    if arguments.question is not None and not arguments.question.strip():
        raise UserError("empty question: say what you want to know")
    images = [load_image(Path(name)) for name in arguments.image]
    session = _pipeline(arguments).new_session()
    if arguments.question is not None:
        _print_answer(session.stream(arguments.question, images, max_new_tokens=arguments.max_new_tokens))
        return 0
    return _converse(session, images, arguments.max_new_tokens)


def _converse(session: "ChatSession", images: list[Image.Image], max_new_tokens: int) -> int:
    """Questions from the standard input until it ends. Images wait for the next question, before whose text they stand.

    Lines of their own: `/image FILE` adds an image, `/reset` begins a new conversation. Ctrl-C stops an answer, which
    then stays as far as it got; at the prompt it ends the conversation.
    """
    from unitok.data.transforms import load_image

    terminal = sys.stdin.isatty()
    if terminal:
        print("/image FILE adds an image, /reset begins anew, Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    while True:
        try:
            line = input("you: " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if terminal else "")
            return 0
        command, _, rest = line.partition(" ")
        turns = len(session.messages)
        try:
            if command == "/image":
                if not rest.strip():
                    raise UserError("/image: name a file, as in `/image photo.png`")
                images.append(load_image(Path(rest.strip())))
            elif line == "/reset":
                session.reset()
                images.clear()
            elif command.startswith("/") and command[1:].isalpha():
                raise UserError(f"{command}: no such command; there are /image FILE and /reset")
            elif line:
                _print_answer(session.stream(line, images, max_new_tokens=max_new_tokens))
        except UserError as error:  # one bad line does not end the conversation
            print(f"unitok: error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(flush=True)
        if len(session.messages) > turns:  # asked, also where the answer was stopped
            images.clear()


def _print_answer(deltas: Generator[str, None, None]) -> None:
    """The pieces of an answer as they come, then the end of the line."""
    with closing(deltas):  # so that an answer that is stopped is put on record at once
        for delta in deltas:
            print(delta, end="", flush=True)
    print(flush=True)


def output_files(out: str | None, names: Sequence[str]) -> list[Path]:
    """Where results go: `out` names a file for a single result, else a folder that is made; None is here."""
    if out is not None and Path(out).suffix.lower() in Image.registered_extensions() and not Path(out).is_dir():
        if Path(out).suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
            raise UserError(f"--out {out}: expected a folder or a file ending in .{', .'.join(IMAGE_EXTENSIONS)}")
        if len(names) > 1:
            raise UserError(f"--out {out}: one file for {len(names)} images; give a folder")
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        return [Path(out)]
    folder = Path(out or ".")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}: is a file; expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    taken: set[str] = set()
    for name in names:  # equal names get a number
        path, number = Path(name), 1
        while name in taken:
            number += 1
            name = f"{path.stem}_{number}{path.suffix}"
        taken.add(name)
        files.append(folder / name)
    return files


def _file_name(prompt: str, number: int, count: int) -> str:
    words = "_".join("".join(c if c.isalnum() else " " for c in prompt).split())[:80] or "image"
    return f"{words}_{number:02d}.png" if count > 1 else f"{words}.png"


def _prompts_of(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--from-file {file}: cannot be read as text ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _save(image: Image.Image, target: Path) -> None:
    image.save(target)
    print(target)
