"""The backbone for one new position at a time.

Two ways with the same results up to rounding: `LlamaSteps` for layers that are Llama's in all that matters, and
`GenericSteps`, which calls the backbone with a cache of transformers and serves every other family.

R rows, T prompt length, S slots (prompt and image positions), D width, d channels per head.
"""

import logging
import math
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from unitok.core.errors import ConfigError
from unitok.mllm.decoder_steps import DecoderSteps, LayerParts, rotation, rotation_of_all

_LOGGER = logging.getLogger(__name__)
LIKE_LLAMA = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
POSITIONS_AT_ONCE = 256  # of prompts read together on a CPU
# Kinds of rotary embedding whose angle at a position does not depend on how long the sequence has become.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
_CHECKED: WeakSet[PreTrainedModel] = WeakSet()  # backbones that `check_steps` has found good
_LENGTH, _PADDING, _STEPS = 8, 2, 2  # of its sequences; what it reads step by step


def why_generic(backbone: PreTrainedModel, slots: int) -> str | None:
    """What keeps `LlamaSteps` from serving this backbone; None when it does."""
    if type(backbone) not in LIKE_LLAMA:
        return f"{type(backbone).__name__} is not one of {', '.join(kind.__name__ for kind in LIKE_LLAMA)}"
    window = getattr(backbone.config, "sliding_window", None)
    if window is not None and window < slots:
        return f"its attention window of {window} is shorter than the sequence of {slots}"
    if backbone.rotary_emb.rope_type not in _FIXED_ROPE:
        return f"its rotary embedding is of type {backbone.rotary_emb.rope_type!r}"
    if any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules()):
        return "some of its modules have hooks"
    if any(hasattr(module, "_hf_hook") for module in backbone.modules()):
        return "some of its modules are moved between devices as they are used"
    return None


def backbone_steps(backbone: PreTrainedModel, rows: int, slots: int, like: Tensor) -> "LlamaSteps | GenericSteps":
    """The faster way that gives this backbone's results."""
    reason = why_generic(backbone, slots)
    if reason is None:
        return LlamaSteps(backbone, rows, slots, like)
    check_steps(backbone)
    _LOGGER.info("image positions go through the backbone's own forward pass: %s", reason)
    return GenericSteps(backbone, slots)


def count_positions(mask_RS: Tensor) -> Tensor:
    """Position ids of left-padded rows: padding does not count."""
    return (mask_RS.cumsum(dim=1) - 1).clamp(min=0)


class GenericSteps:
    """Every decoder of transformers; keys and values in tensors of fixed size, if its family can have them so."""

    graphable = False

    def __init__(self, backbone: PreTrainedModel, slots: int, fixed: bool = True) -> None:
        self.backbone, self.slots = backbone, slots
        # layers that are no attention take the mask for one of the positions given, which is then shorter
        attention = all("attention" in kind for kind in getattr(backbone.config, "layer_types", None) or ())
        self.fixed = fixed and attention and backbone._can_compile_fullgraph

    def start(self, inputs_RTD: Tensor, mask_RT: Tensor) -> Tensor:
        """Read the prompts; the last hidden state `[R, D]`."""
        config = self.backbone.config
        self.cache = StaticCache(config, max_cache_len=self.slots) if self.fixed else DynamicCache(config=config)
        self.mask_RS = torch.cat([mask_RT, mask_RT.new_ones(mask_RT.shape[0], self.slots - mask_RT.shape[1])], dim=1)
        self.positions_RS = count_positions(self.mask_RS)
        return self._run(inputs_RTD, self.positions_RS[:, : mask_RT.shape[1]])

    def __call__(self, x_RD: Tensor, slot: Tensor, end: int) -> Tensor:
        return self._run(x_RD.unsqueeze(1), self.positions_RS.index_select(1, slot))

    def _run(self, inputs_RTD: Tensor, positions_RT: Tensor) -> Tensor:
        end = self.slots if self.fixed else self.cache.get_seq_length() + inputs_RTD.shape[1]
        outputs = self.backbone(
            inputs_embeds=inputs_RTD,
            attention_mask=self.mask_RS[:, :end],
            position_ids=positions_RT,
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state[:, -1]


def check_steps(backbone: PreTrainedModel) -> None:
    """ConfigError unless left-padded steps with a cache give the hidden states of plain full passes, in which no
    position sees what stands behind it.

    Once for each backbone, with a handful of positions; not for families that are known, nor where weights are in parts
    on other ranks or not in memory.
    """
    if isinstance(backbone, LIKE_LLAMA) or backbone in _CHECKED:
        return
    parameters = list(backbone.parameters())
    if any(hasattr(one, "ds_id") or one.is_meta for one in parameters):
        return
    refusal = f"a backbone of model_type={backbone.config.model_type} cannot be sampled from"
    advice = "give another decoder-only model, such as llama"
    training = backbone.training
    backbone.eval()  # no dropout
    try:
        differences = _differences(backbone)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{refusal}: its forward pass fails ({type(error).__name__}: {reason}); {advice}") from error
    finally:
        backbone.train(training)
    if any(map(math.isnan, differences.values())):
        return  # broken weights, which the sampler names
    # elsewhere products may be rounded to fewer bits, and then now and then another expert is chosen
    exact = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in parameters)
    exact = exact and not any(hasattr(one, "__tensor_flatten__") for one in parameters)  # of fewer bits
    for what, difference in differences.items():
        if not difference < (1e-3 if exact else 0.1):
            raise ConfigError(f"{refusal}: {what} (hidden states differ by {difference:.2g} of their size); {advice}")
    _CHECKED.add(backbone)


