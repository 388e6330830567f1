"""`unitok eval zeroshot`: classification by class names, and a linear probe, of any number of models."""

import argparse
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError

PREPROCESS = ("clip_val", "inference", "vae_val", "plain")


def add_zeroshot_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """The options of the command."""
    parser.description = "Classify images in class folders (ImageNet's layout). Several --model give columns."
    parser.add_argument(
        "--model", action="append", metavar="DIR|FILE|open_clip:MODEL:WEIGHTS",
        help=f"UniTok folder, released .pth, or a model of open_clip; may be given several times (default: {default})",
    )  # fmt: skip
    parser.add_argument("--source", required=True, metavar="DIR", help="images in folders named by class")
    parser.add_argument("--train", metavar="DIR", help="images of a linear probe, in the same class folders")
    parser.add_argument("--classes", metavar="FILE", help="a name for each class folder, in sorted order, one a line")
    parser.add_argument("--templates", default="imagenet", metavar="imagenet|simple|FILE", help="default: %(default)s")
    parser.add_argument("--preprocess", choices=PREPROCESS, default="clip_val", help="of UniTok (default: %(default)s)")
    parser.add_argument("--probe-c", type=float, default=1.0, metavar="C", help="inverse penalty of the linear probe")
    parser.add_argument("--limit", type=int, metavar="N", help="use only N images, as many of every class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
    parser.set_defaults(run=("zeroshot", "zeroshot"), default_model=default)


def zeroshot(arguments: argparse.Namespace) -> int:
    """Measure, print one table, write the figures."""
    import torch

    from unitok.data.source import open_source
    from unitok.eval.autoencoders import system_names
    from unitok.eval.image_text import open_image_text
    from unitok.eval.results import print_table, protocol, write_results
    from unitok.eval.run_form import system_runs
    from unitok.eval.zeroshot import class_folders, load_names, load_templates

    names = arguments.model or [arguments.default_model]
    if arguments.dry_run:
        return _plan(arguments, names)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: expected at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = open_source(arguments.source)
    folders = class_folders(source)
    classes, templates = load_names(folders, arguments.classes), load_templates(arguments.templates)
    train = open_source(arguments.train) if arguments.train else None
    figures, settings = {}, {}
    for short, name in zip(system_names(names), names, strict=True):
        model = open_image_text(name, arguments.preprocess, device)
        figures[short], settings[short] = (
            _one(model, source, train, folders, classes, templates, arguments),
            model.settings,
        )
    rows = list(dict.fromkeys(key for values in figures.values() for key in values))
    table = [(row, *(_text(values[row]) for values in figures.values())) for row in rows]
    print_table(table, ("figure", *figures))
    if arguments.out:
        counts = {"images": next(iter(figures.values()))["num_images"], "classes": len(classes)}
        details = {"source": arguments.source, "train": arguments.train, "templates": arguments.templates}
        details |= {"probe_c": arguments.probe_c, "models": settings}
        block = protocol("zeroshot", arguments.seed, counts, **details)
        shared = {key: value for key, value in block.items() if key != "models"}
        runs = system_runs("zeroshot", figures, counts["images"], shared, [arguments.seed], names)
        print(write_results(arguments.out, {"systems": figures, "protocol": block, "runs": runs}))
    return 0


def _one(
    model: Any, source: Any, train: Any, folders: list[str], classes: list[str], templates: list[Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    from unitok.eval.zeroshot import accuracies, classifier, image_features, linear_probe

    features, labels = image_features(model, source, folders, arguments.limit, arguments.batch_size)
    figures: dict[str, Any] = accuracies(features @ classifier(model, classes, templates).T, labels)
    if train is not None:
        probe = image_features(model, train, folders, None, arguments.batch_size)
        figures["linear_probe"] = linear_probe(probe, (features, labels), arguments.probe_c, arguments.seed)
    return figures | {"chance": 1 / len(classes), "num_images": len(labels)}


def _plan(arguments: argparse.Namespace, names: list[str]) -> int:
    print(f"would measure: zero-shot classification of {arguments.source} by {', '.join(names)}")
    hints = [(arguments.source, "images in class folders, such as ImageNet's val (https://image-net.org)")]
    hints += [(arguments.train, "images of the linear probe in the same class folders")] if arguments.train else []
    hints += [(name, "train it, or convert a release") for name in names if not name.startswith("open_clip:")]
    for path, hint in hints:
        if not Path(path).exists():
            print(f"missing: {path}: {hint}")
    return 0


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
