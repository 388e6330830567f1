"""What touches every (chunk, entry) pair of a multi-codebook quantizer, a few MiB at a time: search and entropy loss.

K codebooks, V entries per codebook, D channels per chunk, N chunks per codebook, B batch, L positions, C = K * D.
In a block the chunks run along the last axis, `[K, V, N]`: the reductions over entries then go across whole vectors of
chunks, which is what makes them fast on a CPU (torch's argmax along a row is several times slower).
"""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unitok.core.distributed import all_reduce_sum_, world_size
from unitok.core.errors import ConfigError, DataError

Backend = Literal["auto", "torch", "triton"]

# Pairs (chunk, entry) held at once. On a CPU 4 MiB of fp32, which stays in the cache; elsewhere launches cost more.
CPU_ELEMENTS, DEVICE_ELEMENTS = 1 << 20, 1 << 22
LN2 = math.log(2)
GROUP = 64  # entries of a group; only the winning group of a chunk is looked through one by one


@torch.no_grad()
def search(chunks_KND: Tensor, codebooks_KVD: Tensor, backend: Backend = "auto") -> Tensor:
    """Index int64 `[K, N]` of the entry with the largest inner product; the lowest index among equals.

    Args:
        chunks_KND, codebooks_KVD: fp32; normalised for a search by cosine, of whatever strides.
        backend: "triton" is the kernel of `kernels.py`, "torch" blocked products; "auto" takes the kernel on CUDA.

    Raises:
        ConfigError: backend "triton" was asked for where it cannot run.
    """
    _check_pair(chunks_KND, codebooks_KVD)
    if _use_triton(backend, chunks_KND):
        from unitok.tokenizer.kernels import nearest_entries

        return nearest_entries(chunks_KND, codebooks_KVD, normalise=False)
    with torch.autocast(chunks_KND.device.type, enabled=False):
        return _search_blocks(chunks_KND, codebooks_KVD)


@torch.no_grad()
def search_features(features_BLC: Tensor, codebooks_KVD: Tensor, backend: Backend = "auto") -> Tensor:
    """Codes int64 `[K, N]` of features `[..., K * D]` of any length, N being the product of the leading sizes.

    The codebooks are normalised. The kernel normalises chunks as it reads them, so no other copy of them is made.

    Raises:
        DataError: the features do not have `K * D` channels.
        ConfigError: backend "triton" was asked for where it cannot run.
    """
    num_codebooks, _, dim = codebooks_KVD.shape
    if features_BLC.shape[-1] != num_codebooks * dim:
        raise DataError(
            f"features with {features_BLC.shape[-1]} channels: expected num_codebooks * code_dim = "
            f"{num_codebooks} * {dim} = {num_codebooks * dim}"
        )
    chunks_KND = features_BLC.float().reshape(-1, num_codebooks, dim).transpose(0, 1)
    if _use_triton(backend, chunks_KND):
        from unitok.tokenizer.kernels import nearest_entries

        return nearest_entries(chunks_KND, codebooks_KVD, normalise=True)
    return search(F.normalize(chunks_KND, dim=-1), codebooks_KVD, backend="torch")


def usage_counts(codes_KN: Tensor, codebook_size: int) -> Tensor:
    """How often each entry occurs, float32 `[K, V]`."""
    counts_KV = torch.zeros(codes_KN.shape[0], codebook_size, device=codes_KN.device)
    # Not bincount: on CUDA it waits for the device. Sums of ones are exact in any order up to 2^24.
    return counts_KV.scatter_add_(1, codes_KN, torch.ones_like(codes_KN, dtype=counts_KV.dtype))


def entropy_loss(chunks_KND: Tensor, codebooks_KVD: Tensor, temperature: float, block: int | None = None) -> Tensor:
    """Mean over codebooks of (mean entropy per chunk - entropy of the mean assignment); low = sure and diverse.

    The assignment is the softmax of -(squared distance) / temperature between unit vectors. The mean assignment is
    that of all ranks (every rank must call); averaged over ranks, value and gradient are those of one process with all
    chunks. Neither pass holds more than two blocks of `[K, V, N]`: the backward pass computes the softmax again.

    Args:
        block: chunks (of one codebook) held at once; by default as many as fit the cache.
    """
    _check_pair(chunks_KND, codebooks_KVD)
    # On unit vectors the negative squared distance is 2 * cosine - 2; the constant drops out of the softmax.
    return _EntropyLoss.apply(chunks_KND.float(), codebooks_KVD.float(), 2.0 / temperature / LN2, block)


