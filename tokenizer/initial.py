"""What a run begins with: weights of another tokenizer or of a CLIP model, and what of the model is trained."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unitok.core.distributed import is_main
from unitok.core.errors import CheckpointError, ConfigError
from unitok.core.pretrained import load_model_folder
from unitok.tokenizer.configuration import UniTokConfig
from unitok.tokenizer.model import UniTok
from unitok.tokenizer.settings import TokenizerTrainConfig
from unitok.tokenizer.weights import check_layout, find_weights, read_torch

# OpenCLIP's names for the parts that a ViTamin CLIP model shares with UniTok. `visual.trunk` is timm's ViTamin.
_CLIP_NAMES = {
    "visual.trunk.patch_embed.backbone.": "encoder.backbone.",
    "visual.trunk.blocks.": "encoder.blocks.",
    "visual.trunk.norm.": "encoder.norm.",
    "visual.trunk.fc_norm.": "fc_norm.",
    "visual.head.proj.": "projection.",
    "text.": "text_encoder.",
}
_CLIP_REQUIRED = ("encoder.", "text_encoder.")  # the rest is taken where it is there
# timm's ViTamin pools before its last norm (`fc_norm`), so it may lack `norm`; it has neither positions nor queries
_CLIP_ABSENT = ("encoder.norm.weight", "encoder.norm.bias", "encoder.pos_embed", "encoder.query_tokens")
_CLIP_OPTIONAL = (
    "encoder.norm.weight", "encoder.norm.bias", "fc_norm.weight", "fc_norm.bias", "projection.weight",
    "projection.bias", "logit_scale",
)  # fmt: skip
_CLIP_DERIVED = ("text.attn_mask", "attn_mask")


# What weights mean beyond their shapes
_STRUCTURE = ("num_heads", "mlp_ratio", "projection", "projection_causal", "quantizer", "num_codebooks", "text_tower")


@dataclass(frozen=True)
class LoadReport:
    """Names in the model that were and were not loaded, and names in the file that were not used."""

    loaded: list[str]
    not_loaded: list[str]
    unused: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for title, names in (
            ("not loaded (they keep their initial values)", self.not_loaded),
            ("not used", self.unused),
        ):
            lines.append(f"{len(names)} {title}: {', '.join(_parts(names)) or '-'}")
        return "\n".join(lines)


def _parts(names: list[str]) -> list[str]:
    """The names, those below one part of the model as `part.* (count)`."""
    counts: dict[str, int] = {}
    for name in names:
        top = name.split(".")[0]
        counts[top] = counts.get(top, 0) + 1
    return [f"{top}.* ({count})" if count > 1 else next(n for n in names if n.split(".")[0] == top)
            for top, count in counts.items()]  # fmt: skip


def initial_weights(model: UniTok, config: TokenizerTrainConfig) -> None:
    """Load what `init_from` or `init_clip` name into `model`.

    Rank 0 prints what was and was not loaded, and writes all names into `initial_weights.json` of the run folder.
    """
    if config.init_from is not None:
        report = load_tokenizer(model, config.init_from)
    elif config.init_clip is not None:
        report = load_clip(model, config.init_clip)
    else:
        return
    if is_main():
        print(f"initial weights of {config.init_from or config.init_clip}:\n{report}", flush=True)
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "initial_weights.json").write_text(json.dumps(asdict(report), indent=1) + "\n")


def _structure(config: UniTokConfig, name: str) -> object:
    return asdict(config.text_tower_config) if name == "text_tower" and config.text_tower else getattr(config, name)


def load_tokenizer(model: UniTok, source: str | Path) -> LoadReport:
    """All weights of a UniTok folder or a released `.pth` of the same sizes; CheckpointError where they differ.

    How it wants images prepared (`preprocess`) comes with them. A head for distillation that only one of the two has
    is left as it is.
    """
    source = Path(source)
    other = load_model_folder(UniTok, source) if source.is_dir() else UniTok.from_official(source)
    for name in _STRUCTURE:
        ours, theirs = (_structure(one.config, name) for one in (model, other))
        if ours != theirs:
            raise CheckpointError(f"{source} was made with {name}={theirs}, the configured model has {name}={ours}")
    model.config.preprocess = other.config.preprocess
    optional = "distill_head."
    state = {k: v for k, v in other.state_dict().items() if not k.startswith(optional) or k in model.state_dict()}
    expected = {
        name: value.shape
        for name, value in model.state_dict().items()
        if name in state or not name.startswith(optional)
    }
    check_layout(expected, state, "the configured model", source)
    model.load_state_dict(state, strict=False)
    not_loaded = [name for name in model.state_dict() if name not in state]
    unused = [name for name in other.state_dict() if name not in state]
    return LoadReport(list(state), not_loaded, unused)


@torch.no_grad()
def load_clip(model: UniTok, source: str | Path) -> LoadReport:
    """Encoder, text tower and, where they fit, the embedding head of a ViTamin CLIP checkpoint (OpenCLIP's layout).

    Raises CheckpointError if the file lacks a tensor of the encoder or the text tower, or one has another shape.
    """
    file = find_weights("init_clip", source, "a ViTamin CLIP checkpoint", "hub:jienengchen/ViTamin-L-256px or another")
    found = _clip_state(read_torch(file), file)
    own = model.state_dict()
    renamed, unused = _renamed(found)
    required = {
        name: value.shape for name, value in own.items() if name.startswith(_CLIP_REQUIRED) and name not in _CLIP_ABSENT
    }
    offered = {name: renamed[name] for name in renamed if name in required}
    check_layout(required, offered, "encoder and text tower of the configured model", file)
    for name in _CLIP_OPTIONAL:
        if name in renamed and renamed[name].numel() == own[name].numel():
            offered[name] = renamed[name].view(own[name].shape)
    model.load_state_dict(offered, strict=False)
    unused += [name for name in renamed if name not in offered]
    return LoadReport(list(offered), [name for name in own if name not in offered], sorted(unused))


def _clip_state(content: object, file: Path) -> Mapping[str, Tensor]:
    """The state in an OpenCLIP checkpoint, which may stand under "state_dict" and be prefixed with "module."."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file}: expected a dictionary of tensors in OpenCLIP's layout")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _renamed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under UniTok's names, and the names that have none."""
    renamed, unused = {}, []
    for name, value in state.items():
        prefix = next((prefix for prefix in _CLIP_NAMES if name.startswith(prefix)), None)
        if name in _CLIP_DERIVED:
            continue
        if name == "logit_scale":
            renamed[name] = value
        elif prefix is None:
            unused.append(name)
        else:
            renamed[_CLIP_NAMES[prefix] + name.removeprefix(prefix)] = value
    return renamed, unused


