"""The released unified model: a folder in the layout of `MiniGeminiLlamaForCausalLM`, read and written.

Its layers are ours under other names (`official_places`); sizes that the released code has written into it stand here.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import GenerationConfig, LlamaConfig
from transformers.initialization import no_init_weights

from unitok.core.errors import CheckpointError, ConfigError, UserError
from unitok.core.pretrained import load_model_folder, read_json
from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.mllm.processor import TEXT_MODEL_FILE, UniTokProcessor, UniTokTextTokenizer, load_text_tokenizer
from unitok.mllm.shards import Place, load_sharded, open_shards, save_shards, stored_dtype
from unitok.tokenizer import UniTok

if TYPE_CHECKING:
    from unitok.mllm.model import UniTokMLLM

MODEL_TYPE, ARCHITECTURE = "mini_gemini", "MiniGeminiLlamaForCausalLM"
SIZES_FILE = "sizes.json"  # beside config.json: sizes other than the released ones
# vocab: codes of all K codebooks together; width: channels of a code vector; embed: output of the attention projection
RELEASED_SIZES = {"vocab": 32768, "width": 64, "K": 8, "embed": 1024, "depth_layers": 3, "positions": 256}
RELEASED_IMAGE_SIZE = 256  # pixels
RELEASED_SAMPLER = {
    "guidance_scale": 5.0, "temperature": 0.9, "top_k": 2048, "top_p": 0.96, "depth_temperature": None
}  # fmt: skip
# How the released code lays out sequences. The vocabulary is Llama-2's: the marks are its byte tokens 0x00 and 0x01,
# and the placeholder lies outside of it.
RELEASED_MARK_PIECES = {"begin_image_id": "<0x00>", "end_image_id": "<0x01>"}
RELEASED_LAYOUT: dict[str, Any] = {
    "quantizer": "multi_codebook",
    "visual_mlp_ratio": 2.0,
    "depth_shared_head": True,
    "image_position_embedding": False,
    "begin_image_id": 3,
    "end_image_id": 4,
    "image_token_id": -200,
    "instruction_suffix": " Generate an image based on this description.",
    "unconditional_text": "<unconditional>",
    "system_prompt": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. ",
    "user_prefix": "USER: ",
    "assistant_prefix": " ASSISTANT:",
    "chat_image_marks": False,
}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Ours begins with the left one, theirs with the right one; the first that fits counts.
_PREFIXES = (
    ("backbone.", "model."),
    ("embedder.projection.", "model.multi_embedder.attn_projection."),
    ("embedder.mlp.", "model.multi_embedder.mm_projector."),
    ("depth.code_embeddings.", "ar_head.codebooks."),
    ("depth.", "ar_head."),
    ("lm_head.", "lm_head."),
)
_ZERO_KEY_BIAS = "model.multi_embedder.attn_projection.attn.zero_k_bias"


def load_official(
    folder: str | Path, tokenizer: str | Path | UniTok | None = None, dtype: torch.dtype | None = None
) -> "UniTokMLLM":
    """The released model in `folder`, in one file or in shards, with the embedder cache and sampler of the release.

    Args:
        tokenizer: the visual tokenizer, a released file or a UniTok folder; UserError unless its codes are the model's.
        dtype: of the weights; None: as they are stored.

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
    for tensor in model.state_dict(keep_vars=True).values():  # not `model.to`: rotary angles stay fp32
        tensor.data = tensor.data.to(dtype or stored_dtype(shards))
    load_official_weights(model, folder)
    ids = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, image_sampler=RELEASED_SAMPLER)
    if visual is not None:
        model.keep_tokenizer(visual)
    return model.eval()


def load_official_weights(model: nn.Module, folder: Path) -> None:
    """Copy a released folder's weights into a model of its configuration, which ZeRO 3 may have partitioned."""
    load_sharded(model, folder, official_places(model), zeros=(_ZERO_KEY_BIAS,))


def load_visual_tokenizer(source: str | Path | UniTok | None) -> UniTok | None:
    """From a released file or a UniTok folder; a UniTok is given back as it is."""
    if source is None or isinstance(source, UniTok):
        return source
    return load_model_folder(UniTok, source) if Path(source).is_dir() else UniTok.from_official(source)