class _EntropyLoss(torch.autograd.Function):
    """With logits l, p = softmax(l), a = mean of p over chunks: mean_n H(p_n) + sum a log(a + 1e-7), mean over K.

    Logits are to base 2 (`scale` holds the 1 / ln 2): torch's exp2 is four times as fast as its exp on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, chunks_KND: Tensor, codebooks_KVD: Tensor, scale: float, block: int | None) -> Tensor:
        num_codebooks, num_chunks, _ = chunks_KND.shape
        entropy_K = chunks_KND.new_zeros(num_codebooks)
        mean_KV = chunks_KND.new_zeros(codebooks_KVD.shape[:2])
        peak_KN, total_KN = chunks_KND.new_empty(2, num_codebooks, num_chunks)
        with torch.autocast(chunks_KND.device.type, enabled=False):
            for k, n, logits_kVn, weights_kVn in _logit_blocks(chunks_KND, codebooks_KVD, scale, block):
                peak_kn = logits_kVn.amax(1)
                _exp2_below(logits_kVn, peak_kn, weights_kVn)
                total_kn = weights_kVn.sum(1)
                mean_KV[k] += torch.bmm(weights_kVn, total_kn.reciprocal().unsqueeze(-1)).squeeze(-1)
                entropy_K[k] += (total_kn.log2() - logits_kVn.mul_(weights_kVn).sum(1) / total_kn).sum(-1)
                peak_KN[k, n], total_KN[k, n] = peak_kn, total_kn
        count = max(num_chunks, 1)  # no chunk at all: loss and gradient are 0, not NaN
        mean_KV = all_reduce_sum_(mean_KV / count) / world_size()
        log_mean_KV = (mean_KV + 1e-7).log()
        # Derivative of sum a log2(a + 1e-7); own gradient only: the engine averages gradients over ranks.
        slope_KV = (log_mean_KV + mean_KV / (mean_KV + 1e-7)) / LN2
        ctx.save_for_backward(chunks_KND, codebooks_KVD, peak_KN, total_KN, slope_KV)
        ctx.scale, ctx.block = scale, block
        return (entropy_K * (LN2 / count) + (mean_KV * log_mean_KV).sum(-1)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """dLoss/dl = p (q - sum p q) / (K N) with q = slope - log p.

        The peak is taken off the logits before the total is divided out, in two steps as in a softmax: with one
        rounded logsumexp the p of a chunk would not sum to 1, and at low temperature the two terms of q - sum p q
        would not cancel.
        """
        chunks_KND, codebooks_KVD, peak_KN, total_KN, slope_KV = ctx.saved_tensors
        grad_KDN, grad_KDV = torch.zeros_like(chunks_KND.mT), torch.zeros_like(codebooks_KVD.mT)
        with torch.autocast(chunks_KND.device.type, enabled=False):
            for k, n, logits_kVn, weights_kVn in _logit_blocks(chunks_KND, codebooks_KVD, ctx.scale, ctx.block):
                _exp2_below(logits_kVn, peak_KN[k, n], weights_kVn)
                total_k1n = total_KN[k, n].unsqueeze(1)
                # log p = logit - log total: the last is the same for all entries and drops out of q - sum p q.
                grad_kVn = torch.sub(slope_KV[k].unsqueeze(-1), logits_kVn, out=logits_kVn).mul_(weights_kVn)
                grad_kVn.addcmul_(weights_kVn, grad_kVn.sum(1, keepdim=True) / total_k1n, value=-1)
                # Products of D rows: with D columns they take three times as long.
                grad_KDN[k, :, n] = torch.bmm(codebooks_KVD[k].mT, grad_kVn) / total_k1n
                grad_KDV[k] += torch.bmm(chunks_KND[k, n].mT / total_k1n, grad_kVn.mT)
        factor = grad * (ctx.scale * LN2**2 / max(chunks_KND.shape[0] * chunks_KND.shape[1], 1))
        return grad_KDN.mT * factor, grad_KDV.mT * factor, None, None


def _exp2_below(logits_kVn: Tensor, peak_kn: Tensor, out_kVn: Tensor) -> None:
    """In place, logits less their peak; into `out`, 2 to that power."""
    # Far below the peak a power is a denormal number, which takes a processor several times as long as 2^-126.
    torch.exp2(logits_kVn.sub_(peak_kn.unsqueeze(1)).clamp_(min=-126.0), out=out_kVn)


def _logit_blocks(
    chunks_KND: Tensor, codebooks_KVD: Tensor, scale: float, block: int | None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Codebooks, chunks, their logits `[k, V, n]` and room for as many; the next block overwrites both."""
    num_codebooks, num_chunks, _ = chunks_KND.shape
    size = codebooks_KVD.shape[1]
    scaled_KDN = (chunks_KND * scale).mT
    buffers: Tensor | None = None
    for k, n in _blocks(chunks_KND, size, block):
        shape = (k.stop - k.start, size, n.stop - n.start)
        count = shape[0] * shape[1] * shape[2]
        if buffers is None:  # the first block is the largest
            buffers = chunks_KND.new_empty(2, count)
        logits_kVn, room_kVn = (buffer[:count].view(shape) for buffer in buffers)
        torch.bmm(codebooks_KVD[k], scaled_KDN[k, :, n], out=logits_kVn)
        yield k, n, logits_kVn, room_kVn


