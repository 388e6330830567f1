"""Layers of Llama's kind for one new position at a time, with keys and values in tensors of fixed size.

The depth transformer and, where its layers are of this kind, the backbone take their steps here; prompts are read by
the same layers. R rows, T positions of a prompt, H heads, KV heads of keys and values, S slots of the cache, D width, d
channels per head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.core.onednn import causal_in_blocks
from unitok.mllm.linears import joined, joined_after_norm, rms_norm

MOST_VIEWS = 64  # slots of a cache whose views are kept


@dataclass(frozen=True)
class LayerParts:
    """The modules of one layer: `x + o(attention(norm x))`, then `+ down(act(gate(norm x)) * up(norm x))`.

    Norms are root-mean-square norms, given as (weight, eps); `query_norm` and `key_norm` work within a head.
    """

    norm: tuple[Tensor, float]
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    mlp_norm: tuple[Tensor, float]
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    act: Callable[[Tensor], Tensor]
    head_dim: int
    scaling: float
    query_norm: tuple[Tensor, float] | None = None
    key_norm: tuple[Tensor, float] | None = None

    @property
    def num_heads(self) -> int:
        return self.query.out_features // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.key.out_features // self.head_dim


def rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What a head is multiplied with, and what its halves swapped, from Llama's cosine and sine `[.., d]`."""
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat([-first, second], dim=-1)


def rotation_of_all(cos_R1d: Tensor, sin_R1d: Tensor, layer: LayerParts) -> tuple[Tensor, Tensor]:
    """`rotation` of one place for queries, keys and values together, `[1 or R, H + 2 KV, d]`: values stay as they are,
    and so need no operations of their own."""
    rows, _, width = cos_R1d.shape
    turned = (rows, layer.num_heads + layer.num_kv_heads, width)
    still = cos_R1d.new_zeros(rows, layer.num_kv_heads, width)
    return torch.cat([cos_R1d.expand(turned), still + 1], dim=1), torch.cat([sin_R1d.expand(turned), still], dim=1)


