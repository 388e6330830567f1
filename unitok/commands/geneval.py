"""`unitok eval geneval-generate` and `geneval-score`: the official GenEval chain, each step for itself."""

import argparse
from pathlib import Path
from typing import Any

from unitok.commands.t2i import (
    add_generation_arguments,
    add_share_arguments,
    begin_generation,
    model_needed,
    plan,
    prompts_planned,
    sampler_of,
    use_share,
)
from unitok.core.errors import DataError, UserError

_DETECTORS = ("mask2former", "owlv2", "shapes")


def add_generate_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """Options of `geneval-generate`."""
    from unitok.cli import positive_int

    parser.description = (
        "Draw images for GenEval's prompts into its official folder layout. The same command goes on where it was "
        "stopped. Several GPUs: torchrun --nproc_per_node N -m unitok eval geneval-generate ..."
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help="evaluation_metadata.jsonl")
    parser.add_argument("--samples", type=positive_int, default=4, help="images per prompt (default: %(default)s)")
    add_generation_arguments(parser, model)
    parser.set_defaults(run=("geneval", "generate"))


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `geneval-score`."""
    from unitok.cli import positive_int

    parser.description = (
        "Score a folder in GenEval's official layout, made here or by another program. Writes results.jsonl, which "
        "GenEval's summary script reads, and beside it results.json. The same command goes on where it was stopped. "
        "Several GPUs: torchrun --nproc_per_node N -m unitok eval geneval-score ..."
    )
    parser.add_argument("folder", metavar="DIR", help="folder of 00000/metadata.jsonl, 00000/samples/00000.png, ...")
    parser.add_argument("--detector", required=True, choices=_DETECTORS, help="shapes: of the embedded world")
    parser.add_argument(
        "--detector-weights", metavar="DIR|NAME", help="folder of transformers, or name on the hub (default: Meta's "
        "Mask2Former Swin-S for COCO instances, or Google's OWLv2 base)"
    )  # fmt: skip
    parser.add_argument("--clip", metavar="FILE", help="OpenAI's CLIP ViT-L/14, which names colors, or hub:...")
    parser.add_argument("--threshold", type=float, metavar="S", help="least score of a detection (default: official)")
    parser.add_argument("--counting-threshold", type=float, metavar="S", help="for counting (default: official)")
    parser.add_argument("--out", metavar="FILE", help="rows (default: DIR/results.jsonl); figures beside it as .json")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="score only the first N prompts")
    parser.add_argument("--seed", type=int, help="the images' seed, where no generation.json tells")
    add_share_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and what is missing, and stop")
    parser.set_defaults(run=("geneval", "score"), positional="folder")


def generate(arguments: argparse.Namespace) -> int:
    """Draw this process's share of the images."""
    from unitok.eval.geneval import PROMPTS_FROM, load_prompts
    from unitok.eval.geneval_run import (
        generate_folder,
        read_rewrite,
    )

    use_share(arguments)
    if arguments.dry_run:
        needed = [(arguments.prompts, f"GenEval's prompts; from {PROMPTS_FROM}"), model_needed(arguments)]
        if arguments.rewrite:
            needed.append((arguments.rewrite, "the rewritten prompts, a JSON object"))
        plan(f"{arguments.samples} images for {prompts_planned(arguments)} of GenEval into {arguments.out}", needed)
        return 0
    metadata = load_prompts(arguments.prompts)[: arguments.limit]
    rewrite = read_rewrite(arguments.rewrite, [entry["prompt"] for entry in metadata]) if arguments.rewrite else None
    out = Path(arguments.out)
    pipeline, _ = begin_generation(arguments, out, len(metadata), arguments.samples)
    generate_folder(
        pipeline, metadata, out, arguments.samples, arguments.seed, rewrite=rewrite,
        batch_size=arguments.batch_size, **sampler_of(arguments),
    )  # fmt: skip
    print(f"{out}: this process's images are there; score them with `unitok eval geneval-score {out} --detector NAME`")
    return 0


