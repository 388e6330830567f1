"""`unitok eval ...` and `unitok report`: measure, print one table, write the figures as JSON."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError


def reconstruction(arguments: argparse.Namespace) -> int:
    """Figures of one autoencoder, or of several side by side."""
    from unitok.commands.reconstruction import compare

    return compare(arguments, _open(arguments), _finish)


def retrieval(arguments: argparse.Namespace) -> int:
    """Top-1 and top-5 of the image's own caption among the distinct captions, with chance."""
    from unitok.eval.retrieval import evaluate_retrieval

    source = _open(arguments)
    if _only_planned(arguments, f"caption retrieval on {_count(arguments, len(source))} images of {source.name}"):
        return 0
    tokenizer = _tokenizer(arguments)
    figures = evaluate_retrieval(tokenizer, source, arguments.limit, arguments.batch_size, tokenizer.device)
    return _finish(arguments, "retrieval", figures, {"images": figures["num_images"]})


def vqa(arguments: argparse.Namespace) -> int:
    """Accuracy by type of question, beside always giving the most frequent answer."""
    from unitok.data.captions import paraphrase
    from unitok.eval.vqa import evaluate_vqa

    source = _open(arguments)
    if _only_planned(arguments, f"visual question answering on {source.name}"):
        return 0
    pipeline = _pipeline(arguments)
    rephrase = paraphrase if arguments.paraphrase else None
    size = arguments.batch_size
    figures = evaluate_vqa(pipeline.answer, source, arguments.limit, arguments.seed, batch_size=size, rephrase=rephrase)
    counts = {"questions": figures["num_questions"]}
    return _finish(arguments, "vqa", figures, counts, paraphrase=arguments.paraphrase)


def geneval(arguments: argparse.Namespace) -> int:
    """GenEval on shapes prompts, or on a metadata file whose classes are shapes."""
    from unitok.data.captions import geneval_prompts
    from unitok.data.detector import detect
    from unitok.eval.geneval import evaluate_geneval, load_prompts
    from unitok.eval.geneval_score import SHAPES_RULE

    if arguments.prompts:
        metadata = load_prompts(arguments.prompts)[: arguments.limit]
    else:
        metadata = geneval_prompts(arguments.limit or 120, seed=arguments.seed)
    _check_classes(metadata)
    if _only_planned(arguments, f"GenEval: {len(metadata)} prompts, {arguments.samples} images each"):
        return 0
    pipeline = _pipeline(arguments)

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
    return _finish(arguments, "geneval", figures, counts, rule=asdict(SHAPES_RULE))


def report(arguments: argparse.Namespace) -> int:
    """Write DIR/report.html."""
    from unitok.eval.report import write_report

    folder = Path(arguments.dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    print(write_report(folder))
    return 0


def _check_classes(metadata: list[dict[str, Any]]) -> None:
    """The shapes detector knows three classes; scoring others with it would look like a measurement."""
    from unitok.data.shapes import SHAPES

    classes = {clause["class"] for entry in metadata for clause in entry["include"]}
    unknown = sorted(classes - set(SHAPES))
    if unknown:
        raise UserError(
            f"prompts ask for {unknown[0]!r}, which the shapes detector cannot find (it knows {', '.join(SHAPES)})"
        )


def _open(arguments: argparse.Namespace) -> Any:
    from unitok.data.source import open_source

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: expected at least 1")
    return open_source(arguments.source)


def _count(arguments: argparse.Namespace, available: int) -> int:
    return available if arguments.limit is None else min(arguments.limit, available)


def _only_planned(arguments: argparse.Namespace, plan: str) -> bool:
    if arguments.dry_run:
        print(f"would measure: {plan}")
    return arguments.dry_run


def _tokenizer(arguments: argparse.Namespace) -> Any:
    import torch

    from unitok.core.pretrained import load_model_folder
    from unitok.tokenizer import UniTok

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model_folder(UniTok, arguments.tokenizer).eval().to(device)


def _pipeline(arguments: argparse.Namespace) -> Any:
    from unitok.mllm.pipeline import UniTokPipeline

    return UniTokPipeline.from_pretrained(arguments.model)


def _finish(
    arguments: argparse.Namespace, what: str, figures: dict[str, Any], counts: dict[str, int], **details: Any
) -> int:
    """Print the figures as one table and write them with their protocol."""
    from unitok.eval.results import figures_only, print_table, protocol, write_results

    figures = figures_only(figures)
    rows = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += [(f"{name} {key}", _text(entry)) for key, entry in value.items()]
        elif not isinstance(value, list):
            rows.append((name, _text(value)))
    print_table(rows, ("figure", "value"))
    if arguments.out:
        block = protocol(what, arguments.seed, counts, source=getattr(arguments, "source", None), **details)
        print(write_results(arguments.out, figures | {"protocol": block}))
    return 0


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)
