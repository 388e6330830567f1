"""Linear layers made ready for many calls with few rows, as sampling makes them.

On the CPU a product of few rows with a large matrix is two to four times faster when the matrix lies in the blocks that
oneDNN reads (measured: LOG.md), so its weights are copied once into that form. What is not a plain fp32 layer on the
CPU (GPUs, bf16, quantized weights, adapters) is called as it is.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

LinearMap = Callable[[Tensor], Tensor]


def linear_map(weight: Tensor, bias: Tensor | None, rows: int) -> LinearMap:
    """`x -> x @ weight.T + bias` for inputs `[rows, in]`, prepared where that pays. The weight is copied: a later
    change of it is not seen."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if not _can_pack(weight):
        return lambda x: nn.functional.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous(), rows)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, "none", [], "")


def joined(modules: Sequence[nn.Module], rows: int) -> LinearMap:
    """One call for linear layers that read the same input: their outputs side by side."""
    if all(type(module) is nn.Linear and _can_pack(module.weight) for module in modules):
        biases = [module.bias for module in modules]
        weights = [module.weight.detach() for module in modules]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        if all(bias is None for bias in biases):
            return linear_map(weight, None, rows)
        if all(bias is not None for bias in biases):
            return linear_map(weight, torch.cat([bias.detach() for bias in biases]), rows)
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], dim=-1)


def rms_norm(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """Root-mean-square norm (weight, eps) of the last dimension."""
    return nn.functional.rms_norm(x, x.shape[-1:], *norm)


def joined_after_norm(norm: tuple[Tensor, float], modules: Sequence[nn.Module], rows: int) -> LinearMap:
    """`joined` layers of a root-mean-square norm (weight, eps) of their input.

    Where weights are copied anyway, the norm's go into them, and the mean square is a product with a column of 1/D:
    half the time of a norm on the CPU.
    """
    weight, eps = norm
    if not all(type(module) is nn.Linear and module.bias is None and _can_pack(module.weight) for module in modules):
        product = joined(modules, rows)
        return lambda x: product(rms_norm(x, norm))
    product = linear_map(torch.cat([module.weight.detach() for module in modules]) * weight.detach(), None, rows)
    column, floor = torch.full((weight.shape[0], 1), 1 / weight.shape[0]), torch.full((1,), eps)
    return lambda x: product(x * torch.addmm(floor, x * x, column).rsqrt_())


def _can_pack(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return plain and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
