"""The code embedder for one new position at a time.

B images, K codebooks, L positions, C channels of a code vector, D width, H heads, d channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.core.onednn import can_pack
from unitok.mllm.embedder import CodeEmbedder
from unitok.mllm.linears import joined, joined_in_a_row, linear_map
from unitok.tokenizer.quantizer import lookup, residual_lookup


class EmbedderSteps:
    """Codes `[B, K]` of one position -> its input vector `[B, D]`, as `CodeEmbedder` gives it with a cache.

    `alone`: the position sees itself only, as in the released sampler; else those before it too. On the CPU in float32
    what follows from weights alone is made once; elsewhere at every step, for a recorded one must see weights change.
    """

    def __init__(self, embedder: CodeEmbedder, images: int, length: int, alone: bool, like: Tensor) -> None:
        projection, attention = embedder.projection, embedder.projection.attn
        self.norms, self.mlp_norm = (projection.norm1, projection.norm3, projection.norm2), projection.mlp.norm
        self.mlp, self.act, self.positions = embedder.mlp, projection.mlp.act, embedder.positions
        self.lookup = residual_lookup if embedder.residual else lookup
        self.embedder, self.attention = embedder, attention
        once = can_pack(attention.qkv.weight)
        self.entries = embedder.entries() if once else None
        self.alone, self.num_heads, self.length = alone, attention.num_heads, length
        self.direct = joined([projection.proj], images)
        self.gate, self.up = joined([projection.mlp.w0], images), joined([projection.mlp.w1], images)
        self.down = joined([projection.mlp.w2], images)
        self.widen, self.last = joined([embedder.mlp[1]], images), joined([embedder.mlp[3]], images)
        weight = attention.qkv.weight
        if alone:  # the weight of the only key is 1: its value is the result
            value = weight.detach().chunk(3)[2]
            self.attend = joined_in_a_row(value, attention.v_bias, attention.proj, images, "attend")
        else:
            self.qkv = linear_map(weight, attention.qkv_bias(), images, weight) if once else self._qkv
            self.out = joined([attention.proj], images)
            self.keys = like.new_zeros(images, self.num_heads, length, attention.inner_dim // self.num_heads)
            self.values = torch.zeros_like(self.keys)
        self.places_L = torch.arange(length, device=like.device)

    def __call__(self, codes_BK: Tensor, place: Tensor, end: int) -> Tensor:
        """`place` int64 `[1]`: the position of these codes. `end`: the positions up to it, or all, as in the backbone's
        steps."""
        entries = self.embedder.entries() if self.entries is None else self.entries
        vectors_BC = self.lookup(codes_BK.unsqueeze(-1), entries)[:, 0].to(self.norms[0].weight.dtype)
        norm1, norm3, norm2 = self.norms
        seen_BC = norm1(vectors_BC)
        attended_BC = self.attend(seen_BC) if self.alone else self._see_others(seen_BC, place, end)
        x_BC = self.direct(norm3(vectors_BC)) + attended_BC
        hidden = self.mlp_norm(norm2(x_BC))
        x_BC = x_BC + self.down(self.act(self.gate(hidden)) * self.up(hidden))
        vectors_BD = self.last(self.mlp[2](self.widen(self.mlp[0](x_BC))))
        return vectors_BD if self.positions is None else vectors_BD + self.positions.index_select(0, place)

    def _qkv(self, x_BC: Tensor) -> Tensor:
        return F.linear(x_BC, self.attention.qkv.weight, self.attention.qkv_bias())

    def _see_others(self, x_BC: Tensor, place: Tensor, end: int) -> Tensor:
        query, key, value = self.qkv(x_BC).view(x_BC.shape[0], 3, self.num_heads, 1, -1).unbind(1)
        self.keys.index_copy_(2, place, key)
        self.values.index_copy_(2, place, value)
        mask = None
        if end == self.length:
            mask = query.new_zeros(1, self.length).masked_fill(self.places_L > place, -torch.inf)
        keys, values = self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self.out(out.flatten(1))
