"""Images for DPG-Bench, GenAI-Bench and MJHQ-30K, named and laid out as their official scorers read them.

`OUT/samples` holds every image as PNG, `OUT/images` is what the official program is given:

    dpg    images/ID.png             2 x 2 grid of four; ID from ID.txt of dpg_bench/prompts (TencentQQGYLab/ELLA)
    genai  images/ID.jpeg            ID from genai_image.json (BaiqiL/GenAI-Bench-1600, linzhiqiu/t2v_metrics)
    mjhq   images/CATEGORY/ID.png    from meta_data.json (playgroundai/MJHQ-30K); FID is measured here

The first two are scored by vision-language models of their own programs (mPLUG, VQAScore), which are not part of this.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from unitok.core.errors import DataError
from unitok.core.rng import derive_seed
from unitok.eval.geneval import make_grid
from unitok.eval.progress import progress
from unitok.eval.results import Metric

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline

JPEG = {"quality": 100, "subsampling": 0}  # the official name asks for JPEG; this loses as little as it can
_NAME = re.compile(r"[^/\\\0]+")


@dataclass(frozen=True)
class Item:
    """One prompt; `name` is its image's path under `images`, without the ending."""

    name: str
    prompt: str


def load_dpg(path: Path) -> list[Item]:
    """A folder of ID.txt files, one prompt each."""
    if not path.is_dir():
        raise DataError(f"{path}: expected the folder dpg_bench/prompts with one .txt file a prompt")
    files = sorted(file for file in path.glob("*.txt") if not file.name.startswith("."))
    return _checked([Item(file.stem, _text_of(file)) for file in files], path)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}); expected one prompt as text") from None


def load_genai(path: Path) -> list[Item]:
    """genai_image.json: {ID: {"prompt": ...}}."""
    return _checked([Item(name, entry["prompt"]) for name, entry in _entries(path, ("prompt",))], path)


def load_mjhq(path: Path) -> list[Item]:
    """meta_data.json: {ID: {"category": ..., "prompt": ...}}."""
    entries = _entries(path, ("category", "prompt"))
    for name, entry in entries:
        _plain(name, path)
        _plain(entry["category"], path)
    return _checked([Item(f"{entry['category']}/{name}", entry["prompt"]) for name, entry in entries], path, depth=2)


def _entries(path: Path, fields: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    expected = f"expected a JSON object of {{ID: {{{', '.join(fields)}}}}}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); {expected}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}; {expected}")
    for name, entry in data.items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in fields):
            raise DataError(f"{path}: entry {name!r} is {str(entry)[:60]!r}; {expected}")
    return list(data.items())


def _plain(name: str, path: Path) -> None:
    """Names become files: none may lead out of the folder."""
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise DataError(f"{path}: {name!r} cannot be a file's name; expected a plain one")


def _checked(items: list[Item], path: Path, depth: int = 1) -> list[Item]:
    if not items:
        raise DataError(f"{path} holds no prompt; is it the benchmark's own file?")
    for item in items:
        if depth == 1:
            _plain(item.name, path)
        if not item.prompt.strip():
            raise DataError(f"{path}: the prompt of {item.name} is empty")
    return items


@dataclass(frozen=True)
class Bench:
    """One benchmark. `samples`: images of a prompt; `suffix` of its official image."""

    title: str
    load: Callable[[Path], list[Item]]
    samples: int
    suffix: str
    prompts_from: str
    scored_by: str


BENCHES = {
    "dpg": Bench(
        "DPG-Bench", load_dpg, 4, ".png", "github.com/TencentQQGYLab/ELLA, the folder dpg_bench/prompts",
        "dpg_bench/compute_dpg_bench.py --image-root-path OUT/images --resolution SIZE --pic-num 4 of ELLA",
    ),
    "genai": Bench(
        "GenAI-Bench", load_genai, 1, ".jpeg", "genai_image.json of huggingface.co/datasets/BaiqiL/GenAI-Bench-1600",
        "genai_bench/evaluate.py --output_dir OUT --gen_model images of github.com/linzhiqiu/t2v_metrics",
    ),
    "mjhq": Bench(
        "MJHQ-30K", load_mjhq, 1, ".png",
        "meta_data.json and mjhq30k_imgs.zip of huggingface.co/datasets/playgroundai/MJHQ-30K",
        "unitok eval t2i --bench mjhq with --reference and --inception",
    ),
}  # fmt: skip


