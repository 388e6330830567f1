"""The main job from end to end on the shapes world: both stages, chat, pictures, evaluation, report."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unitok.commands.train import stage_config
from unitok.core.config import Config, has_config
from unitok.core.errors import ConfigError
from unitok.core.launch import launch, local_ranks
from unitok.core.memory import MemoryWatch
from unitok.eval.report import write_report
from unitok.eval.results import write_results

HELD_OUT_IMAGES = 500
VQA_QUESTIONS = 1000
GENEVAL_PROMPTS = 240
GENEVAL_SAMPLES = 2
SECOND = "_2"  # ending of a second part's configuration and folder

# Shows that every part runs; nothing is learnt in so few steps.
QUICK = {
    "tokenizer": ["steps=4", "save_every=2", "data.source=shapes:train?num=64", "discriminator.start_step=2"],
    "mllm": ["steps=4", "save_every=2"],
}


def run_demo(out: Path, seed: int = 0, quick: bool = False, recipe: str = "shapes") -> dict[str, Any]:
    """Train, evaluate and report into `out`; returns the figures that stand in `out/results.json`.

    `recipe` names the configuration file of each stage (configs/tokenizer/NAME.yaml and configs/mllm/NAME.yaml).
    The final export is `out/model`. An interrupted demo goes on where its last checkpoint was; its time is then that of
    all calls together.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _counted(out, "training"):
        source = _train_tokenizer(out, seed, quick, recipe)
        _extract(out, source)
        _train_model(out, seed, quick, recipe)
    with _counted(out, "evaluation", anew=True) as spent:
        results = evaluate_model(out / "model", out, seed, quick)
    results |= {
        "wall_seconds": round(sum(part["seconds"] for part in spent.values()), 1),
        "training_cpu_seconds": round(spent["training"]["cpu_seconds"], 1),
        "peak_memory_mb": round(max(part["peak_mb"] for part in spent.values()), 1),
    }
    write_results(out / "results.json", results)
    write_report(out)
    _print(out, results)
    return results


@contextmanager
def _counted(out: Path, part: str, anew: bool = False) -> Iterator[dict[str, dict[str, float]]]:
    """Seconds, CPU seconds (of all ranks) and largest memory of every part, as `out/spent.json` remembers over calls.

    What this call spends is added to `part`, or replaces it if `anew`: training goes on, an evaluation starts again.
    """
    record = out / "spent.json"
    spent = json.loads(record.read_text()) if record.is_file() else {}
    nothing = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_mb": 0.0}
    before = nothing if anew else nothing | spent.get(part, {})
    started, cpu = time.monotonic(), sum(os.times()[:4])
    watch = MemoryWatch()
    try:
        with watch:
            yield spent
    finally:
        seconds = before["seconds"] + time.monotonic() - started
        spent[part] = {
            "seconds": seconds,
            "cpu_seconds": before["cpu_seconds"] + sum(os.times()[:4]) - cpu,
            "peak_mb": max(before["peak_mb"], watch.peak_mb),
        }
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(spent) + "\n")
        os.replace(temporary, record)


