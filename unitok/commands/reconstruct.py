"""`unitok reconstruct`: images beside what the tokenizer's codes keep of them."""

import argparse
import json
from pathlib import Path
from statistics import fmean

from unitok.commands.use import image_file, keep_inputs, output_files, sheet, small_tokenizer, text_file
from unitok.core.errors import UserError
from unitok.core.signals import interrupt_ends


def add_reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `unitok reconstruct`."""
    parser.description = (
        "Write every image as the tokenizer sees it, beside its reconstruction, and print the PSNR of each and the "
        "mean. PSNR is taken after rounding to 8 bits, as `unitok eval reconstruction` does."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--tokenizer", default=small_tokenizer(), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--out", metavar="FILE|DIR", help="file for one image, else folder (default: here)")
    parser.add_argument("--alone", action="store_true", help="write reconstructions alone, without the originals")
    parser.add_argument("--sheet", metavar="FILE", help="all pairs in one picture, in place of a file for each")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.set_defaults(run=("reconstruct", "reconstruct"))


def reconstruct(arguments: argparse.Namespace) -> int:
    """Write pairs, or reconstructions alone, and print PSNRs."""
    with interrupt_ends():
        import torch

        from unitok.core.pretrained import load_model_folder
        from unitok.data.transforms import eval_transform, load_image, to_pil
        from unitok.eval.reconstruction import psnr_db
        from unitok.tokenizer import UniTok

    if arguments.sheet and (arguments.out or arguments.alone):
        raise UserError("--sheet is all pairs in one picture: give it without --out and --alone")
    for name in arguments.images:  # all are looked at before the work, but one is kept at a time
        load_image(Path(name))
    kind = "reconstruction" if arguments.alone else "pair"
    names = [f"{Path(name).stem}_{kind}.png" for name in arguments.images]
    files = [image_file("--sheet", arguments.sheet)] if arguments.sheet else output_files(arguments.out, names)
    json_file = text_file("--json", arguments.json) if arguments.json else None
    keep_inputs([*files, *([json_file] if json_file else [])], arguments.images)
    if json_file and json_file.resolve() in {file.resolve() for file in files}:
        raise UserError(f"--json {json_file}: is also the file of an image; give another name")
    tokenizer = load_model_folder(UniTok, arguments.tokenizer, dtype=torch.float32).eval()
    pairs, figures = [], []
    for number, name in enumerate(arguments.images):
        image = load_image(Path(name))
        pixels = eval_transform(image, tokenizer.config.image_size, tokenizer.config.preprocess).unsqueeze(0)
        with torch.no_grad():
            again = tokenizer.reconstruct(pixels)
        pair = [to_pil(pixels[0]), to_pil(again[0])]
        figure = {"image": name, "psnr_db": psnr_db(pixels, again).item()}
        if arguments.sheet:
            pairs += pair
        else:
            (pair[1] if arguments.alone else sheet(pair, 2)).save(files[number])
            figure["file"] = str(files[number])
        print(f"{figure.get('file', name)}  PSNR {figure['psnr_db']:.2f} dB", flush=True)
        figures.append(figure)
    mean = fmean(figure["psnr_db"] for figure in figures)
    if len(figures) > 1:
        print(f"mean of {len(figures)} images: PSNR {mean:.2f} dB")
    if arguments.sheet:
        sheet(pairs, 2 * _pairs_in_a_row(len(figures))).save(files[0])
        print(files[0])
    if json_file:
        results = {"tokenizer": str(arguments.tokenizer), "images": figures, "mean_psnr_db": mean}
        json_file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def _pairs_in_a_row(count: int) -> int:
    """So that the sheet is nearly square: a pair is twice as wide as it is high."""
    return max(1, round((count / 2) ** 0.5))
