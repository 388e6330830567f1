"""Pictures for many prompts: in batches, over ranks, resumable, each file written whole.

K codebooks, L positions, H W pixels.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import unitok
from unitok.core.distributed import is_distributed, rank, world_size
from unitok.core.errors import UserError
from unitok.mllm.pipeline import UniTokPipeline, seeds_of
from unitok.mllm.sampler import SETTINGS, check_settings
from unitok.tokenizer.extract import Share

RECORD = "unitok"  # text entry of a PNG that says how it was made
_DIGITS = 5
_HEAD = 64  # numbers of each weight that a fingerprint reads
# What PIL raises for files that are no image, cut off, or damaged in their middle.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

Record = dict[str, Any]


def generate_many(
    pipeline: UniTokPipeline,
    prompts: Sequence[str],
    folder: Path | str,
    seed: int | Sequence[int] = 0,
    names: Sequence[str] | None = None,
    batch_size: int = 32,
    overlap: bool | None = None,
    graph: bool | None = None,
    on_image: Callable[[int, Path], None] | None = None,
    on_position: Callable[[int, int], None] | None = None,
    **sampler: Any,
) -> list[Path]:
    """One PNG per prompt, named by its index or as `names` say; the paths of all, those of other ranks included.

    Image i gets the seed `seed + i` (or `seed[i]`), so it is the same whatever the batches and ranks. Every rank (of a
    process group, or of torchrun, deepspeed or srun) makes each n-th image. What is there already is left as it
    is.

    Args:
        sampler: settings of `generate_codes` that replace those of the export, each one number for all.
        overlap: decode and write one batch while the next is sampled (None: on a GPU; on a CPU both want the same
            cores).
        graph: see `generate_codes`.
        on_image: called with index and path after each file of this rank, from one thread.
        on_position: called after each image position of a batch, with how many are done of how many.

    Raises:
        UserError: an image that is there was made in another way (it says in what), or by something else.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: expected at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(pipeline, sampler)
    seeds = seeds_of(seed, len(prompts), "prompts")
    records = image_records(pipeline, prompts, seeds, **settings)
    digits = max(_DIGITS, len(str(len(prompts) - 1)))
    names = [f"{index:0{digits}}.png" for index in range(len(prompts))] if names is None else names
    if len(names) != len(prompts) or len(set(names)) < len(names):
        raise UserError(f"{len(set(names))} different names for {len(prompts)} prompts: give each its own")
    paths = [folder / name for name in names]
    first, step = own_share()
    missing = [index for index in range(first, len(prompts), step) if not is_made(paths[index], records[index])]
    overlap = pipeline.model.device.type == "cuda" if overlap is None else overlap

    def finish(indices: Sequence[int], codes_BKL: Tensor, sampled: torch.cuda.Event | None) -> None:
        for index, pixels in zip(indices, _decode(pipeline, codes_BKL, stream, sampled), strict=True):
            write_image(pipeline.picture(pixels), paths[index], records[index], prompts[index])
            if on_image is not None:
                on_image(index, paths[index])

    # One for all batches: torch keeps the memory of each stream apart.
    stream = torch.cuda.Stream(pipeline.model.device) if overlap and pipeline.model.device.type == "cuda" else None

    with ThreadPoolExecutor(max_workers=1) as worker:
        pending: Future[None] | None = None
        for start in range(0, len(missing), batch_size):
            indices = missing[start : start + batch_size]
            own = [[values[index] for index in indices] for values in (prompts, seeds)]
            codes_BKL = pipeline.sample_codes(*own, settings, on_position, graph)
            if pending is not None:
                pending.result()  # an error of the last batch ends it all
            if overlap:
                sampled = torch.cuda.current_stream(codes_BKL.device).record_event() if stream is not None else None
                pending = worker.submit(finish, indices, codes_BKL, sampled)
            else:
                finish(indices, codes_BKL, None)
        if pending is not None:
            pending.result()
    return paths


