"""`unitok eval ...` and `unitok report`: measure, print one table, write the figures as JSON."""

import argparse
from pathlib import Path
from typing import Any

from unitok.commands.use import load_pipeline
from unitok.core.errors import UserError
from unitok.core.signals import interrupt_ends

_WORLD = "the embedded world needs no data: shapes:val?num=500"
_DATA_FROM = {
    "reconstruction": f"ImageNet's val is at https://image-net.org (ILSVRC2012_img_val.tar); {_WORLD}",
    "retrieval": f"images with captions, such as COCO's val2017 of https://cocodataset.org; {_WORLD}",
    "vqa": f"images with questions (docs/data.md); {_WORLD}; benchmarks' own data: unitok lm-eval --dry-run",
}


def reconstruction(arguments: argparse.Namespace) -> int:
    """Figures of one autoencoder, or of several side by side."""
    from unitok.commands.reconstruction import compare

    return compare(arguments, _open(arguments), _finish)


def retrieval(arguments: argparse.Namespace) -> int:
    """Top-1 and top-5 of the image's own caption among the distinct captions, with chance."""
    from unitok.eval.retrieval import evaluate_retrieval
    from unitok.eval.run_form import with_errors

    source = _open(arguments)
    if _only_planned(arguments, f"caption retrieval on {arguments.limit or 'all'} images of {arguments.source}"):
        return 0
    tokenizer = _tokenizer(arguments)
    figures = evaluate_retrieval(tokenizer, source, arguments.limit, arguments.batch_size, tokenizer.device)
    figures = with_errors(figures, ("top1", "top5"), figures["num_images"])
    details = {"preprocess": tokenizer.config.preprocess, "image_size": tokenizer.config.image_size}
    return _finish(arguments, "retrieval", figures, {"images": figures["num_images"]}, **details)


def vqa(arguments: argparse.Namespace) -> int:
    """Accuracy by type of question, beside always giving the most frequent answer."""
    from unitok.data.captions import paraphrase
    from unitok.eval.run_form import with_errors
    from unitok.eval.vqa import evaluate_vqa

    source = _open(arguments)
    if _only_planned(arguments, f"{arguments.limit or 'all'} questions about {arguments.source}"):
        return 0
    pipeline = load_pipeline(arguments.model)
    rephrase = paraphrase if arguments.paraphrase else None
    size = arguments.batch_size
    figures = evaluate_vqa(pipeline.answer, source, arguments.limit, arguments.seed, batch_size=size, rephrase=rephrase)
    counts = {"questions": figures["num_questions"]}
    figures = with_errors(figures, ("accuracy",), figures["num_questions"])
    model = pipeline.model
    details = {"embedder_cache": model.config.embedder_cache, "precision": str(model.dtype).removeprefix("torch.")}
    details |= {"weights": model.weight_kind, "decoding": "greedy", "paraphrase": arguments.paraphrase}
    return _finish(arguments, "vqa", figures, counts, **details)


def geneval(arguments: argparse.Namespace) -> int:
    """GenEval on shapes prompts, or on a metadata file whose classes are shapes."""
    from unitok.data.captions import geneval_prompts
    from unitok.data.detector import detect
    from unitok.eval.geneval import evaluate_geneval, load_prompts
    from unitok.eval.geneval_detect import shapes_detector
    from unitok.eval.geneval_run import file_name_and_hash, generation_protocol, geneval_metrics
    from unitok.eval.geneval_score import SHAPES_RULE

    if arguments.dry_run:
        _list_missing(arguments)
        if arguments.prompts and not Path(arguments.prompts).is_file():
            return 0
    if arguments.prompts:
        metadata = load_prompts(arguments.prompts)[: arguments.limit]
    else:
        metadata = geneval_prompts(arguments.limit or 120, seed=arguments.seed)
    shapes_detector().check(metadata)
    if _only_planned(arguments, f"GenEval: {len(metadata)} prompts, {arguments.samples} images each"):
        return 0
    if arguments.images and Path(arguments.images).exists() and any(Path(arguments.images).iterdir()):
        raise UserError(
            f"--images {arguments.images}: is not empty, and pictures of two runs would mix; give a new folder"
        )
    pipeline = load_pipeline(arguments.model)

    def generate(prompts: list[str], seeds: list[int]) -> list[Any]:
        return pipeline.generate_images(prompts, guidance_scale=arguments.guidance, seed=seeds)

    figures = evaluate_geneval(
        generate,
        metadata,
        arguments.samples,
        arguments.images,
        arguments.seed,
        detect=detect,
        rule=SHAPES_RULE,
        batch_size=arguments.batch_size,
    )
    counts = {"prompts": len(metadata), "samples_per_prompt": arguments.samples}
    prompts = file_name_and_hash(arguments.prompts) if arguments.prompts else "of the shapes world, by the seed"
    details = generation_protocol(pipeline, {"guidance_scale": arguments.guidance}, prompts=prompts)
    details["scoring"] = shapes_detector().protocol()
    return _finish(arguments, "geneval", figures, counts, geneval_metrics(figures["rows"]), **details)


