"""The README's picture: the first generated images of every GenEval task of a demo run, with their prompts.

python scripts/demo_picture.py runs/demo docs/demo.png
"""

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, TEXT_HEIGHT, MARGIN, PER_TASK = 128, 44, 12, 2


def draw_picture(run_dir: Path, per_task: int = PER_TASK) -> Image.Image:
    """One column per image; the first `per_task` of each task, as they came."""
    folder = run_dir / "images" / "generation"
    entries = json.loads((folder / "index.json").read_text())
    tags = list(dict.fromkeys(entry["tag"] for entry in entries))
    rows = [[entry for entry in entries if entry["tag"] == tag] for tag in tags]
    # Every prompt is drawn several times; the picture shows its first image only.
    rows = [list({entry["prompt"]: entry for entry in reversed(row)}.values())[::-1][:per_task] for row in rows]
    size = (MARGIN + len(rows) * (SIDE + MARGIN), MARGIN + per_task * (SIDE + TEXT_HEIGHT + MARGIN))
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for column, row in enumerate(rows):
        for line, entry in enumerate(row):
            x, y = MARGIN + column * (SIDE + MARGIN), MARGIN + line * (SIDE + TEXT_HEIGHT + MARGIN)
            image = Image.open(folder / entry["file"]).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.paste(image, (x, y))
            words = "\n".join(textwrap.wrap(entry["prompt"].removeprefix("a photo of "), 21))
            draw.multiline_text((x, y + SIDE + 4), words, fill="black", font=font)
    return picture


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="folder of a demo run")
    parser.add_argument("out", type=Path, help="picture to write")
    arguments = parser.parse_args(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw_picture(arguments.run_dir).save(arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
