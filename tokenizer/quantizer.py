"""Quantizers behind one interface (paper, section 3.2): multi-codebook, and residual for comparison.

B batch, L positions, C channels of the code space, K codebooks, V entries per codebook, D channels of an entry (C / K
for multi-codebook quantization, C for residual quantization), N = B * L.
All K codebooks are one parameter `[K, V, D]`; multi-codebook quantization searches them in one go, without a loop.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from unitok.core.distributed import all_reduce_sum_
from unitok.core.errors import ConfigError, DataError
from unitok.tokenizer.configuration import CodebookInit, UniTokConfig
from unitok.tokenizer.search import entropy_loss, search, search_features, usage_counts

# An entry counts as used when it takes more than this share of what it would take if all were chosen alike.
USED_ABOVE = 0.01
_FAST_AVERAGE_UPDATES = 100  # the running average of usage moves by 10 % a batch up to here, by 1 % afterwards


@dataclass
class QuantizerOutput(ModelOutput):
    """quantized `[B, L, C]` (straight-through), codes int64 `[B, K, L]`, scalar losses, usage `[K, V]`."""

    quantized: Tensor | None = None
    codes: Tensor | None = None
    vq_loss: Tensor | None = None
    entropy_loss: Tensor | None = None
    usage: Tensor | None = None  # how often each entry was chosen in this batch (of all ranks in training), as floats


class Quantizer(nn.Module):
    """What every quantizer has: codebooks `[K, V, D]`, running usage, codes to vectors and back.

    Args:
        num_codebooks, codebook_size, code_dim: K, V and D.
        commitment_weight: beta of `beta * mse(z, sg[q]) + mse(q, sg[z])`.
        entropy_temperature: softmax temperature of the optional entropy loss.
        codebook_init: see UniTokConfig.
    """

    def __init__(
        self,
        num_codebooks: int = 8,
        codebook_size: int = 4096,
        code_dim: int = 8,
        commitment_weight: float = 0.25,
        entropy_temperature: float = 0.01,
        codebook_init: CodebookInit = "uniform",
    ) -> None:
        super().__init__()
        if min(num_codebooks, codebook_size, code_dim) < 1:
            raise ConfigError(f"codebooks of shape {(num_codebooks, codebook_size, code_dim)}: all must be positive")
        self.commitment_weight, self.entropy_temperature = commitment_weight, entropy_temperature
        self.codebook_init = codebook_init
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, code_dim))
        # Share of each entry, averaged over training batches, and over how many: part of the state, so that a resumed
        # run goes on where it was.
        self.register_buffer("usage_average", torch.empty(num_codebooks, codebook_size))
        self.register_buffer("usage_updates", torch.empty(1, dtype=torch.long))
        self.counts_usage = True  # off where the codebooks are frozen
        self.recent_KND: Tensor | None = None  # vectors quantized last, from which dead codes are revived
        self.reset_parameters()

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initial codebooks; usage starts anew."""

    @abstractmethod
    def entries(self) -> Tensor:
        """Codebooks `[K, V, D]` in fp32 as `lookup` uses them."""

    @abstractmethod
    def fitted(self, vectors_KVD: Tensor, codebooks_KVD: Tensor) -> Tensor:
        """Quantized vectors, scaled as fits entries of these codebooks."""

    @abstractmethod
    def normalized(self, features_BLC: Tensor) -> Tensor:
        """What is quantized of features `[B, L, C]`: the vectors `[B, L, C]` that code vectors stand for, in fp32."""

    @abstractmethod
    def lookup(self, codes_BKL: Tensor) -> Tensor:
        """Code vectors `[B, L, C]` of codes `[B, K, L]`; DataError when K or a code does not fit."""

    @property
    def _shape(self) -> torch.Size:
        return getattr(self.codebooks, "ds_shape", self.codebooks.shape)  # under ZeRO 3 it may be in parts

    @property
    def num_codebooks(self) -> int:
        return self._shape[0]

    @property
    def codebook_size(self) -> int:
        return self._shape[1]

    @property
    def code_dim(self) -> int:
        return self._shape[2]

    def _reset_usage(self) -> None:
        nn.init.zeros_(self.usage_average)
        nn.init.zeros_(self.usage_updates)

    def _check_width(self, features_BLC: Tensor, width: int, meaning: str) -> None:
        if features_BLC.shape[-1] != width:
            raise DataError(f"features with {features_BLC.shape[-1]} channels: expected {meaning} = {width}")

    @torch.no_grad()
    def _count(self, codes_KN: Tensor) -> Tensor:
        """Counts `[K, V]` of this batch, over all ranks in training (one all-reduce); updates the running average."""
        counts_KV = usage_counts(codes_KN, self.codebook_size)
        if self.training:
            counts_KV = all_reduce_sum_(counts_KV)
        if not self.counts_usage:
            return counts_KV
        shares_KV = counts_KV / counts_KV.sum(dim=-1, keepdim=True).clamp(min=1)
        # without a branch on the device's value, which would make the host wait
        slow = torch.where(self.usage_updates < _FAST_AVERAGE_UPDATES, 0.9, 0.99)
        decay = torch.where(self.usage_updates == 0, 0.0, slow).to(shares_KV.dtype)
        self.usage_average.copy_(self.usage_average * decay + shares_KV * (1 - decay))
        self.usage_updates += 1
        return counts_KV

    def _output(
        self, features_BLC: Tensor, target: Tensor, chosen: Tensor, vq_loss: Tensor, codes_KN: Tensor
    ) -> QuantizerOutput:
        return QuantizerOutput(
            quantized=(target + (chosen - target).detach()).reshape(features_BLC.shape),
            codes=codes_KN.view(len(codes_KN), *features_BLC.shape[:2]).transpose(0, 1).contiguous(),
            vq_loss=vq_loss,
            usage=self._count(codes_KN),
        )


