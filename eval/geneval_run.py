"""The official GenEval chain in two steps that need not share a machine: images into the official folder, scores of it.

Both steps share their work among processes and go on where they were stopped. What a folder was generated with lies in
its `generation.json`, and from there goes into the results of whatever scores it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from unitok.core.errors import DataError, UserError
from unitok.eval.geneval import list_samples, make_grid, result_row, sample_seed
from unitok.eval.geneval_score import summarise
from unitok.eval.progress import progress
from unitok.eval.results import Metric, checkpoint_hash, protocol_differences, share, write_results

if TYPE_CHECKING:
    from unitok.eval.geneval_detect import Detector
    from unitok.mllm.pipeline import UniTokPipeline

GENERATION = "generation.json"
_COUNTS = {"num_prompts", "samples_per_prompt"}  # of its protocol, which may grow
_SETTINGS = "settings.json"
_DIGEST = "image_sha256"  # in the rows of a part only, with what is asked for: what was made anew is scored anew


def read_rewrite(path: Path | str, prompts: Iterable[str]) -> dict[str, str]:
    """Other words for prompts: a JSON object {prompt as it stands: what the model is given}.

    Raises:
        DataError: the file is not of that form, or lacks a prompt (half a rewriting is no protocol).
    """
    expected = "expected a JSON object that maps every prompt to its rewriting"
    try:
        mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"--rewrite {path} cannot be read ({type(error).__name__}); {expected}") from None
    if not isinstance(mapping, dict) or not all(isinstance(text, str) and text.strip() for text in mapping.values()):
        raise DataError(f"--rewrite {path}: {expected}")
    missing = [prompt for prompt in prompts if prompt not in mapping]
    if missing:
        raise DataError(f"--rewrite {path} lacks {len(missing)} prompts, such as {missing[0]!r}; {expected}")
    return mapping


def file_name_and_hash(path: Path | str) -> dict[str, str]:
    """A data file (or folder of them) as a protocol names it: its name, and a hash of what it holds."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256(b"".join(file.name.encode() + b"\0" + file.read_bytes() for file in files))
    return {"file": path.name, "sha256": digest.hexdigest()}


def generation_protocol(pipeline: "UniTokPipeline", sampler: Mapping[str, Any], **details: Any) -> dict[str, Any]:
    """All that decides which images come out, but the model and the seed: sampler, cache mode, precision, `details`."""
    return {
        **details,
        "sampler": pipeline.image_sampler | {name: value for name, value in sampler.items() if value is not None},
        "embedder_cache": pipeline.model.config.embedder_cache,
        "precision": str(pipeline.model.dtype).removeprefix("torch."),
        "weights": pipeline.model.weight_kind,
    }


def write_generation(folder: Path, protocol: Mapping[str, Any], seed: int, model: Path | str) -> None:
    """`generation.json` of a folder, before the images: a folder never holds two protocols.

    Every process looks; the first of them writes, and whoever finds none. More prompts or samples may be added later.

    Raises:
        UserError: what is there was generated in another way; it says in what.
    """
    from unitok.mllm.many import own_share

    checkpoint = {"path": str(model), "sha256": checkpoint_hash(model)}
    record = {"protocol": dict(protocol), "seed": seed, "checkpoint": checkpoint}
    before = read_generation(folder)
    if before is not None:
        for name, (old, new) in protocol_differences(_fixed(before), _fixed(record)).items():
            raise UserError(f"{folder / GENERATION}: made with {name} {old}, now it is {new}; give another --out")
        for name in _COUNTS & record["protocol"].keys():  # what is there stays there
            record["protocol"][name] = max(record["protocol"][name], before["protocol"].get(name) or 0)
    if before is None or own_share()[0] == 0:
        write_results(folder / GENERATION, record)


