"""The released unified model: a folder in the layout of `MiniGeminiLlamaForCausalLM`, read and written.

Its layers are ours under other names (`official_places`); what it says of itself is read in `official_config`.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from unitok.core.errors import ConfigError, UserError
from unitok.core.pretrained import load_model_folder
from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.mllm.official_config import (
    ARCHITECTURE,
    MODEL_TYPE,
    RELEASED_IMAGE_SIZE,
    RELEASED_LAYOUT,
    RELEASED_PICTURES,
    RELEASED_SAMPLER,
    SIZES_FILE,
    odd_settings,
    official_config,
    official_text_tokenizer,
)
from unitok.mllm.precision import cast_weights
from unitok.mllm.processor import TEXT_MODEL_FILE, UniTokProcessor, UniTokTextTokenizer
from unitok.mllm.quantize import refuse_quantized
from unitok.mllm.shards import RECOMPUTED, Place, load_sharded, open_shards, save_shards, stored_dtype
from unitok.tokenizer import UniTok

if TYPE_CHECKING:
    from unitok.mllm.model import UniTokMLLM

# Ours begins with the left one, theirs with the right one; the first that fits counts.
_PREFIXES = (
    ("backbone.", "model."),
    ("embedder.projection.", "model.multi_embedder.attn_projection."),
    ("embedder.mlp.", "model.multi_embedder.mm_projector."),
    ("depth.code_embeddings.", "ar_head.codebooks."),
    ("depth.", "ar_head."),
    ("lm_head.", "lm_head."),
)
_QUANTIZER = "model.multi_embedder.quantizer."  # what is written in fp32 beside weights in bf16
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ZERO_KEY_BIAS = "model.multi_embedder.attn_projection.attn.zero_k_bias"


def load_official(
    folder: str | Path, tokenizer: str | Path | UniTok | None = None, dtype: torch.dtype | None = None
) -> "UniTokMLLM":
    """The released model in `folder`, in one file or in shards, with the embedder cache and sampler of the release.

    Args:
        tokenizer: the visual tokenizer, a released file or a UniTok folder; UserError unless its codes are the model's.
        dtype: of the weights, but codebooks stay fp32; None: as they are stored.

    Raises CheckpointError, in one line, for a folder of another kind or files that are damaged, hold code, or whose
    keys and shapes are not exactly those that its config.json and sizes.json describe.
    """
    from unitok.mllm.model import UniTokMLLM

    folder = Path(folder)
    visual = load_visual_tokenizer(tokenizer)
    config = official_config(folder, visual)
    shards = open_shards(folder)
    with no_init_weights():
        model = UniTokMLLM(config)
    cast_weights(model, dtype or stored_dtype(shards, ignored=(_QUANTIZER, *RECOMPUTED)))
    load_official_weights(model, folder)
    ids = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, image_sampler=RELEASED_SAMPLER)
    if visual is not None:
        model.keep_tokenizer(visual)
    return model.eval()


def load_official_weights(model: nn.Module, folder: Path) -> None:
    """Copy a released folder's weights into a model of its configuration, which ZeRO 3 may have partitioned. A head
    that shares the embedding's weights gets a copy of its own."""
    places, ignored = official_places(model), RECOMPUTED
    if model.config.text_config.tie_word_embeddings:
        places[_EMBEDDING] += places.pop(_HEAD)
        ignored += (_HEAD,)
    load_sharded(model, folder, places, zeros=(_ZERO_KEY_BIAS,), ignored=ignored)


def load_visual_tokenizer(source: str | Path | UniTok | None) -> UniTok | None:
    """From a released file or a UniTok folder; a UniTok is given back as it is."""
    if source is None or isinstance(source, UniTok):
        return source
    return load_model_folder(UniTok, source) if Path(source).is_dir() else UniTok.from_official(source)


def official_processor(folder: Path, model: "UniTokMLLM") -> UniTokProcessor:
    """Texts and images as the release prepares them, for the model that `load_official` made of the folder."""
    visual = model.visual_tokenizer
    image_size = RELEASED_IMAGE_SIZE if visual is None else visual.config.image_size
    return UniTokProcessor(official_text_tokenizer(folder), model.config, image_size, **RELEASED_PICTURES)


def official_places(model: nn.Module) -> dict[str, list[Place]]:
    """For every released key (but the zero key bias) the place of its tensor in this model."""
    places: dict[str, list[Place]] = {}
    books = {"embedder.codebooks": "codebook.weight", "embedder.code_usage": "vocab_usage"}
    for name, tensor in model.state_dict().items():
        if name in books:
            keys = [f"{_QUANTIZER}codebooks.{k}.{books[name]}" for k in range(tensor.shape[0])]
            places |= {key: [Place(name, k)] for k, key in enumerate(keys)}
        elif name.startswith("depth.head."):
            places[name.replace("depth.head.", "ar_head.linear_head.")] = [Place(name, 0)]  # one head for all codes
        else:
            places[_official_name(name)] = [Place(name)]
    return places


