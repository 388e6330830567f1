"""Multi-codebook quantization (paper, section 3.2): K chunks of the code vector, each with its own codebook.

B batch, L positions, C = K * D channels, K codebooks, V entries per codebook, D channels per chunk, N = B * L.
All K codebooks are one parameter `[K, V, D]` and one batched product; there is no loop over codebooks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from unitok.core.distributed import all_reduce_sum_, world_size
from unitok.core.errors import ConfigError, DataError

SEARCH_ELEMENTS = 1 << 23  # similarities held at once during the search: 32 MiB in fp32


@dataclass
class QuantizerOutput(ModelOutput):
    """quantized `[B, L, C]` (straight-through, normalised), codes int64 `[B, K, L]`, scalar losses, usage `[K, V]`."""

    quantized: Tensor | None = None
    codes: Tensor | None = None
    vq_loss: Tensor | None = None
    entropy_loss: Tensor | None = None
    usage: Tensor | None = None  # how often each entry was chosen in this batch, float counts


class MultiCodebookQuantizer(nn.Module):
    """Chunks and codebook entries are l2-normalised; the code is the entry of largest cosine similarity.

    Args:
        num_codebooks, codebook_size, code_dim: K, V and D; the input has `K * D` channels.
        commitment_weight: beta of `beta * mse(z, sg[q]) + mse(q, sg[z])` on normalised vectors.
        entropy_temperature: softmax temperature of the optional entropy loss.
    """

    def __init__(
        self,
        num_codebooks: int = 8,
        codebook_size: int = 4096,
        code_dim: int = 8,
        commitment_weight: float = 0.25,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        if min(num_codebooks, codebook_size, code_dim) < 1:
            raise ConfigError(f"codebooks of shape {(num_codebooks, codebook_size, code_dim)}: all must be positive")
        self.commitment_weight, self.entropy_temperature = commitment_weight, entropy_temperature
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, code_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian entries of about unit length; only their direction matters."""
        nn.init.normal_(self.codebooks, std=self.codebooks.shape[-1] ** -0.5)

    @property
    def num_codebooks(self) -> int:
        return self.codebooks.shape[0]

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @property
    def code_dim(self) -> int:
        return self.codebooks.shape[2]

    def normalised_codebooks(self) -> Tensor:
        return F.normalize(self.codebooks.float(), dim=-1)

    def forward(self, features_BLC: Tensor, with_entropy: bool = False) -> QuantizerOutput:
        """Quantize `[B, L, K * D]`. Computed in fp32 whatever the surrounding autocast."""
        with torch.autocast(features_BLC.device.type, enabled=False):
            batch, length, _ = features_BLC.shape
            chunks_KND = self._chunks(features_BLC)
            codebooks_KVD = self.normalised_codebooks()
            codes_KN = search(chunks_KND, codebooks_KVD)
            chosen_KND = codebooks_KVD.gather(1, codes_KN.unsqueeze(-1).expand(-1, -1, self.code_dim))
            vq_loss = self.commitment_weight * F.mse_loss(chunks_KND, chosen_KND.detach())
            vq_loss = vq_loss + F.mse_loss(chosen_KND, chunks_KND.detach())
            entropy = entropy_loss(chunks_KND, codebooks_KVD, self.entropy_temperature) if with_entropy else None
            through_KND = chunks_KND + (chosen_KND - chunks_KND).detach()
            usage = torch.zeros(self.num_codebooks, self.codebook_size, device=codes_KN.device)
            usage.scatter_add_(1, codes_KN, torch.ones_like(codes_KN, dtype=usage.dtype))
            return QuantizerOutput(
                quantized=through_KND.permute(1, 0, 2).reshape(batch, length, -1),
                codes=codes_KN.view(-1, batch, length).transpose(0, 1).contiguous(),
                vq_loss=vq_loss,
                entropy_loss=entropy,
                usage=usage,
            )

    @torch.no_grad()
    def encode(self, features_BLC: Tensor) -> Tensor:
        """Codes `[B, K, L]` of features `[B, L, K * D]`."""
        with torch.autocast(features_BLC.device.type, enabled=False):
            codes_KN = search(self._chunks(features_BLC), self.normalised_codebooks())
        return codes_KN.view(-1, *features_BLC.shape[:2]).transpose(0, 1).contiguous()

    def lookup(self, codes_BKL: Tensor) -> Tensor:
        """Normalised code vectors `[B, L, K * D]` of codes `[B, K, L]`; DataError when K or a code does not fit."""
        check_codes(codes_BKL, self.num_codebooks, self.codebook_size)
        return lookup(codes_BKL, self.normalised_codebooks())

    def _chunks(self, features_BLC: Tensor) -> Tensor:
        if features_BLC.shape[-1] != self.num_codebooks * self.code_dim:
            raise DataError(
                f"features with {features_BLC.shape[-1]} channels: expected num_codebooks * code_dim = "
                f"{self.num_codebooks} * {self.code_dim} = {self.num_codebooks * self.code_dim}"
            )
        chunks_KND = features_BLC.float().reshape(-1, self.num_codebooks, self.code_dim).transpose(0, 1)
        return F.normalize(chunks_KND, dim=-1)


