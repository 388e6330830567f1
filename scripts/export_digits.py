"""Writes scikit-learn's handwritten digits as an image folder: a small real data set that needs no download.

    python scripts/export_digits.py OUT

gives OUT/train and OUT/val with NAME.png (32 x 32), NAME.txt (captions) and NAME.json (questions), readable with
`open_source("OUT/train")` and `source: OUT/train` in a configuration.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unitok.core.errors import DataError, UserError
from unitok.core.rng import numpy_rng
from unitok.data.captions import QA

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "a photo of the digit {word}",
    "the digit {number}",
    "a handwritten {word}",
    "a picture of the number {number}",
)
QUESTIONS = {
    "digit": ("which digit is this?", "what digit is this?", "what number is written here?"),
    "exists": ("is this {article} {word}?", "does the image show {article} {word}?"),
    "parity": ("is the digit even or odd?", "is this number odd or even?"),
}


def digit_captions(digit: int) -> list[str]:
    """Every caption of a digit."""
    return [form.format(word=WORDS[digit], number=digit) for form in CAPTIONS]


def digit_questions(digit: int, key: str) -> list[QA]:
    """One question of each type, "exists" once with yes and once with no; the wording is drawn from `key`."""
    rng = numpy_rng("digit questions", key)
    other = (digit + int(rng.integers(1, 10))) % 10
    parity = "odd" if digit % 2 else "even"
    asked = [("digit", digit, WORDS[digit]), ("exists", digit, "yes"), ("exists", other, "no"), ("parity", 0, parity)]
    out = []
    for kind, about, answer in asked:
        form = QUESTIONS[kind][rng.integers(len(QUESTIONS[kind]))]
        word = WORDS[about]
        out.append(QA(kind, form.format(word=word, article="an" if word[0] in "aeiou" else "a"), answer))
    return out


def digit_image(pixels: np.ndarray, size: int) -> Image.Image:
    """An 8 x 8 digit of 0..16 as dark ink on white, enlarged smoothly."""
    ink = 255 - np.clip(pixels * (255 / 16), 0, 255)
    small = Image.fromarray(np.rint(ink).astype(np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def split_indices(labels: np.ndarray, val_share: float, seed: int) -> dict[str, np.ndarray]:
    """Indices of train and val; every digit has the same share in val."""
    val = []
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        order = numpy_rng("digits split", seed, digit).permutation(len(members))
        val.append(members[order[: round(val_share * len(members))]])
    chosen = np.sort(np.concatenate(val))
    return {"train": np.setdiff1d(np.arange(len(labels)), chosen), "val": chosen}


def export_digits(out: Path, size: int = 32, val_share: float = 0.2, seed: int = 0) -> dict[str, int]:
    """Writes OUT/train and OUT/val; returns how many digits each holds.

    Raises:
        DataError: a folder to be written is not empty, or an argument is out of range.
    """
    from sklearn.datasets import load_digits

    if not 0 < val_share < 1 or size < 8:
        raise DataError(f"val share {val_share}, size {size}: expected a share between 0 and 1 and a size from 8")
    digits = load_digits()
    counts = {}
    for split, indices in split_indices(digits.target, val_share, seed).items():
        folder = out / split
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} is not empty; remove it or give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for index in indices:
            _write_digit(folder / f"digit-{index:04d}", digits.images[index], int(digits.target[index]), size)
        counts[split] = len(indices)
    return counts


def _write_digit(path: Path, pixels: np.ndarray, digit: int, size: int) -> None:
    digit_image(pixels, size).save(path.with_suffix(".png"))
    path.with_suffix(".txt").write_text("\n".join(digit_captions(digit)) + "\n", encoding="utf-8")
    questions = [question._asdict() for question in digit_questions(digit, path.name)]
    path.with_suffix(".json").write_text(json.dumps({"digit": digit, "questions": questions}) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that receives train/ and val/")
    parser.add_argument("--size", type=int, default=32, help="side of the images (default 32)")
    parser.add_argument("--val-share", type=float, default=0.2, help="share of held-out digits (default 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default 0)")
    arguments = parser.parse_args(argv)
    try:
        counts = export_digits(arguments.out, arguments.size, arguments.val_share, arguments.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
