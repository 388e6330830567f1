"""Layers of Llama's kind for one new position at a time, with keys and values in tensors of fixed size.

The depth transformer and, where its layers are of this kind, the backbone take their steps here. R rows, H heads, KV
heads of keys and values, S slots of the cache, D width, d channels per head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.mllm.linears import joined, joined_after_norm, rms_norm


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

    def __init__(self, parts: LayerParts, rows: int, slots: int, like: Tensor) -> None:
        self.parts, self.head_dim, self.scaling = parts, parts.head_dim, parts.scaling
        self.num_heads, self.num_kv_heads = parts.num_heads, parts.num_kv_heads
        self.cache = like.new_zeros(rows, 2 * self.num_kv_heads, slots, parts.head_dim)
        self.keys, self.values = self.cache.chunk(2, dim=1)
        self.qkv = joined_after_norm(parts.norm, [parts.query, parts.key, parts.value], rows)
        self.out = joined([parts.out], rows)
        self.gate_up = joined_after_norm(parts.mlp_norm, [parts.gate, parts.up], rows)
        self.down = joined([parts.down], rows)

    def __call__(
        self, x_RD: Tensor, slot: Tensor, end: int, turn: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        rows = x_RD.shape[0]
        qkv = self.qkv(x_RD).view(rows, -1, self.head_dim)
        if self.parts.query_norm is not None:
            qkv = self._norm_heads(qkv)
        qkv = torch.addcmul(qkv * turn[0], qkv.roll(self.head_dim // 2, -1), turn[1])
        self.cache.index_copy_(2, slot, qkv[:, self.num_heads :].unsqueeze(2))
        # Heads that share keys and values stand where several query positions would: no key is repeated.
        query = qkv[:, : self.num_heads].view(rows, self.num_kv_heads, -1, self.head_dim)
        keys, values = self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scaling)
        x_RD = x_RD + self.out(out.reshape(rows, -1))
        gate, up = self.gate_up(x_RD).chunk(2, dim=-1)
        return x_RD + self.down(self.parts.act(gate) * up)

    def _norm_heads(self, qkv: Tensor) -> Tensor:
        query, key, value = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return torch.cat([rms_norm(query, self.parts.query_norm), rms_norm(key, self.parts.key_norm), value], dim=1)


class DecoderSteps:
    """All layers and the last norm: `[R, D]` -> `[R, D]`."""

    def __init__(
        self, layers: Sequence[LayerParts], norm: tuple[Tensor, float], rows: int, slots: int, like: Tensor
    ) -> None:
        self.layers = [LayerSteps(parts, rows, slots, like) for parts in layers]
        self.norm = norm

    def __call__(
        self, x_RD: Tensor, slot: Tensor, end: int, turn: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """One position.

        Args:
            slot: int64 `[1]`, where its keys and values go. end: how many slots it may see, from the first.
            turn: `rotation_of_all` of its place, `[1 or R, H + 2 KV, d]`. mask: additive `[1 or R, 1, 1, end]`.
        """
        for layer in self.layers:
            x_RD = layer(x_RD, slot, end, turn, mask)
        return rms_norm(x_RD, self.norm)
