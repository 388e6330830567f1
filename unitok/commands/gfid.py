"""`unitok eval gfid`: class-conditional images of a model trained on class tokens, and their FID."""

import argparse
from pathlib import Path
from typing import Any

from unitok.commands.t2i import (
    add_generation_arguments,
    fid_network,
    model_needed,
    plan,
    sampler_of,
    use_share,
)
from unitok.commands.use import load_pipeline

REFERENCE_FROM = (
    "VIRTUAL_imagenet256_labeled.npz of github.com/openai/guided-diffusion (evaluations), or a folder of images"
)


def add_gfid_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """Options of `unitok eval gfid`."""
    from unitok.cli import positive_int

    parser.description = (
        "Draw images of all classes in turn and measure their FID. The same command goes on where it was stopped. "
        "Without guidance: --guidance 1. Several GPUs: torchrun --nproc_per_node N -m unitok eval gfid ..."
    )
    parser.add_argument("--num", type=positive_int, default=50000, help="images (default: %(default)s)")
    add_generation_arguments(parser, model, prompts=False)
    parser.add_argument("--reference", metavar="FILE|DIR", help="npz of guided-diffusion's kind, or folder of images")
    parser.add_argument("--inception", metavar="FILE", help="torch-fidelity's InceptionV3; without: no FID")
    parser.add_argument("--npz", metavar="FILE", help="also all images in one file, for guided-diffusion's evaluator")
    parser.set_defaults(run=("gfid", "gfid"))


def gfid(arguments: argparse.Namespace) -> int:
    """Draw this process's share; figures once all images are there."""
    from unitok.eval.class_generation import count_classes, generate_classes, reference_kind, write_batch
    from unitok.eval.geneval_run import generation_protocol, write_generation

    use_share(arguments)
    num = min(arguments.num, arguments.limit or arguments.num)
    if arguments.dry_run:
        _plan(arguments, num)
        return 0
    network = fid_network(arguments)
    if network is not None:
        reference_kind(Path(arguments.reference))  # hours before it is read
    pipeline, out = load_pipeline(arguments.model, arguments.precision), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    protocol = generation_protocol(pipeline, sampler_of(arguments), classes=count_classes(pipeline))
    write_generation(out, protocol, arguments.seed, arguments.model)
    paths = generate_classes(
        pipeline, num, out / "images", arguments.seed, batch_size=arguments.batch_size, **sampler_of(arguments)
    )
    missing = sum(not path.exists() for path in paths)
    if missing:
        print(f"{out}: this process's share is done; {missing} of {num} images wait for other processes")
        return 0
    print(f"{out / 'images'}: {num} images of {protocol['classes']} classes")
    if arguments.npz:
        write_batch(paths, Path(arguments.npz))
        print(arguments.npz)
    return _measure(arguments, paths, protocol | {"num_images": num}, network) if arguments.inception else 0


def _plan(arguments: argparse.Namespace, num: int) -> None:
    from unitok.eval.fidelity import INCEPTION_WEIGHTS

    needed = [
        model_needed(arguments),
        (arguments.reference, f"FID's reference (--reference); from {REFERENCE_FROM}"),
        (arguments.inception, f"FID's InceptionV3 (--inception FILE); get {INCEPTION_WEIGHTS.hint}"),
    ]
    plan(f"{num} images of all classes into {arguments.out}", needed)


def _measure(arguments: argparse.Namespace, paths: list[Path], protocol: dict[str, Any], network: Any) -> int:
    from unitok.eval.class_generation import gfid_metrics
    from unitok.eval.fidelity import reference_name
    from unitok.eval.results import print_run, run_results, write_run

    reference = Path(arguments.reference)
    metrics, kind = gfid_metrics(paths, reference, network, arguments.batch_size, arguments.seed)
    protocol |= {"fid": "torch-fidelity, 8-bit images", "reference": reference_name(reference), "reference_kind": kind}
    results = run_results("class_conditional", metrics, protocol, [arguments.seed], Path(arguments.model))
    print_run(results)
    print(write_run(Path(arguments.out) / "results.json", results))
    return 0
