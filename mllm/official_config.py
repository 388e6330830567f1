"""What a folder of the released unified model says of itself, and what its code has written into it."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from unitok.core.errors import CheckpointError, ConfigError, UserError
from unitok.core.pretrained import read_json
from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.mllm.processor import TEXT_MODEL_FILE, UniTokTextTokenizer, load_text_tokenizer
from unitok.tokenizer import UniTok

MODEL_TYPE, ARCHITECTURE = "mini_gemini", "MiniGeminiLlamaForCausalLM"
SIZES_FILE = "sizes.json"  # beside config.json: sizes other than the released ones
RELEASED_IMAGE_SIZE = 256  # pixels
RELEASED_SAMPLER = {
    "guidance_scale": 5.0, "temperature": 0.9, "top_k": 2048, "top_p": 0.96, "depth_temperature": None
}  # fmt: skip
RELEASED_PICTURES = {"image_preprocess": "padded", "truncate_pixels": True}  # of the processor
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
    if odd := odd_settings(config):
        raise CheckpointError(
            f"{file}: {', '.join(odd)}; the released depth transformer has the backbone's settings, ours only those "
            "expected ones"
        )
    return config


def odd_settings(text: LlamaConfig) -> list[str]:
    """Settings of a Llama backbone that the released layout has no place for. Its depth transformer is made with the
    same ones, and ours has neither biases nor other activations, widths of heads or rotary positions."""
    rope = text.rope_parameters or {}
    found = {name: getattr(text, name, None) for name in ("hidden_act", "attention_bias", "mlp_bias", "head_dim")}
    found |= {"rope_type": rope.get("rope_type", "default")}
    wanted = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": text.hidden_size // text.num_attention_heads,
        "rope_type": "default",
    }
    return [f"{name}={found[name]!r} (expected {wanted[name]!r})" for name in wanted if found[name] != wanted[name]]


def _released_sizes() -> dict[str, int]:
    """The defaults of our configuration, which are the released model's, in the names of SIZES_FILE: vocab, the codes
    of all K codebooks together; width, the channels of a code vector; embed, those of the attention projection."""
    released = UniTokMLLMConfig()
    return {
        "vocab": released.num_codebooks * released.codebook_size,
        "width": released.code_width,
        "K": released.num_codebooks,
        "embed": released.visual_width,
        "depth_layers": released.depth_num_layers,
        "positions": released.num_image_positions,
    }


def _sizes(folder: Path, visual: UniTok | None) -> dict[str, int]:
    file = folder / SIZES_FILE
    given = read_json(file) if file.is_file() else {}
    released = _released_sizes()
    sizes = released | {name: given[name] for name in released if name in given}
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
