"""Class-conditional images and their FID (gFID), without or with guidance, for a model trained on class tokens.

N images, H W pixels.
"""

import contextlib
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from unitok.core.errors import DataError, UserError
from unitok.core.rng import derive_seed
from unitok.data.classes import class_token
from unitok.data.transforms import IMAGE_EXTENSIONS
from unitok.eval.progress import progress
from unitok.eval.results import Metric
from unitok.eval.t2i_runs import add_files, device_of

if TYPE_CHECKING:
    from unitok.mllm.pipeline import UniTokPipeline


def count_classes(pipeline: "UniTokPipeline") -> int:
    """How many classes the model knows: its class tokens, but the one that stands for "no class".

    UserError where it was not trained on classes.
    """
    vocabulary = pipeline.processor.tokenizer.get_vocab()
    count = 0
    while class_token(count) in vocabulary:
        count += 1
    if count and pipeline.model.config.unconditional_text == class_token(count - 1):
        count -= 1
    if not count:
        raise UserError("the model has no class tokens; train one with backbone.class_tokens and data.classes")
    return count


def class_jobs(num: int, classes: int, seed: int) -> list[tuple[str, str, int]]:
    """(file name, class token, seed) of `num` images, the classes in turn so that all have as many, or one more."""
    digits = max(6, len(str(num - 1)))
    names = [f"{index:0{digits}}.png" for index in range(num)]
    return [(name, class_token(i % classes), derive_seed("gfid", seed, i)) for i, name in enumerate(names)]


def generate_classes(
    pipeline: "UniTokPipeline", num: int, out: Path, seed: int = 0, *, batch_size: int = 32, **sampler: Any
) -> list[Path]:
    """This process's share (RANK of WORLD_SIZE) of `num` images; the paths of all. See `generate_many`."""
    from unitok.mllm.many import generate_many, own_share

    jobs = class_jobs(num, count_classes(pipeline), seed)
    names, tokens, seeds = (list(column) for column in zip(*jobs, strict=True))
    first, step = own_share()
    done = iter(progress(range(first, num, step), "generating images"))
    return generate_many(
        pipeline, tokens, out, seeds, names, batch_size, on_image=lambda *_: next(done, None), **sampler
    )


def write_batch(paths: Sequence[Path], file: Path) -> None:
    """The images as `arr_0` uint8 `[N, H, W, 3]` in an npz, as the evaluator of guided-diffusion reads samples."""
    arrays = []
    for path in paths:
        with Image.open(path) as image:
            arrays.append(np.asarray(image.convert("RGB")))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.tmp.npz")
    np.savez(temporary, arr_0=np.stack(arrays))
    temporary.replace(file)


def gfid_metrics(
    paths: Sequence[Path], reference: Path, network: torch.nn.Module, batch_size: int = 32, seed: int = 0
) -> tuple[list[Metric], str]:
    """Figures of images beside a reference, and which kind of reference it was.

    `reference`: a folder of images (also in sub-folders), or an npz of guided-diffusion's kind: with `mu` and `sigma`
    only FID and inception score are measured (its authors' own statistics), with nothing but images `arr_0` all.

    Raises:
        DataError: the reference is neither, or of another network.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    from unitok.eval.fidelity import LOGITS, Features, distances, fid_to_statistics

    generated = Features(network)
    add_files(generated, paths, batch_size, "features, generated")
    features, n = generated.gathered(), len(paths)
    kind = reference_kind(reference)
    if kind == "statistics":
        with contextlib.redirect_stdout(sys.stderr):
            isc = isc_features_to_metric(features[LOGITS], splits=min(10, n), shuffle=True, rng_seed=seed)
        fid = fid_to_statistics(features, reference)
        return [Metric("fid", fid, None, n), Metric("isc", isc["inception_score_mean"], None, n)], kind
    real = Features(network)
    if kind == "images":
        _add_batch(real, reference, batch_size)
    else:
        files = sorted(path for path in reference.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
        add_files(real, files, batch_size, "features, reference")
    found = distances(features, real.gathered(), seed)
    return [Metric(name, float(found[name]), None, n) for name in ("fid", "isc", "kid", "precision", "recall")], kind


def reference_kind(reference: Path) -> str:
    """ "folder", or of an npz "statistics" or "images"."""
    if reference.is_dir():
        return "folder"
    try:
        with np.load(reference, allow_pickle=False) as file:
            names = set(file.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"--reference {reference} cannot be read ({type(error).__name__}); give a folder of images or an .npz"
        ) from None
    if {"mu", "sigma"} <= names:
        return "statistics"
    if "arr_0" in names:
        return "images"
    raise DataError(f"--reference {reference} holds {', '.join(sorted(names))}; expected mu and sigma, or arr_0")


def _add_batch(features: Any, file: Path, batch_size: int) -> None:
    with np.load(file, allow_pickle=False) as content:
        images = content["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(f"--reference {file}: arr_0 is {images.dtype} {images.shape}; expected uint8 [N, H, W, 3]")
    for start in progress(range(0, len(images), batch_size), "features, reference"):
        batch = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2)
        features.add(batch.to(device_of(features)))
