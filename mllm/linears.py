"""Linear layers made ready for many calls with few rows, as sampling makes them.

On the CPU a product of few rows with a large matrix is two to four times faster when the matrix lies in the blocks that
oneDNN reads (measured: LOG.md), so its weights are copied into that form, and small ones kept (`unitok.core.onednn`).
What is not a plain fp32 layer on the CPU (GPUs, bf16, quantized weights, adapters) is called as it is.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from unitok.core.onednn import can_pack, is_intel, kept, kept_packed, packed_product

SMALL, FEW = 2**16, 4  # weights and rows up to which oneDNN's 8 us a call are most of its time
MOST_TRANSPOSED = 2**19  # weights up to which MKL is faster than oneDNN on an Intel processor
LinearMap = Callable[[Tensor], Tensor]


def linear_map(weight: Tensor, bias: Tensor | None, rows: int, owner: Tensor, name: Hashable = ()) -> LinearMap:
    """`x -> x @ weight.T + bias` for inputs `[rows, in]`, prepared where that pays. A weight that is copied for it
    is not seen to change later. `owner`: the parameter that the weight is, or that it belongs to under a `name`."""
    return _made_of([weight], lambda: weight, bias, rows, owner, name)


def _made_of(
    sources: Sequence[Tensor], make: Callable[[], Tensor], bias: Tensor | None, rows: int, owner: Tensor, name: Hashable
) -> LinearMap:
    """`linear_map` with a weight that is made from other tensors."""
    bias = None if bias is None else bias.detach()
    sources = [source.detach() for source in sources]
    if not all(can_pack(source) for source in sources):
        weight = make().detach()
        return lambda x: nn.functional.linear(x, weight, bias)
    count = sum(source.numel() for source in sources)
    if is_intel() and count <= MOST_TRANSPOSED:
        turned = kept(owner, ("transposed", name), sources, make, lambda weight: weight.t().contiguous())
        return (lambda x: x @ turned) if bias is None else (lambda x: torch.addmm(bias, x, turned))
    blocks, product = kept_packed(owner, name, sources, rows, make), packed_product()
    if count > SMALL or rows > FEW:
        return lambda x: product(x, blocks, bias, "none", [], "")
    weight = make().detach()
    return lambda x: (
        nn.functional.linear(x, weight, bias) if x.shape[0] <= FEW else product(x, blocks, bias, "none", [], "")
    )


def joined(modules: Sequence[nn.Module], rows: int) -> LinearMap:
    """One call for linear layers that read the same input: their outputs side by side."""
    if all(type(module) is nn.Linear and can_pack(module.weight) for module in modules):
        biases = [module.bias for module in modules]
        weights = [module.weight.detach() for module in modules]
        owner, name = modules[0].weight, () if len(modules) == 1 else ("joined", len(modules))
        if all(bias is None for bias in biases):
            return _made_of(weights, lambda: torch.cat(weights), None, rows, owner, name)
        if all(bias is not None for bias in biases):
            return _made_of(weights, lambda: torch.cat(weights), torch.cat(biases), rows, owner, name)
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], dim=-1)


def joined_in_a_row(first: Tensor, bias: Tensor, second: nn.Linear, rows: int, name: Hashable) -> LinearMap:
    """`x -> second(x @ first.T + bias)`: two linear maps, one where weights are copied anyway."""
    if not (can_pack(first) and can_pack(second.weight)):
        return lambda x: second(nn.functional.linear(x, first, bias))
    sources = [first, second.weight]
    return _made_of(sources, lambda: second.weight.detach() @ first, second(bias), rows, second.weight, name)


def rms_norm(x: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    """Root-mean-square norm (weight, eps) of the last dimension."""
    return nn.functional.rms_norm(x, x.shape[-1:], *norm)


def joined_after_norm(norm: tuple[Tensor, float], modules: Sequence[nn.Module], rows: int) -> LinearMap:
    """`joined` layers of a root-mean-square norm (weight, eps) of their input, `[rows, in]`.

    Where weights are copied anyway, the norm's go into them, and the mean square is a product with a column of 1/D:
    half the time of a norm on the CPU.
    """
    weight, eps = norm
    if not all(type(module) is nn.Linear and module.bias is None and can_pack(module.weight) for module in modules):
        product = joined(modules, rows)
        return lambda x: product(rms_norm(x, norm))
    sources = [weight.detach(), *(module.weight.detach() for module in modules)]
    name = ("after norm", len(modules))
    product = _made_of(sources, lambda: torch.cat(sources[1:]) * sources[0], None, rows, modules[0].weight, name)
    column, floor = torch.full((weight.shape[0], 1), 1 / weight.shape[0]), torch.full((1,), eps)
    return lambda x: product(x * torch.addmm(floor, x * x, column).rsqrt_())
