"""Depth transformer: predicts the K codes of one position one after the other, given the backbone's hidden state.

N positions (of all images of a batch), K codebooks, V entries, D depth width, H heads.
Input of a position: `[hidden, embedding_0(code_0), ..., embedding_{K-2}(code_{K-2})]`; output k predicts code k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.mllm.cross_entropy import Sums, summed_losses
from unitok.mllm.decoder_steps import DecoderSteps, LayerParts, rotation, rotation_of_all
from unitok.mllm.linears import joined, linear_map


def rope_angles(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[length, head_dim]` of Llama's rotary position embedding."""
    inverse = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class DepthAttention(nn.Module):
    """Causal self-attention over the sub-codes; with fewer key-value heads than heads, groups of heads share them."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        kv_width = width // num_heads * num_kv_heads
        self.head_dim = width // num_heads
        self.grouped = num_kv_heads < num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_NTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        count, length, width = x_NTD.shape
        shape = (count, length, -1, self.head_dim)
        q_NHTd = rotate(self.q_proj(x_NTD).view(shape).transpose(1, 2), cos, sin)
        k_NHTd = rotate(self.k_proj(x_NTD).view(shape).transpose(1, 2), cos, sin)
        v_NHTd = self.v_proj(x_NTD).view(shape).transpose(1, 2)
        out = F.scaled_dot_product_attention(q_NHTd, k_NHTd, v_NHTd, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).reshape(count, length, width))


class DepthLayer(nn.Module):
    """One pre-norm Llama layer; parameter names are Llama's, so released depth layers load as they are."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, intermediate: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.self_attn = DepthAttention(width, num_heads, num_kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x_NTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_NTD = x_NTD + self.self_attn(self.input_layernorm(x_NTD), cos, sin)
        hidden = self.post_attention_layernorm(x_NTD)
        return x_NTD + self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))

    def parts(self) -> LayerParts:
        """What `DecoderSteps` needs of this layer."""
        attention, mlp_norm = self.self_attn, self.post_attention_layernorm
        return LayerParts(
            norm=(self.input_layernorm.weight, self.input_layernorm.eps),
            query=attention.q_proj,
            key=attention.k_proj,
            value=attention.v_proj,
            out=attention.o_proj,
            mlp_norm=(mlp_norm.weight, mlp_norm.eps),
            gate=self.gate_proj,
            up=self.up_proj,
            down=self.down_proj,
            act=F.silu,
            head_dim=attention.head_dim,
            scaling=attention.head_dim**-0.5,
        )


class CodeHead(nn.Module):
    """Logits of codes: one linear map for all sub-codes, or one for each (`num_heads` = K)."""

    def __init__(self, num_heads: int, codebook_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, codebook_size, width))
        self.bias = nn.Parameter(torch.zeros(num_heads, codebook_size))

    def forward(
        self, x_NkD: Tensor, first: int = 0, targets_Nk: Tensor | None = None, method: str = "chunked"
    ) -> Tensor | Sums:
        """Logits `[N, k, V]` of the sub-codes number `first` and on; with targets the sums of their losses."""
        if targets_Nk is not None:
            return summed_losses(self.forward, x_NkD, targets_Nk, self.bias.shape[-1], method)
        if self.weight.shape[0] == 1:
            return F.linear(x_NkD, self.weight[0], self.bias[0])
        steps = slice(first, first + x_NkD.shape[1])
        return torch.einsum("nkd,kvd->nkv", x_NkD, self.weight[steps]) + self.bias[steps]