def _section(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _train(stage: str, recipe: str, run: Path, seed: int, quick: bool, places: dict[str, Path]) -> Config:
    """One stage into the folder `run`, on two ranks where there are two cores, at the batch size of its configuration
    file."""
    file = f"{stage}/{recipe}.yaml"
    overrides = [f"output_dir={run}", f"seed={seed}", *(QUICK[stage] if quick else [])]
    overrides += [f"{name}={path}" for name, path in places.items()]
    config = stage_config(stage, file, overrides)
    ranks = local_ranks(most=2)
    if config.engine.micro_batch_size % ranks:
        raise ConfigError(
            f"engine.micro_batch_size={config.engine.micro_batch_size} does not divide into {ranks} ranks"
        )
    overrides.append(f"engine.micro_batch_size={config.engine.micro_batch_size // ranks}")
    launch(["train", stage, "--config", file, *overrides], ranks)
    return config


def _train_tokenizer(out: Path, seed: int, quick: bool, recipe: str) -> str:
    """Stage one; returns the data source that it trained on."""
    _section("stage one: the visual tokenizer")
    return _train("tokenizer", recipe, out / "tokenizer", seed, quick, {}).data.source


def _extract(out: Path, source: str) -> None:
    """Code shards of the training images; kept if they are those of this tokenizer."""
    from unitok.core.pretrained import load_model_folder
    from unitok.data.source import open_source
    from unitok.tokenizer import UniTok
    from unitok.tokenizer.extract import extract_codes, fingerprint

    _section("encoding the training images")
    tokenizer = load_model_folder(UniTok, out / "tokenizer" / "export")
    codes, header = out / "codes", out / "codes" / "header.json"
    if header.is_file() and json.loads(header.read_text())["tokenizer"] == fingerprint(tokenizer):
        print(f"{codes} is there already")
        return
    shutil.rmtree(codes, ignore_errors=True)
    extract_codes(tokenizer, open_source(source), codes)


def _train_model(out: Path, seed: int, quick: bool, recipe: str) -> None:
    """Stage two, and its second part where the recipe has one (configs/mllm/NAME_2.yaml), which goes on from the export
    of the first; the last export is copied to `out/model`."""
    _section("stage two: the unified model")
    last, codes = out / "mllm", {"data.codes": out / "codes"}
    _train("mllm", recipe, last, seed, quick, {"tokenizer": out / "tokenizer" / "export"} | codes)
    if has_config(f"mllm/{recipe}{SECOND}.yaml"):
        _section("stage two: its second part")
        first, last = last, out / f"mllm{SECOND}"
        _train("mllm", recipe + SECOND, last, seed, quick, {"init_from": first / "export"} | codes)
    shutil.rmtree(out / "model", ignore_errors=True)
    shutil.copytree(last / "export", out / "model")


def evaluate_model(model: Path, out: Path, seed: int, quick: bool = False) -> dict[str, Any]:
    """Every figure of the export in `model` on held-out scenes, each with its baseline; `out` gets what the report
    shows."""
    from unitok.data.captions import geneval_prompts, paraphrase
    from unitok.data.detector import detect
    from unitok.data.source import open_source
    from unitok.eval.geneval import evaluate_geneval, random_codes_score, reconstruction_ceiling
    from unitok.eval.geneval_score import SHAPES_RULE
    from unitok.eval.reconstruction import evaluate_reconstruction
    from unitok.eval.report import save_geneval_examples, save_reconstructions
    from unitok.eval.results import demo_results, protocol
    from unitok.eval.retrieval import evaluate_retrieval
    from unitok.eval.vqa import evaluate_vqa
    from unitok.mllm.pipeline import UniTokPipeline

    _section("evaluation on held-out scenes")
    scale = 20 if quick else 1
    images, questions, prompts = (n // scale for n in (HELD_OUT_IMAGES, VQA_QUESTIONS, GENEVAL_PROMPTS))
    source = open_source(f"shapes:val?num={images}&seed={seed}")
    pipeline = UniTokPipeline.from_pretrained(model)
    tokenizer = pipeline.tokenizer
    reconstruction = evaluate_reconstruction(tokenizer, source, device=tokenizer.device)
    retrieval = evaluate_retrieval(tokenizer, source, device=tokenizer.device)
    vqa = evaluate_vqa(pipeline.answer, source, questions, seed, batch_size=64, rephrase=paraphrase)
    metadata = geneval_prompts(prompts, seed)

    def generate(texts: list[str], seeds: list[int]) -> list[Any]:
        return pipeline.generate_images(texts, seed=seeds, batch_size=len(texts))

    scoring = {"detect": detect, "rule": SHAPES_RULE}
    drawn = {"samples_per_prompt": GENEVAL_SAMPLES, "seed": seed, "device": tokenizer.device}
    geneval = evaluate_geneval(generate, metadata, GENEVAL_SAMPLES, out / "geneval", seed, batch_size=60, **scoring)
    save_reconstructions(out, reconstruction["pairs"])
    save_geneval_examples(out, geneval)
    _save_conversation(out, pipeline, source)
    counts = {"images": images, "questions": vqa["num_questions"], "prompts": prompts, "samples": GENEVAL_SAMPLES}
    return demo_results(
        tokenizer=reconstruction,
        retrieval=retrieval,
        vqa=vqa,
        geneval=geneval,
        random_codes=random_codes_score(tokenizer, metadata, **drawn, **scoring),
        reconstruction_ceiling=reconstruction_ceiling(tokenizer, source, device=tokenizer.device, **scoring),
        wall_seconds=0.0,
        protocol_block=protocol(
            "demo",
            seed,
            counts,
            source=source.name,
            sampler=pipeline.image_sampler,
            rule=asdict(SHAPES_RULE),
            quick=quick,
        ),
    )


def _save_conversation(out: Path, pipeline: Any, source: Any, num_images: int = 3) -> None:
    """A conversation of several turns about the first held-out images, as it comes."""
    from unitok.eval.report import save_chat

    shown: list[dict[str, Any]] = []
    for index in range(num_images):
        sample, messages = source[index], []
        for number, question in enumerate(sample.questions[:3]):
            image = [{"type": "image", "image": sample.image}] if number == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.question}]})
            answer = pipeline.chat(messages, max_new_tokens=16)
            messages.append({"role": "assistant", "content": answer})
            shown.append({"role": "user", "content": question.question, "image": sample.image if image else None})
            shown.append({"role": "assistant", "content": answer, "expected": question.answer})
    save_chat(out, shown)


def _print(out: Path, results: dict[str, Any]) -> None:
    from unitok.eval.results import DEMO_HEADERS, demo_table, print_table

    _section("results")
    print_table(demo_table(results), DEMO_HEADERS)
    for name, types in (("VQA", results["vqa"]["by_type"]), ("GenEval-style", results["geneval"]["by_tag"])):
        print()
        if name == "VQA":
            rows = [(kind, f"{one['accuracy']:.3f}", f"{one['majority']:.3f}") for kind, one in types.items()]
            print_table(rows, ("VQA by type", "accuracy", "majority answer"))
        else:
            rows = [(tag, f"{score:.3f}") for tag, score in types.items()]
            print_table(rows, ("GenEval-style by task", "score"))
    minutes = results["wall_seconds"] / 60
    print(f"\n{minutes:.1f} minutes, {results['peak_memory_mb']:.0f} MB at most")
    print(f"model   {out / 'model'}\nfigures {out / 'results.json'}\nreport  {out / 'report.html'}", flush=True)