def score(arguments: argparse.Namespace) -> int:
    """Score this process's share; the last process writes rows and figures."""
    from unitok.eval.geneval_run import geneval_metrics, read_generation, score_run
    from unitok.eval.results import print_run, run_results, write_run
    from unitok.mllm.many import own_share

    folder = Path(arguments.folder)
    out = Path(arguments.out) if arguments.out else folder / "results.jsonl"
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a file ending in .jsonl (the figures go beside it, as .json)")
    use_share(arguments)
    if arguments.dry_run:
        _plan_score(arguments, folder)
        return 0
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected images in GenEval's layout, as geneval-generate makes them")
    detector = _detector(arguments, folder)
    rows = score_run(folder, detector, out, arguments.limit, own_share())
    if rows is None:
        print(f"{folder}: this process's share is scored; the process that ends last writes {out}")
        return 0
    generation = read_generation(folder) or {}
    seed = generation.get("seed", arguments.seed)
    protocol = {
        "scoring": detector.protocol(),
        "generation": generation.get("protocol"),
        "num_prompts": len({row["filename"].split("/")[0] for row in rows}),
        "num_images": len(rows),
    }
    results = run_results("geneval", geneval_metrics(rows), protocol, [] if seed is None else [seed], None)
    results |= {"checkpoint": generation.get("checkpoint")}
    print_run(results)
    print(out)
    print(write_run(out.with_suffix(".json"), results))
    return 0


def _plan_score(arguments: argparse.Namespace, folder: Path) -> None:
    from unitok.eval.geneval_detect import CLIP_HINT

    needed = [(str(folder), "images in GenEval's layout; make them with `unitok eval geneval-generate`")]
    if arguments.detector != "shapes":
        weights = arguments.detector_weights
        name = _default_weights(arguments.detector)
        of_the_hub = weights is not None and weights.count("/") == 1 and weights[0] not in "./~"
        if of_the_hub and not Path(weights).exists():
            needed.append((f"hub:{weights}", "the detector"))
        else:
            needed.append((weights, f"the detector's folder; without it {name} of the hub"))
        needed.append((arguments.clip, f"CLIP, which names colors (--clip FILE); get {CLIP_HINT}"))
    some = f"the images of {prompts_planned(arguments)}" if arguments.limit else "the images"
    plan(f"scores of {some} in {folder} by {arguments.detector}", needed)


def _default_weights(detector: str) -> str:
    from unitok.eval.geneval_detect import MASK2FORMER, OWLV2

    return {"mask2former": MASK2FORMER, "owlv2": OWLV2}[detector]


def _detector(arguments: argparse.Namespace, folder: Path) -> Any:
    from dataclasses import replace

    from unitok.core.distributed import inference_device
    from unitok.eval import geneval_detect as detectors
    from unitok.eval.geneval import list_samples

    given = {"threshold": arguments.threshold, "counting_threshold": arguments.counting_threshold}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.detector == "shapes":
        if arguments.detector_weights or arguments.clip:
            raise UserError("--detector shapes needs no --detector-weights and no --clip; leave them out")
        return detectors.shapes_detector(replace(detectors.SHAPES_RULE, **given))
    device = inference_device()
    name_color = _colors(arguments, [metadata for _, metadata in list_samples(folder, arguments.limit)], device)
    path = arguments.detector_weights or _default_weights(arguments.detector)
    if arguments.detector == "mask2former":
        detector = detectors.mask2former_detector(path, device, replace(detectors.OFFICIAL_RULE, **given), name_color)
    else:
        # of the whole folder, whatever --limit: the queries compete for a box, so others would give other scores
        classes = sorted(detectors.wanted_classes([metadata for _, metadata in list_samples(folder)]))
        detector = detectors.owlv2_detector(path, classes, device, replace(detectors.OWLV2_RULE, **given), name_color)
    if name_color is not None:
        detector.settings["clip"] = {"name": detectors.CLIP_NAME, "weights": detectors.weights_name(arguments.clip)}
    return detector


def _colors(arguments: argparse.Namespace, metadata: list[dict[str, Any]], device: Any) -> Any:
    """CLIP where a prompt asks for a colour: before hours of detection, not after."""
    from unitok.eval.geneval_detect import ClipColors

    asked = any(clause.get("color") is not None for entry in metadata for clause in entry["include"])
    return ClipColors.from_file(arguments.clip, device) if asked or arguments.clip else None


def show_side_by_side(paths: list[Path], html: str | None, mixed_protocols: bool) -> int:
    """`unitok report FILE...`: print the tables, and write them as a page where that is asked for."""
    from unitok.eval.compare import as_html, as_text, compare
    from unitok.eval.geneval_run import write_text

    if html:
        Path(html).parent.mkdir(parents=True, exist_ok=True)
    tables = compare(paths, mixed_protocols)
    print(as_text(tables))
    if html:
        write_text(Path(html), as_html(tables))
        print(html)
    return 0
