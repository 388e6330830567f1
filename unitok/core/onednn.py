"""Wide float32 products on a CPU through oneDNN.

torch gives float32 products on x86 to MKL, which uses AVX-512 on Intel's processors only; oneDNN uses it wherever it is
there. Measured on one thread of an AMD EPYC, 256 rows of 1024 -> 2048: 106 GFLOP/s with MKL, 220 with oneDNN. Narrow
products (one row per conversation) do not gain, because the operands have to be wrapped.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEAST_ROWS = 64  # of a product that is worth wrapping


def wide_products(x: Tensor) -> AbstractContextManager[object]:
    """`WideProducts` for passes whose input holds at least LEAST_ROWS vectors or ids `x`, on the CPU; else nothing,
    because the mode itself costs some time in every call of torch."""
    rows = x.numel() // (x.shape[-1] if x.is_floating_point() else 1)
    return WideProducts() if rows >= LEAST_ROWS and x.device.type == "cpu" else nullcontext()


class WideProducts(TorchFunctionMode):
    """Inside `with WideProducts():` linear layers of many rows in float32 on the CPU run in oneDNN, without gradients.

    Anything else (few rows, another device or type, quantized weights, autocast, gradients) runs as it would without.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _is_wide(*args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _is_wide(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    operands = [x, weight] if bias is None else [x, weight, bias]
    return (
        torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() >= LEAST_ROWS * x.shape[-1]
        and all(
            type(one) in (Tensor, torch.nn.Parameter) and one.dtype == torch.float32 and one.device.type == "cpu"
            for one in operands
        )
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows, wrapped_bias = x.reshape(-1, x.shape[-1]).to_mkldnn(), None if bias is None else bias.to_mkldnn()
    return F.linear(rows, weight.to_mkldnn(), wrapped_bias).to_dense().view(*x.shape[:-1], weight.shape[0])
