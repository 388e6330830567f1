"""Caption retrieval: does the image feature find the caption of the image, and the caption the image?

I images and T captions of the pool, B images, N distinct captions.
"""

from typing import Any

import torch

from unitok.core.errors import DataError
from unitok.eval.codes import evaluation_mode, images_to_pixels
from unitok.eval.image_text import BATCH_OF_TEXTS, ImageText
from unitok.eval.progress import batches, sample_batches
from unitok.eval.results import share


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


def recalls(
    model: ImageText, source: Any, limit: int | None = None, batch_size: int = 32, captions_per_image: int = 5
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 of Flickr30k and COCO: from images to captions (five an image) and back.

    Returns:
        {"image_to_text_recall1", ..., "text_to_image_recall10", each with "..._se", "num_caption_images",
        "num_captions"}

    Raises:
        DataError: no sample has a caption.
    """
    count = len(source) if limit is None else min(limit, len(source))
    features, texts, owners = [], [], []
    images = 0
    for batch in sample_batches(source, count, batch_size, "retrieval"):
        told = [sample for sample in batch if sample.captions]
        if told:
            features.append(model.images([sample.image for sample in told]))
        for sample in told:
            own = list(dict.fromkeys(sample.captions))[:captions_per_image]
            texts += own
            owners += [images] * len(own)
            images += 1
    if not texts:
        raise DataError(f"none of the {count} samples of {source.name} has a caption; retrieval needs them")
    words = [model.texts(texts[rows.start : rows.stop]) for rows in batches(len(texts), BATCH_OF_TEXTS)]
    out: dict[str, Any] = {}
    for name, ranks in _both_ranks(torch.cat(features) @ torch.cat(words).T, torch.tensor(owners)).items():
        for k in (1, 5, 10):
            found = share(f"{name}_recall{k}", [bool(rank < k) for rank in ranks])
            out |= {found.name: found.value}
            out |= {} if found.standard_error is None else {f"{found.name}_se": found.standard_error}
    return out | {"num_caption_images": images, "num_captions": len(texts)}


def _both_ranks(scores_IT: torch.Tensor, owners_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """How many foreign captions score at least as well as an image's best own one [I], and how many other images at
    least as well as a caption's own [T]."""
    own_IT = owners_T[None, :] == torch.arange(len(scores_IT))[:, None]
    best_I1 = scores_IT.masked_fill(~own_IT, -torch.inf).amax(1, keepdim=True)
    own_scores_T = scores_IT[owners_T, torch.arange(scores_IT.shape[1])]
    return {
        "image_to_text": ((scores_IT >= best_I1) & ~own_IT).sum(1),
        "text_to_image": (scores_IT >= own_scores_T).sum(0) - 1,
    }