class MultiCodebookQuantizer(Quantizer):
    """K chunks of the code vector, each with its own codebook (paper, equation 1).

    Chunks and codebook entries are l2-normalised; the code is the entry of largest cosine similarity. The input has
    `K * D` channels. With K = 1 this is plain vector quantization.
    """

    def reset_parameters(self) -> None:
        if self.codebook_init == "uniform":
            bound = self.code_dim**-0.5 / 36
            nn.init.uniform_(self.codebooks, -bound, bound)
        else:
            nn.init.normal_(self.codebooks, std=self.code_dim**-0.5)
        self._reset_usage()

    def entries(self) -> Tensor:
        return F.normalize(self.codebooks.float(), dim=-1)

    def fitted(self, vectors_KVD: Tensor, codebooks_KVD: Tensor) -> Tensor:
        return vectors_KVD * codebooks_KVD.norm(dim=-1).mean(dim=1).view(-1, 1, 1)

    def forward(self, features_BLC: Tensor, with_entropy: bool = False) -> QuantizerOutput:
        """Quantize `[B, L, K * D]`. Computed in fp32 whatever the surrounding autocast."""
        with torch.autocast(features_BLC.device.type, enabled=False):
            chunks_NKD = self._chunks(features_BLC)
            codebooks_KVD = self.entries()
            codes_KN = search(chunks_NKD.detach().transpose(0, 1), codebooks_KVD.detach())
            chosen_NKD = _gather(codes_KN, codebooks_KVD)
            vq_loss = self.commitment_weight * F.mse_loss(chunks_NKD, chosen_NKD.detach())
            vq_loss = vq_loss + F.mse_loss(chosen_NKD, chunks_NKD.detach())
            out = self._output(features_BLC, chunks_NKD, chosen_NKD, vq_loss, codes_KN)
            if with_entropy:
                out.entropy_loss = entropy_loss(chunks_NKD.transpose(0, 1), codebooks_KVD, self.entropy_temperature)
            self.recent_KND = chunks_NKD.detach().transpose(0, 1)
            return out

    @torch.no_grad()
    def encode(self, features_BLC: Tensor) -> Tensor:
        """Codes `[B, K, L]` of features `[B, L, K * D]`."""
        with torch.autocast(features_BLC.device.type, enabled=False):
            self._check_channels(features_BLC)
            codes_KN = search_features(features_BLC.float(), self.entries())
        return codes_KN.view(len(codes_KN), *features_BLC.shape[:2]).transpose(0, 1).contiguous()

    def lookup(self, codes_BKL: Tensor) -> Tensor:
        check_codes(codes_BKL, self.num_codebooks, self.codebook_size)
        return lookup(codes_BKL, self.entries())

    def normalized(self, features_BLC: Tensor) -> Tensor:
        return self._chunks(features_BLC).view(features_BLC.shape)

    def _chunks(self, features_BLC: Tensor) -> Tensor:
        """Normalised chunks `[N, K, D]`."""
        self._check_channels(features_BLC)
        return F.normalize(features_BLC.float().reshape(-1, self.num_codebooks, self.code_dim), dim=-1)

    def _check_channels(self, features_BLC: Tensor) -> None:
        width = self.num_codebooks * self.code_dim
        self._check_width(features_BLC, width, f"num_codebooks * code_dim = {self.num_codebooks} * {self.code_dim}")


