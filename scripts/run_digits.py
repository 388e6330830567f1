"""Both stages on real scans, with the same commands as on the shapes: scikit-learn's handwritten digits.

    python scripts/run_digits.py [--out runs/digits] [--seed 0]

exports the digits as an image folder, trains tokenizer and model, and measures on held-out digits: visual question
answering by type, and how often a classifier trained on the real digits recognises a generated one as what was asked.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unitok.cli import main as unitok
from unitok.core.errors import UserError
from unitok.scripts.export_digits import CAPTIONS, WORDS, export_digits

IMAGES_PER_DIGIT = 30


def run(command: Sequence[str]) -> None:
    """One `unitok` command; its failure ends the run."""
    print(f"\n$ unitok {' '.join(command)}", flush=True)
    code = unitok(command)
    if code:
        raise SystemExit(code)


def train(out: Path, seed: int, overrides: Sequence[str] = ()) -> None:
    """Export the data, train stage one, encode, train stage two."""
    data, tokenizer, codes, model = out / "data", out / "tokenizer", out / "codes", out / "mllm"
    if not (data / "val").is_dir():
        export_digits(data)
    common = [f"seed={seed}", *overrides]
    source = f"data.source={data / 'train'}"
    run(["train", "tokenizer", "--config", "tokenizer/digits.yaml", f"output_dir={tokenizer}", source, *common])
    export = str(tokenizer / "export")
    if not (codes / "header.json").is_file():
        run(["data", "codes", "--tokenizer", export, "--shards", str(data / "train"), "--out", str(codes)])
    places = [f"output_dir={model}", f"tokenizer={export}", f"data.codes={codes}"]
    run(["train", "mllm", "--config", "mllm/digits.yaml", *places, *common])


def digit_classifier(folder: Path) -> tuple[Any, float]:
    """A support-vector classifier trained on the real training digits, and its accuracy on the real held-out ones."""
    from sklearn.svm import SVC

    from unitok.data.source import open_source

    def load(split: str) -> tuple[np.ndarray, np.ndarray]:
        source = open_source(folder / split)
        samples = [source[index] for index in range(len(source))]
        labels = [WORDS.index(_digit_word(sample)) for sample in samples]
        return np.stack([features(sample.image) for sample in samples]), np.array(labels)

    classifier = SVC(gamma="scale", C=10.0).fit(*load("train"))
    return classifier, float(classifier.score(*load("val")))


def _digit_word(sample: Any) -> str:
    return next(question.answer for question in sample.questions if question.type == "digit")


def features(image: Image.Image) -> np.ndarray:
    """Ink of a digit on the 8 x 8 grid of the original scans, 0 to 1."""
    grey = image.convert("L").resize((8, 8), Image.Resampling.BOX)
    return 1 - np.asarray(grey, dtype=np.float64).ravel() / 255


def evaluate(out: Path, seed: int, started: float) -> dict[str, Any]:
    """Held-out figures, written to `out/results.json`."""
    from unitok.data.source import open_source
    from unitok.eval.reconstruction import evaluate_reconstruction
    from unitok.eval.results import figures_only, peak_memory_mb, protocol, write_results
    from unitok.eval.vqa import evaluate_vqa
    from unitok.mllm.pipeline import UniTokPipeline

    source = open_source(out / "data" / "val")
    pipeline = UniTokPipeline.from_pretrained(out / "mllm" / "export")
    vqa = evaluate_vqa(pipeline.answer, source, seed=seed, batch_size=64)
    digits = np.repeat(np.arange(10), IMAGES_PER_DIGIT)
    prompts = [CAPTIONS[i % len(CAPTIONS)].format(word=WORDS[d], number=d) for i, d in enumerate(digits)]
    images = pipeline.generate_images(prompts, seed=seed)
    classifier, real_accuracy = digit_classifier(out / "data")
    recognised = classifier.predict(np.stack([features(image) for image in images])) == digits
    save_grid(images, out / "generated.png")
    results = {
        "tokenizer": figures_only(
            evaluate_reconstruction(pipeline.tokenizer, source, device=pipeline.tokenizer.device)
        ),
        "vqa": figures_only(vqa),
        "generation": {
            "recognised": float(recognised.mean()),
            "by_digit": {WORDS[d]: float(recognised[digits == d].mean()) for d in range(10)},
            "chance": 0.1,
            "classifier_on_real_held_out": real_accuracy,
        },
        "wall_seconds": round(time.monotonic() - started, 1),
        "peak_memory_mb": peak_memory_mb(),
        "protocol": protocol("digits", seed, {"images": len(source), "generated": len(images)}),
    }
    write_results(out / "results.json", results)
    return results


def save_grid(images: Sequence[Image.Image], path: Path) -> None:
    """One row per digit."""
    side = images[0].width
    grid = Image.new("RGB", (IMAGES_PER_DIGIT * side, 10 * side), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % IMAGES_PER_DIGIT * side, index // IMAGES_PER_DIGIT * side))
    grid.save(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    from unitok.eval.results import print_table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="run folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for both stages, such as steps=4")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    try:
        train(arguments.out, arguments.seed, arguments.overrides)
        results = evaluate(arguments.out, arguments.seed, started)
    except UserError as error:
        print(f"error: {error}")
        return 2
    rows = [(f"question: {kind}", one["accuracy"], one["majority"]) for kind, one in results["vqa"]["by_type"].items()]
    generation = results["generation"]
    rows.append(("generated digit recognised", generation["recognised"], generation["chance"]))
    print_table(
        [(name, f"{value:.3f}", f"{base:.3f}") for name, value, base in rows], ("held out", "share", "baseline")
    )
    print(f"{results['wall_seconds'] / 60:.1f} minutes; {arguments.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
