"""Helpers on a frozen tokenizer that several evaluations share: encode and decode in batches, statistics of codes."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from unitok.core.rng import torch_rng
from unitok.data.transforms import eval_transform, to_pil
from unitok.eval.progress import batches, progress


@contextmanager
def evaluation_mode(module: Any):
    """No gradients, and `module` in eval mode inside; the mode it had comes back afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        module.train(training)


def images_to_pixels(images: Sequence[Image.Image], config: Any, device: torch.device | str = "cpu") -> torch.Tensor:
    """PIL images -> float pixels [B, 3, size, size] in [-1, 1], as the tokenizer of this configuration wants them."""
    preprocess = getattr(config, "preprocess", "plain")  # any tokenizer with an image_size can be measured
    return torch.stack([eval_transform(image, config.image_size, preprocess) for image in images]).to(device)


def decode_to_images(tokenizer: Any, codes_BKL: torch.Tensor) -> list[Image.Image]:
    """Codes [B, K, L] -> PIL images; call it inside `evaluation_mode`."""
    return [to_pil(pixels) for pixels in tokenizer.decode(codes_BKL).float().cpu()]


def reconstruct_images(
    tokenizer: Any,
    images: Sequence[Image.Image],
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> list[Image.Image]:
    """Every image through encode and decode."""
    out: list[Image.Image] = []
    with evaluation_mode(tokenizer):
        for rows in progress(batches(len(images), batch_size), "reconstructing"):
            pixels = images_to_pixels([images[row] for row in rows], tokenizer.config, device)
            out += decode_to_images(tokenizer, tokenizer.encode(pixels))
    return out


def random_code_images(
    tokenizer: Any,
    count: int,
    seed: int = 0,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> list[Image.Image]:
    """Images decoded from uniformly drawn codes: what a generator that knows nothing would draw."""
    config = tokenizer.config
    generator = torch_rng("random codes", seed)
    out: list[Image.Image] = []
    with evaluation_mode(tokenizer):
        blank = torch.zeros(1, 3, config.image_size, config.image_size, device=device)
        shape_KL = tokenizer.encode(blank).shape[1:]
        for rows in progress(batches(count, batch_size), "decoding random codes"):
            codes = torch.randint(config.codebook_size, (len(rows), *shape_KL), generator=generator)
            out += decode_to_images(tokenizer, codes.to(device))
    return out


class CodeCounter:
    """Counts how often every entry of every codebook is used."""

    def __init__(self, num_codebooks: int, codebook_size: int) -> None:
        self.counts_KV = torch.zeros(num_codebooks, codebook_size, dtype=torch.int64)

    def add(self, codes_BKL: torch.Tensor) -> None:
        """Adds codes [B, K, L]."""
        size = self.counts_KV.shape[1]
        for book, codes in enumerate(codes_BKL.detach().cpu().transpose(0, 1)):
            self.counts_KV[book] += torch.bincount(codes.flatten(), minlength=size)

    def summary(self) -> dict[str, Any]:
        """Per codebook: share of entries used at least once, perplexity exp(entropy), entries never used; and means."""
        counts = self.counts_KV.double()
        shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
        entropy = -(shares * shares.clamp_min(1e-30).log()).sum(1)
        used = (self.counts_KV > 0).sum(1)
        usage, perplexity = used / counts.shape[1], entropy.exp()
        return {
            "usage": usage.mean().item(),
            "perplexity": perplexity.mean().item(),
            "dead_codes": int((counts.shape[1] - used).sum()),
            "usage_by_codebook": [round(value, 6) for value in usage.tolist()],
            "perplexity_by_codebook": [round(value, 4) for value in perplexity.tolist()],
            "dead_codes_by_codebook": (counts.shape[1] - used).tolist(),
        }