def _fixed(record: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change within a folder."""
    protocol = {name: value for name, value in record["protocol"].items() if name not in _COUNTS}
    return {**protocol, "seed": record["seed"], "checkpoint": record["checkpoint"]["sha256"]}


def read_generation(folder: Path) -> dict[str, Any] | None:
    """What `write_generation` wrote; None in a folder that was made by another program."""
    path = folder / GENERATION
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); generate again, or delete it") from None
    if not isinstance(found, dict) or not {"protocol", "seed", "checkpoint"} <= found.keys():
        raise DataError(f"{path}: expected protocol, seed and checkpoint; generate again, or delete it")
    return found


def generate_folder(
    pipeline: "UniTokPipeline",
    metadata: Sequence[Mapping[str, Any]],
    out: Path,
    samples: int = 4,
    seed: int = 0,
    *,
    rewrite: Mapping[str, str] | None = None,
    batch_size: int = 32,
    **sampler: Any,
) -> None:
    """This process's share (RANK of WORLD_SIZE) of `samples` images of every prompt, in GenEval's folder layout.

    Images that are there stay; they do not depend on batches or processes. A prompt's grid.png is written once all its
    samples are there, and anew when more are.

    Raises:
        UserError: the folder holds another prompt at some number, or an image that was made in another way.
    """
    from unitok.mllm.many import generate_many, own_share

    _lay_out(out, metadata)
    jobs = [(index, sample) for index in range(len(metadata)) for sample in range(samples)]
    texts = [metadata[index]["prompt"] for index, _ in jobs]
    texts = texts if rewrite is None else [rewrite[text] for text in texts]
    seeds = [sample_seed(seed, *job) for job in jobs]
    names = [f"{index:05d}/samples/{sample:05d}.png" for index, sample in jobs]
    first, step = own_share()
    done = iter(progress(range(first, len(jobs), step), "generating images"))
    generate_many(
        pipeline, texts, out, seeds, names, batch_size, on_image=lambda *_: next(done, None), **sampler
    )  # fmt: skip
    for index in range(len(metadata)):
        _write_grid(out / f"{index:05d}", samples)


def _lay_out(out: Path, metadata: Sequence[Mapping[str, Any]]) -> None:
    """Folders and metadata.jsonl of all prompts."""
    for index, entry in enumerate(metadata):
        folder, text = out / f"{index:05d}", json.dumps(entry) + "\n"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        file = folder / "metadata.jsonl"
        if not file.exists():
            write_text(file, text)
        elif json.loads(file.read_text(encoding="utf-8")) != entry:
            raise UserError(f"{file} holds another prompt than {entry['prompt']!r}; give another folder")


def _write_grid(folder: Path, samples: int) -> None:
    files = [folder / "samples" / f"{sample:05d}.png" for sample in range(samples)]
    if not all(file.exists() for file in files) or _grid_of(folder / "grid.png") >= samples:
        return
    from unitok.mllm.many import write_image

    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    write_image(make_grid(images), folder / "grid.png", {"of": samples})


def _grid_of(path: Path) -> int:
    """How many samples a grid of ours holds; 0 where there is none, or one that does not tell."""
    from unitok.mllm.many import RECORD

    try:
        with Image.open(path) as image:
            return int(json.loads(image.info.get(RECORD, "{}")).get("of", 0))
    except OSError:
        return 0


def write_text(path: Path, text: str) -> None:
    """A whole text file or none."""
    import os

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def score_run(
    folder: Path,
    detector: "Detector",
    out: Path,
    limit: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[dict[str, Any]] | None:
    """Scores this process's share (number, of how many) of a folder in the official layout.

    Rows go line by line into files beside `out`, in its name with `.parts`: stopped and started again, with as many
    processes or others, only what is missing is scored. The process that finds all images scored writes `out`, with
    the rows in the order of the images, and returns them; the others return None.

    Args:
        limit: only the first so many prompts.

    Raises:
        DataError: no sample in the folder, or one that cannot be read.
        UserError: `.parts` come from another detector or thresholds, or prompts ask for what the detector cannot find.
    """
    samples = list_samples(folder, limit)
    if not samples:
        raise DataError(f"{folder} holds no GenEval sample; expected NNNNN/metadata.jsonl and NNNNN/samples/NNNNN.png")
    _check_complete(folder, len(samples), limit)
    detector.check([metadata for _, metadata in samples])
    parts = out.with_name(out.name + ".parts")
    _same_settings(parts, detector.protocol())
    names = {path: path.relative_to(folder).as_posix() for path, _ in samples}
    digests = {names[path]: _digest_of(path, metadata) for path, metadata in samples}
    known = _scored(parts, digests)
    first, step = part
    own = [(path, metadata) for path, metadata in samples[first::step] if names[path] not in known]
    with _open_part(parts / f"{first}.jsonl") as lines:
        for path, metadata in progress(own, "scoring images"):
            row = result_row(_read(path), metadata, detector.detect, detector.rule, names[path])
            lines.write(json.dumps(row | {_DIGEST: digests[names[path]]}) + "\n")
            lines.flush()
    known = _scored(parts, digests)
    if len(known) < len(digests):
        return None
    rows = [known[name] for name in digests]
    write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _check_complete(folder: Path, found: int, limit: int | None) -> None:
    """DataError where `generation.json` names more images than there are."""
    counts = (read_generation(folder) or {}).get("protocol") or {}
    if not _COUNTS <= counts.keys():
        return
    prompts = counts["num_prompts"] if limit is None else min(limit, counts["num_prompts"])
    if found < prompts * counts["samples_per_prompt"]:
        raise DataError(
            f"{folder} holds {found} of {prompts * counts['samples_per_prompt']} images; give the command that makes "
            "them again, which goes on, or score fewer prompts (--limit)"
        )


def _digest_of(path: Path, metadata: Mapping[str, Any]) -> str:
    """Of an image and what it is asked for."""
    return hashlib.sha256(path.read_bytes() + json.dumps(metadata).encode()).hexdigest()


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except OSError:
        raise DataError(f"{path} is not a readable image; generate it again or remove it") from None


def _same_settings(parts: Path, settings: dict[str, Any]) -> None:
    file = parts / _SETTINGS
    if not file.exists():
        parts.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings))
        return
    found, settings = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    if found != settings:
        changed = {name: (found.get(name), settings.get(name)) for name in {**found, **settings}}
        text = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items() if old != new)
        raise UserError(f"{parts} holds scores by {text}; delete it or give another --out")


def _open_part(file: Path) -> Any:
    """A part opened at its end, without the half line that a killed process may have left."""
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            file.write_bytes(whole)
    return file.open("a", encoding="utf-8")


def _scored(parts: Path, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Rows by name of the images that are scored already, as they are now."""
    known = {}
    for file in sorted(parts.glob("*.jsonl")):
        content = file.read_text(encoding="utf-8")
        for number, line in enumerate(content[: content.rfind("\n") + 1].splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise DataError(f"{file}:{number} is not JSON; delete that line, and score again") from None
            if row.pop(_DIGEST) == digests.get(row["filename"]):
                known[row["filename"]] = row
    return known


def geneval_metrics(rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """Overall and per-task scores with standard errors.

    Samples of one prompt are no independent trials: standard errors, and `n`, are over prompts. The overall score is
    the mean of the task means, so its variance is the sum of theirs over the squared number of tasks.
    """
    scores = summarise(rows)
    by_prompt: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        identity = str(row.get("metadata", row["prompt"]))
        by_prompt.setdefault(row["tag"], {}).setdefault(identity, []).append(bool(row["correct"]))
    tasks = []
    for tag, value in scores["by_tag"].items():
        over_prompts = share(tag, [sum(own) / len(own) for own in by_prompt[tag].values()])
        tasks.append(Metric(tag, value, over_prompts.standard_error, over_prompts.n))
    errors = [task.standard_error for task in tasks]
    error = None if None in errors else sum(one**2 for one in errors) ** 0.5 / len(errors)
    overall = Metric("overall", scores["overall"], error, scores["num_prompts"])
    right = [any(own) for task in by_prompt.values() for own in task.values()]
    return [overall, *tasks, share("prompt_accuracy", right)]
