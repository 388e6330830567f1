"""Reconstruction: how much of an image survives the codes."""

from typing import Any

import torch
from PIL import Image

from unitok.core.errors import DataError
from unitok.data.detector import agrees, detect
from unitok.data.shapes import Scene
from unitok.data.transforms import to_pil
from unitok.eval.codes import CodeCounter, evaluation_mode, images_to_pixels
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
) -> dict[str, Any]:
    """Encodes and decodes the first `limit` images of `source` and compares.

    Returns:
        {"psnr_db", "ssim": means over images; "detector_agreement": share of reconstructions on which the shapes
        detector finds the scene again, and "detector_agreement_originals", the same of the originals (both None
        where the source has no scenes); "usage", "perplexity", "dead_codes" and each "..._by_codebook";
        "num_images"; "pairs": the first `num_pairs` (original, reconstruction) as PIL}

    Raises:
        DataError: the source is empty.
    """
    count = min(len(source), len(source) if limit is None else limit)
    if count < 1:
        raise DataError("no image to reconstruct; expected a source with at least one image and limit >= 1")
    config = tokenizer.config
    counter = CodeCounter(config.num_codebooks, config.codebook_size)
    psnr, similarity, agreement = [], [], []
    pairs: list[tuple[Image.Image, Image.Image]] = []
    with evaluation_mode(tokenizer):
        for samples in sample_batches(source, count, batch_size, "reconstruction"):
            pixels = images_to_pixels([sample.image for sample in samples], config, device)
            codes = tokenizer.encode(pixels)
            decoded = tokenizer.decode(codes).float()
            counter.add(codes)
            psnr.append(psnr_db(pixels, decoded).cpu())
            similarity.append(ssim(pixels, decoded).cpu())
            images = [(to_pil(a), to_pil(b)) for a, b in zip(pixels.cpu(), decoded.cpu(), strict=True)]
            agreement += [_scene_kept(sample, *pair) for sample, pair in zip(samples, images, strict=True)]
            pairs += images[: num_pairs - len(pairs)]
    return {
        "psnr_db": torch.cat(psnr).mean().item(),
        "ssim": torch.cat(similarity).mean().item(),
        **_agreement(agreement),
        **counter.summary(),
        "num_images": len(agreement),
        "pairs": pairs,
    }


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
