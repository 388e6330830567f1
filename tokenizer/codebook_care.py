"""Revival of codebook entries that are hardly chosen any more.

K codebooks, V entries, D channels, N quantized vectors of this rank, G of all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unitok.core.distributed import world_size
from unitok.core.engine import edit_parameter_
from unitok.core.rng import torch_rng
from unitok.tokenizer.quantizer import Quantizer


@torch.no_grad()
def revive_dead_codes_(quantizer: Quantizer, below: float, *key: int | str) -> tuple[Tensor, Tensor] | None:
    """Replace entries whose running share is below `below` / V by vectors that were quantized last.

    Vectors are drawn from those of all ranks, by a generator seeded with `key`, so the result does not depend on how
    the batch is spread. Every rank must call. Revived entries begin with the average share 1 / V, and where only the
    direction counts with the average length of their codebook: longer ones would turn more slowly than the others.

    Returns which entries were replaced (bool `[K, V, D]`) and the new codebooks; None if all entries are alive.
    """
    size = quantizer.codebook_size
    dead_KV = quantizer.usage_average < below / size
    if not bool(dead_KV.any()):  # equal on all ranks: usage is counted over all of them
        return None
    assert quantizer.recent_KND is not None, "no batch has been quantized yet"
    vectors_KGD = _of_all_ranks(quantizer.recent_KND)
    # Each vector at most once, as long as there are enough: equal entries would share their vectors by rounding alone.
    draws_KG = torch.rand(vectors_KGD.shape[:2], generator=torch_rng("revive", *key)).argsort(dim=1)
    rows = draws_KG.repeat(1, -(-size // draws_KG.shape[1]))[:, :size].to(dead_KV.device)
    mask_KVD = dead_KV.unsqueeze(-1).expand(-1, -1, vectors_KGD.shape[-1])
    drawn_KVD = vectors_KGD.gather(1, rows.unsqueeze(-1).expand_as(mask_KVD))
    changed: list[Tensor] = []

    def replace(codebooks_KVD: Tensor) -> Tensor:
        changed.append(
            torch.where(mask_KVD, quantizer.fitted(drawn_KVD.to(codebooks_KVD), codebooks_KVD), codebooks_KVD)
        )
        return changed[0]

    edit_parameter_(quantizer.codebooks, replace)
    quantizer.usage_average.masked_fill_(dead_KV, 1.0 / size)
    return mask_KVD, changed[0]


def _of_all_ranks(vectors_KND: Tensor) -> Tensor:
    if world_size() == 1:
        return vectors_KND
    parts: list[Any] = [torch.empty_like(vectors_KND.contiguous()) for _ in range(world_size())]
    dist.all_gather(parts, vectors_KND.contiguous())
    return torch.cat(parts, dim=1)
