"""Low-rank adapters (LoRA, arXiv 2106.09685) on the backbone, by peft; an export holds them merged."""

import torch
from torch import Tensor, nn

from unitok.core.errors import ConfigError
from unitok.core.rng import derive_seed
from unitok.mllm.settings import LoraConfig

_BASE = ".base_layer."  # what peft puts into the name of the map that an adapter adds to


def is_adapter(name: str) -> bool:
    """Is a parameter of this name an adapter's?"""
    return ".lora_" in name


def add_adapters(backbone: nn.Module, settings: LoraConfig, seed: int) -> None:
    """Put an adapter beside every targeted linear map of `backbone`, in place. Its first factor is drawn from `seed`,
    its second one starts at 0.

    Raises ConfigError for a target that is no linear map of the backbone, or if it has none at all.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(
            f"lora: a backbone of model_type={backbone.config.model_type} has no nn.Linear maps for adapters to stand "
            "beside; set lora=null or give another backbone"
        )
    ends = sorted({name.split(".")[-1] for name in linear})
    for target in settings.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ConfigError(f"lora.targets: {target!r} is no linear map of the backbone; it has {', '.join(ends)}")
    config = PeftConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets or linear,
    )
    torch.manual_seed(derive_seed("adapters", seed))
    inject_adapter_in_model(config, backbone)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model` without adapters: each one's product added to its map, under the map's own name.

    `model` stays as it is. Without adapters this is its state dict.
    """
    state = {name: value for name, value in model.state_dict().items() if not is_adapter(name)}
    for path, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):  # peft's layers
            continue
        for adapter in module.active_adapters:
            name = f"{path}{_BASE}weight"
            state[name] = state[name] + module.get_delta_weight(adapter).to(state[name])
    return {name.replace(_BASE, "."): value for name, value in state.items()}
