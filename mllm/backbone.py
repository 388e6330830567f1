"""Pretrained backbones: any decoder-only transformers model whose text logits are a plain head on its hidden states.

One code path for all families: the class that transformers has for the folder's config.json tells the names in its
files, and its tensors are copied into our backbone and text head, shard by shard, also into partitioned ones.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from unitok.core.engine import EngineConfig, partitioned, whole_parameters
from unitok.core.errors import ConfigError
from unitok.core.pretrained import check_model_folder, read_json
from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.mllm.model import UniTokMLLM
from unitok.mllm.official import MODEL_TYPE, load_official_weights, official_config
from unitok.mllm.processor import load_text_tokenizer, special_ids
from unitok.mllm.shards import RECOMPUTED, Place, load_sharded

# What some families do to the head's output; a value that is none of the neutral ones would change every text logit
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
_NEUTRAL = (None, 1)
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "tokenizer.model")


def backbone_folder(path: str) -> Path:
    """The local folder that `backbone.path` names, or the files of a model of that name on the Hugging Face hub."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"backbone.path={path}: neither a local folder nor a model on the hub ({reason}); give a folder with "
            "config.json, weights and tokenizer"
        ) from error


def check_backbone(config: Any, what: str) -> None:
    """ConfigError for a backbone whose text logits we would compute in another way than its own class does, or which
    we could not sample from."""
    if not hasattr(config, "hidden_size") or not hasattr(config, "vocab_size"):
        raise ConfigError(f"{what}: a {config.model_type} is no decoder-only text model; give the text model alone")
    # in place of keys and values these carry a state, which can neither be padded nor taken back
    if type(config) in MODEL_MAPPING and MODEL_MAPPING[type(config)]._is_stateful:
        raise ConfigError(
            f"{what}: a {config.model_type} carries a state along the sequence, but sampling needs a cache of keys and "
            "values of every layer; give a backbone of attention layers alone, such as llama"
        )
    for name in _LOGIT_CHANGES:
        value = getattr(config, name, None)
        if value not in _NEUTRAL:
            raise ConfigError(
                f"{what}: {name}={value} of this {config.model_type} changes text logits, which is not supported; give "
                "another backbone"
            )


def pretrained_model(
    config: UniTokMLLMConfig, folder: Path, text_tokenizer: PreTrainedTokenizerBase, engine: EngineConfig
) -> UniTokMLLM:
    """A model with the backbone of `folder` and everything else new; partitioned under ZeRO 3.

    `text_tokenizer` is the folder's with the image marks added: their rows begin as the mean of the old ones, which
    stay as they are. A head that shares the embedding's weights gets a copy of its own.
    """
    source = AutoConfig.from_pretrained(folder)
    model = empty_model(config, engine)
    for part in (model.embedder, model.depth):
        for module in part.modules():
            with whole_parameters(module.parameters(recurse=False), write=True), torch.no_grad():
                model._init_weights(module)
    places, ignored = backbone_places(source)
    load_sharded(model, folder, places, ignored=ignored)
    known = min(len(load_text_tokenizer(folder)), source.vocab_size)  # tokens may have been added without rows
    added = {index for index in special_ids(text_tokenizer).values() if index >= known}
    _fill_rows(model, known, sorted(added | set(range(source.vocab_size, config.text_config.vocab_size))))
    return model


def load_model(folder: str | Path, engine: EngineConfig | None = None) -> UniTokMLLM:
    """The fp32 model of an export folder or of a released one, its weights read shard by shard.

    With ZeRO 3 it is built in parts, one on each rank, and every rank calls. CheckpointError as in `load_sharded`.
    """
    folder, engine = Path(folder), engine or EngineConfig()
    config_file = folder / "config.json"
    if config_file.is_file() and read_json(config_file).get("model_type") == MODEL_TYPE:
        model = empty_model(official_config(folder), engine)
        load_official_weights(model, folder)
        return model
    check_model_folder(folder, UniTokMLLMConfig.model_type)
    model = empty_model(UniTokMLLMConfig.from_pretrained(folder), engine)
    load_sharded(model, folder)
    return model


def empty_model(config: UniTokMLLMConfig, engine: EngineConfig) -> UniTokMLLM:
    """A model whose weights hold nothing yet, all of them to be filled; partitioned under ZeRO 3."""
    with partitioned(engine), no_init_weights():
        model = UniTokMLLM(config)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()  # with bf16 weights ZeRO makes buffers bf16 as well
    return model


def backbone_places(source: Any) -> tuple[dict[str, list[Place]], tuple[str, ...]]:
    """Where the tensors in a folder of the configuration `source` go, and endings of keys to be left out.

    ConfigError for a family whose head is more than a matrix.
    """
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(source)
    embedding, head = (_name_of(whole, part) for part in (whole.get_input_embeddings(), whole.get_output_embeddings()))
    prefix, rows = whole.base_model_prefix + ".", slice(0, source.vocab_size)
    places: dict[str, list[Place]] = {}
    for key in whole.state_dict():
        if key == f"{head}.weight":
            places[key] = [Place("lm_head.weight", rows)]
        elif key.startswith(prefix):
            name = "backbone." + key.removeprefix(prefix)
            places[key] = [Place(name, rows if key == f"{embedding}.weight" else None)]
        else:
            raise ConfigError(
                f"a {source.model_type} has {key}, for which this model has no place; give another backbone"
            )
    if not getattr(source, "tie_word_embeddings", False):
        return places, RECOMPUTED
    places[f"{embedding}.weight"] += places.pop(f"{head}.weight")
    return places, (*RECOMPUTED, f"{head}.weight")


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


@torch.no_grad()
def _fill_rows(model: UniTokMLLM, known: int, rows: list[int]) -> None:
    """Rows of the vocabulary that were not there before: the mean of those of the `known` tokens."""
    weights = [model.get_input_embeddings().weight, model.lm_head.weight]
    with whole_parameters(weights, write=True):
        for weight in weights:
            if rows:
                weight.data[rows] = weight.data[:known].mean(dim=0)