def image_records(
    pipeline: UniTokPipeline, prompts: Sequence[str], seeds: Sequence[int], **sampler: Any
) -> list[Record]:
    """What decides how each image looks: prompt, seed, sampler, device, precision and the model. `sampler`: as in
    `generate_many`."""
    common = {
        "settings": _settings(pipeline, sampler),
        "device": pipeline.model.device.type,  # random numbers are made there
        "precision": str(pipeline.model.dtype).removeprefix("torch."),
        "weights": pipeline.model.weight_kind,
        "embedder_cache": pipeline.model.config.embedder_cache,
        "model": fingerprint(pipeline),  # last: rounded weights have another one
    }
    return [{"prompt": prompt, "seed": seed, **common} for prompt, seed in zip(prompts, seeds, strict=True)]


def _settings(pipeline: UniTokPipeline, sampler: dict[str, Any]) -> dict[str, Any]:
    """Those of the export and those given, as they are written into records: numpy's own numbers have no place there.
    UserError for one that is not one number for all."""
    given = {name: value for name, value in sampler.items() if value is not None}
    given = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    check_settings({name: value for name, value in given.items() if name in SETTINGS})
    return pipeline.image_sampler | given


def own_share() -> tuple[int, int]:
    """This process's number and how many there are: as of the process group or the launcher."""
    if is_distributed():
        return rank(), world_size()
    share = Share.of_launcher()
    return share.rank, share.world_size


def fingerprint(pipeline: UniTokPipeline) -> str:
    """Tells one trained model from another by the first numbers of each of its weights, and of the visual tokenizer's.
    Rounded weights (8 and 4 bits) are passed over."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (pipeline.model, pipeline.tokenizer):
        plain = [weight for weight in part.state_dict().values() if type(weight) is Tensor]
        heads = [weight.flatten()[:_HEAD].float().cpu() for weight in plain]
        digest.update(torch.cat(heads).numpy().tobytes())
    return digest.hexdigest()


def is_made(path: Path, record: Record) -> bool:
    """Whether the image is there, whole. UserError if it is not the one that `record` describes."""
    if not path.exists():
        return False
    try:
        # All of it: a file may have been cut off or damaged since. The first looks at checksums, the second at pixels.
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            image.load()
            text = image.info.get(RECORD)
    except _UNREADABLE as error:
        raise UserError(
            f"{path}: is there, but is no image, or a damaged one ({error}); delete it or give another folder"
        ) from error
    found, wanted = _record_of(text), json.loads(json.dumps(record))
    if found is None:
        raise UserError(f"{path}: is there, but was not made by this command; give another folder")
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            was, now = _difference(found.get(name), wanted.get(name))
            raise UserError(f"{path}: was made with {name} {was}, now it is {now}; give another folder or delete it")
    return True


def _record_of(text: str | None) -> Record | None:
    try:
        found = json.loads(text or "null")
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _difference(found: Any, wanted: Any) -> tuple[Any, Any]:
    """Of two dictionaries what differs, else both as they are."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return found, wanted
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return {name: found.get(name) for name in names}, {name: wanted.get(name) for name in names}


def write_image(image: Image.Image, path: Path, record: Record, description: str | None = None) -> None:
    """The PNG with its record, all at once. `description`, and the versions that wrote it, have PNG's own names."""
    info = PngInfo()
    info.add_text(RECORD, json.dumps(record))
    info.add_text("Software", _software())  # not part of the record: a new version goes on with a folder
    if description is not None:
        info.add_text("Description", description)
    name = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()  # short, however long the file's own is
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _software() -> str:
    versions = {"unitok": unitok.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


@torch.no_grad()
def _decode(
    pipeline: UniTokPipeline, codes_BKL: Tensor, stream: torch.cuda.Stream | None, sampled: torch.cuda.Event | None
) -> Tensor:
    """Pixels `[B, 3, H, W]` on the CPU. `sampled` marks where the codes are complete: on `stream` they are decoded, and
    brought here, beside what follows it on the GPU."""
    if stream is None or sampled is None:
        return pipeline.decode(codes_BKL).cpu()
    stream.wait_event(sampled)
    with torch.cuda.stream(stream):
        return pipeline.decode(codes_BKL).cpu()
