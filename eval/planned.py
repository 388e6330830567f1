"""The networks of a stage-two configuration on the meta device, also where the folders that it names do not exist yet.

Sizes come from the folder if it is there, else from the configuration that writes it (the one beside this file whose
`output_dir` it is), else from the tables below; what was assumed is told.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from unitok.core.config import config_path, load_config
from unitok.core.errors import ConfigError
from unitok.data.conversations import MARKS
from unitok.mllm import UniTokMLLM, UniTokMLLMConfig
from unitok.mllm.build import new_text_config
from unitok.mllm.lora import add_adapters
from unitok.mllm.recipes import apply_recipe, check_recipe, unreached
from unitok.mllm.settings import MllmTrainConfig
from unitok.tokenizer import UniTokConfig
from unitok.tokenizer.configuration import VITAMIN_SIZES
from unitok.tokenizer.task import TokenizerTrainConfig

_LLAMA = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# By the name of the folder: sizes as in the models' published config.json.
KNOWN_BACKBONES: dict[str, dict[str, Any]] = {
    "Llama-2-7b-hf": dict(zip(_LLAMA, (32000, 4096, 11008, 32, 32), strict=True)),
    "vicuna-7b-v1.5": dict(zip(_LLAMA, (32000, 4096, 11008, 32, 32), strict=True)),
    "Llama-2-13b-hf": dict(zip(_LLAMA, (32000, 5120, 13824, 40, 40), strict=True)),
    "Meta-Llama-3-8B": dict(zip(_LLAMA, (128256, 4096, 14336, 32, 32), strict=True)) | {"num_key_value_heads": 8},
    "Llama-3.2-1B": dict(zip(_LLAMA, (128256, 2048, 8192, 16, 32), strict=True)) | {"num_key_value_heads": 8},
    "Llama-3.2-3B": dict(zip(_LLAMA, (128256, 3072, 8192, 28, 24), strict=True)) | {"num_key_value_heads": 8},
}
_PARENTS = 8  # configurations one after the other, as warm-up -> pre-training -> fine-tuning


def planned_model(config: MllmTrainConfig, file: Path | str) -> tuple[UniTokMLLM, list[str]]:
    """The unified model of `config` (read from `file`) on the meta device, with its recipe and adapters, and what was
    assumed. ConfigError where sizes cannot be found."""
    check_recipe(config)
    notes: list[str] = []
    sizes = _sizes(config, config_path(file), notes)
    with torch.device("meta"):
        model = UniTokMLLM(sizes)
        if config.lora is not None:
            add_adapters(model.backbone, config.lora, config.seed)
    apply_recipe(model, config.recipe, unreached(config))
    return model, notes


def _sizes(config: MllmTrainConfig, file: Path, notes: list[str]) -> UniTokMLLMConfig:
    origin = config
    for _ in range(_PARENTS):
        if origin.init_from is None:
            break
        if (Path(origin.init_from) / "config.json").is_file():
            return UniTokMLLMConfig.from_pretrained(origin.init_from)
        parent = _writer_of(Path(origin.init_from).parent, file.parent)
        if parent is None:
            raise ConfigError(
                f"init_from={origin.init_from}: no such export, and no configuration in {file.parent} has output_dir="
                f"{Path(origin.init_from).parent}; give init_from=null and model.*, backbone.* as in the step before"
            )
        notes.append(f"{origin.init_from} is not there yet: sizes from {parent.name}")
        origin = load_config(MllmTrainConfig, parent)
    visual = _visual(origin.tokenizer, file, notes)
    return UniTokMLLMConfig(
        text_config=_text_config(origin, notes),
        quantizer=visual.quantizer,
        num_codebooks=visual.num_codebooks,
        codebook_size=visual.codebook_size,
        code_dim=visual.code_dim,
        num_image_positions=visual.num_positions,
        **origin.model.model_dump(),
    )


def _writer_of(folder: Path, configurations: Path) -> Path | None:
    """The file in `configurations` whose runs go into `folder`."""
    for file in sorted(configurations.glob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        if any(line.split("#")[0].strip() == f"output_dir: {folder}" for line in lines):
            return file
    return None


def _text_config(config: MllmTrainConfig, notes: list[str]) -> Any:
    backbone = config.backbone
    if backbone.path is None:
        return new_text_config(backbone.config, "backbone.config", vocab_size=backbone.text_vocab_size)
    if (Path(backbone.path) / "config.json").is_file():
        found = AutoConfig.from_pretrained(backbone.path)
        found.dtype = torch.float32
        return found
    name = Path(backbone.path).name
    if name not in KNOWN_BACKBONES:
        raise ConfigError(
            f"backbone.path={backbone.path}: no such folder, and {name!r} is none of the known sizes "
            f"({', '.join(KNOWN_BACKBONES)}); give backbone.path=null and the sizes as backbone.config.*"
        )
    notes.append(f"{backbone.path} is not there: published sizes of {name}")
    sizes = KNOWN_BACKBONES[name]
    return new_text_config(sizes | {"vocab_size": sizes["vocab_size"] + len(MARKS)}, "backbone.config")


def _visual(folder: str, file: Path, notes: list[str]) -> UniTokConfig:
    if (Path(folder) / "config.json").is_file():
        return UniTokConfig.from_pretrained(folder)
    writer = _writer_of(Path(folder).parent, file.parent.parent / "tokenizer")
    if writer is not None:
        notes.append(f"{folder} is not there yet: sizes from tokenizer/{writer.name}")
        return UniTokConfig(**load_config(TokenizerTrainConfig, writer).model.model_dump())
    notes.append(f"{folder} is not there: sizes of the released tokenizer")
    return UniTokConfig(**VITAMIN_SIZES["vitamin_large"])
