"""`unitok eval reconstruction`: any number of autoencoders on the same images."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from unitok.core.errors import UserError


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
        "--preprocess", choices=("plain", "inference", "vae_val", "clip_val"),
        help="how images are cut to size, for all models (default: as each was trained)",
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
        figures: dict[str, dict[str, Any]] = {}
        size = arguments.image_size
        settings = {}
        for name, path in zip(system_names(paths), paths, strict=True):
            model = open_autoencoder(path, device, size, arguments.preprocess or "plain")
            if arguments.preprocess:
                model.config.preprocess = arguments.preprocess
            size = size or model.config.image_size
            if model.config.image_size != size:
                raise UserError(
                    f"{path} works at {model.config.image_size} pixels, the others at {size}: not comparable"
                )
            settings[name] = getattr(model.config, "preprocess", "plain")
            figures[name] = _one(model, source, arguments, device, measures)
        if len(set(settings.values())) > 1:
            raise UserError(
                f"the models cut images in different ways ({settings}); give one for all: --preprocess NAME"
            )
        if not is_main():
            return 0
        return _show(arguments, figures, finish, image_size=size, preprocess=settings, systems=paths)
    finally:
        shutdown_distributed()


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
        if not path.startswith(HUB_PREFIX) and not Path(path).exists():
            print(f"missing: {path}: train it (unitok demo), convert a release, or give another --tokenizer")
    for given, names, figures in (
        (arguments.lpips, _lpips_weights(), "LPIPS"),
        (arguments.inception, INCEPTION_WEIGHTS, "rFID, ISC, KID, precision, recall"),
    ):
        if not given:
            print(f"left out: {figures} ({names.what} not given; get {names.hint})")
        elif not given.startswith(HUB_PREFIX) and not Path(given).is_file():
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