def lookup(codes_BKL: Tensor, codebooks_KVD: Tensor) -> Tensor:
    """The entries of codes `[B, K, L]`, side by side: `[B, L, K * D]`."""
    # One gather over the flattened codebooks: entry (k, v) stands in row k * V + v.
    num_codebooks, size, _ = codebooks_KVD.shape
    offsets_K1 = torch.arange(num_codebooks, device=codes_BKL.device).unsqueeze(-1) * size
    rows_BLK = (codes_BKL + offsets_K1).transpose(1, 2)
    return F.embedding(rows_BLK, codebooks_KVD.flatten(0, 1)).flatten(2)


def check_codes(codes_BKL: Tensor, num_codebooks: int, codebook_size: int) -> None:
    """DataError unless codes are `[B, K, L]` and in [0, V): an entry of another codebook would be taken silently."""
    if codes_BKL.dim() != 3 or codes_BKL.shape[1] != num_codebooks:
        raise DataError(f"codes of shape {list(codes_BKL.shape)}: expected [B, K={num_codebooks}, L]")
    if codes_BKL.numel() == 0:
        return
    low, high = (int(value) for value in codes_BKL.aminmax())
    if low < 0 or high >= codebook_size:
        raise DataError(
            f"codes from {low} to {high}: expected 0 to {codebook_size - 1}; they belong to another tokenizer"
        )


@torch.no_grad()
def search(chunks_KND: Tensor, codebooks_KVD: Tensor) -> Tensor:
    """Index `[K, N]` of the most similar entry, in blocks of N so that `[K, N, V]` is never held whole."""
    num_codebooks, num_chunks, _ = chunks_KND.shape
    block = max(1, SEARCH_ELEMENTS // (num_codebooks * codebooks_KVD.shape[1]))
    codebooks_KDV = codebooks_KVD.transpose(1, 2)
    if num_chunks <= block:
        return torch.bmm(chunks_KND, codebooks_KDV).argmax(dim=-1)
    blocks = [torch.bmm(part, codebooks_KDV).argmax(dim=-1) for part in chunks_KND.split(block, dim=1)]
    return torch.cat(blocks, dim=1)


def entropy_loss(chunks_KND: Tensor, codebooks_KVD: Tensor, temperature: float) -> Tensor:
    """Mean over codebooks of (mean entropy per sample - entropy of the mean assignment); low = sure and diverse.

    The mean assignment is that of all ranks (every rank must call); averaged over ranks, value and gradient are those
    of one process with all samples.
    """
    # On unit vectors the negative squared distance is 2 * cosine - 2; the constant drops out of the softmax.
    logits_KNV = 2.0 * torch.bmm(chunks_KND, codebooks_KVD.transpose(1, 2)) / temperature
    probs_KNV, log_probs_KNV = logits_KNV.softmax(dim=-1), logits_KNV.log_softmax(dim=-1)
    sample_entropy = -(probs_KNV * log_probs_KNV).sum(-1).mean(-1)
    mean_KV = probs_KNV.mean(dim=1)
    global_KV = all_reduce_sum_(mean_KV.detach().clone()) / world_size()
    mean_KV = mean_KV + (global_KV - mean_KV).detach()  # own gradient only: the engine averages gradients over ranks
    mean_entropy = -(mean_KV * (mean_KV + 1e-7).log()).sum(-1)
    return (sample_entropy - mean_entropy).mean()


def usage_statistics(counts_KV: Tensor) -> dict[str, Tensor]:
    """Per codebook `[K]`: share of entries used, perplexity of their distribution, number of dead entries."""
    probs_KV = counts_KV / counts_KV.sum(dim=-1, keepdim=True).clamp(min=1)
    entropy_K = -(probs_KV * probs_KV.clamp(min=1e-12).log()).sum(dim=-1)
    used_K = (counts_KV > 0).float().sum(dim=-1)
    return {"usage": used_K / counts_KV.shape[-1], "perplexity": entropy_K.exp(), "dead": counts_KV.shape[-1] - used_K}
