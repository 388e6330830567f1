"""`unitok generate`: images from text."""

import argparse
import sys
from collections.abc import Sequence
from math import ceil, inf, sqrt
from pathlib import Path
from typing import Any

from PIL import Image

from unitok.commands.use import file_stem, image_file, load_pipeline, output_files, progress, sheet, small_model
from unitok.core.errors import UserError
from unitok.core.signals import interrupt_ends
from unitok.core.texts import check_unicode

MOST_AT_ONCE = 10_000  # images that are in memory together before they are written
MOST_FROM_FILE = 1_000_000  # names of files that are


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `unitok generate`."""
    from unitok.cli import positive_int

    parser.description = (
        "Draw images from text. The same prompt and seed give the same image, whatever is drawn beside it; a GPU "
        "draws others than a CPU. A .png file says how it was made: PIL's `Image.open(FILE).text` has the prompt "
        "(Description), libraries (Software), and prompt, seed, sampler, device, precision and the model's hash as JSON"
        " (unitok)."
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--model", default=small_model(), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--out", metavar="FILE|DIR", help="file for one image, else folder (default: here)")
    parser.add_argument("--grid", metavar="FILE", help="also all images in one picture, a row for each prompt")
    parser.add_argument("--num", type=positive_int, metavar="N", help="images per prompt (default: 1)")
    parser.add_argument("--seed", type=int, metavar="S", help="of a prompt's first image, the next S + 1 (default: 0)")
    parser.add_argument("--seeds", type=whole_numbers, metavar="S,S", help="an image per prompt and seed: 3,5,9")
    parser.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance, 1 = off")
    parser.add_argument("--temperature", type=float, metavar="T", help="high: varied, low: cautious")
    parser.add_argument(
        "--depth-temperature", type=float, metavar="T", help="of all codes of a position but the first: how things look"
    )
    parser.add_argument("--greedy", action="store_true", help="the likeliest image, whatever the seed")
    parser.add_argument(
        "--from-file",
        metavar="FILE",
        help="one prompt per line; given again, the command goes on where it was stopped, and refuses a folder with "
        "images of other settings",
    )
    parser.add_argument(
        "--no-graph", action="store_true", help="on a GPU: begin at once instead of compiling for a minute, but slower"
    )
    parser.set_defaults(run=("generate", "generate"), positional="prompts")


def whole_numbers(text: str) -> list[int]:
    """The different numbers of "3,5,9"."""
    try:
        numbers = [int(one) for one in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers, as in 3,5,9") from None
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text} names a seed twice")
    return numbers


def generate(arguments: argparse.Namespace) -> int:
    """Write one image per prompt and seed."""
    prompts = list(arguments.prompts) + prompts_of(arguments.from_file)
    if not prompts:
        raise UserError("no prompt: give one, as in `unitok generate 'a photo of a red circle'`, or --from-file FILE")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("empty prompt: say what the image should show")
    for prompt in arguments.prompts:
        check_unicode(prompt, "prompt")
    number = len(prompts) * (arguments.num or len(arguments.seeds or [0]))
    most = MOST_FROM_FILE if arguments.from_file else MOST_AT_ONCE
    if number > most:
        more = "" if arguments.from_file else f" (with --from-file, which writes each at once, {MOST_FROM_FILE})"
        raise UserError(f"{number} images: expected at most {most}{more}; make them in several commands")
    seeds, endings = _seeds_of(arguments)
    texts = [prompt for prompt in prompts for _ in seeds]
    names = [f"{file_stem(prompt)}{ending}.png" for prompt in prompts for ending in endings]
    targets = output_files(arguments.out, names)
    grid = _grid_file(arguments.grid, targets)
    draw = _draw_many if arguments.from_file else _draw
    records = draw(arguments, texts, seeds * len(prompts), targets)
    if grid is not None:
        from unitok.mllm.many import write_image

        images = [_read(target) for target in targets]
        columns = len(seeds) if len(seeds) > 1 else ceil(sqrt(len(images)))
        write_image(sheet(images, columns), grid, {"images": records}, "\n".join(prompts))
        print(grid)
    return 0


def _seeds_of(arguments: argparse.Namespace) -> tuple[list[int], list[str]]:
    """The seeds of every prompt, and what each adds to a file's name."""
    if arguments.seeds is not None:
        if arguments.seed is not None or arguments.num is not None:
            raise UserError("--seeds names all seeds: give it without --seed and --num")
        return arguments.seeds, [f"_seed{seed}" for seed in arguments.seeds]
    count, first = arguments.num or 1, arguments.seed or 0
    return [first + n for n in range(count)], [f"_{n:02d}" if count > 1 else "" for n in range(count)]


