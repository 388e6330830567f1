"""`unitok eval reconstruction`: any number of autoencoders on the same images."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from unitok.core.errors import UserError
from unitok.data.preprocess import OF_TOKENIZERS


def add_reconstruction_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """The options beside those of every `unitok eval`."""
    parser.description = (
        "Encode and decode images and compare. Several --tokenizer give one column each, so that UniTok and the SD-VAE "
        "see the same pixels. On several GPUs: torchrun --nproc_per_node N -m unitok eval reconstruction ..."
    )
    parser.add_argument(
        "--tokenizer", action="append", metavar="DIR|FILE|hub:NAME",
        help=f"UniTok folder, released .pth, or autoencoder of diffusers; several give columns (default: {default})",
    )  # fmt: skip
    parser.set_defaults(default_tokenizer=default)
    parser.add_argument("--lpips", metavar="FILE", help="weights of LPIPS (VGG16); without: no LPIPS")
    parser.add_argument("--inception", metavar="FILE", help="torch-fidelity's InceptionV3; without: no rFID, KID, ...")
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="for models of diffusers, which have none of their own"
    )
    parser.add_argument(
        "--preprocess", choices=OF_TOKENIZERS,
        help="how images are cut to size, for all models (default: as UniTok was trained, which others follow)",
    )  # fmt: skip


def compare(arguments: argparse.Namespace, source: Any, finish: Callable[..., int]) -> int:
    """Measure, print one table, write the figures."""
    from unitok.core.distributed import init_distributed, is_main, shutdown_distributed
    from unitok.eval.autoencoders import open_autoencoder, system_names

    paths = arguments.tokenizer or [arguments.default_tokenizer]
    if arguments.dry_run:
        count = "the" if source is None else min(arguments.limit or len(source), len(source))
        _plan(arguments, paths, f"reconstruction of {count} images of {arguments.source}")
        return 0
    device = init_distributed("auto")
    try:
        measures = _measures(arguments, device)
        models = {name: open_autoencoder(path) for name, path in zip(system_names(paths), paths, strict=True)}
        size, preprocess = _same_images(models, arguments.image_size, arguments.preprocess)
        figures: dict[str, dict[str, Any]] = {}
        for name, model in models.items():
            figures[name] = _one(model.to(device), source, arguments, device, measures)
            model.cpu()  # one at a time on the device
        if not is_main():
            return 0
        return _show(arguments, figures, finish, image_size=size, preprocess=preprocess, systems=paths)
    finally:
        shutdown_distributed()


def _same_images(models: dict[str, Any], size: int | None, preprocess: str | None) -> tuple[int, str]:
    """Image size and way of cutting (`size`, `preprocess` where given) that all models use, set in their configs.

    UniTok's are those of its training. Models of diffusers fix neither and follow the first UniTok; without any:
    256 pixels, plain.

    Raises:
        UserError: the models would not see the same pixels.
    """
    from unitok.eval.autoencoders import DiffusersAutoencoder

    fixed = [model for model in models.values() if not isinstance(model, DiffusersAutoencoder)]
    size = size or (fixed[0].config.image_size if fixed else 256)
    cut = preprocess or (fixed[0].config.preprocess if fixed else "plain")
    for name, model in models.items():
        if isinstance(model, DiffusersAutoencoder):
            model.config.image_size, model.config.preprocess = size, cut
        elif preprocess:
            model.config.preprocess = preprocess
        if model.config.image_size != size:
            raise UserError(f"{name} works at {model.config.image_size} pixels, the others at {size}: not comparable")
    settings = {name: model.config.preprocess for name, model in models.items()}
    if len(set(settings.values())) > 1:
        raise UserError(f"the models cut images in different ways ({settings}); give one for all: --preprocess NAME")
    return size, cut


def _one(
    model: Any, source: Any, arguments: argparse.Namespace, device: Any, measures: dict[str, Any]
) -> dict[str, Any]:
    from unitok.eval.reconstruction import evaluate_reconstruction
    from unitok.eval.results import figures_only

    found = evaluate_reconstruction(
        model, source, arguments.limit, arguments.batch_size, device, num_pairs=0, seed=arguments.seed, **measures
    )
    return figures_only(found)


def _measures(arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    import torch

    from unitok.eval.fidelity import load_inception
    from unitok.tokenizer.lpips import LPIPS

    out: dict[str, Any] = {}
    if arguments.lpips:
        network = LPIPS.from_file(arguments.lpips, _lpips_weights()).to(device)
        out["lpips"] = lambda a, b: torch.stack([network(b[i : i + 1], a[i : i + 1]) for i in range(len(a))])
    if arguments.inception:
        out["inception"] = load_inception(arguments.inception, device)
    return out


def _lpips_weights() -> Any:
    """Training's file, as the option of this command names it."""
    from unitok.tokenizer.weights import LPIPS_WEIGHTS

    return replace(LPIPS_WEIGHTS, field="--lpips", hint=LPIPS_WEIGHTS.hint.partition("; or set")[0])


def _plan(arguments: argparse.Namespace, paths: list[str], what: str) -> None:
    from pathlib import Path

    from unitok.eval.fidelity import INCEPTION_WEIGHTS
    from unitok.tokenizer.weights import HUB_PREFIX

    print(f"would measure: {what}")
    for path in paths:
        if path.startswith(HUB_PREFIX):
            print(f"needed: {path}: diffusers fetches it from the hub; or give its folder")
        elif not Path(path).exists():
            print(f"missing: {path}: train it (unitok demo), convert a release, or give another --tokenizer")
    for given, names, figures in (
        (arguments.lpips, _lpips_weights(), "LPIPS"),
        (arguments.inception, INCEPTION_WEIGHTS, "rFID, ISC, KID, precision, recall"),
    ):
        if not given:
            print(f"left out: {figures} ({names.what} not given; get {names.hint})")
        elif given.startswith(HUB_PREFIX):
            print(f"needed: {given}: {names.what}, fetched from the hub; or give its file")
        elif not Path(given).is_file():
            print(f"missing: {given}: {names.what}; get {names.hint}")


def _show(arguments: argparse.Namespace, figures: dict[str, Any], finish: Callable[..., int], **details: Any) -> int:
    from unitok.eval.results import print_table

    images = {name: values["num_images"] for name, values in figures.items()}
    if len(figures) == 1:
        (only,) = figures.values()
        return finish(arguments, "reconstruction", only, {"images": only["num_images"]}, **details)
    rows = dict.fromkeys(
        key for values in figures.values() for key, value in values.items() if not isinstance(value, list)
    )
    table = [(row, *(_text(values.get(row)) for values in figures.values())) for row in rows]
    print_table(table, ("figure", *figures))
    return finish(arguments, "reconstruction", {"systems": figures}, {"images": min(images.values())}, **details)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
