"""GenEval: prompts, generation into the official folder format, scoring of images and folders.

`OUT/00000/metadata.jsonl` (the prompt's line), `OUT/00000/samples/00000.png`, `OUT/00000/grid.png`, and
`OUT/results.jsonl` with the rows that the official summary reads. So a folder made here can be scored by the official
program, and one made by another model can be scored here.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unitok.core.errors import DataError
from unitok.core.rng import derive_seed
from unitok.data.source import good_samples
from unitok.eval.codes import random_code_images, reconstruct_images
from unitok.eval.geneval_score import OFFICIAL_RULE, Detected, GenEvalRule, score_detections, summarise
from unitok.eval.geneval_score import score_prompt as score_prompt  # the scorer on plain records, part of our interface
from unitok.eval.progress import batches, progress

Metadata = Mapping[str, Any]
Detect = Callable[[Image.Image], Sequence[Detected]]
Generate = Callable[[list[str], list[int]], list[Image.Image]]  # (prompts, seeds) -> one image each

PROMPTS_FROM = "github.com/djghosh13/geneval, prompts/evaluation_metadata.jsonl"


def load_prompts(path: Path | str) -> list[dict[str, Any]]:
    """Reads prompts in GenEval's JSON lines format (`evaluation_metadata.jsonl`).

    Raises:
        DataError: the file is missing or a line is not a prompt; the message names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read GenEval prompts from {path} ({type(error).__name__}); get {PROMPTS_FROM}"
        ) from None
    prompts = [_parse_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompt; expected one JSON object a line with tag, include and prompt")
    return prompts


def _parse_prompt(text: str, where: str) -> dict[str, Any]:
    expected = "expected a JSON object with tag, prompt and include [{class, count, color?, position?}]"
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError:
        raise DataError(f"{where} is not JSON; {expected}") from None
    if not isinstance(metadata, dict):
        raise DataError(f"{where} is a {type(metadata).__name__}; {expected}")
    missing = [key for key in ("tag", "prompt", "include") if metadata.get(key) is None]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; {expected}")
    _check_clauses(metadata, where, expected)
    return metadata


def _check_clauses(metadata: Metadata, where: str, expected: str) -> None:
    for key in ("include", "exclude"):
        clauses = metadata.get(key, [])
        if not isinstance(clauses, list):
            raise DataError(f"{where}: {key} is a {type(clauses).__name__}; {expected}")
        for index, clause in enumerate(clauses):
            if not (isinstance(clause, dict) and _is(clause.get("class"), str) and _is(clause.get("count"), int)):
                raise DataError(f"{where}: {key}[{index}] is {clause!r}; {expected}")
            position = clause.get("position")
            if position is None:
                continue
            earlier = isinstance(position, list) and len(position) == 2 and _is(position[1], int)
            if not (earlier and position[1] in range(index)):
                raise DataError(f"{where}: position {position!r} must be [relation, index of an earlier clause]")


def _is(value: Any, kind: type) -> bool:
    """Of that kind; true and false are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def write_prompts(folder: Path | str, metadata: Sequence[Metadata]) -> list[Path]:
    """Creates one official sub-folder per prompt with its `metadata.jsonl`; returns the sub-folders in order."""
    folders = []
    for index, entry in enumerate(metadata):
        prompt_folder = Path(folder) / f"{index:05d}"
        (prompt_folder / "samples").mkdir(parents=True, exist_ok=True)
        (prompt_folder / "metadata.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")
        folders.append(prompt_folder)
    return folders


def make_grid(images: Sequence[Image.Image]) -> Image.Image:
    """All images of one prompt in one picture, nearly square, row by row."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


def result_row(
    image: Image.Image, metadata: Metadata, detect: Detect, rule: GenEvalRule, filename: str
) -> dict[str, Any]:
    """Scores one image: the row of the official `results.jsonl`."""
    detections = list(detect(image))
    correct, reason = score_detections(detections, metadata, rule)
    kept = rule.select(detections, metadata["tag"])
    boxes = {kind: [[*map(float, item.bbox), float(item.score)] for item in items] for kind, items in kept.items()}
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": correct,
        "reason": reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(boxes),
    }


def score_images(
    images: Sequence[Image.Image],
    metadata: Sequence[Metadata],
    detect: Detect,
    rule: GenEvalRule = OFFICIAL_RULE,
) -> dict[str, Any]:
    """Scores image i against prompt i; `summarise`'s figures and the rows under "rows"."""
    pairs = list(enumerate(zip(images, metadata, strict=True)))
    rows = [
        result_row(image, entry, detect, rule, f"{index:05d}.png")
        for index, (image, entry) in progress(pairs, "scoring images")
    ]
    return summarise(rows) | {"rows": rows}