def generate_bench(
    pipeline: "UniTokPipeline",
    bench: str,
    items: Sequence[Item],
    out: Path,
    seed: int = 0,
    *,
    rewrite: Mapping[str, str] | None = None,
    batch_size: int = 32,
    **sampler: Any,
) -> int:
    """This process's share (RANK of WORLD_SIZE) of the images, then the official files that can be made of what is
    there. Returns how many of these are still missing. What is there stays; see `generate_many`."""
    from unitok.mllm.many import generate_many, own_share

    spec = BENCHES[bench]
    jobs = [(item, sample) for item in items for sample in range(spec.samples)]
    files = [sample_file(out, bench, item, sample) for item, sample in jobs]
    for folder in {file.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    texts = [item.prompt if rewrite is None else rewrite[item.prompt] for item, _ in jobs]
    seeds = [derive_seed(bench, seed, item.name, sample) for item, sample in jobs]
    first, step = own_share()
    done = iter(progress(range(first, len(jobs), step), "generating images"))
    names = [file.relative_to(out).as_posix() for file in files]
    generate_many(pipeline, texts, out, seeds, names, batch_size, on_image=lambda *_: next(done, None), **sampler)
    return sum(not _finish(out, bench, item) for item in items)


def sample_file(out: Path, bench: str, item: Item, sample: int) -> Path:
    """The PNG of one image. MJHQ-30K needs no other form of it."""
    if bench == "mjhq":
        return official_file(out, bench, item)
    name = item.name if BENCHES[bench].samples == 1 else f"{item.name}/{sample:05d}"
    return out / "samples" / f"{name}.png"


def official_file(out: Path, bench: str, item: Item) -> Path:
    """What the official scorer reads."""
    return out / "images" / f"{item.name}{BENCHES[bench].suffix}"


def _finish(out: Path, bench: str, item: Item) -> bool:
    """Makes an item's official image; False where a sample is missing."""
    spec, target = BENCHES[bench], official_file(out, bench, item)
    files = [sample_file(out, bench, item, sample) for sample in range(spec.samples)]
    if not all(file.exists() for file in files):
        return False
    if target.exists():
        return True
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    make_grid(images).save(temporary, **(JPEG if spec.suffix == ".jpeg" else {}))
    temporary.replace(target)
    return True


def fidelity_metrics(
    out: Path, items: Sequence[Item], reference: Path, network: torch.nn.Module, batch_size: int = 32, seed: int = 0
) -> list[Metric]:
    """FID, KID, inception score, precision and recall of MJHQ-30K's images beside `reference/CATEGORY/ID.*`.

    Images go to the network in the size in which they lie there; it resizes them itself.

    Raises:
        DataError: a generated or a reference image is missing or cannot be read.
    """
    from unitok.eval.fidelity import Features, distances

    generated, real = Features(network), Features(network)
    theirs = [_reference_file(reference, item) for item in items]
    add_files(generated, [official_file(out, "mjhq", item) for item in items], batch_size, "features, generated")
    add_files(real, theirs, batch_size, "features, reference")
    found = distances(generated.gathered(), real.gathered(), seed)
    names = ("fid", "kid", "isc", "precision", "recall")
    return [Metric(name, float(found[name]), None, len(items)) for name in names]


def _reference_file(reference: Path, item: Item) -> Path:
    for suffix in (".jpg", ".jpeg", ".png"):
        file = reference / f"{item.name}{suffix}"
        if file.exists():
            return file
    raise DataError(
        f"{reference}/{item.name}.jpg: no such reference image; give --reference the folder of mjhq30k_imgs.zip "
        f"({BENCHES['mjhq'].prompts_from})"
    )


def device_of(features: Any) -> torch.device:
    """Where the network of `Features` expects its images."""
    return next(iter([*features.network.parameters(), *features.network.buffers()]), torch.zeros(())).device


def add_files(features: Any, files: Sequence[Path], batch_size: int, label: str) -> None:
    """Takes the features of image files as they are, 8-bit RGB; neighbours of one size go in one batch.

    `features`: `unitok.eval.fidelity.Features`. DataError where a file is no image.
    """
    device = device_of(features)
    waiting: list[torch.Tensor] = []
    for file in progress(files, label):
        try:
            with Image.open(file) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except OSError:
            raise DataError(f"{file} is not a readable image; generate or download it again") from None
        if waiting and (len(waiting) == batch_size or waiting[0].shape != pixels.shape):
            features.add(torch.stack(waiting).to(device))
            waiting = []
        waiting.append(pixels)
    if waiting:
        features.add(torch.stack(waiting).to(device))