def report(arguments: argparse.Namespace) -> int:
    """Write DIR/report.html of a run folder, or show results files side by side."""
    from unitok.commands.geneval import show_side_by_side
    from unitok.eval.report import write_report

    paths = [Path(name) for name in arguments.paths]
    if any(path.is_dir() for path in paths):
        if len(paths) > 1 or arguments.html or arguments.mixed_protocols:
            raise UserError(f"{' '.join(arguments.paths)}: expected one run folder alone, or results files")
        print(write_report(paths[0]))
        return 0
    return show_side_by_side(paths, arguments.html, arguments.mixed_protocols)


def _open(arguments: argparse.Namespace) -> Any:
    """The source; None in a dry run that does not find it, which is then told."""
    from unitok.data.source import open_source

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: expected at least 1")
    if not arguments.dry_run:
        return open_source(arguments.source)
    _list_missing(arguments)
    try:
        return open_source(arguments.source)
    except UserError as error:  # what a dry run is for
        print(f"missing: {error}; {_DATA_FROM[arguments.kind]}")
        return None


def _list_missing(arguments: argparse.Namespace) -> None:
    """What a dry run does not find, and where it comes from."""
    from unitok.eval.geneval import PROMPTS_FROM

    made = "train it (unitok demo), convert a release (unitok convert), or name another"
    prompts = f"GenEval's prompts; from {PROMPTS_FROM}"
    for name, hint in (("model", made), ("tokenizer", made), ("prompts", prompts)):
        path = getattr(arguments, name, None)
        if isinstance(path, str) and not Path(path).exists():
            print(f"missing: {path}: {hint}")


def _only_planned(arguments: argparse.Namespace, plan: str) -> bool:
    if arguments.dry_run:
        print(f"would measure: {plan}")
    return arguments.dry_run


def _tokenizer(arguments: argparse.Namespace) -> Any:
    with interrupt_ends():
        import torch

        from unitok.core.pretrained import load_model_folder
        from unitok.tokenizer import UniTok

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_model_folder(UniTok, arguments.tokenizer).eval().to(device)


def _finish(
    arguments: argparse.Namespace,
    what: str,
    figures: dict[str, Any],
    counts: dict[str, int],
    metrics: list[Any] | None = None,
    **details: Any,
) -> int:
    """Print the figures as one table (of several systems the caller has, side by side) and write them with their
    protocol, also in the form of every run (`metrics`, or the plain numbers among the figures)."""
    from unitok.eval.results import figures_only, print_table, protocol, write_results

    figures = figures_only(figures)
    rows = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += [(f"{name} {key}", _text(entry)) for key, entry in value.items()]
        elif not isinstance(value, list):
            rows.append((name, _text(value)))
    if "systems" not in figures:
        print_table(rows, ("figure", "value"))
    if arguments.out:
        block = protocol(what, arguments.seed, counts, source=getattr(arguments, "source", None), **details)
        print(write_results(arguments.out, figures | _runs(arguments, what, figures, counts, block, metrics)))
    return 0


def _runs(
    arguments: argparse.Namespace,
    what: str,
    figures: dict[str, Any],
    counts: dict[str, int],
    block: dict[str, Any],
    metrics: list[Any] | None,
) -> dict[str, Any]:
    """One run's results; several systems are `runs` of one file. What names a system is no part of its protocol."""
    from unitok.eval.results import run_results
    from unitok.eval.run_form import figures_as_metrics, system_runs

    n, seeds = next(iter(counts.values())), [arguments.seed]
    paths = block.pop("systems", None) or [getattr(arguments, "model", None) or arguments.tokenizer]
    if "systems" in figures:
        runs = system_runs(what, figures["systems"], n, block, seeds, paths)
        return {"protocol": block | {"systems": paths}, "runs": runs}
    checkpoint = Path(paths[0]) if Path(paths[0]).exists() else None
    return run_results(what, metrics or figures_as_metrics(figures, n), block, seeds, checkpoint)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
