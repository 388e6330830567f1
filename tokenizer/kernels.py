"""Triton kernel of the codebook search. Import it where it is used: triton exists for some platforms only.

K codebooks, V entries per codebook, D channels per chunk, N chunks per codebook.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_DIM = 256  # a block of chunks and one of entries must fit the registers and shared memory of one program


def runs_on(tensor: Tensor) -> bool:
    """On a CUDA device, or anywhere in triton's interpreter (TRITON_INTERPRET=1 before the import)."""
    return tensor.is_cuda or triton.knobs.runtime.interpret


def nearest_entries(chunks_KND: Tensor, codebooks_KVD: Tensor, normalise: bool) -> Tensor:
    """Index int64 `[K, N]` of the entry with the largest inner product, the lowest index among equals.

    Both in fp32, of whatever strides: chunks may be a view of features `[N, K * D]`. With `normalise` the chunks are
    first scaled to unit length as F.normalize does it; entries are taken as they are.
    """
    num_codebooks, num_chunks, dim = chunks_KND.shape
    assert dim <= MAX_DIM and chunks_KND.dtype == codebooks_KVD.dtype == torch.float32, (dim, chunks_KND.dtype)
    codes_KN = torch.empty(num_codebooks, num_chunks, dtype=torch.int64, device=chunks_KND.device)
    if not codes_KN.numel():
        return codes_KN
    block_d = max(16, triton.next_power_of_2(dim))  # tl.dot multiplies at least 16 x 16
    block = 64 if block_d <= 64 else 32  # no spilled registers (ptxas, sm_90); not yet tuned on a GPU
    grid = (triton.cdiv(num_chunks, block), num_codebooks)
    with torch.cuda.device_of(chunks_KND):  # triton launches on the current device, which may be another
        _nearest_entries_kernel[grid](
            chunks_KND,
            codebooks_KVD,
            codes_KN,
            num_chunks,
            codebooks_KVD.shape[1],
            dim,
            *chunks_KND.stride(),
            *codebooks_KVD.stride(),
            NORMALISE=normalise,
            BLOCK_N=block,
            BLOCK_V=block,
            BLOCK_D=block_d,
        )
    return codes_KN


@triton.jit
def _nearest_entries_kernel(
    chunks,
    entries,
    codes,
    num_chunks,
    size,
    dim,
    chunk_stride_k,
    chunk_stride_n,
    chunk_stride_d,
    entry_stride_k,
    entry_stride_v,
    entry_stride_d,
    NORMALISE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_N chunks of one codebook against all its entries, BLOCK_V at a time."""
    # Offsets in 64 bits: features of a large batch have more than 2^31 elements.
    k = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    chunk_ND = tl.load(
        chunks + k * chunk_stride_k + n[:, None] * chunk_stride_n + d[None, :] * chunk_stride_d,
        mask=(n[:, None] < num_chunks) & (d[None, :] < dim),
        other=0.0,
    )
    if NORMALISE:
        length_N = tl.sqrt(tl.sum(chunk_ND * chunk_ND, axis=1))
        chunk_ND = chunk_ND / tl.maximum(length_N, 1e-12)[:, None]
    best_N = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    code_N = tl.zeros([BLOCK_N], dtype=tl.int32)
    for start in range(0, size, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        entry_DV = tl.load(
            entries + k * entry_stride_k + v[None, :] * entry_stride_v + d[:, None] * entry_stride_d,
            mask=(v[None, :] < size) & (d[:, None] < dim),
            other=0.0,
        )
        # "ieee": TF32 would round the factors to 10 bits and confuse neighbouring entries.
        similarity_NV = tl.dot(chunk_ND, entry_DV, input_precision="ieee")
        # NaN, which does not equal itself, never wins: the reduction below would order it at will.
        counts_NV = (v[None, :] < size) & (similarity_NV == similarity_NV)
        similarity_NV = tl.where(counts_NV, similarity_NV, float("-inf"))
        block_best_N, inside_N = tl.max(similarity_NV, axis=1, return_indices=True)
        # Strictly larger: among equals the earlier block, thus the lower index, stays.
        better_N = block_best_N > best_N
        code_N = tl.where(better_N, start + inside_N, code_N)
        best_N = tl.where(better_N, block_best_N, best_N)
    tl.store(codes + k * num_chunks + n, code_N.to(tl.int64), mask=n < num_chunks)