def list_samples(folder: Path, limit: int | None = None) -> list[tuple[Path, Metadata]]:
    """(image, its prompt's metadata) of a folder in the official layout, of the first `limit` prompts."""
    prompt_folders = sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdigit())
    found = []
    for prompt_folder in prompt_folders[:limit]:
        metadata = load_prompts(prompt_folder / "metadata.jsonl")[0]
        samples = sorted(path for path in (prompt_folder / "samples").glob("*.png") if path.stem.isdigit())
        found += [(path, metadata) for path in samples]
    return found


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes result rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sample_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """Seed of one image: does not depend on the batch size or on which other prompts are drawn."""
    return derive_seed("geneval", seed, prompt_index, sample_index)


def evaluate_geneval(
    generate_fn: Generate,
    metadata: Sequence[Metadata],
    samples_per_prompt: int = 4,
    out: Path | str | None = None,
    seed: int = 0,
    *,
    detect: Detect,
    rule: GenEvalRule = OFFICIAL_RULE,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Draws `samples_per_prompt` images of every prompt and scores them.

    Args:
        generate_fn: (prompts, seeds) -> as many PIL images, one per prompt.
        out: folder that receives the official format and `results.jsonl`; None keeps nothing on disk.

    Returns:
        `summarise`'s figures, "rows", and "images" (PIL, in the order of the rows: prompt by prompt).

    Raises:
        DataError: no prompt, or `generate_fn` gave another number of images than asked.
    """
    if not metadata or samples_per_prompt < 1:
        raise DataError(f"GenEval got {len(metadata)} prompts and {samples_per_prompt} samples each; both must be >= 1")
    jobs = [(prompt, sample) for prompt in range(len(metadata)) for sample in range(samples_per_prompt)]
    images: list[Image.Image] = []
    for rows in progress(batches(len(jobs), batch_size), "generating images"):
        chunk = [jobs[row] for row in rows]
        prompts = [metadata[prompt]["prompt"] for prompt, _ in chunk]
        drawn = generate_fn(prompts, [sample_seed(seed, *job) for job in chunk])
        if len(drawn) != len(chunk):
            raise DataError(f"the generator gave {len(drawn)} images for {len(chunk)} prompts; expected one each")
        images += drawn
    names = [f"{prompt:05d}/samples/{sample:05d}.png" for prompt, sample in jobs]
    rows = [
        result_row(image, metadata[prompt], detect, rule, name)
        for image, (prompt, _), name in zip(images, jobs, names, strict=True)
    ]
    if out is not None:
        _write_folder(Path(out), metadata, names, images, samples_per_prompt)
        write_rows(Path(out) / "results.jsonl", rows)
    return summarise(rows) | {"rows": rows, "images": images}


def _write_folder(
    out: Path,
    metadata: Sequence[Metadata],
    names: list[str],
    images: list[Image.Image],
    samples_per_prompt: int,
) -> None:
    folders = write_prompts(out, metadata)
    for name, image in zip(names, images, strict=True):
        image.save(out / name)
    for index, folder in enumerate(folders):
        make_grid(images[index * samples_per_prompt : (index + 1) * samples_per_prompt]).save(folder / "grid.png")


def random_codes_score(
    tokenizer: Any,
    metadata: Sequence[Metadata],
    *,
    detect: Detect,
    rule: GenEvalRule = OFFICIAL_RULE,
    seed: int = 0,
    samples_per_prompt: int = 1,
    batch_size: int = 32,
    device: Any = "cpu",
) -> dict[str, Any]:
    """Baseline: images decoded from random codes, scored against the prompts. Returns `summarise`'s figures."""
    prompts = [entry for entry in metadata for _ in range(samples_per_prompt)]
    images = random_code_images(tokenizer, len(prompts), seed, batch_size, device)
    return _without_rows(score_images(images, prompts, detect, rule))


def reconstruction_ceiling(
    tokenizer: Any,
    source: Any,
    limit: int | None = None,
    *,
    detect: Detect,
    rule: GenEvalRule = OFFICIAL_RULE,
    batch_size: int = 32,
    device: Any = "cpu",
) -> dict[str, Any]:
    """Ceiling: real images through the tokenizer, each scored against its own caption's metadata.

    A generator that drew perfect codes could not do better than this, except by luck. `source` must give
    `meta["geneval"]`; the first `limit` samples are used.

    Raises:
        DataError: no sample has GenEval metadata.
    """
    count = min(len(source), len(source) if limit is None else limit)
    samples = [sample for _, sample in good_samples(source, count) if _is_metadata((sample.meta or {}).get("geneval"))]
    if not samples:
        raise DataError(f"none of the {count} samples has GenEval metadata; the ceiling needs a shapes source")
    images = reconstruct_images(tokenizer, [sample.image for sample in samples], batch_size, device)
    return _without_rows(score_images(images, [sample.meta["geneval"] for sample in samples], detect, rule))


def _is_metadata(value: Any) -> bool:
    return isinstance(value, Mapping) and "include" in value


def _without_rows(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scores.items() if key != "rows"}
