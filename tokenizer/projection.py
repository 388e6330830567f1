"""Projections into and out of the code space (paper, section 3.3 "attention factorization").

B batch, L tokens, C channels, H heads, D channels per head.
"""

import torch
import torch.nn.functional as F
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from unitok.tokenizer.configuration import UniTokConfig


class ProjectionAttention(nn.Module):
    """Self-attention that changes the width; keys carry no trainable bias.

    Going down (`in_dim > out_dim`) heads work on the input width and are *averaged*, so each head must be `out_dim`
    wide. Going up, queries, keys and values already have the output width and the heads are concatenated.
    """

    def __init__(self, in_dim: int, out_dim: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.inner_dim = max(in_dim, out_dim)
        self.num_heads, self.causal, self.average_heads = num_heads, causal, in_dim > out_dim
        self.qkv = nn.Linear(in_dim, 3 * self.inner_dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(self.inner_dim))
        self.v_bias = nn.Parameter(torch.zeros(self.inner_dim))
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        batch, length, _ = x_BLC.shape
        qkv = F.linear(x_BLC, self.qkv.weight, self.qkv_bias()).view(
            batch, length, 3, self.num_heads, self.inner_dim // self.num_heads
        )
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=self.causal)
        if self.average_heads:
            return self.proj(out_BHLD.mean(dim=1))
        return self.proj(out_BHLD.transpose(1, 2).reshape(batch, length, self.inner_dim))

    def qkv_bias(self) -> Tensor:
        """Of queries, keys (none) and values, `[3 * inner_dim]`."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])


class AttentionProjection(nn.Module):
    """`Linear(LN x) + Attention(LN x)`, then `+ GatedMLP(LN .)`: `[B, L, in_dim]` -> `[B, L, out_dim]`."""

    def __init__(self, in_dim: int, out_dim: int, num_heads: int, mlp_ratio: float, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.attn = ProjectionAttention(in_dim, out_dim, num_heads, causal)
        self.proj = nn.Linear(in_dim, out_dim)
        self.norm3 = nn.LayerNorm(in_dim)
        self.norm2 = nn.LayerNorm(out_dim)
        self.mlp = GeGluMlp(out_dim, int(out_dim * mlp_ratio), act_layer="gelu_tanh")

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC = self.proj(self.norm3(x_BLC)) + self.attn(self.norm1(x_BLC))
        return x_BLC + self.mlp(self.norm2(x_BLC))


def build_projection(config: UniTokConfig, to_codes: bool, causal: bool | None = None) -> nn.Module:
    """Projection from the encoder width to the code width (`to_codes`) or back; `causal` overrides the config's."""
    dims = (config.width, config.code_width) if to_codes else (config.code_width, config.width)
    if config.projection == "linear":
        return nn.Linear(*dims)
    heads = config.width // config.code_width
    is_causal = config.projection_causal if causal is None else causal
    return AttentionProjection(*dims, heads, config.projection_mlp_ratio, is_causal)