class DepthTransformer(nn.Module):
    """Logits of the K codes of every position, teacher-forced (`forward`) or one code at a time (`step`)."""

    def __init__(self, config: UniTokMLLMConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # transformers sets it where it is wanted
        text = config.text_config
        width = config.depth_width or text.hidden_size
        heads = config.depth_num_heads or text.num_attention_heads
        intermediate = config.depth_intermediate_size or text.intermediate_size
        eps = getattr(text, "rms_norm_eps", 1e-6)
        kv_heads = config.depth_num_key_value_heads or heads
        self.num_codebooks, self.num_kv_heads, self.head_dim = config.num_codebooks, kv_heads, width // heads
        self.rope_theta = float((getattr(text, "rope_parameters", None) or {}).get("rope_theta", 10000.0))
        same = width == text.hidden_size
        self.in_proj = nn.Identity() if same else nn.Linear(text.hidden_size, width, bias=False)
        self.code_embeddings = nn.ModuleList(
            nn.Embedding(config.codebook_size, width) for _ in range(config.num_codebooks - 1)
        )
        self.layers = nn.ModuleList(
            DepthLayer(width, heads, kv_heads, intermediate, eps) for _ in range(config.depth_num_layers)
        )
        self.norm = nn.RMSNorm(width, eps=eps)
        self.head = CodeHead(1 if config.depth_shared_head else config.num_codebooks, config.codebook_size, width)

    def forward(self, hidden_ND: Tensor, codes_NK: Tensor) -> Tensor:
        """Teacher-forced logits `[N, K, V]` from hidden states `[N, hidden_size]` and the true codes `[N, K]`."""
        return self.head(self.features(hidden_ND, codes_NK))

    def features(self, hidden_ND: Tensor, codes_NK: Tensor) -> Tensor:
        """What the head reads, `[N, K, D]`."""
        inputs = [self.in_proj(hidden_ND)]
        inputs += [embed(codes_NK[:, k]) for k, embed in enumerate(self.code_embeddings)]
        x_NKD = torch.stack([part.to(inputs[0].dtype) for part in inputs], dim=1)
        return self.run_layers(x_NKD)

    def run_layers(self, x_NkD: Tensor) -> Tensor:
        """All layers and the norm on the first k inputs of positions."""
        cos, sin = rope_angles(x_NkD.shape[1], self.head_dim, self.rope_theta, x_NkD.device)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x_NkD = checkpoint(layer, x_NkD, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x_NkD = layer(x_NkD, cos, sin)
        return self.norm(x_NkD)

    def losses(self, hidden_ND: Tensor, codes_NK: Tensor, method: str) -> Sums:
        """Summed losses of all codes, their right guesses `[K]` and squared largest logits (see `cross_entropy`)."""
        return self.head(self.features(hidden_ND, codes_NK), targets_Nk=codes_NK, method=method)

    def new_cache(self, count: int, like: Tensor) -> "DepthCache":
        """What `step` keeps for `count` positions side by side. It serves one position after the other: step 0 begins
        a new one. `like`: dtype and device of the inputs."""
        return DepthCache(self, count, like)

    def step(self, index: int, inputs: Tensor, cache: "DepthCache") -> Tensor:
        """Logits `[N, V]` of code `index`; `inputs` is `hidden_ND` for index 0, else the code `[N]` before it. For
        inference: no gradient flows."""
        x_ND = cache.in_proj(inputs) if index == 0 else self.code_embeddings[index - 1](inputs)
        # A compiler copies the whole cache to write a slot that is a number.
        slot = cache.slots[index] if torch.compiler.is_compiling() else index
        x_ND = cache.layers(x_ND, slot, index + 1, cache.turns[index])
        return cache.heads[index if len(cache.heads) > 1 else 0](x_ND)


class DepthCache:
    """Keys and values of the sub-codes before, and the layers and heads made ready for single steps."""

    def __init__(self, depth: DepthTransformer, count: int, like: Tensor) -> None:
        parts = [layer.parts() for layer in depth.layers]
        norm = (depth.norm.weight, depth.norm.eps)
        self.layers = DecoderSteps(parts, norm, count, depth.num_codebooks, like)
        self.slots = torch.arange(depth.num_codebooks, device=like.device).split(1)
        self.in_proj = depth.in_proj if isinstance(depth.in_proj, nn.Identity) else joined([depth.in_proj], count)
        head = depth.head
        self.heads = [
            linear_map(weight, bias, count, owner=head.weight, name=index)
            for index, (weight, bias) in enumerate(zip(head.weight, head.bias, strict=True))
        ]
        cos, sin = rope_angles(depth.num_codebooks, depth.head_dim, depth.rope_theta, like.device)
        turns = [angle.to(like.dtype).unsqueeze(1).split(1) for angle in rotation(cos, sin)]
        self.turns = [rotation_of_all(*turn, parts[0]) for turn in zip(*turns, strict=True)]
