"""Float32 products on a CPU through oneDNN, or with weights that lie as MKL likes them.

torch gives float32 products on x86 to MKL, which uses AVX-512 on Intel's processors only; oneDNN uses it wherever it is
there. Measured on one thread of an AMD EPYC, 2048 rows of 1024 -> 2048: 106 GFLOP/s with MKL, 237 with oneDNN, and 1 ms
to bring the weights into its blocks. So it pays for products of many rows, and for few where the blocks are kept.

A call of oneDNN takes 8 to 16 us, though. On an Intel Xeon MKL does small products in less as a whole, the more so with
the weights transposed: 8 rows of 192 -> 192 in 4.5 us, 7.6 as they are, 21 with oneDNN.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

LEAST_ROWS = 64  # of a product that is worth its weight's way into blocks
MOST_KEPT_BYTES = 2**24  # of one matrix; larger ones would double the memory of a large model for good
QUERIES = 32  # of causal attention at a time
# By the tensor that a matrix belongs to and its name: what its sources held, and the matrix in blocks.
_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()


def can_pack(weight: Tensor) -> bool:
    """Whether `packed` takes it: a plain float32 matrix on the CPU."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype == torch.float32
    mkldnn = torch.backends.mkldnn
    return plain and weight.device.type == "cpu" and mkldnn.is_available() and mkldnn.enabled


@cache
def is_intel() -> bool:
    """Whether the processor is one that MKL is made for; of others than Linux's nothing is known."""
    try:
        return torch.backends.mkl.is_available() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def packed(weight: Tensor, rows: int) -> Tensor:
    """A copy of a weight `[out, in]` in the blocks that oneDNN reads, best for inputs of `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight.default(weight.detach().contiguous(), rows)


def packed_product() -> Callable[..., Tensor]:
    """The operation `(x [.., in], packed weight, bias or None, "none", [], "")`, for any number of rows."""
    return torch.ops.mkldnn._linear_pointwise.default


def kept_packed(
    owner: Tensor, name: Hashable, sources: Sequence[Tensor], rows: int, make: Callable[[], Tensor]
) -> Tensor:
    """`packed(make(), rows)` of a matrix that is made from the `sources` alone, kept as `kept` says."""
    return kept(owner, name, sources, make, lambda weight: packed(weight, rows))


def kept(
    owner: Tensor,
    name: Hashable,
    sources: Sequence[Tensor],
    make: Callable[[], Tensor],
    lay: Callable[[Tensor], Tensor],
) -> Tensor:
    """`lay(make())`, the copy of a matrix that is made from the `sources` alone, float32 tensors on the CPU.

    It is kept under its name as long as the owner lives (up to MOST_KEPT_BYTES), and made anew when a source has
    changed, in whatever way: their bytes are hashed at every call, in a twentieth of the time that blocks take.
    """
    content, own = _digest(sources), _KEPT.setdefault(owner, {})
    if name in own and own[name][0] == content:
        return own[name][1]
    own.pop(name, None)  # its memory is free before the new one takes some
    weight = make()
    copy = lay(weight)
    if weight.nbytes <= MOST_KEPT_BYTES:
        own[name] = (content, copy)
    return copy


def _digest(sources: Sequence[Tensor]) -> bytes:
    """Of version counters there is no use: changes through `.data` and by compiled optimizers leave them alone."""
    import xxhash

    found = xxhash.xxh3_128(repr([source.shape for source in sources]).encode())
    for source in sources:
        found.update(source.detach().contiguous().view(torch.uint8).numpy())
    return found.digest()


def wide_products(x: Tensor) -> AbstractContextManager[object]:
    """`WideProducts` for passes whose input holds at least LEAST_ROWS vectors or ids `x`, on the CPU; else nothing,
    because the mode itself costs some time in every call of torch."""
    rows = x.numel() // (x.shape[-1] if x.is_floating_point() else 1)
    return WideProducts() if rows >= LEAST_ROWS and x.device.type == "cpu" else nullcontext()


class WideProducts(TorchFunctionMode):
    """Inside `with WideProducts():` linear layers of many rows in float32 on the CPU run in oneDNN, without gradients,
    and causal attention over many positions in blocks of queries.

    Anything else (few rows, another device or type, quantized weights, autocast, gradients) runs as it would without.
    Weights must not change inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}  # by a weight's id: the weight, so that the id is its own

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _is_wide(*args):
            return self._linear(*args)
        if func is F.scaled_dot_product_attention and kwargs and len(args) == 3 and _is_long(*args, **kwargs):
            return causal_in_blocks(*args, kwargs.get("scale"), kwargs.get("enable_gqa", False))
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in self._blocks:
            blocks = self._blocks[id(weight)][1]
        else:
            blocks = kept_packed(weight, (), [weight], x.numel() // x.shape[-1], lambda: weight)
            if weight.nbytes <= MOST_KEPT_BYTES:
                self._blocks[id(weight)] = (weight, blocks)
        return packed_product()(x, blocks, None if bias is None else bias.detach(), "none", [], "")


def causal_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    enable_gqa: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T of S positions, `[R, H, T, d]` with all keys, QUERIES at a time and only with the
    keys that they see: torch's kernel for the CPU takes the products with all keys and then hides them.

    `mask` `[R, 1, T, S]`: what else is hidden, with what comes later.
    """
    rows, heads, length, _ = query.shape
    before = key.shape[2] - length
    out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)  # as those who join heads need it
    later = query.new_full((QUERIES, QUERIES), -torch.inf).triu_(1)
    for begin in range(0, length, QUERIES):
        end = min(begin + QUERIES, length)
        if mask is None:
            known = query.new_zeros(end - begin, before + begin)
            hidden = torch.cat([known, later[: end - begin, : end - begin]], dim=1)
        else:
            hidden = mask[:, :, begin:end, : before + end]
        seen = slice(0, before + end)
        out[:, :, begin:end] = F.scaled_dot_product_attention(
            query[:, :, begin:end], key[:, :, seen], value[:, :, seen], hidden, scale=scale, enable_gqa=enable_gqa
        )
    return out


def _is_long(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **options: Any) -> bool:
    """Whether it is causal attention that is worth its way into blocks."""
    known = options.keys() <= {"attn_mask", "scale", "enable_gqa"} and options.get("attn_mask") is None
    return (
        is_causal
        and known
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and query.device.type == "cpu"
        and query.dim() == 4
        and query.shape[2] == key.shape[2] >= 2 * QUERIES
    )


def _is_wide(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    operands = [x, weight] if bias is None else [x, weight, bias]
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() >= LEAST_ROWS * x.shape[-1]
        and all(can_pack(one) for one in operands)
    )