class LayerSteps:
    """One layer with its keys and, after them, its values in `cache` `[R, 2 KV, S, d]`."""

    def __init__(self, parts: LayerParts, rows: int, slots: int, like: Tensor, zeroed: bool) -> None:
        self.parts, self.head_dim, self.scaling = parts, parts.head_dim, parts.scaling
        self.num_heads, self.num_kv_heads = parts.num_heads, parts.num_kv_heads
        make = like.new_zeros if zeroed else like.new_empty  # a mask hides numbers, but no NaN
        self.cache = make(rows, 2 * self.num_kv_heads, slots, parts.head_dim)
        self.views: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.qkv = joined_after_norm(parts.norm, [parts.query, parts.key, parts.value], rows)
        self.out = joined([parts.out], rows)
        self.gate_up = joined_after_norm(parts.mlp_norm, [parts.gate, parts.up], rows)
        self.down = joined([parts.down], rows)

    # Views made anew, not held: to the compiler a held one is a second input that shares the memory of the first. It
    # would copy the whole cache to write one slot, and refuse quantized weights beside.
    @property
    def keys(self) -> Tensor:
        return self.cache.narrow(1, 0, self.num_kv_heads)

    @property
    def values(self) -> Tensor:
        return self.cache.narrow(1, self.num_kv_heads, self.num_kv_heads)

    def __call__(
        self, x_RD: Tensor, slot: Tensor | int, end: int, turn: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        rows = x_RD.shape[0]
        qkv = self._heads(x_RD)
        if end > 1:  # else the angles are 0
            qkv = torch.addcmul(qkv * turn[0], qkv.roll(self.head_dim // 2, -1), turn[1])
        if isinstance(slot, int):
            column, keys, values = self._views(slot, end)
            column.copy_(qkv[:, self.num_heads :])
        else:
            self.cache.index_copy_(2, slot, qkv[:, self.num_heads :].unsqueeze(2))
            keys, values = self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        # Heads that share keys and values stand where several query positions would: no key is repeated.
        query = qkv[:, : self.num_heads].view(rows, self.num_kv_heads, -1, self.head_dim)
        if end == 1:  # the weight of the only key is 1
            out = qkv[:, self.num_heads + self.num_kv_heads :].unsqueeze(2).expand_as(query)
        else:
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scaling)
        return self._rest(x_RD, out.reshape(rows, -1))

    def read(
        self, x_RTD: Tensor, rows: slice, begin: int, turn: tuple[Tensor, Tensor], mask: Tensor | None, last: bool
    ) -> Tensor:
        """As `DecoderSteps.read`. `last`: of the layer's output only that of the last position is needed."""
        count, length, width = x_RTD.shape
        num_turned, end = self.num_heads + self.num_kv_heads, begin + length
        qkv = self._heads(x_RTD.reshape(-1, width)).view(count, length, -1, self.head_dim)
        turned = qkv[:, :, :num_turned]
        turned = torch.addcmul(turned * turn[0], turned.roll(self.head_dim // 2, -1), turn[1])
        keys, values = self.keys[rows, :, :end], self.values[rows, :, :end]
        keys[:, :, begin:] = turned[:, :, self.num_heads :].transpose(1, 2)
        values[:, :, begin:] = qkv[:, :, num_turned:].transpose(1, 2)
        query = turned[:, :, : self.num_heads]
        if last:
            query, x_RTD, mask = query[:, -1:], x_RTD[:, -1:], None if mask is None else mask[:, :, -1:]
        options: dict[str, Any] = {"scale": self.scaling, "enable_gqa": self.num_heads > self.num_kv_heads}
        if not last and query.device.type == "cpu":
            out = causal_in_blocks(query.transpose(1, 2), keys, values, mask=mask, **options)
        else:
            causal = mask is None and not last
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), keys, values, attn_mask=mask, is_causal=causal, **options
            )
        attended = out.transpose(1, 2).reshape(-1, self.num_heads * self.head_dim)
        return self._rest(x_RTD.reshape(-1, width), attended).view(count, -1, width)

    def _views(self, slot: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a step writes, and the keys and values that it reads. The depth transformer's few are made once."""
        if self.cache.shape[2] > MOST_VIEWS or torch.compiler.is_compiling():
            return self.cache.select(2, slot), self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        if (slot, end) not in self.views:
            self.views[slot, end] = (self.cache.select(2, slot), self.keys[:, :, :end], self.values[:, :, :end])
        return self.views[slot, end]

    def select(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.views.clear()
        self.cache = self.cache.index_select(0, rows)

    def _heads(self, x_ND: Tensor) -> Tensor:
        """Queries, keys and values `[N, H + 2 KV, d]`, not yet turned."""
        qkv = self.qkv(x_ND).view(x_ND.shape[0], -1, self.head_dim)
        if self.parts.query_norm is None:
            return qkv
        query, key, value = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return torch.cat([rms_norm(query, self.parts.query_norm), rms_norm(key, self.parts.key_norm), value], dim=1)

    def _rest(self, x_ND: Tensor, attended: Tensor) -> Tensor:
        x_ND = x_ND + self.out(attended)
        gate, up = self.gate_up(x_ND).chunk(2, dim=-1)
        return x_ND + self.down(self.parts.act(gate) * up)


class DecoderSteps:
    """All layers and the last norm: `[R, D]` -> `[R, D]`."""

    def __init__(
        self,
        layers: Sequence[LayerParts],
        norm: tuple[Tensor, float],
        rows: int,
        slots: int,
        like: Tensor,
        zeroed: bool = True,
    ) -> None:
        self.layers = [LayerSteps(parts, rows, slots, like, zeroed) for parts in layers]
        self.norm = norm

    def __call__(
        self, x_RD: Tensor, slot: Tensor | int, end: int, turn: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """One position.

        Args:
            slot: where its keys and values go, int64 `[1]` where a graph is recorded. end: how many slots it may see.
            turn: `rotation_of_all` of its place, `[1 or R, H + 2 KV, d]`. mask: additive `[1 or R, 1, 1, end]`.
        """
        for layer in self.layers:
            x_RD = layer(x_RD, slot, end, turn, mask)
        return rms_norm(x_RD, self.norm)

    def read(self, x_RTD: Tensor, rows: slice, begin: int, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Positions from slot `begin` on of these rows of the cache; the output `[R, D]` of the last one.

        Args:
            turn: `rotation` of the places, `[R, T, 1, d]`. mask: what a position sees, `[R, 1, T, slots so far]`; None
                for all before it, which needs `begin` 0 or a CPU.
        """
        for layer in self.layers:
            x_RTD = layer.read(x_RTD, rows, begin, turn, mask, last=layer is self.layers[-1])
        return rms_norm(x_RTD[:, -1], self.norm)
