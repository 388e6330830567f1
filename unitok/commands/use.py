"""What `unitok reconstruct`, `generate`, `chat` and `serve` share: the model that is there, files that are written."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from unitok.core.errors import UserError
from unitok.core.signals import interrupt_ends
from unitok.data.decoding import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline
    from unitok.mllm.quantize import WeightKind

SMALL_MODEL = "assets/shapes-mini"
_LONGEST_STEM = 180  # bytes


def small_model() -> str:
    """The model that comes with the project: seen from here, or in the checkout or installation of this package."""
    if not Path(SMALL_MODEL).is_dir():
        package = Path(__file__).resolve().parents[1]
        for folder in (package.parent / SMALL_MODEL, package / SMALL_MODEL):
            if folder.is_dir():
                return str(folder)
    return SMALL_MODEL


def small_tokenizer() -> str:
    """The visual tokenizer of `small_model`."""
    return f"{small_model()}/visual_tokenizer"


def load_pipeline(model: str, precision: str = "fp32", weights: "WeightKind | None" = None) -> "UniTokPipeline":
    """The model that a command uses, as its options --model, --precision and --weights ask for it."""
    with interrupt_ends():
        import torch

        from unitok.mllm.pipeline import UniTokPipeline

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return UniTokPipeline.from_pretrained(model, dtype=dtype, weights=weights)


def progress() -> Callable[[int, int], None] | None:
    """Shows on a terminal how many image positions of a batch are sampled; None where nobody watches."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\rimage position {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def output_files(out: str | None, names: Sequence[str]) -> list[Path]:
    """Where results go: `out` names a file for a single result, else a folder that is made; None is here."""
    if out is not None and is_image_name(out) and not Path(out).is_dir():
        if len(names) > 1:
            raise UserError(f"--out {out}: one file for {len(names)} images; give a folder")
        return [image_file("--out", out)]
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
        files[-1].exists()  # OSError for a name that is too long, before the work is done
    return files


def text_file(option: str, name: str) -> Path:
    """A file for text, its folder made; UserError where it cannot be one."""
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{option} {name}: is a folder; expected a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def keep_inputs(targets: Sequence[Path], inputs: Sequence[str]) -> None:
    """UserError where a file to be written is one that is read."""
    for target in targets:
        for name in inputs:
            if target.exists() and target.samefile(name):
                raise UserError(f"{target}: would replace the input {name}; give another file or folder with --out")


def is_image_name(name: str) -> bool:
    """Whether a name ends as those of images do, also of kinds that we do not write."""
    return Path(name).suffix.lower() in Image.registered_extensions()


def image_file(option: str, name: str) -> Path:
    """A file for one image, its folder made; UserError unless it is of a kind that we write."""
    if Path(name).suffix.lower().lstrip(".") not in IMAGE_EXTENSIONS:
        also = "a folder or " if option == "--out" else ""
        raise UserError(f"{option} {name}: expected {also}a file ending in .{', .'.join(IMAGE_EXTENSIONS)}")
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{option} {name}: is a folder; expected a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def file_stem(prompt: str) -> str:
    """The words of a prompt as a file's name, which with an ending fits the 255 bytes that file systems allow."""
    words = "_".join("".join(c if c.isalnum() else " " for c in prompt).split())[:80]
    return words.encode()[:_LONGEST_STEM].decode(errors="ignore") or "image"


def sheet(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size in one picture, row by row, with `gap` white pixels between them."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        whole.paste(image, (column * (width + gap), row * (height + gap)))
    return whole
