"""FID, inception score, KID, precision and recall, by torch-fidelity's own functions on features held in memory.

Images stay 8-bit RGB tensors on their way to the network (what a PNG file would hold); nothing is compressed.
B images, F features.
"""

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unitok.core.distributed import all_gather_object
from unitok.core.errors import DataError
from unitok.tokenizer.weights import Foreign, find_weights, read_torch

INCEPTION_WEIGHTS = Foreign(
    "--inception",
    "torch-fidelity's InceptionV3",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
LAYER = "2048"  # what FID, KID, precision and recall compare
LOGITS = "logits_unbiased"  # what the inception score reads
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # of precision and recall


def load_inception(path: str | Path | None, device: torch.device | str = "cpu") -> nn.Module:
    """torch-fidelity's feature extractor with the weights in `path` (a file, or hub:OWNER/REPOSITORY/FILE).

    torch-fidelity itself would run what is pickled in that file; here only tensors are read, and handed on.
    Raises UserError, which says where the file comes from.
    """
    names = INCEPTION_WEIGHTS
    weights = read_torch(find_weights(names.field, path, names.what, names.hint))
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)} if _is_map(weights) else {}
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(tensors, file.name)
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [LAYER, LOGITS], feature_extractor_weights_path=file.name
            )
        except RuntimeError as error:  # keys or shapes do not fit
            text = " ".join(str(error).split())[:200]
            raise DataError(f"{path} is not {names.what} ({text}); get {names.hint}") from None
    return network.to(device)


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def reference_name(path: Path) -> dict[str, Any]:
    """FID's reference as a protocol names it: a file with the hash of what it holds, a folder with the number of its
    files and a hash of their names and sizes (reading 30,000 images once more would take minutes)."""
    if path.is_file():
        with path.open("rb") as stream:
            return {"file": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    inside = (file for file in path.rglob("*") if file.is_file())
    files = sorted((file.relative_to(path).as_posix(), file.stat().st_size) for file in inside)
    return {"folder": path.name, "files": len(files), "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


def to_uint8(pixels_B3HW: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> 8-bit images."""
    return ((pixels_B3HW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Features:
    """Features of one set of images, gathered batch by batch."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self._parts = network, []

    @torch.no_grad()
    def add(self, images_B3HW: Tensor) -> None:
        """8-bit images `[B, 3, H, W]`."""
        found = self.network.convert_features_tuple_to_dict(self.network(images_B3HW))
        self._parts.append({name: value.float().cpu() for name, value in found.items()})

    def gathered(self) -> dict[str, Tensor]:
        """`{layer: [B, F]}` of the images of all ranks (every rank calls)."""
        parts = [part for parts in all_gather_object(self._parts) for part in parts]
        if not parts:
            raise DataError("no image to take features of; expected at least two")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def distances(generated: Mapping[str, Tensor], reference: Mapping[str, Tensor], seed: int = 0) -> dict[str, Any]:
    """Figures of generated images beside reference ones, from `Features.gathered`.

    Returns {"fid", "isc", "isc_std", "kid", "kid_std", "precision", "recall", "num_generated", "num_reference"}; KID
    takes KID_SUBSETS subsets of KID_SUBSET_SIZE images, or of half of them where there are fewer.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, theirs = generated[LAYER], reference[LAYER]
    count = min(len(ours), len(theirs))
    if count < 2 * NEIGHBOURS:
        raise DataError(f"{len(ours)} and {len(theirs)} images: expected at least {2 * NEIGHBOURS} of each for FID")
    with contextlib.redirect_stdout(sys.stderr):
        statistics = [fid_features_to_statistics(features.double()) for features in (ours, theirs)]
        out = fid_statistics_to_metric(*statistics, False)
        out |= isc_features_to_metric(generated[LOGITS], splits=min(10, count), shuffle=True, rng_seed=seed)
        size = min(KID_SUBSET_SIZE, count // 2)
        kid = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": seed, "verbose": False}
        out |= kid_features_to_metric(ours, theirs, **kid)
        out |= prc_features_to_metric(ours, theirs, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {
        "fid": out["frechet_inception_distance"],
        "isc": out["inception_score_mean"],
        "isc_std": out["inception_score_std"],
        "kid": out["kernel_inception_distance_mean"],
        "kid_std": out["kernel_inception_distance_std"],
        "kid_subset_size": size,
        "precision": out["precision"],
        "recall": out["recall"],
        "num_generated": len(ours),
        "num_reference": len(theirs),
    }


def fid_to_statistics(generated: Mapping[str, Tensor], path: Path | str) -> float:
    """FID to a reference batch with `mu` `[F]` and `sigma` `[F, F]` (npz of guided-diffusion's kind).

    Raises DataError where the file holds none, or of another network.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    ours = fid_features_to_statistics(generated[LAYER].double())
    try:
        with np.load(path, allow_pickle=False) as file:
            reference = {name: file[name].astype(np.float64) for name in ("mu", "sigma")}
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} holds no mu and sigma ({type(error).__name__}); give a reference batch .npz") from None
    if reference["mu"].shape != ours["mu"].shape:
        raise DataError(
            f"{path}: mu is {reference['mu'].shape}, the features are {ours['mu'].shape}; it is of another network"
        )
    with contextlib.redirect_stdout(sys.stderr):
        return fid_statistics_to_metric(ours, reference, False)["frechet_inception_distance"]
