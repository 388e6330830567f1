"""`unitok eval zeroshot`: classification by class names, and a linear probe, of any number of models."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError
from unitok.data.preprocess import OF_TOKENIZERS


def add_zeroshot_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """The options of the command."""
    parser.description = (
        "Classify images in class folders (ImageNet's layout), or, of a source such as shapes:val?num=2000, scenes of "
        "one object by colour and shape. Several --model give columns."
    )
    parser.add_argument(
        "--model", action="append", metavar="DIR|FILE|open_clip:MODEL:WEIGHTS",
        help=f"UniTok folder, released .pth, or a model of open_clip; may be given several times (default: {default})",
    )  # fmt: skip
    parser.add_argument(
        "--source", required=True, metavar="DIR", help="images in folders named by class; or the shapes world"
    )
    parser.add_argument("--train", metavar="DIR", help="images of a linear probe, of the same classes")
    parser.add_argument("--classes", metavar="FILE", help="a name for each class folder, in sorted order, one a line")
    parser.add_argument(
        "--templates", metavar="imagenet|simple|photo|FILE", help="default: imagenet; photo for the shapes world"
    )
    parser.add_argument(
        "--preprocess", choices=OF_TOKENIZERS, default="clip_val", help="of UniTok (default: %(default)s)"
    )
    parser.add_argument("--captions", metavar="SOURCE", help="images with captions: also recall in both directions")
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
    from unitok.eval.results import print_table, write_results
    from unitok.eval.retrieval import recalls
    from unitok.eval.zeroshot import SceneClasses, by_class, class_folders, load_names, load_templates

    names = arguments.model or [arguments.default_model]
    if arguments.dry_run:
        return _plan(arguments, names)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: expected at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = by_class(open_source(arguments.source))
    folders = class_folders(source)
    arguments.templates = arguments.templates or ("photo" if isinstance(source, SceneClasses) else "imagenet")
    classes, templates = load_names(folders, arguments.classes), load_templates(arguments.templates)
    train = by_class(open_source(arguments.train)) if arguments.train else None
    captions = open_source(arguments.captions) if arguments.captions else None
    figures, settings = {}, {}
    for short, name in zip(system_names(names), names, strict=True):
        model = open_image_text(name, arguments.preprocess, device)
        figures[short] = _one(model, source, train, folders, classes, templates, arguments)
        if captions is not None:
            figures[short] |= recalls(model, captions, arguments.limit, arguments.batch_size)
        settings[short] = model.settings
    rows = list(dict.fromkeys(key for values in figures.values() for key in values))
    table = [(row, *(_text(values[row]) for values in figures.values())) for row in rows]
    print_table(table, ("figure", *figures))
    if arguments.out:
        systems = dict(zip(figures, names, strict=True))
        scenes = isinstance(source, SceneClasses)
        print(write_results(arguments.out, _results(arguments, systems, figures, settings, len(classes), scenes)))
    return 0


def _results(
    arguments: argparse.Namespace,
    systems: dict[str, str],
    figures: dict[str, dict[str, Any]],
    settings: dict[str, dict[str, Any]],
    classes: int,
    scenes: bool,
) -> dict[str, Any]:
    """One run for each model, as `unitok report` reads them. How a model wants its images is the model's own."""
    from unitok.eval.results import protocol, run_results
    from unitok.eval.run_form import figures_as_metrics

    images = next(iter(figures.values()))["num_images"]
    names = ("source", "train", "templates", "classes", "captions", "probe_c", "limit")
    details = {name: getattr(arguments, name) for name in names} | ({"world": "shapes"} if scenes else {})
    block = protocol("zeroshot", arguments.seed, {"images": images, "num_classes": classes}, **details)
    runs = {}
    for short, path in systems.items():
        own = [_counted(metric, figures[short]) for metric in figures_as_metrics(figures[short], images)]
        checkpoint = Path(path) if Path(path).exists() else None
        runs[short] = run_results("zeroshot", own, block, [arguments.seed], checkpoint) | {"system": settings[short]}
    return {"systems": figures, "protocol": block | {"models": settings}, "runs": runs}


def _counted(metric: Any, figures: dict[str, Any]) -> Any:
    """Recall is over images, or captions, of the data with captions."""
    if "_recall" not in metric.name:
        return metric
    return replace(metric, n=figures["num_caption_images" if metric.name.startswith("image") else "num_captions"])


def _one(
    model: Any, source: Any, train: Any, folders: list[str], classes: list[str], templates: list[Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    from unitok.eval.zeroshot import accuracies, classifier, image_features, linear_probe

    features, labels = image_features(model, source, folders, arguments.limit, arguments.batch_size)
    figures: dict[str, Any] = accuracies(features @ classifier(model, classes, templates).T, labels)
    if train is not None:
        probe = image_features(model, train, folders, None, arguments.batch_size)
        figures |= linear_probe(probe, (features, labels), arguments.probe_c, arguments.seed)
    return figures | {"chance": 1 / len(classes), "num_images": len(labels)}


def _plan(arguments: argparse.Namespace, names: list[str]) -> int:
    some = f"{arguments.limit} images of {arguments.source}" if arguments.limit else arguments.source
    print(f"would measure: zero-shot classification of {some} by {', '.join(names)}")
    hints = [
        (
            arguments.source,
            "images in class folders, such as ImageNet's val (https://image-net.org); or shapes:val?num=2000",
        )
    ]
    hints += [(arguments.train, "images of the linear probe in the same class folders")] if arguments.train else []
    hints += [(arguments.captions, "images with captions, such as Flickr30k's")] if arguments.captions else []
    hints += [(name, "train it, or convert a release") for name in names if not name.startswith("open_clip:")]
    hints += [(arguments.classes, "a name for each class folder, one a line")] if arguments.classes else []
    if arguments.templates not in (None, "imagenet", "simple", "photo"):
        hints.append((arguments.templates, "one prompt a line, {} standing for the class"))
    for path, hint in hints:
        if not path.startswith("shapes") and not Path(path).exists():
            print(f"missing: {path}: {hint}")
    for name in names:
        if name.startswith("open_clip:") and not Path(name.rpartition(":")[2]).exists():
            print(f"needed: {name}: open_clip fetches it (github.com/mlfoundations/open_clip); or give its file")
    return 0


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
