"""What a stage-two run begins with: the export of the step before, and the model made ready for its recipe."""

from importlib.util import find_spec
from pathlib import Path

import torch

from unitok.core.engine import EngineConfig
from unitok.core.errors import ConfigError
from unitok.mllm.backbone import load_model
from unitok.mllm.backbone_steps import check_steps
from unitok.mllm.cross_entropy import choose_method
from unitok.mllm.lora import add_adapters
from unitok.mllm.model import UniTokMLLM, read_sampler
from unitok.mllm.pipeline import check_same_codes
from unitok.mllm.processor import UniTokProcessor
from unitok.mllm.recipes import apply_recipe, unreached
from unitok.mllm.settings import MllmTrainConfig
from unitok.tokenizer import UniTok


def load_start(folder: str | Path, visual: UniTok, engine: EngineConfig) -> tuple[UniTokMLLM, UniTokProcessor]:
    """Model (fp32) and processor of an export folder; `visual` is its visual tokenizer.

    Training lets every position see the prefix, so whatever the start did when sampling, what is trained here is
    sampled with `embedder_cache` "consistent".

    Raises CheckpointError for a folder of something else or with weights that do not all fit, UserError where model and
    visual tokenizer do not belong together.
    """
    model = load_model(folder, engine)
    check_same_codes(model, visual)
    model.config.embedder_cache = "consistent"
    model.generation_config.image_sampler = read_sampler(Path(folder)) or {}
    return model, UniTokProcessor.from_pretrained(folder)


def prepare_model(model: UniTokMLLM, config: MllmTrainConfig, device: torch.device) -> None:
    """Adapters, what trains, attention, cross-entropy and checkpointing as the settings say.

    ConfigError for settings that do not fit the model, and for a backbone that could not be sampled from.
    """
    check_steps(model.backbone)
    visual_input = model.config.visual_input
    if visual_input != "codes" and config.data.mixture.text_to_image > 0:
        raise ConfigError(
            f"visual_input={visual_input} is for understanding alone, but data.mixture.text_to_image is "
            f"{config.data.mixture.text_to_image}; set it to 0"
        )
    set_attention(model, config.attention, device, config.engine.precision)
    model.cross_entropy = choose_method(config.cross_entropy, device)
    if config.lora is not None:
        add_adapters(model.backbone, config.lora, config.seed)
    apply_recipe(model, config.recipe, unreached(config))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def set_attention(model: UniTokMLLM, setting: str, device: torch.device, precision: str = "fp32") -> None:
    """Give the backbone the attention that the setting names; ConfigError where it cannot have it.

    precision: the engine's. flash-attn has no kernels for fp32, so "auto" leaves it to sdpa.
    """
    installed = find_spec("flash_attn") is not None and device.type == "cuda"
    if setting == "flash" and not installed:
        raise ConfigError(
            f"attention=flash needs a CUDA GPU (the run is on {device.type}) and flash-attn: install unitok[flash], or "
            "use attention=sdpa or flex"
        )
    if setting == "flash" and precision == "fp32":
        raise ConfigError(
            "attention=flash computes in bf16, but engine.precision is fp32; set engine.precision=autocast or bf16, or "
            "use attention=sdpa or flex"
        )
    if setting == "flex" and device.type != "cuda":
        raise ConfigError("attention=flex needs a CUDA GPU: on a CPU it has no backward pass; use attention=sdpa")
    if setting == "auto":
        if not installed or precision == "fp32" or not model.backbone._supports_flash_attn:
            return  # what transformers gave it: sdpa, wherever a backbone has it
        setting = "flash"
    name = {"flash": "flash_attention_2", "flex": "flex_attention"}.get(setting, setting)
    refusal = f"attention={setting}: not for a backbone of model_type={model.backbone.config.model_type}"
    try:
        model.backbone.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{refusal} ({reason})") from error
    given = model.backbone.config._attn_implementation
    if given != name:  # of some families transformers logs a warning and leaves what was there
        raise ConfigError(f"{refusal}: transformers gives it {given}; use attention=auto")
