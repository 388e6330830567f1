"""`unitok eval zeroshot`: UniTok and models of open_clip on the same images, one column each."""

import argparse
import re
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError


def add_zeroshot_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """The options beside those of every `unitok eval`."""
    parser.description = (
        "Zero-shot classification of a folder of class folders (ImageNet's layout), shards with label in their JSON, "
        "or the shapes world; with --retrieval recall among captions, with --probe-train a linear probe."
    )
    parser.add_argument(
        "--tokenizer", action="append", default=[], metavar="DIR|FILE",
        help=f"UniTok folder or released .pth; may be given several times (default: {default}, without --open-clip)",
    )  # fmt: skip
    parser.add_argument(
        "--open-clip", action="append", default=[], metavar="NAME=WEIGHTS",
        help="model of open_clip with a file or tag of weights, or local-dir:DIR; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--classes", metavar="imagenet|FILE", help="names of the classes (default: those of the folders)"
    )
    parser.add_argument(
        "--templates", default="openai", metavar="openai|simple|plain|FILE", help="default: %(default)s"
    )
    parser.add_argument("--preprocess", default="clip_val", choices=("clip_val", "plain"), help="of UniTok's images")
    parser.add_argument("--probe-train", metavar="SOURCE", help="images to train a linear probe on")
    parser.add_argument("--probe-c", type=float, metavar="C", help="inverse strength of its regularisation")
    parser.add_argument("--retrieval", action="store_true", help="recall among the captions, in both directions")
    parser.set_defaults(run=("zeroshot", "zeroshot"), default_tokenizer=default)


def zeroshot(arguments: argparse.Namespace) -> int:
    """Measure every model, print one table, write one result per model."""
    from unitok.core.distributed import inference_device
    from unitok.data.source import open_source
    from unitok.eval.autoencoders import system_names
    from unitok.eval.clip_models import open_open_clip, open_tokenizer
    from unitok.eval.results import print_table, run_results, write_results
    from unitok.eval.zeroshot import source_classes, templates

    if arguments.probe_c is not None and not arguments.probe_c > 0:
        raise UserError(f"--probe-c {arguments.probe_c}: expected a positive number")
    paths = arguments.tokenizer or ([] if arguments.open_clip else [arguments.default_tokenizer])
    if arguments.dry_run:
        return _plan(arguments, paths)
    source = open_source(arguments.source)
    classes, forms = source_classes(source, arguments.classes), templates(arguments.templates)
    train = open_source(arguments.probe_train) if arguments.probe_train else None
    device = inference_device()
    runs, columns = {}, {}
    for spec in [*paths, *arguments.open_clip]:
        is_unitok = spec in paths
        model = open_tokenizer(spec, device, arguments.preprocess) if is_unitok else open_open_clip(spec, device)
        metrics = _measure(model, source, train, classes, forms, arguments)
        protocol = _protocol(arguments, len(classes.names), len(forms)) | model.protocol
        checkpoint = Path(spec) if is_unitok else None
        runs[spec] = run_results("zeroshot", metrics, protocol, [arguments.seed], checkpoint)
        columns[spec] = {metric.name: metric for metric in metrics}
    names = list(next(iter(columns.values())))
    rows = [(name, *(f"{found[name].value:.4f}" for found in columns.values())) for name in names]
    print_table(rows, ("figure", *columns))
    if arguments.out:
        out = Path(arguments.out)
        for name, run in zip(system_names(list(runs)), runs.values(), strict=True):
            # One run a file, as `unitok report` reads them
            own = re.sub(r"[^\w.-]+", "_", name)
            print(write_results(out if len(runs) == 1 else out.with_name(f"{out.stem}-{own}.json"), run))
    return 0


def _measure(model: Any, source: Any, train: Any, classes: Any, forms: Any, arguments: argparse.Namespace) -> list[Any]:
    from unitok.eval.zeroshot import PROBE_C, classifier, classify, labelled_features, linear_probe, retrieve

    limit, size = arguments.limit, arguments.batch_size
    test = labelled_features(model, source, classes, limit, size)
    metrics = classify(*test, classifier(model, classes.names, forms))
    if train is not None:
        found = labelled_features(model, train, classes, None, size)
        metrics += linear_probe(found, test, arguments.probe_c or PROBE_C, arguments.seed)
    if arguments.retrieval:
        metrics += retrieve(model, source, limit, size)
    return metrics


def _protocol(arguments: argparse.Namespace, num_classes: int, num_templates: int) -> dict[str, Any]:
    from unitok.eval.zeroshot import PROBE_C

    probe = {"train": arguments.probe_train, "c": arguments.probe_c or PROBE_C} if arguments.probe_train else None
    return {
        "source": arguments.source,
        "limit": arguments.limit,
        "classes": arguments.classes or "folders",
        "num_classes": num_classes,
        "templates": arguments.templates,
        "num_templates": num_templates,
        "probe": probe,
    }


def _plan(arguments: argparse.Namespace, paths: list[str]) -> int:
    """What would be measured, and what is missing for it."""
    print(f"would measure: zero-shot classification on {arguments.source} with {arguments.templates} templates")
    for path in paths:
        if not Path(path).exists():
            print(f"missing: {path}: train it (unitok demo), or convert a release")
    for spec in arguments.open_clip:
        name, _, weights = spec.partition("=")
        place = name.removeprefix("local-dir:") if name.startswith("local-dir:") else weights
        if place and not Path(place).exists():
            print(f"not here: {spec}: open_clip would download {place}, or give the file of its weights")
    for source in filter(None, (arguments.source, arguments.probe_train)):
        if not source.startswith("shapes") and not Path(source).exists():
            print(f"missing: {source}: for ImageNet a folder val/ with one folder of images per class (image-net.org)")
    if arguments.classes not in (None, "imagenet") and not Path(arguments.classes).is_file():
        print(f"missing: {arguments.classes}: names of the classes")
    return 0