def freeze(model: UniTok, config: TokenizerTrainConfig) -> None:
    """Turn off the gradients of what `trainable` and `text_lock` keep as it is."""
    if config.trainable == "decoder":
        model.requires_grad_(False)
        model.decoder.requires_grad_(True)
        model.codes_frozen, model.quantizer.counts_usage = True, False
        return
    lock = config.text_lock
    if lock.enabled:
        tower = model.text_encoder
        assert tower is not None
        groups: list[list[nn.Module | nn.Parameter]] = [[tower.token_embedding, tower.positional_embedding]]
        groups += [[block] for block in tower.transformer.resblocks[:-1]]
        groups += [[tower.transformer.resblocks[-1], tower.ln_final], [tower.text_projection]]
        if lock.unlocked_layers > len(groups):
            raise ConfigError(
                f"text_lock.unlocked_layers={lock.unlocked_layers}: the text tower has {len(groups)} groups"
            )
        tower.requires_grad_(False)
        for part in (part for group in groups[len(groups) - lock.unlocked_layers :] for part in group):
            part.requires_grad_(True)
        if lock.train_layer_norm:
            for module in tower.modules():
                if isinstance(module, nn.LayerNorm):
                    module.requires_grad_(True)
    if config.loss.contrastive == 0:
        # without its loss the contrastive side gets no gradient: neither memory nor weight decay for it
        for part in (model.text_encoder, model.fc_norm, model.projection):
            if part is not None:
                part.requires_grad_(False)
        model.logit_scale.requires_grad_(False)


GRAPHS = 32  # of one class of blocks, over all stages, training and evaluation


def compile_blocks(model: UniTok) -> None:
    """torch.compile for every transformer block and convolutional stage, in place: names of parameters stay."""
    blocks = [*model.encoder.blocks, *model.decoder.blocks, *model.encoder.backbone.stages]
    blocks += [*model.decoder.up_conv2, *model.decoder.up_conv3]
    if model.text_encoder is not None:
        blocks += list(model.text_encoder.transformer.resblocks)
    # One graph for each shape: blocks of a class share their code, of which dynamo keeps eight graphs, and after the
    # second shape it would make the sizes symbolic.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in blocks:
        block.compile(dynamic=False)