@torch.no_grad()
def _differences(backbone: PreTrainedModel) -> dict[str, float]:
    """How far hidden states are from those that they should be, by what would then be wrong."""
    embedding, prompt = backbone.get_input_embeddings(), _LENGTH - _STEPS
    size = embedding.num_embeddings
    ids_RT = torch.randint(size, (2, _LENGTH), generator=torch.Generator().manual_seed(0))
    other_1T = ids_RT[:1].clone()
    other_1T[:, prompt:] = (other_1T[:, prompt:] + 1) % size
    with torch.autocast(embedding.weight.device.type, enabled=False):
        inputs_RTD = embedding(torch.cat([ids_RT, other_1T]).to(embedding.weight.device))
        full_RTD = backbone(inputs_embeds=inputs_RTD.clone(), use_cache=False).last_hidden_state
        width = backbone.config.hidden_size
        if {inputs_RTD.shape[-1], full_RTD.shape[-1]} != {width}:
            raise ValueError(f"hidden_size={width}, but it reads {inputs_RTD.shape[-1]} and gives {full_RTD.shape[-1]}")
        wrong = {"positions see those behind them": _difference(full_RTD[2:, :prompt], full_RTD[:1, :prompt])}
        # the second row stands in the same slots, its first positions at the place of padding
        inputs_RTD = torch.stack([inputs_RTD[0], inputs_RTD[1].roll(_PADDING, dims=0)])
        wanted_RTD = torch.stack([full_RTD[0, prompt - 1 :], full_RTD[1, prompt - 1 - _PADDING : -_PADDING]])
        mask_RT = torch.ones(2, prompt, dtype=torch.long, device=inputs_RTD.device)
        mask_RT[1, :_PADDING] = 0
        ways = [GenericSteps(backbone, _LENGTH, fixed) for fixed in (True, False)]  # of images, and of text
        for steps in ways if ways[0].fixed else ways[1:]:
            given_RTD = inputs_RTD.clone()  # some families scale them in place
            found = [steps.start(given_RTD[:, :prompt], mask_RT)]
            for slot in range(prompt, _LENGTH):
                found.append(steps(given_RTD[:, slot], torch.tensor([slot], device=mask_RT.device), slot + 1))
            far = _difference(torch.stack(found, dim=1), wanted_RTD)
            wrong[f"steps with {type(steps.cache).__name__} do not give what a full pass gives"] = far
    return wrong


def _difference(found_RTD: Tensor, wanted_RTD: Tensor) -> float:
    """In parts of their size, of a usual position of the worst row."""
    lengths_RT = (found_RTD - wanted_RTD).float().norm(dim=-1) / wanted_RTD.float().norm(dim=-1).clamp(min=1e-12)
    return float(lengths_RT.median(dim=-1).values.max())