def _search_blocks(chunks_KND: Tensor, codebooks_KVD: Tensor) -> Tensor:
    """The search in plain torch: group maxima of a block of similarities, then the winner in the winning group."""
    num_codebooks, num_chunks, _ = chunks_KND.shape
    device, last = chunks_KND.device, codebooks_KVD.shape[1] - 1
    groups = -(-(last + 1) // GROUP)
    group = -(-(last + 1) // groups)
    # Whole groups by repeating the last entry; should rounding let a copy win, the index is clamped to the original.
    missing = groups * group - (last + 1)
    if missing:
        codebooks_KVD = torch.cat([codebooks_KVD, codebooks_KVD[:, -1:].expand(-1, missing, -1)], dim=1)
    codes_KN = torch.empty(num_codebooks, num_chunks, dtype=torch.int64, device=device)
    chunks_KDN = chunks_KND.mT
    row_K1 = torch.arange(num_codebooks, device=device).unsqueeze(-1)
    column_N = torch.arange(num_chunks, device=device)
    buffer: Tensor | None = None
    for k, n in _blocks(chunks_KND, groups * group):
        shape = (k.stop - k.start, groups, group, n.stop - n.start)
        count = shape[0] * groups * group * shape[3]
        if buffer is None:  # one buffer for all blocks, of which the first is the largest
            buffer = chunks_KND.new_empty(count)
        similarities = buffer[:count].view(shape)
        torch.bmm(codebooks_KVD[k], chunks_KDN[k, :, n], out=similarities.flatten(1, 2))
        # max with indices across rows, and argmax along rows: each is the fast one of the two in its direction.
        winner_kn = similarities.amax(2).max(1).indices
        inside_kn = similarities[row_K1[: shape[0]], winner_kn, :, column_N[: shape[3]]].argmax(-1)
        codes_KN[k, n] = winner_kn.mul_(group).add_(inside_kn)
    return codes_KN.clamp_(max=last) if missing else codes_KN


def _blocks(chunks_KND: Tensor, size: int, block: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Slices of codebooks and of chunks: as many pairs with `size` entries as one block holds, or `block` chunks."""
    num_codebooks, num_chunks, _ = chunks_KND.shape
    elements = CPU_ELEMENTS if chunks_KND.device.type == "cpu" else DEVICE_ELEMENTS
    chunks = max(1, min(num_chunks, block or elements // size))
    codebooks = max(1, min(num_codebooks, elements // (size * chunks)))
    for k in range(0, num_codebooks, codebooks):
        for n in range(0, num_chunks, chunks):
            yield slice(k, min(k + codebooks, num_codebooks)), slice(n, min(n + chunks, num_chunks))


def _check_pair(chunks_KND: Tensor, codebooks_KVD: Tensor) -> None:
    """Ours to keep: the quantizer has checked what a user gives."""
    shapes = f"chunks {list(chunks_KND.shape)}, codebooks {list(codebooks_KVD.shape)}"
    assert chunks_KND.dim() == codebooks_KVD.dim() == 3 and codebooks_KVD.shape[1] > 0, shapes
    assert chunks_KND.shape[::2] == codebooks_KVD.shape[::2], shapes


def _use_triton(backend: Backend, chunks_KND: Tensor) -> bool:
    """Whether the kernel runs; ConfigError when it was asked for and cannot."""
    if backend not in ("auto", "torch", "triton"):
        raise ConfigError(f'search backend {backend!r}: expected "auto", "torch" or "triton"')
    if backend == "torch" or (backend == "auto" and not chunks_KND.is_cuda):
        return False
    if importlib.util.find_spec("triton") is None:
        if backend == "auto":
            return False
        raise ConfigError('search backend "triton": the package triton is not installed; use "auto" or "torch"')
    from unitok.tokenizer.kernels import MAX_DIM, runs_on

    fits = chunks_KND.dtype == torch.float32 and chunks_KND.shape[-1] <= MAX_DIM and runs_on(chunks_KND)
    if backend == "triton" and not fits:
        raise ConfigError(
            f'search backend "triton" for chunks of {chunks_KND.shape[-1]} channels, {chunks_KND.dtype}, on '
            f'{chunks_KND.device.type}: expected at most {MAX_DIM}, float32, on CUDA; use "auto" or "torch"'
        )
    return fits