def _draw(
    arguments: argparse.Namespace, texts: Sequence[str], seeds: Sequence[int], targets: Sequence[Path]
) -> list[dict[str, Any]]:
    """All images, then all files, in place of what was there; how each was made."""
    sampler = _sampler_of(arguments)
    pipeline = load_pipeline(arguments.model, arguments.precision, arguments.weights)
    # after it: it has imported what these import, in a way that bears Ctrl-C
    from unitok.mllm.many import image_records, write_image

    records = image_records(pipeline, texts, seeds, **sampler)
    graph = False if arguments.no_graph else None
    images = pipeline.generate_images(texts, seed=seeds, on_position=progress(), graph=graph, **sampler)
    replaced = sum(target.exists() for target in targets)
    for image, target, record in zip(images, targets, records, strict=True):
        if target.suffix.lower() == ".png":
            write_image(image, target, record, record["prompt"])
        else:
            image.save(target)
        print(target)
    if replaced:
        print(f"{replaced} of these files were there before and have been replaced", file=sys.stderr)
    return records


def _draw_many(
    arguments: argparse.Namespace, texts: Sequence[str], seeds: Sequence[int], targets: Sequence[Path]
) -> list[dict[str, Any]]:
    """Each file is written when it is there, and what is there is not made again; how each was made."""
    if {target.suffix for target in targets} != {".png"} or len({target.parent for target in targets}) > 1:
        raise UserError(f"--out {arguments.out}: with --from-file images are .png files in one folder; give a folder")
    sampler = _sampler_of(arguments)
    pipeline = load_pipeline(arguments.model, arguments.precision, arguments.weights)
    # after it: it has imported what these import, in a way that bears Ctrl-C
    from unitok.mllm.many import generate_many, image_records

    made: list[Path] = []

    def tell(_: int, path: Path) -> None:
        made.append(path)
        print(path, flush=True)

    generate_many(
        pipeline,
        texts,
        targets[0].parent,
        seeds,
        [target.name for target in targets],
        graph=False if arguments.no_graph else None,
        on_image=tell,
        on_position=progress(),
        **sampler,
    )
    print(f"{len(made)} images made of {len(targets)}", file=sys.stderr)
    return image_records(pipeline, texts, seeds, **sampler)


def _sampler_of(arguments: argparse.Namespace) -> dict[str, float | None]:
    for name in ("temperature", "depth_temperature"):
        value, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if value is not None and arguments.greedy:
            raise UserError(f"{option} {value:g} and --greedy: the likeliest image has no temperature")
        if value is not None and not 0 < value < inf:
            raise UserError(f"{option} {value:g}: must be positive; for the likeliest image give --greedy")
    return {
        "do_sample": False if arguments.greedy else None,
        "guidance_scale": arguments.guidance,
        "temperature": arguments.temperature,
        "depth_temperature": arguments.depth_temperature,
    }


def _grid_file(name: str | None, targets: Sequence[Path]) -> Path | None:
    """Where the grid goes; UserError where it cannot be made."""
    if name is None:
        return None
    grid = image_file("--grid", name)
    if grid.suffix.lower() != ".png":
        raise UserError(f"--grid {name}: expected a file ending in .png, which can say how its images were made")
    if grid.resolve() in {target.resolve() for target in targets}:
        raise UserError(f"--grid {name}: is also the file of an image; give another name")
    with interrupt_ends():
        from unitok.mllm.many import own_share

    if own_share()[1] > 1:
        raise UserError("--grid: this process makes a part of the images only; make the grid without torchrun or srun")
    return grid


def _read(target: Path) -> Image.Image:
    with Image.open(target) as image:
        return image.convert("RGB")


def prompts_of(file: str | None) -> list[str]:
    """The lines of a file that are not empty."""
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--from-file {file}: cannot be read as text ({error})") from error
    return [line.strip() for line in lines if line.strip()]
