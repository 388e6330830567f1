"""Pretrained backbones: any decoder-only transformers model whose text logits are a plain head on its hidden states.

One code path for all families: the class that transformers has for the folder's config.json tells the names in its
files, and its tensors are copied into our backbone and text head, shard by shard, also into partitioned ones.
"""

import math
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
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
    load_sharded(model, folder, {key: [place] for key, place in stored_places(model).items()})
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
    keys: dict[str, str] = {}
    for key, (name, part) in stored_places(whole).items():
        keys[name] = key
        if name == f"{head}.weight":
            places[key] = [Place("lm_head.weight", rows)]
        elif name.startswith(prefix):
            part = rows if name == f"{embedding}.weight" else part
            places[key] = [Place("backbone." + name.removeprefix(prefix), part)]
        else:
            raise ConfigError(
                f"a {source.model_type} has {name}, for which this model has no place; give another backbone"
            )
    if not getattr(source, "tie_word_embeddings", False):
        return places, RECOMPUTED
    places[keys[f"{embedding}.weight"]] += places.pop(keys[f"{head}.weight"])
    return places, (*RECOMPUTED, keys[f"{head}.weight"])


def stored_places(model: PreTrainedModel) -> dict[str, Place]:
    """Where each tensor goes that transformers writes of `model`: some families are stored under other names and in
    other pieces than those of their modules (experts one by one).

    Found by numbers, one for each row of each tensor, which transformers takes apart as if they were the weights.
    ConfigError where a piece is not rows that follow on one another.
    """
    shapes, starts, numbers = {}, [], {}
    count = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        shapes[name] = shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        rows = (*shape[:-1], 1) if len(shape) > 1 else shape
        starts.append(count)
        count += math.prod(rows)
        numbers[name] = torch.arange(starts[-1], count).view(rows)
    names, places = list(shapes), {}
    for key, found in revert_weight_conversion(model, numbers).items():
        if found.numel() == 0:
            places[key] = Place(key)
            continue
        first = int(found.flatten()[0])
        index = bisect_right(starts, first) - 1
        place = _place(names[index], shapes[names[index]], first - starts[index], found.shape)
        given = numbers[place.name]
        if not torch.equal(place.of(given), found):
            raise ConfigError(
                f"a {model.config.model_type} is stored in pieces that cannot be read one by one ({key} of "
                f"{place.name}); give another backbone"
            )
        places[key] = place
    return places


def _place(name: str, shape: tuple[int, ...], first: int, piece: tuple[int, ...]) -> Place:
    """The place of a piece of rows in a tensor of this shape, the `first` of which is known."""
    if len(piece) == len(shape):
        return Place(name, None if piece[:-1] == shape[:-1] else slice(first, first + piece[0]))
    outer, inner = divmod(first, shape[1])
    return Place(name, outer if piece[0] == shape[1] else (outer, slice(inner, inner + piece[0])))


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
