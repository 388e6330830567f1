"""`unitok reconstruct`, `generate` and `chat`: a trained model in use."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unitok.core.errors import UserError
from unitok.data.transforms import IMAGE_EXTENSIONS


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
    from unitok.mllm.pipeline import UniTokPipeline

    prompts = list(arguments.prompts) + _prompts_of(arguments.from_file)
    if not prompts:
        raise UserError("no prompt: give one, as in `unitok generate 'a photo of a red circle'`, or --from-file FILE")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("empty prompt: say what the image should show")
    if arguments.num < 1:
        raise UserError(f"--num {arguments.num}: expected at least 1")
    jobs = [(prompt, number) for prompt in prompts for number in range(arguments.num)]
    targets = output_files(arguments.out, [_file_name(prompt, n, arguments.num) for prompt, n in jobs])
    pipeline = UniTokPipeline.from_pretrained(arguments.model)
    images = pipeline.generate_images(
        [prompt for prompt, _ in jobs],
        guidance_scale=arguments.guidance,
        temperature=arguments.temperature,
        depth_temperature=arguments.depth_temperature,
        seed=[arguments.seed + number for _, number in jobs],
    )
    for image, target in zip(images, targets, strict=True):
        _save(image, target)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Answer one question, or hold a conversation on the terminal."""
    from unitok.data.transforms import load_image
    from unitok.mllm.pipeline import UniTokPipeline

    if arguments.question is not None and not arguments.question.strip():
        raise UserError("empty question: say what you want to know")
    parts = [{"type": "image", "image": load_image(Path(name))} for name in arguments.image]
    pipeline = UniTokPipeline.from_pretrained(arguments.model)
    messages: list[dict] = []

    def ask(question: str) -> str:
        # Images stand in the first turn, as in training.
        content = (parts if not messages else []) + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        answer = pipeline.chat(messages, max_new_tokens=arguments.max_new_tokens)
        messages.append({"role": "assistant", "content": answer})
        return answer

    if arguments.question is not None:
        print(ask(arguments.question))
        return 0
    prompt = "you: " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            return 0
        if not question:
            continue
        try:
            print(ask(question), flush=True)
        except UserError as error:  # one bad line does not end the conversation
            messages.pop()
            print(f"unitok: error: {error}", file=sys.stderr, flush=True)


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
