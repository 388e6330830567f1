"""Reconstruction: how much of an image survives the codes."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from unitok.core.checkpoint import on_main
from unitok.core.distributed import all_gather_object, rank, world_size
from unitok.core.errors import DataError
from unitok.data.detector import agrees, detect
from unitok.data.samples import Picked
from unitok.data.shapes import Scene
from unitok.data.transforms import to_pil
from unitok.eval.codes import CodeCounter, evaluation_mode, images_to_pixels
from unitok.eval.fidelity import Features, distances, to_uint8
from unitok.eval.progress import sample_batches

PSNR_CEILING_DB = 100.0  # of two equal images, whose PSNR is infinite


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] -> what an 8-bit image file holds, as float 0..255."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round()


def psnr_db(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """PSNR [B] per image of RGB pixels in [-1, 1], taken after rounding to 8 bits."""
    error = (to_bytes(a_BCHW) - to_bytes(b_BCHW)).double().square().flatten(1).mean(1)
    return (20 * torch.log10(255 / error.sqrt())).clamp_max(PSNR_CEILING_DB)


def ssim(a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
    """SSIM [B] per image after rounding to 8 bits: torchmetrics, Gaussian window of 11 pixels, sigma 1.5."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    # In float64: on bright flat ground E[x^2] - E[x]^2 loses so many digits in float32 that equal images get 0.9994.
    a, b = to_bytes(a_BCHW).double(), to_bytes(b_BCHW).double()
    return structural_similarity_index_measure(a, b, data_range=255.0, reduction="none").reshape(-1)


def evaluate_reconstruction(
    tokenizer: Any,
    source: Any,
    limit: int | None = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    num_pairs: int = 12,
    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    inception: torch.nn.Module | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Encodes and decodes the first `limit` images of `source` and compares; ranks share them (every rank calls).

    Args:
        tokenizer: UniTok or an autoencoder of `eval.autoencoders`.
        lpips: perceptual distance of pixels in [-1, 1], per image. inception: `load_inception`, for FID and its kin.

    Returns:
        {"psnr_db", "ssim", "lpips": means over images, each with "..._se", its standard error; "rfid", "isc", "kid",
        "precision", "recall" as `distances` has them; "detector_agreement": share of reconstructions on which the
        shapes detector finds the scene again, and "detector_agreement_originals", the same of the originals (both None
        where the source has no scenes); "usage", "perplexity", "dead_codes" and each "..._by_codebook", of models with
        codes; "num_images"; "pairs": the first `num_pairs` (original, reconstruction) of this rank as PIL}

    Raises:
        DataError: the source is empty.
    """
    count = min(len(source), len(source) if limit is None else limit)
    if count < 1:
        raise DataError("no image to reconstruct; expected a source with at least one image and limit >= 1")
    config = tokenizer.config
    num_codebooks = getattr(config, "num_codebooks", 0)
    counter = CodeCounter(num_codebooks, config.codebook_size) if num_codebooks else None
    measures = {"psnr_db": psnr_db, "ssim": ssim} | ({} if lpips is None else {"lpips": lpips})
    values: dict[str, list[float]] = {name: [] for name in measures}
    features = None if inception is None else (Features(inception), Features(inception))
    agreement: list[tuple[bool, bool] | None] = []
    pairs: list[tuple[Image.Image, Image.Image]] = []
    part = Picked(source, range(rank(), count, world_size()))
    with evaluation_mode(tokenizer):
        for samples in sample_batches(part, len(part), batch_size, "reconstruction"):
            pixels = images_to_pixels([sample.image for sample in samples], config, device)
            encoded = tokenizer.encode(pixels)
            decoded = tokenizer.decode(encoded).float()
            if counter is not None:
                counter.add(encoded)
            for name, measure in measures.items():
                values[name] += measure(pixels, decoded).flatten().tolist()
            if features is not None:
                features[0].add(to_uint8(decoded))
                features[1].add(to_uint8(pixels))
            images = [(to_pil(a), to_pil(b)) for a, b in zip(pixels.cpu(), decoded.cpu(), strict=True)]
            agreement += [_scene_kept(sample, *pair) for sample, pair in zip(samples, images, strict=True)]
            pairs += images[: num_pairs - len(pairs)]
    everyone = all_gather_object((values, agreement, None if counter is None else counter.counts_KV))
    figures: dict[str, Any] = {}
    for name in measures:
        figures |= _mean(name, [value for own, _, _ in everyone for value in own[name]])
    if features is not None:
        gathered = [one.gathered() for one in features]
        found = on_main(lambda: distances(*gathered, seed))  # minutes of work, and much memory: once
        figures |= {"rfid": found.pop("fid"), **{k: v for k, v in found.items() if not k.startswith("num_")}}
    agreements = [one for _, own, _ in everyone for one in own]
    figures |= _agreement(agreements)
    if counter is not None:
        counter.counts_KV = torch.stack([counts for _, _, counts in everyone]).sum(0)
        figures |= counter.summary()
    return {**figures, "num_images": len(agreements), "pairs": pairs}


def _mean(name: str, values: list[float]) -> dict[str, float]:
    """Mean and, of more than one, standard error of the mean."""
    if not values:
        raise DataError("no image of the source can be read; look at it with unitok data check")
    array = torch.tensor(values, dtype=torch.float64)
    error = {f"{name}_se": (array.var() / len(values)).sqrt().item()} if len(values) > 1 else {}
    return {name: array.mean().item()} | error


def _scene_kept(sample: Any, original: Image.Image, reconstruction: Image.Image) -> tuple[bool, bool] | None:
    scene = (sample.meta or {}).get("scene")
    if not isinstance(scene, Scene):
        return None
    return agrees(scene, detect(original)), agrees(scene, detect(reconstruction))


def _agreement(results: list[tuple[bool, bool] | None]) -> dict[str, float | None]:
    known = [result for result in results if result is not None]
    if not known:
        return {"detector_agreement": None, "detector_agreement_originals": None}
    originals, reconstructions = (sum(column) / len(known) for column in zip(*known, strict=True))
    return {"detector_agreement": reconstructions, "detector_agreement_originals": originals}
