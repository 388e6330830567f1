"""The released checkpoint layout, both ways: `unitok_tokenizer.pth` <-> UniTok (UniTok's release, commit bb8012e).

A released file is a dictionary: `args` holds plain values, `trainer.unitok` the state. Nothing in it is executed.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unitok.core.errors import CheckpointError, ConfigError
from unitok.core.pretrained import read_json
from unitok.tokenizer.configuration import VITAMIN_SIZES, TextTowerConfig, UniTokConfig
from unitok.tokenizer.model import UniTok
from unitok.tokenizer.projection import ProjectionAttention
from unitok.tokenizer.text import TEXT_MODEL_FILE
from unitok.tokenizer.weights import check_layout, read_torch

VIT_CONFIG_FILE = "vit_config.json"  # beside the checkpoint: encoder sizes that have no released name
ARGS_FILE = "args.json"  # beside a .safetensors file, which has no place for them
# Arguments that only our own files have; the released code does not read them.
_OWN_ARGS = ("preprocess", "codebook_init", "decoder_init_gain", "initializer_range")
_PROJECTIONS = {"attn": "attention", "linear": "linear"}
# Not part of the released state: derived, counted, or of use in training only.
_OWN_ONLY = ("quantizer.usage_updates", "distill_head.")


def load_official(path: str | Path) -> UniTok:
    """A UniTok with the weights of a released checkpoint (`.pth`, or `.safetensors` with `args.json` beside it).

    Encoder sizes follow from the name stored in the file; for a name that was never released they are read from
    `vit_config.json` beside it. Raises CheckpointError, in one line, for a file that is damaged, holds code, or whose
    keys or shapes are not exactly those of the model that its arguments describe.
    """
    path = Path(path)
    args, state, updates = _read(path)
    model = UniTok(official_config(args, path))
    check_layout({name: value.shape for name, value in to_official_state(model).items()}, state, "UniTok", path)
    own, counted = from_official_state(model, state), model.quantizer.usage_average
    _check_zero_key_biases(state, path)
    model.load_state_dict(own | {name: value for name, value in model.state_dict().items() if name not in own})
    # the release forgets how many batches its running usage has seen; only "none at all" can be told from the numbers
    seen = updates if updates is not None else (100 if bool(counted.any()) else 0)
    model.quantizer.usage_updates.fill_(seen)
    text_file = path.parent / TEXT_MODEL_FILE
    if model.config.text_tower_config and model.config.text_tower_config.tokenizer == "sentencepiece":
        if not text_file.is_file():
            raise CheckpointError(f"{path}: its text tower needs {TEXT_MODEL_FILE} beside it; copy it there")
        model.set_text_model(text_file)
    return model.eval()


def save_official(model: UniTok, path: str | Path) -> list[str]:
    """Write `model` in the released layout; `vit_config.json` beside it when its encoder has no released name.

    Returns the names of what the layout has no place for and is left out. Raises ConfigError for a model that the
    released code could not run.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    args, vit_config = official_args(model.config)
    # copies: torch.save writes the whole storage that a view belongs to
    state = {name: value.detach().cpu().clone() for name, value in to_official_state(model).items()}
    content = {
        "args": args,
        "trainer": {"unitok": state},
        "usage_updates": int(model.quantizer.usage_updates),
    }
    partial = path.with_name(path.name + ".partial")
    text_model, target = model.text_model_file, path.parent / TEXT_MODEL_FILE
    text = None if text_model is None else text_model.read_bytes()
    if text is not None and target.is_file() and target.read_bytes() != text:
        raise ConfigError(f"{target} is another checkpoint's; write this one into a folder of its own")
    if vit_config is not None:
        _write_sizes(path.parent / VIT_CONFIG_FILE, vit_config)
    if text is not None and not target.is_file():
        target.write_bytes(text)
    torch.save(content, partial)
    partial.replace(path)
    return [name for name in model.state_dict() if name.startswith("distill_head.")]


def _write_sizes(file: Path, sizes: dict[str, Any]) -> None:
    """The size file is shared by all checkpoints of a folder, so one of other sizes must not be replaced."""
    if file.is_file() and read_json(file) != sizes:
        raise ConfigError(f"{file} holds the sizes of another checkpoint; write this one into a folder of its own")
    file.write_text(json.dumps(sizes, indent=1) + "\n")


