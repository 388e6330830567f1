"""One self-contained HTML page about a run: figures, curves, images, a conversation, the configuration.

The page is made from files of the run folder. Whatever is missing or cannot be read is left out, and the page says so.

    results.json                        figures (`unitok.eval.results.demo_results`)
    tokenizer/log.jsonl, mllm/log.jsonl one JSON object a logged step: "step" and metrics
    tokenizer/config.yaml, mllm/config.yaml
    images/reconstruction/index.json    [{"original": FILE, "reconstruction": FILE, "caption": text or null}]
    images/generation/index.json        [{"file": FILE, "prompt": text, "tag": text or null, "correct": bool or null}]
    chat.json                           [{"role": "user" | "assistant", "content": text, "image": FILE or absent,
                                          "expected": text or absent}]; images lie in images/chat/

FILE is a name in the folder of its index. `save_reconstructions`, `save_generations` and `save_chat` write these.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from unitok import __version__
from unitok.core.errors import DataError
from unitok.eval.curves import curve_names, curve_svg, is_finite
from unitok.eval.results import DEMO_HEADERS, demo_table, read_results
from unitok.eval.vqa_accuracy import is_answer

STAGES = (("tokenizer", "Stage one: tokenizer"), ("mllm", "Stage two: unified model"))
TAG_NAMES = {
    "single_object": "single object",
    "two_object": "two objects",
    "color_attr": "colour attribution",
    "colors": "colours",
}

Loaded = TypeVar("Loaded")


def save_reconstructions(
    run_dir: Path | str,
    pairs: Sequence[tuple[Image.Image, Image.Image]],
    captions: Sequence[str] | None = None,
) -> None:
    """Stores (original, reconstruction) pairs for the report."""
    folder = _fresh_folder(Path(run_dir) / "images" / "reconstruction")
    index = []
    for number, (original, reconstruction) in enumerate(pairs):
        names = f"{number:03d}_original.png", f"{number:03d}_reconstruction.png"
        original.save(folder / names[0])
        reconstruction.save(folder / names[1])
        caption = captions[number] if captions is not None else None
        index.append({"original": names[0], "reconstruction": names[1], "caption": caption})
    _write_json(folder / "index.json", index)


def save_generations(
    run_dir: Path | str,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    correct: Sequence[bool | None] | None = None,
    tags: Sequence[str] | None = None,
) -> None:
    """Stores generated images for the report, with their prompts and, if known, the scorer's word and the task."""
    folder = _fresh_folder(Path(run_dir) / "images" / "generation")
    index = []
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        image.save(folder / f"{number:03d}.png")
        entry = {"file": f"{number:03d}.png", "prompt": prompt}
        entry |= {"tag": tags[number] if tags else None, "correct": correct[number] if correct else None}
        index.append(entry)
    _write_json(folder / "index.json", index)


def save_geneval_examples(run_dir: Path | str, scores: Mapping[str, Any], per_tag: int = 8) -> None:
    """Stores the first `per_tag` images of every task from what `evaluate_geneval` returned: first, not best."""
    count: dict[str, int] = {}
    chosen = []
    for number, row in enumerate(scores["rows"]):
        count[row["tag"]] = count.get(row["tag"], 0) + 1
        if count[row["tag"]] <= per_tag:
            chosen.append((scores["images"][number], row))
    rows = [row for _, row in chosen]
    columns = ([row[key] for row in rows] for key in ("prompt", "correct", "tag"))
    save_generations(run_dir, [image for image, _ in chosen], *columns)


def save_chat(run_dir: Path | str, turns: Sequence[Mapping[str, Any]]) -> None:
    """Stores a conversation: turns with "role", "content" and optionally "image" (PIL) and "expected" (an answer)."""
    folder = _fresh_folder(Path(run_dir) / "images" / "chat")
    stored = []
    for number, turn in enumerate(turns):
        entry = {key: turn[key] for key in ("role", "content", "expected") if turn.get(key) is not None}
        if turn.get("image") is not None:
            entry["image"] = f"{number:03d}.png"
            turn["image"].save(folder / entry["image"])
        stored.append(entry)
    _write_json(Path(run_dir) / "chat.json", stored)


