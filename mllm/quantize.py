"""8-bit and 4-bit weights for inference, through torchao (the extra `unitok[quantized]`)."""

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from unitok.core.errors import UserError

if TYPE_CHECKING:
    from unitok.mllm.model import UniTokMLLM

WeightKind = Literal["int8", "int4"]
_GROUPS = (128, 64, 32)  # weights that share a scale in int4; the largest that divides every layer's width


def quantize_weights(model: "UniTokMLLM", kind: str) -> "UniTokMLLM":
    """Replace the weights of the linear layers of backbone and depth transformer, in place; for inference only.

    "int8": one scale for each output channel, on any device. "int4": groups of weights with a scale each, on a GPU and
    for a model in bf16. Embeddings, codebooks, the code embedder and both heads stay as they are: they are a small
    part of a large model, and what is chosen depends on the heads most.

    UserError where torchao is not installed, or where it cannot do this kind here.
    """
    if kind not in get_args(WeightKind):
        raise UserError(f"weights={kind!r}: expected one of {', '.join(get_args(WeightKind))}")
    layers = _linear_layers(model)
    if any(type(layer.weight) is not nn.Parameter for layer in layers.values()):
        raise UserError(f"weights={kind!r}: the weights of this model are quantized already; load it anew")
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise UserError(f"weights={kind!r} needs torchao; install the extra unitok[quantized]") from error
    config = _int8() if kind == "int8" else _int4(model, layers)
    quantize_(model, config, filter_fn=lambda module, name: name in layers)
    model.weight_kind = kind
    return model


def refuse_quantized(model: "UniTokMLLM") -> None:
    """UserError for a model whose weights have fewer bits: no file of ours holds those."""
    if model.weight_kind is not None:
        raise UserError(
            f"this model has {model.weight_kind} weights, which cannot be saved; save it as it was loaded, and give "
            f"weights={model.weight_kind!r} when loading it"
        )


def _linear_layers(model: "UniTokMLLM") -> dict[str, nn.Linear]:
    """The layers that are quantized, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.split(".")[0] in ("backbone", "depth")
    }


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4(model: "UniTokMLLM", layers: dict[str, nn.Linear]) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    if model.device.type != "cuda" or model.dtype != torch.bfloat16:
        raise UserError(
            f"weights='int4' needs a model in bf16 on a GPU, this one is in {model.dtype} on {model.device.type}; use "
            f"weights='int8'"
        )
    for size in _GROUPS:
        if all(layer.in_features % size == 0 for layer in layers.values()):
            return Int4WeightOnlyConfig(group_size=size, int4_packing_format="tile_packed_to_4d")
    odd = next(name for name, layer in layers.items() if layer.in_features % _GROUPS[-1])
    raise UserError(
        f"weights='int4': {odd} has {layers[odd].in_features} inputs, expected a multiple of {_GROUPS[-1]}; use "
        f"weights='int8'"
    )


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a weight takes, quantized or not."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module."""
    return sum(stored_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))