class ResidualQuantizer(Quantizer):
    """Every codebook codes what those before it left over (RQ-VAE, arXiv 2203.01941); D = C, the whole code space.

    For comparison with multi-codebook quantization at the same number of codes. The input is l2-normalised as there;
    entries are not, because residuals shrink. The code is the entry of least squared distance. The losses compare the
    input with every partial sum of entries and are averaged over K (RQ-VAE, equation 9).
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.codebooks, std=self.code_dim**-0.5)
        with torch.no_grad():  # residuals are shorter at each step: so are the entries that start out to code them
            self.codebooks.mul_(0.7 ** torch.arange(self.num_codebooks).view(-1, 1, 1))
        self._reset_usage()

    def entries(self) -> Tensor:
        return self.codebooks.float()

    def fitted(self, vectors_KVD: Tensor, codebooks_KVD: Tensor) -> Tensor:
        return vectors_KVD

    def forward(self, features_BLC: Tensor, with_entropy: bool = False) -> QuantizerOutput:
        """Quantize `[B, L, C]`. ConfigError with entropy: it is defined for independent codebooks."""
        if with_entropy:
            raise ConfigError("quantizer=residual has no entropy loss; set loss.entropy=0")
        with torch.autocast(features_BLC.device.type, enabled=False):
            vectors_NC, codebooks_KVD = self._vectors(features_BLC), self.entries()
            codes_KN, residuals_KND = self._search(vectors_NC.detach(), codebooks_KVD.detach())
            partial_KNC = _gather(codes_KN, codebooks_KVD).transpose(0, 1).cumsum(dim=0)
            target_KNC = vectors_NC.expand_as(partial_KNC)
            vq_loss = self.commitment_weight * F.mse_loss(target_KNC, partial_KNC.detach())
            vq_loss = vq_loss + F.mse_loss(partial_KNC, target_KNC.detach())
            self.recent_KND = residuals_KND
            return self._output(features_BLC, vectors_NC, partial_KNC[-1], vq_loss, codes_KN)

    @torch.no_grad()
    def encode(self, features_BLC: Tensor) -> Tensor:
        """Codes `[B, K, L]` of features `[B, L, C]`."""
        with torch.autocast(features_BLC.device.type, enabled=False):
            codes_KN, _ = self._search(self._vectors(features_BLC), self.entries())
        return codes_KN.view(-1, *features_BLC.shape[:2]).transpose(0, 1).contiguous()

    def lookup(self, codes_BKL: Tensor) -> Tensor:
        check_codes(codes_BKL, self.num_codebooks, self.codebook_size)
        return residual_lookup(codes_BKL, self.entries())

    def normalized(self, features_BLC: Tensor) -> Tensor:
        return self._vectors(features_BLC).view(features_BLC.shape)

    def _vectors(self, features_BLC: Tensor) -> Tensor:
        self._check_width(features_BLC, self.code_dim, "code_dim")
        return F.normalize(features_BLC.float().flatten(0, 1), dim=-1)

    @staticmethod
    def _search(vectors_NC: Tensor, codebooks_KVD: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[K, N]` and the residuals `[K, N, C]` that they were chosen for."""
        residual_NC, codes, residuals = vectors_NC, [], []
        for entries_VD in codebooks_KVD:
            residuals.append(residual_NC)
            # Least |r - e|^2 is largest r.e - |e|^2 / 2: one more channel makes an inner product of it.
            queries = F.pad(residual_NC, (0, 1), value=1.0)
            keys = torch.cat([entries_VD, -0.5 * entries_VD.square().sum(-1, keepdim=True)], dim=-1)
            code_N = search(queries.unsqueeze(0), keys.unsqueeze(0))[0]
            codes.append(code_N)
            residual_NC = residual_NC - entries_VD[code_N]
        return torch.stack(codes), torch.stack(residuals)