def _official_name(name: str) -> str:
    own, official = next((own, official) for own, official in _PREFIXES if name.startswith(own))
    name = official + name.removeprefix(own)
    for part in ("gate_proj", "up_proj", "down_proj"):
        if name.startswith("ar_head.layers."):
            name = name.replace(f".{part}.", f".mlp.{part}.")
    return name


def save_official(
    model: "UniTokMLLM", folder: str | Path, processor: UniTokProcessor | None = None, max_shard_size: str = "5GB"
) -> list[str]:
    """Write `model` and the texts' tokenizer in the released layout, into a folder that may not hold anything yet.

    Returns what the layout has no place for and is left out. Raises ConfigError for a model that the released code
    could not run.
    """
    folder, config = Path(folder), model.config
    _refuse_other_layouts(config)
    refuse_quantized(model)
    if processor is not None:
        _refuse_other_tokenizers(processor)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    own, places = model.state_dict(), official_places(model)
    state = {key: targets[0].of(own[targets[0].name]) for key, targets in places.items()}
    state[_ZERO_KEY_BIAS] = torch.zeros_like(own["embedder.projection.attn.q_bias"])
    if not config.code_usage:
        visual = model.visual_tokenizer
        usage = torch.zeros(own["embedder.codebooks"].shape[:2]) if visual is None else visual.quantizer.usage_average
        for k, counted in enumerate(usage):
            state[f"{_QUANTIZER}codebooks.{k}.vocab_usage"] = counted
    save_shards(state, folder, max_shard_size)
    for name, content in _official_files(model).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if processor is not None:
        _save_tokenizer(processor.tokenizer, folder)
    left_out = ["embedder_cache=consistent"] if config.embedder_cache == "consistent" else []
    sampler = getattr(model.generation_config, "image_sampler", RELEASED_SAMPLER)
    left_out += [] if sampler == RELEASED_SAMPLER else ["image_sampler"]
    for name, released in RELEASED_PICTURES.items():
        if processor is not None and (own_way := getattr(processor, name)) != released:
            left_out.append(f"{name}={own_way}")
    return left_out


def _official_files(model: "UniTokMLLM") -> dict[str, dict[str, Any]]:
    config, text = model.config, model.config.text_config
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    own = text.to_dict()
    rope = own.pop("rope_parameters", None) or {}
    dtype = str(model.dtype).removeprefix("torch.")
    described = {name: value for name, value in own.items() if not name.startswith("_") and name != "dtype"}
    described |= {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "torch_dtype": dtype, "use_cache": True}
    described |= {"rope_theta": rope.get("rope_theta"), "rope_scaling": None}
    described["tie_word_embeddings"] = False  # both are written, whatever the backbone began with
    sizes = {
        "vocab": config.num_codebooks * config.codebook_size,
        "width": config.code_width,
        "K": config.num_codebooks,
        "embed": config.visual_width,
        "depth_layers": config.depth_num_layers,
        "positions": config.num_image_positions,
    }
    return {"config.json": described, SIZES_FILE: sizes, "generation_config.json": ids}


def _refuse_other_layouts(config: UniTokMLLMConfig) -> None:
    """ConfigError, with all that differs, unless the released code could run a model of this configuration."""
    text = config.text_config
    if text.model_type != "llama":
        raise ConfigError(f"the released layout has a Llama backbone, this model a {text.model_type}; keep the export")
    as_backbone = {
        "depth_width": text.hidden_size,
        "depth_num_heads": text.num_attention_heads,
        "depth_intermediate_size": text.intermediate_size,
    }
    wanted = RELEASED_LAYOUT | {name: value for name, value in as_backbone.items() if getattr(config, name) is not None}
    wanted["depth_num_key_value_heads"] = text.num_key_value_heads
    wanted["visual_input"] = "codes"
    wanted["visual_num_heads"] = config.visual_width // config.code_width
    found = {name: getattr(config, name) for name in wanted}
    if found["depth_num_key_value_heads"] is None:
        found["depth_num_key_value_heads"] = config.depth_num_heads or text.num_attention_heads
    odd = [f"{name}={found[name]!r} (expected {wanted[name]!r})" for name in wanted if found[name] != wanted[name]]
    odd += odd_settings(text)
    if odd:
        raise ConfigError(f"the released layout has no place for {', '.join(odd)}; keep the export instead")


def _refuse_other_tokenizers(processor: UniTokProcessor) -> None:
    tokenizer = processor.tokenizer
    if not isinstance(tokenizer, UniTokTextTokenizer):
        raise ConfigError(
            f"the released layout reads texts with a {TEXT_MODEL_FILE}, this model with a {type(tokenizer).__name__}"
        )


def _save_tokenizer(tokenizer: UniTokTextTokenizer, folder: Path) -> None:
    """tokenizer.model, and settings in the form of transformers' own Llama tokenizer."""
    shutil.copyfile(tokenizer.vocab_file, folder / TEXT_MODEL_FILE)
    tokens = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": tokenizer.legacy,
        "add_bos_token": True,
        "add_eos_token": False,
        **tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens, indent=2) + "\n")