def official_config(folder: Path, visual: UniTok | None = None) -> UniTokMLLMConfig:
    """The configuration that a released folder describes; the number of positions is its tokenizer's, where given."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{folder}: no folder of the released model (it has no config.json)")
    given = read_json(config_file)
    if given.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder}: holds a model of type {given.get('model_type')!r}, expected the released {MODEL_TYPE!r}; "
            "own exports are loaded with from_pretrained"
        )
    sizes = _sizes(folder, visual)
    try:
        text_config = _text_config(given, config_file)
        config = UniTokMLLMConfig(
            text_config=text_config,
            num_codebooks=sizes["K"],
            codebook_size=sizes["vocab"] // sizes["K"],
            code_dim=sizes["width"] // sizes["K"],
            num_image_positions=sizes["positions"],
            visual_width=sizes["embed"],
            visual_num_heads=sizes["embed"] // sizes["width"],
            depth_num_layers=sizes["depth_layers"],
            depth_num_key_value_heads=text_config.num_key_value_heads,
            embedder_cache="released",
            code_usage=True,
            **RELEASED_LAYOUT,
        )
    except (ConfigError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: its sizes do not fit: {reason}") from error
    _check_marks(folder, config)
    return config


def _text_config(given: dict[str, Any], file: Path) -> LlamaConfig:
    """The backbone's own settings; those of the released training code have no meaning here."""
    missing = [name for name in _NEEDED if name not in given]
    if missing:
        raise CheckpointError(f"{file}: lacks {', '.join(missing)}; it is not the released model's")
    known = set(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling"}
    dropped = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"}
    config = LlamaConfig(**{name: value for name, value in given.items() if name in known - dropped})
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if config.hidden_act != "silu" or rope_type != "default":
        raise CheckpointError(
            f"{file}: hidden_act={config.hidden_act}, rope scaling {rope_type!r}; the depth transformer has silu and "
            "unscaled rotary positions"
        )
    return config


def _sizes(folder: Path, visual: UniTok | None) -> dict[str, int]:
    file = folder / SIZES_FILE
    given = read_json(file) if file.is_file() else {}
    sizes = RELEASED_SIZES | {name: given[name] for name in RELEASED_SIZES if name in given}
    if visual is not None and "positions" not in given:
        sizes["positions"] = visual.config.num_positions
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{file}: {name} is {value!r}, expected a whole number of at least 1")
    if sizes["vocab"] % sizes["K"] or sizes["width"] % sizes["K"] or sizes["embed"] < sizes["width"]:
        raise CheckpointError(
            f"{file}: vocab={sizes['vocab']} and width={sizes['width']} must divide into K={sizes['K']} codebooks, and "
            f"embed={sizes['embed']} be at least as wide"
        )
    return sizes


def _check_marks(folder: Path, config: UniTokMLLMConfig) -> None:
    """The two marks are byte tokens; a text model in the folder must agree on their ids."""
    if not (folder / TEXT_MODEL_FILE).is_file():
        return
    tokenizer = official_text_tokenizer(folder)
    for name, piece in RELEASED_MARK_PIECES.items():
        index = tokenizer.convert_tokens_to_ids(piece)
        if index != getattr(config, name):
            raise CheckpointError(
                f"{folder / TEXT_MODEL_FILE}: {piece} has id {index}, the released model's {name} is "
                f"{getattr(config, name)}; put the release's {TEXT_MODEL_FILE} there"
            )


def official_text_tokenizer(folder: Path) -> UniTokTextTokenizer:
    """Llama-2's sentencepiece model of a released folder; UserError where there is none."""
    if not (folder / TEXT_MODEL_FILE).is_file():
        raise UserError(f"{folder}: has no {TEXT_MODEL_FILE}, without which texts cannot be read; copy it there")
    return load_text_tokenizer(folder)


def official_processor(folder: Path, model: "UniTokMLLM") -> UniTokProcessor:
    """Texts and images as the release prepares them, for the model that `load_official` made of the folder."""
    visual = model.visual_tokenizer
    image_size = RELEASED_IMAGE_SIZE if visual is None else visual.config.image_size
    return UniTokProcessor(official_text_tokenizer(folder), model.config, image_size, image_preprocess="padded")


def official_places(model: nn.Module) -> dict[str, list[Place]]:
    """For every released key (but the zero key bias) the place of its tensor in this model."""
    places: dict[str, list[Place]] = {}
    books = {"embedder.codebooks": "codebook.weight", "embedder.code_usage": "vocab_usage"}
    for name, tensor in model.state_dict().items():
        if name in books:
            keys = [f"model.multi_embedder.quantizer.codebooks.{k}.{books[name]}" for k in range(tensor.shape[0])]
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
            state[f"model.multi_embedder.quantizer.codebooks.{k}.vocab_usage"] = counted
    save_shards(state, folder, max_shard_size)
    for name, content in _official_files(model).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if processor is not None:
        _save_tokenizer(processor.tokenizer, folder)
    left_out = ["embedder_cache=consistent"] if config.embedder_cache == "consistent" else []
    sampler = getattr(model.generation_config, "image_sampler", RELEASED_SAMPLER)
    return left_out + ([] if sampler == RELEASED_SAMPLER else ["image_sampler"])


def _official_files(model: "UniTokMLLM") -> dict[str, dict[str, Any]]:
    config, text = model.config, model.config.text_config
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    own = text.to_dict()
    rope = own.pop("rope_parameters", None) or {}
    dtype = str(model.dtype).removeprefix("torch.")
    described = {name: value for name, value in own.items() if not name.startswith("_") and name != "dtype"}
    described |= {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "torch_dtype": dtype, "use_cache": True}
    described |= {"rope_theta": rope.get("rope_theta"), "rope_scaling": None}
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
    wanted["visual_num_heads"] = config.visual_width // config.code_width
    found = {name: getattr(config, name) for name in wanted}
    if found["depth_num_key_value_heads"] is None:
        found["depth_num_key_value_heads"] = config.depth_num_heads or text.num_attention_heads
    odd = [f"{name}={found[name]!r} (expected {wanted[name]!r})" for name in wanted if found[name] != wanted[name]]
    rope_type = (text.rope_parameters or {}).get("rope_type", "default")
    odd += [] if rope_type == "default" else [f"rope_type={rope_type!r} (expected 'default')"]
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
