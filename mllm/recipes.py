"""Which parts of the unified model each step of stage two trains. The codebooks are a buffer: never trained.

warmup       the MLP alone, on captions of images: backbone and tokenizer stay as they are
pretrain     everything, on text, text-to-image and image-to-text
sft          everything, on conversations and text-to-image (with `lora`: adapters for backbone and text head)
align        LLaVA-1.5's first step (understanding only): the MLP alone
llava_sft    LLaVA-1.5's second step: MLP, backbone and text head (with `lora` likewise)
"""

from collections.abc import Collection

from torch import nn

from unitok.core.errors import ConfigError
from unitok.mllm.lora import is_adapter
from unitok.mllm.settings import MllmTrainConfig, Recipe

# By the beginnings of parameter names. `embedder.positions` are input vectors as the MLP's outputs are.
MLP = ("embedder.mlp.", "embedder.positions")
PROJECTION = ("embedder.projection.",)
LANGUAGE = ("backbone.", "lm_head.")
DEPTH = ("depth.",)

TRAINED: dict[Recipe, tuple[str, ...]] = {
    "warmup": MLP,
    "pretrain": MLP + PROJECTION + LANGUAGE + DEPTH,
    "sft": MLP + PROJECTION + LANGUAGE + DEPTH,
    "align": MLP,
    "llava_sft": MLP + LANGUAGE,
}


def check_recipe(config: MllmTrainConfig) -> None:
    """ConfigError for a mixture or adapters that the recipe has no trained part for."""
    trained = TRAINED[config.recipe]
    if config.data.mixture.text_to_image > 0 and not set(DEPTH) <= set(trained):
        raise ConfigError(
            f"recipe={config.recipe} does not train the depth transformer, but data.mixture.text_to_image is "
            f"{config.data.mixture.text_to_image}; set it to 0"
        )
    if config.lora is not None and not set(LANGUAGE) <= set(trained):
        raise ConfigError(f"recipe={config.recipe} does not train the backbone, so lora has no place; set lora=null")


def unreached(config: MllmTrainConfig) -> tuple[str, ...]:
    """Parts that no loss of this mixture reaches: all that would happen to them is weight decay."""
    mixture = config.data.mixture
    parts = () if mixture.text_to_image > 0 else DEPTH
    if mixture.total == mixture.text:  # documents alone
        parts += MLP + PROJECTION
    return parts


def apply_recipe(model: nn.Module, recipe: Recipe, unreached: Collection[str] = ()) -> None:
    """Turn on the gradients of what `recipe` trains, and off those of everything else, and of the parts `unreached`.

    With adapters in the model (put there before) they are trained in place of backbone and text head. A projection that
    is the visual tokenizer's own (`visual_input` other than "codes") stays as it is.
    """
    adapters = any(is_adapter(name) for name, _ in model.named_parameters())
    parts = tuple(part for part in TRAINED[recipe] if part not in unreached)
    if adapters:
        parts = tuple(part for part in parts if part not in LANGUAGE)
    if model.config.visual_input != "codes":
        parts = tuple(part for part in parts if part not in PROJECTION)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(parts) or is_adapter(name))