class LlamaSteps:
    """Llama, Mistral, Qwen2 and Qwen3."""

    graphable = True

    def __init__(self, backbone: PreTrainedModel, rows: int, slots: int, like: Tensor, zeroed: bool = True) -> None:
        """`zeroed`: for steps that see all slots, of which a mask hides those that are not filled yet."""
        self.backbone, self.slots = backbone, slots
        parts = [_parts(layer) for layer in backbone.layers[: backbone.config.num_hidden_layers]]
        self.layers = DecoderSteps(parts, _norm(backbone.norm), rows, slots, like, zeroed)
        self.padding_R11S = like.new_zeros(rows, 1, 1, slots)
        self.parts = parts[0]
        self.cos_RSd = like.new_zeros(rows, slots, self.parts.head_dim)
        self.sin_RSd = torch.zeros_like(self.cos_RSd)
        self.places_S = torch.arange(slots, device=like.device)
        self.padded = False

    def start(self, inputs_RTD: Tensor, mask_RT: Tensor) -> Tensor:
        """Read the prompts; the last hidden state `[R, D]`. Where the mask is longer than the inputs, they follow on
        what was read before. They may be of the first row alone (see `spread`)."""
        length, mask_RS = mask_RT.shape[1], self._lay_out(mask_RT)
        begin = length - inputs_RTD.shape[1]
        found, at_once = [], len(mask_RT)
        on_cpu = inputs_RTD.device.type == "cpu"
        if on_cpu:  # whatever the batch, what lies between products stays in the cache
            at_once = max(1, POSITIONS_AT_ONCE // inputs_RTD.shape[1])
        for start in range(0, len(mask_RT), at_once):
            rows = slice(start, min(start + at_once, len(mask_RT)))
            turn = tuple(angle[rows, begin:length].unsqueeze(2) for angle in (self.cos_RSd, self.sin_RSd))
            mask = self._seen(mask_RS[rows, :length], begin) if self.padded or (begin and not on_cpu) else None
            found.append(self.layers.read(inputs_RTD[rows], rows, begin, turn, mask))
        return torch.cat(found)

    def _lay_out(self, mask_RT: Tensor) -> Tensor:
        """Angles and masks of all slots, those of the mask `[R, S]` returned, from the mask of the first."""
        mask_RS = torch.cat([mask_RT, mask_RT.new_ones(len(mask_RT), self.slots - mask_RT.shape[1])], dim=1) != 0
        cos_RSd, sin_RSd = rotation(*self.backbone.rotary_emb(self.cos_RSd, count_positions(mask_RS)))
        self.cos_RSd.copy_(cos_RSd)
        self.sin_RSd.copy_(sin_RSd)
        self.padded = not bool(mask_RS.all())
        self.padding_R11S.zero_().masked_fill_(~mask_RS[:, None, None], -torch.inf)
        return mask_RS

    def _seen(self, mask_RT: Tensor, begin: int) -> Tensor:
        """Which slots the positions from `begin` on see, `[R, 1, T, slots so far]`: themselves, also where they are
        padding, for nothing at all would give NaN."""
        own_T1, all_T = self.places_S[begin : mask_RT.shape[1], None], self.places_S[: mask_RT.shape[1]]
        return (((all_T < own_T1) & mask_RT[:, None]) | (all_T == own_T1)).unsqueeze(1)

    def spread(self, length: int) -> None:
        """Give all rows the first `length` slots of the first one."""
        for layer in self.layers.layers:
            layer.cache[1:, :, :length] = layer.cache[:1, :, :length]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, each of which may be named several times."""
        for layer in self.layers.layers:
            layer.select(rows)
        self.cos_RSd, self.sin_RSd, self.padding_R11S = (
            held.index_select(0, rows) for held in (self.cos_RSd, self.sin_RSd, self.padding_R11S)
        )

    def __call__(self, x_RD: Tensor, slot: Tensor | int, end: int) -> Tensor:
        """The hidden state `[R, D]` of the position in `slot` (`[1]` where a graph is recorded). `end`: the slots up to
        it; or all, and then those that are not filled yet are masked, so that shapes do not change."""
        if isinstance(slot, int):
            angles = (self.cos_RSd[:, slot : slot + 1], self.sin_RSd[:, slot : slot + 1])
        else:
            angles = (self.cos_RSd.index_select(1, slot), self.sin_RSd.index_select(1, slot))
        if end == self.slots:
            mask = self.padding_R11S.masked_fill(self.places_S > slot, -torch.inf)
        else:
            mask = self.padding_R11S[..., :end] if self.padded else None
        return self.layers(x_RD, slot, end, rotation_of_all(*angles, self.parts), mask)


def _parts(layer: torch.nn.Module) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerParts(
        norm=_norm(layer.input_layernorm),
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        out=attention.o_proj,
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        act=mlp.act_fn,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
    )


def _norm(module: torch.nn.Module) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon
