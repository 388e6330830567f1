"""From images to code shards: what stage two trains on."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from unitok.data.codes import LATENT_WIDTH, CodeSample, write_codes
from unitok.data.source import Source, good_samples
from unitok.data.transforms import eval_transform
from unitok.tokenizer.model import UniTok


def fingerprint(tokenizer: UniTok) -> str:
    """A short name for exactly these weights: codes of another tokenizer mean something else."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tokenizer.state_dict().items()):
        # what decides the codes; the running usage does not
        if name.startswith(("encoder.", "quant_proj.", "quantizer.")) and not name.startswith("quantizer.usage"):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def extract_codes(
    tokenizer: UniTok,
    source: Source,
    out: Path,
    batch_size: int = 64,
    progress: bool = True,
    latents: bool = False,
) -> Path:
    """Encode every image of `source` and write code shards with their header into `out`.

    `latents`: with the vectors before quantization, for models that read those (`visual_input: continuous`).
    """
    from tqdm import tqdm

    config = tokenizer.eval().config

    def samples() -> Iterator[CodeSample]:
        found = (sample for _, sample in good_samples(source))
        bar = tqdm(total=len(source), desc="encode", unit="image", disable=None if progress else True)
        while batch := list(islice(found, batch_size)):
            bar.update(len(batch))
            pixels = torch.stack(
                [eval_transform(sample.image, config.image_size, config.preprocess) for sample in batch]
            )
            pixels = pixels.to(tokenizer.device)
            codes = tokenizer.encode(pixels).cpu()
            vectors = tokenizer.latents(pixels).half().cpu() if latents else [None] * len(batch)
            for sample, code, vectors_LC in zip(batch, codes, vectors, strict=True):
                words = (sample.captions, sample.questions, sample.conversations, sample.meta)
                yield CodeSample(sample.key, code, *words, vectors_LC)

    header = {
        "tokenizer": fingerprint(tokenizer),
        "num_codebooks": config.num_codebooks,
        "codebook_size": config.codebook_size,
        "image_size": config.image_size,
        "num_positions": config.num_positions,
    }
    if latents:
        header[LATENT_WIDTH] = config.code_width
    return write_codes(samples(), out, header)
