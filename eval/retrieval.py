"""Caption retrieval: does the tokenizer's image feature find the caption of the image?"""

from typing import Any

import torch

from unitok.core.errors import DataError
from unitok.eval.codes import evaluation_mode, images_to_pixels
from unitok.eval.progress import batches, sample_batches


def evaluate_retrieval(
    tokenizer: Any,
    source: Any,
    limit: int | None = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Ranks the distinct captions of the pool for every image by cosine similarity.

    The pool is the first caption of the first `limit` samples. Equal captions are one entry, so that an image is never
    wrong for having found its own words under another number. A caption that is true of several images but belongs to
    another counts as wrong: the figure is a lower bound.

    Returns:
        {"top1", "top5", "chance": 1 / distinct captions, "num_images", "num_captions"}

    Raises:
        DataError: no sample has a caption.
    """
    count = min(len(source), len(source) if limit is None else limit)
    features, captions = [], []
    with evaluation_mode(tokenizer):
        for batch in sample_batches(source, count, batch_size, "retrieval"):
            samples = [sample for sample in batch if sample.captions]
            if not samples:
                continue
            captions += [sample.captions[0] for sample in samples]
            pixels = images_to_pixels([sample.image for sample in samples], tokenizer.config, device)
            features.append(tokenizer.encode_image(pixels, normalize=True).float())
        if not captions:
            raise DataError(f"none of the {count} samples has a caption; retrieval needs a source with captions")
        distinct = sorted(set(captions))
        texts = [
            _encode_text(tokenizer, [distinct[row] for row in rows], device) for rows in batches(len(distinct), 256)
        ]
        ranks = _ranks(torch.cat(features), torch.cat(texts), [distinct.index(caption) for caption in captions])
    return {
        "top1": (ranks < 1).double().mean().item(),
        "top5": (ranks < 5).double().mean().item(),
        "chance": 1 / len(distinct),
        "num_images": len(captions),
        "num_captions": len(distinct),
    }


def _encode_text(tokenizer: Any, texts: list[str], device: torch.device | str) -> torch.Tensor:
    return tokenizer.encode_text(tokenizer.tokenize_text(texts).to(device), normalize=True).float()


def _ranks(images_BD: torch.Tensor, texts_ND: torch.Tensor, own: list[int]) -> torch.Tensor:
    """How many captions score at least as well as the image's own one; ties count against the model. [B]"""
    scores_BN = images_BD @ texts_ND.T
    own_B1 = torch.tensor(own, device=scores_BN.device)[:, None]
    return (scores_BN >= scores_BN.gather(1, own_B1)).sum(1) - 1