def _fresh_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    Raises:
        DataError: there is no such folder, or nothing in it that a report could show.
    """
    import jinja2

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder; give the folder of a run, as runs/demo")
    view = _collect(run_dir)
    if not any(view[part] for part in ("results", "stages", "reconstructions", "generations", "chat")):
        raise DataError(
            f"{run_dir} holds nothing to report; expected results.json, tokenizer/log.jsonl or mllm/log.jsonl"
        )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(resources.files("unitok.eval").joinpath("report.html.j2").read_text("utf-8"))
    page = run_dir / "report.html"
    page.write_text(template.render(view), encoding="utf-8")
    return page


def _collect(run_dir: Path) -> dict[str, Any]:
    notes: list[str] = []

    def load(name: str, read: Callable[[Path], Loaded]) -> Loaded | None:
        path = run_dir / name
        if not path.exists():
            notes.append(f"{name} is not in the run folder")
            return None
        try:
            return read(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{name} could not be read ({type(error).__name__}: {error})")
            return None

    results = load("results.json", read_results) or {}
    logs = {stage: load(f"{stage}/log.jsonl", _read_log) for stage, _ in STAGES}
    configs = {stage: load(f"{stage}/config.yaml", lambda path: path.read_text("utf-8")) for stage, _ in STAGES}
    return {
        "title": run_dir.resolve().name,
        "version": __version__,
        "results": results,
        "headers": DEMO_HEADERS,
        "table": demo_table(results),
        "cards": _cards(results),
        "vqa_bars": _vqa_bars(results.get("vqa") or {}),
        "geneval_bars": _geneval_bars(results.get("geneval") or {}),
        "cost": _cost(results),
        "stages": [_stage(title, logs[stage]) for stage, title in STAGES if logs[stage]],
        "configs": [(title, configs[stage]) for stage, title in STAGES if configs[stage]],
        "protocol": json.dumps(results["protocol"], indent=2) if results.get("protocol") else "",
        "reconstructions": load("images/reconstruction/index.json", _read_reconstructions) or [],
        "generations": load("images/generation/index.json", _read_generations) or [],
        "chat": load("chat.json", _read_chat) or [],
        "notes": notes,
    }


def _read_log(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _stage(title: str, log: list[dict[str, Any]]) -> dict[str, Any]:
    curves = []
    for name in curve_names(log):
        last = next(line[name] for line in reversed(log) if is_finite(line.get(name)))
        curves.append({"name": name, "last": last, "svg": curve_svg(log, name)})
    return {"title": title, "steps": log[-1].get("step"), "curves": [curve for curve in curves if curve["svg"]]}


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _beside(index: Path, name: str) -> str:
    # The name only: an index file must not be able to pull other files of the machine into the page.
    return _data_url(index.parent / Path(name).name)


def _read_reconstructions(path: Path) -> list[dict[str, Any]]:
    return [
        {
            "original": _beside(path, entry["original"]),
            "reconstruction": _beside(path, entry["reconstruction"]),
            "caption": entry.get("caption"),
        }
        for entry in json.loads(path.read_text("utf-8"))
    ]


def _read_generations(path: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads(path.read_text("utf-8")):
        image = {"image": _beside(path, entry["file"]), "prompt": entry["prompt"], "correct": entry.get("correct")}
        groups.setdefault(_tag_name(entry.get("tag") or ""), []).append(image)
    return list(groups.items())


def _read_chat(path: Path) -> list[dict[str, Any]]:
    turns = []
    for entry in json.loads(path.read_text("utf-8")):
        turn = {"role": entry["role"], "content": entry["content"], "image": None, "expected": entry.get("expected")}
        turn["correct"] = turn["expected"] and is_answer(turn["content"], turn["expected"])
        if entry.get("image"):
            turn["image"] = _beside(path.parent / "images" / "chat" / "index", entry["image"])
        turns.append(turn)
    return turns


def _tag_name(tag: str) -> str:
    return TAG_NAMES.get(tag, tag.replace("_", " "))


def _bar(
    name: str, value: float, baseline: float | None, ceiling: float | None = None, note: str = ""
) -> dict[str, Any]:
    return {"name": name, "value": value, "baseline": baseline, "ceiling": ceiling, "note": note}


def _vqa_bars(vqa: Mapping[str, Any]) -> list[dict[str, Any]]:
    bars = []
    for kind, entry in (vqa.get("by_type") or {}).items():
        note = f"{entry['count']} questions" if "count" in entry else ""
        bars.append(_bar(_tag_name(kind), entry["accuracy"], entry.get("majority"), note=note))
    return bars


def _geneval_bars(geneval: Mapping[str, Any]) -> list[dict[str, Any]]:
    low, high = geneval.get("random_codes_by_tag") or {}, geneval.get("reconstruction_ceiling_by_tag") or {}
    by_tag = geneval.get("by_tag") or {}
    return [_bar(_tag_name(tag), value, low.get(tag), high.get(tag)) for tag, value in by_tag.items()]


def _cards(results: Mapping[str, Any]) -> list[dict[str, str]]:
    tokenizer, vqa, geneval = (results.get(part) or {} for part in ("tokenizer", "vqa", "geneval"))
    wanted = [
        ("Reconstruction", tokenizer.get("psnr_db"), "{:.1f}", "dB PSNR", None, ""),
        ("Scene kept", tokenizer.get("detector_agreement"), "{:.0%}", "of reconstructions", None, ""),
        ("VQA accuracy", vqa.get("accuracy"), "{:.0%}", "of answers", vqa.get("majority"), "majority answer {:.0%}"),
        ("GenEval-style", geneval.get("overall"), "{:.2f}", "of 1", geneval.get("random_codes"), "random codes {:.2f}"),
    ]
    return [
        {
            "name": name,
            "value": form.format(value),
            "unit": unit,
            "beside": beside.format(base) if base is not None else "",
        }
        for name, value, form, unit, base, beside in wanted
        if value is not None
    ]


def _cost(results: Mapping[str, Any]) -> list[str]:
    parts = []
    if results.get("wall_seconds"):
        minutes, seconds = divmod(round(results["wall_seconds"]), 60)
        parts.append(f"{minutes} min {seconds} s in all")
    if results.get("peak_memory_mb"):
        parts.append(f"{results['peak_memory_mb'] / 1000:.2f} GB memory at most")
    machine = (results.get("protocol") or {}).get("machine") or {}
    if machine.get("cpus"):
        parts.append(f"{machine['cpus']} CPU cores")
    return parts