_QUANTIZERS: dict[str, type[Quantizer]] = {"multi_codebook": MultiCodebookQuantizer, "residual": ResidualQuantizer}


def build_quantizer(config: UniTokConfig) -> Quantizer:
    """The quantizer that the configuration names."""
    return _QUANTIZERS[config.quantizer](
        config.num_codebooks,
        config.codebook_size,
        config.code_dim,
        config.commitment_weight,
        config.entropy_temperature,
        config.codebook_init,
    )


def _gather(codes_KN: Tensor, codebooks_KVD: Tensor) -> Tensor:
    """The chosen entries `[N, K, D]`, by one look-up in the flattened codebooks: entry (k, v) is row k * V + v."""
    offsets_K1 = torch.arange(codes_KN.shape[0], device=codes_KN.device).unsqueeze(-1) * codebooks_KVD.shape[1]
    rows = (codes_KN + offsets_K1).T
    # index_select: its backward is three times as fast as an embedding's on a CPU
    return codebooks_KVD.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, codebooks_KVD.shape[-1])


def lookup(codes_BKL: Tensor, codebooks_KVD: Tensor) -> Tensor:
    """The entries of codes `[B, K, L]`, side by side: `[B, L, K * D]`."""
    batch, _, length = codes_BKL.shape  # there may be no image at all: sizes are not left to be inferred
    return (
        _gather(codes_BKL.transpose(0, 1).flatten(1), codebooks_KVD)
        .flatten(1)
        .view(batch, length, codebooks_KVD.shape[0] * codebooks_KVD.shape[-1])
    )


def residual_lookup(codes_BKL: Tensor, codebooks_KVD: Tensor) -> Tensor:
    """The sum of the entries of codes `[B, K, L]`: `[B, L, D]`."""
    batch, _, length = codes_BKL.shape
    return (
        _gather(codes_BKL.transpose(0, 1).flatten(1), codebooks_KVD)
        .sum(dim=1)
        .view(batch, length, codebooks_KVD.shape[-1])
    )


def check_codes(codes_BKL: Tensor, num_codebooks: int, codebook_size: int) -> None:
    """DataError unless codes are whole numbers `[B, K, L]` in [0, V): an entry of another codebook would be taken
    silently."""
    if codes_BKL.is_floating_point() or codes_BKL.is_complex() or codes_BKL.dtype == torch.bool:
        raise DataError(f"codes of {codes_BKL.dtype}: expected whole numbers, such as int64")
    if codes_BKL.dim() != 3 or codes_BKL.shape[1] != num_codebooks:
        raise DataError(f"codes of shape {list(codes_BKL.shape)}: expected [B, K={num_codebooks}, L]")
    if codes_BKL.numel() == 0:
        return
    low, high = (int(value) for value in codes_BKL.aminmax())
    if low < 0 or high >= codebook_size:
        raise DataError(
            f"codes from {low} to {high}: expected 0 to {codebook_size - 1}; they belong to another tokenizer"
        )


def usage_statistics(counts_KV: Tensor, running_KV: Tensor | None = None) -> dict[str, Tensor]:
    """Health per codebook `[K]`, from counts or shares of one batch `[K, V]` and the running average of shares.

    usage: share of entries with more than USED_ABOVE / V of the choices; perplexity: exp of the entropy of the choices;
    dead: number of entries that are not used by the running average (by this batch where it is not given).
    """
    size = counts_KV.shape[-1]
    probs_KV = counts_KV / counts_KV.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    entropy_K = -(probs_KV * probs_KV.clamp(min=1e-12).log()).sum(dim=-1)
    used_K = (probs_KV > USED_ABOVE / size).float().sum(dim=-1)
    long_KV = probs_KV if running_KV is None else running_KV
    dead_K = (long_KV <= USED_ABOVE / size).float().sum(dim=-1)
    return {"usage": used_K / size, "perplexity": entropy_K.exp(), "dead": dead_K}
