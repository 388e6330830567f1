"""Making a unified model: backbone (new or pretrained), text tokenizer, and the visual tokenizer's codebooks."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, model_validator
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unitok.core.config import Config
from unitok.core.engine import EngineConfig
from unitok.core.errors import ConfigError, UserError
from unitok.core.signature import config_from_signature
from unitok.data.classes import class_token
from unitok.data.conversations import MARKS
from unitok.data.sentencepieces import run_sentencepiece
from unitok.mllm.backbone import backbone_folder, check_backbone, pretrained_model
from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.mllm.model import UniTokMLLM
from unitok.mllm.processor import UniTokTextTokenizer, load_text_tokenizer, special_ids
from unitok.tokenizer import UniTok

# What the visual tokenizer, the backbone and the text tokenizer determine is not set by hand.
DERIVED = (
    "text_config",
    "quantizer",
    "num_codebooks",
    "codebook_size",
    "code_dim",
    "num_image_positions",
    "code_usage",
)
DERIVED_IDS = ("begin_image_id", "end_image_id", "image_token_id")
UniTokMLLMSettings = config_from_signature(UniTokMLLMConfig, "UniTokMLLMSettings", skip=(*DERIVED, *DERIVED_IDS))


class BackboneConfig(Config):
    """Either `path`, a decoder-only transformers model with its tokenizer, or `config`, the sizes of a new one.

    A new backbone gets a sentencepiece tokenizer trained on the data, of at most `text_vocab_size` pieces, and beside
    them as many `class_tokens` (`unitok.data.classes`).
    """

    path: str | None = None
    config: dict[str, Any] = {}
    text_vocab_size: int = Field(512, ge=8)
    class_tokens: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _class_tokens_are_new(self) -> "BackboneConfig":
        if self.path is not None and self.class_tokens:
            raise ValueError(f"class_tokens={self.class_tokens}: only for a new backbone, and path is given")
        return self


def build_text_tokenizer(
    settings: BackboneConfig,
    texts: Callable[[], Iterable[str]],
    symbols: list[str],
    folder: Path,
    resumed: Path | None = None,
) -> PreTrainedTokenizerBase:
    """The backbone's own tokenizer with the image marks added, or a sentencepiece model trained on `texts()` (kept in
    `folder`; that of the run in `resumed` when one is resumed)."""
    if settings.path is not None:
        with _blamed_on(f"backbone.path={settings.path}: no usable text tokenizer"):
            tokenizer = load_text_tokenizer(backbone_folder(settings.path))
        tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    pieces = [*MARKS, *symbols, *map(class_token, range(settings.class_tokens))]
    size = settings.text_vocab_size + settings.class_tokens
    path = run_sentencepiece(folder, "tokenizer.model", resumed, texts, size, pieces)
    return UniTokTextTokenizer(vocab_file=str(path))


def build_model(
    settings: UniTokMLLMSettings,
    backbone: BackboneConfig,
    text_tokenizer: PreTrainedTokenizerBase,
    visual: UniTok,
    engine: EngineConfig | None = None,
) -> UniTokMLLM:
    """A model whose code sizes are the visual tokenizer's and whose special ids are the text tokenizer's.

    engine: with ZeRO 3 a pretrained backbone is built in parts, one on each rank (then every rank calls).
    """
    sizes = visual.config
    config = UniTokMLLMConfig(
        text_config=_text_config(backbone, text_tokenizer),
        quantizer=sizes.quantizer,
        num_codebooks=sizes.num_codebooks,
        codebook_size=sizes.codebook_size,
        code_dim=sizes.code_dim,
        num_image_positions=sizes.num_positions,
        **special_ids(text_tokenizer),
        **settings.model_dump(),
    )
    with _blamed_on(f"backbone.{f'path={backbone.path}' if backbone.path else 'config'}: no usable backbone"):
        if backbone.path is None:
            model = UniTokMLLM(config)
        else:
            model = pretrained_model(config, backbone_folder(backbone.path), text_tokenizer, engine or EngineConfig())
    model.attach_tokenizer(visual)
    return model


@contextmanager
def _blamed_on(what: str) -> Iterator[None]:
    """What transformers finds wrong with a folder or with sizes, as one line about the setting `what`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{what} ({type(error).__name__}: {reason})") from error


def _text_config(backbone: BackboneConfig, text_tokenizer: PreTrainedTokenizerBase) -> Any:
    if backbone.path is not None:
        if backbone.config:
            raise ConfigError(
                f"backbone.path={backbone.path} and backbone.config are both set: the sizes of a pretrained backbone "
                f"are its own; remove backbone.config"
            )
        with _blamed_on(f"backbone.path={backbone.path}: no usable config.json"):
            config = AutoConfig.from_pretrained(backbone_folder(backbone.path))
        check_backbone(config, f"backbone.path={backbone.path}")
        config.vocab_size = max(config.vocab_size, len(text_tokenizer))
        config.dtype = torch.float32  # whatever the stored type: training keeps fp32 weights
        return config
    derived = {
        "vocab_size": len(text_tokenizer),
        "bos_token_id": text_tokenizer.bos_token_id,
        "eos_token_id": text_tokenizer.eos_token_id,
        "pad_token_id": text_tokenizer.pad_token_id,
    }
    clash = sorted(derived.keys() & backbone.config.keys())
    if clash:
        raise ConfigError(
            f"backbone.config.{clash[0]}: comes from the text tokenizer; remove it from the configuration"
        )
    return new_text_config(backbone.config, "backbone.config", **derived)


def new_text_config(sizes: Mapping[str, Any], where: str, **derived: Any) -> Any:
    """The configuration of a new backbone; ConfigError for an unknown key or sizes that do not fit.

    `where`: the setting that the sizes come from. `derived`: what is not set there.
    """
    given = {"model_type": "llama"} | dict(sizes)
    model_type = given.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown {where}.model_type={model_type!r}; the nearest known one is {near!r}")
    known = AutoConfig.for_model(model_type)
    if hasattr(known, "max_position_embeddings"):  # not in families whose attention needs no positions
        given = {"max_position_embeddings": 4096} | given
    for name in given:
        if not hasattr(known, name):
            near = difflib.get_close_matches(name, known.to_dict(), n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown key '{where}.{name}' for {model_type}; the nearest known key is '{where}.{near}'"
            )
    with _blamed_on(f"{where}: sizes that do not fit"):
        config = AutoConfig.for_model(model_type, **given, **derived)
    check_backbone(config, where)
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if shared and heads % shared:
        raise ConfigError(
            f"{where}.num_attention_heads={heads} does not divide into num_key_value_heads={shared} groups"
        )
    return config