def official_config(args: Mapping[str, Any], path: Path) -> UniTokConfig:
    """The configuration that a checkpoint's arguments describe; `path` is where the checkpoint lies."""
    try:
        num_codebooks, vocab_size, width = (_whole(args, k) for k in ("num_codebooks", "vocab_size", "vocab_width"))
        if num_codebooks < 1 or vocab_size % num_codebooks or width % num_codebooks:
            raise CheckpointError(
                f"{path}: vocab_size={vocab_size} and vocab_width={width} do not divide into {num_codebooks} codebooks"
            )
        tower = TextTowerConfig(
            vocab_size=_whole(args, "text_vocab_size"),
            context_length=_whole(args, "text_context_length"),
            width=_whole(args, "text_width"),
            heads=_whole(args, "text_heads"),
            layers=_whole(args, "text_layers"),
            tokenizer=args.get("text_tokenizer", "clip"),
        )
        if args["quant_proj"] not in _PROJECTIONS:
            raise CheckpointError(
                f"{path}: quant_proj={args['quant_proj']!r}: expected one of {', '.join(_PROJECTIONS)}"
            )
        values: dict[str, Any] = {
            "preprocess": "inference",
            "image_size": _whole(args, "img_size"),
            "num_query_tokens": _whole(args, "num_query"),
            "projection": _PROJECTIONS[args["quant_proj"]],
            "num_codebooks": num_codebooks,
            "codebook_size": vocab_size // num_codebooks,
            "code_dim": width // num_codebooks,
            "embed_dim": _whole(args, "embed_dim"),
            "commitment_weight": float(args.get("vq_beta", 0.25)),
            "entropy_temperature": float(args.get("e_temp", 0.01)),
            "drop_path": float(args.get("drop_path", 0.0)),
            "text_tower": tower,
            **{name: args[name] for name in _OWN_ARGS if name in args},
        }
        values |= _encoder_sizes(str(args["model"]), path)
    except KeyError as error:
        raise CheckpointError(f"{path}: its arguments lack {error}; it is no UniTok tokenizer checkpoint") from error
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its arguments do not describe a tokenizer ({error})") from error
    try:
        return UniTokConfig(**values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: its sizes do not fit: {error}") from error


def _whole(args: Mapping[str, Any], name: str) -> int:
    """The argument as a whole number; KeyError or ValueError where it is none."""
    value = args[name]
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{name}={value!r}")
    return int(value)


def _encoder_sizes(name: str, path: Path) -> dict[str, Any]:
    if name in VITAMIN_SIZES:
        return VITAMIN_SIZES[name]
    file = path.parent / VIT_CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path}: its encoder is {name!r}, which is none of {', '.join(VITAMIN_SIZES)}; put its sizes into "
            f"{VIT_CONFIG_FILE} beside it (stem, dims, depths, depth, heads, mlp_ratio, decoder_depths)"
        )
    sizes = read_json(file)
    try:
        low, high, width = sizes["dims"]
        return {
            "stem_width": sizes["stem"],
            "stage_widths": (low, high),
            "stage_depths": tuple(sizes["depths"]),
            "width": width,
            "depth": sizes["depth"],
            "num_heads": sizes["heads"],
            "mlp_ratio": sizes["mlp_ratio"],
            "decoder_stage_depths": tuple(sizes["decoder_depths"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {type(error).__name__} {error}; expected stem, dims (3), depths (2), depth, "
                              "heads, mlp_ratio, decoder_depths (2)") from error  # fmt: skip


def official_args(config: UniTokConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Arguments that describe `config`, and the content of `vit_config.json` if no released name does."""
    tower = config.text_tower_config
    usual_projection = config.projection_mlp_ratio == UniTokConfig().projection_mlp_ratio
    if config.quantizer != "multi_codebook" or config.projection_causal or not usual_projection or tower is None:
        given = {name: getattr(config, name) for name in ("quantizer", "projection_causal", "projection_mlp_ratio")}
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"{listed}, text_tower={'null' if tower is None else 'set'}: the released layout has only multi-codebook "
            "quantization, full attention, a ratio of 2 and a text tower; keep the UniTok folder instead"
        )
    plain = UniTokConfig()
    usual = all(
        getattr(config, name) == getattr(plain, name) for name in ("stage_depths", "decoder_stage_depths", "mlp_ratio")
    )
    named = [
        name for name, sizes in VITAMIN_SIZES.items()
        if usual and all(_plain(getattr(config, key)) == _plain(value) for key, value in sizes.items())
    ]  # fmt: skip
    args = {
        "model": named[0] if named else "vitamin_custom",
        "img_size": config.image_size,
        "num_query": config.num_query_tokens,
        "quant_proj": {own: official for official, own in _PROJECTIONS.items()}[config.projection],
        "num_codebooks": config.num_codebooks,
        "vocab_size": config.num_codebooks * config.codebook_size,
        "vocab_width": config.code_width,
        "vocab_norm": True,
        "embed_dim": config.embed_dim,
        "vq_beta": config.commitment_weight,
        "e_temp": config.entropy_temperature,
        "le": 0.0,
        "drop_path": config.drop_path,
        "grad_ckpt": False,
        "resize_ratio": 1.125,
        "text_width": tower.width,
        "text_heads": tower.heads,
        "text_layers": tower.layers,
        "text_vocab_size": tower.vocab_size,
        "text_context_length": tower.context_length,
        "text_tokenizer": tower.tokenizer,
        **{name: getattr(config, name) for name in _OWN_ARGS},
    }
    if named:
        return args, None
    vit_config = {
        "stem": config.stem_width,
        "dims": [*config.stage_widths, config.width],
        "depths": config.stage_depths,
        "depth": config.depth,
        "heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "decoder_depths": config.decoder_stage_depths,
    }
    return args, vit_config


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def to_official_state(model: UniTok) -> dict[str, Tensor]:
    """The model's tensors under their released names and in their released shapes (views, no copies)."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "quantizer.codebooks":
            state |= {f"quantizer.codebooks.{k}.codebook.weight": entries for k, entries in enumerate(value)}
        elif name == "quantizer.usage_average":
            state |= {f"quantizer.codebooks.{k}.vocab_usage": usage for k, usage in enumerate(value)}
        elif not name.startswith(_OWN_ONLY):
            state[_official_name(name)] = value.view(()) if name == "logit_scale" else value
    for name, module in model.named_modules():
        if isinstance(module, ProjectionAttention):
            state[f"{name}.zero_k_bias"] = torch.zeros_like(module.q_bias)
    return state


def from_official_state(model: UniTok, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released `state` under this model's names; its keys and shapes are to be checked before."""
    own: dict[str, Tensor] = {}
    count = model.config.num_codebooks
    for name, value in model.state_dict().items():
        if name == "quantizer.codebooks":
            own[name] = torch.stack([state[f"quantizer.codebooks.{k}.codebook.weight"] for k in range(count)])
        elif name == "quantizer.usage_average":
            own[name] = torch.stack([state[f"quantizer.codebooks.{k}.vocab_usage"] for k in range(count)])
        elif not name.startswith(_OWN_ONLY):
            own[name] = state[_official_name(name)].view(value.shape)
    return own


def _official_name(name: str) -> str:
    if name.startswith("encoder.backbone."):
        return name.replace("encoder.backbone.", "encoder.patch_embed.backbone.", 1)
    return "encoder.reg_token" if name == "encoder.query_tokens" else name


def _check_zero_key_biases(state: Mapping[str, Tensor], path: Path) -> None:
    """The released projections have a buffer of zeros where a key bias would be; anything else would be lost."""
    for name, value in state.items():
        if name.endswith(".zero_k_bias") and bool(value.any()):
            raise CheckpointError(f"{path}: {name} is not zero; this model's keys have no bias")


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor], int | None]:
    """Arguments, state, and how many batches the running usage has seen (only our own files tell)."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; load it with UniTok.from_pretrained")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a released tokenizer checkpoint (unitok_tokenizer.pth)")
    content = read_torch(path, allowed=(argparse.Namespace,))
    if path.suffix == ".safetensors":
        args_file = path.parent / ARGS_FILE
        if not args_file.is_file():
            raise CheckpointError(f"{path}: needs {ARGS_FILE} beside it, for its sizes")
        return read_json(args_file), content, None
    if not isinstance(content, Mapping) or "args" not in content:
        raise CheckpointError(f"{path}: expected a dictionary with 'args' and 'trainer'; it is no released checkpoint")
    args, trainer = content["args"], content.get("trainer")
    state = trainer.get("unitok") if isinstance(trainer, Mapping) else None
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, Mapping) or not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: 'args' or 'trainer.unitok' is no dictionary; it is no released checkpoint")
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise CheckpointError(f"{path}: 'trainer.unitok' holds something else than tensors by name")
    updates = content.get("usage_updates")
    return args, state, updates if isinstance(updates, int) else None
