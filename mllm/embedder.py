"""Codes to input vectors: codebook vectors -> causal attention projection -> MLP (Liquid-style projector).

Models that only understand may read the tokenizer's own projection instead (`visual_input`): of codes, or of the
vectors before quantization, its latents. Both are `[B, ., L]`, so a model treats them alike; latents are floats.

B batch, K codebooks, L positions, V entries, C code channels, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.core.errors import DataError
from unitok.mllm.configuration import UniTokMLLMConfig
from unitok.tokenizer.projection import AttentionProjection
from unitok.tokenizer.quantizer import lookup, residual_lookup


class CodeEmbedder(nn.Module):
    """K codes of one position -> *one* input vector of the backbone.

    The codebooks are a buffer: they are the tokenizer's and stay as they are, so that codes keep their meaning.
    The projection has the shape of the tokenizer's projection out of the code space and is initialised from it, but
    attends causally, because positions are generated one after the other (unless `visual_input` says otherwise).
    """

    def __init__(self, config: UniTokMLLMConfig) -> None:
        super().__init__()
        self.num_codebooks = config.num_codebooks
        self.codebook_size = config.codebook_size
        self.continuous = config.visual_input == "continuous"
        self.residual = config.quantizer == "residual"
        shape = (config.num_codebooks, config.codebook_size, config.code_dim)
        self.register_buffer("codebooks", torch.empty(shape))
        if config.code_usage:
            self.register_buffer("code_usage", torch.zeros(shape[:2]))
        causal = config.visual_input == "codes"
        sizes = (config.code_width, config.visual_width, config.visual_num_heads, config.visual_mlp_ratio)
        self.projection = AttentionProjection(*sizes, causal)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.visual_width, eps=1e-6),
            nn.Linear(config.visual_width, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.positions = (
            nn.Parameter(torch.zeros(config.num_image_positions, config.hidden_size))
            if config.image_position_embedding
            else None
        )

    def latent_vectors(self, latents_BCL: Tensor) -> Tensor:
        """Vectors `[B, L, C]` of latents; DataError where codes or another width are given."""
        width = self.projection.proj.in_features
        if not latents_BCL.is_floating_point() or latents_BCL.dim() != 3 or latents_BCL.shape[1] != width:
            raise DataError(
                f"{latents_BCL.dtype} of shape {list(latents_BCL.shape)}: a model with visual_input=continuous reads "
                f"latents, floats [B, C={width}, L]"
            )
        return latents_BCL.transpose(1, 2).to(self.mlp[1].weight.dtype)

    def code_vectors(self, codes_BKL: Tensor) -> Tensor:
        """Vectors `[B, L, C]` as the tokenizer's own `code_vectors`; DataError when K does not fit."""
        if codes_BKL.dim() != 3 or codes_BKL.shape[1] != self.num_codebooks:
            raise DataError(f"codes of shape {list(codes_BKL.shape)}: expected [B, K={self.num_codebooks}, L]")
        found = residual_lookup if self.residual else lookup
        return found(codes_BKL, self.entries()).to(self.mlp[1].weight.dtype)

    def entries(self) -> Tensor:
        """Codebooks `[K, V, D]` in fp32 as they are looked up (normalised again, where rounding has moved them)."""
        return self.codebooks.float() if self.residual else F.normalize(self.codebooks.float(), dim=-1)

    def forward(self, codes_BKL: Tensor, start: int = 0) -> Tensor:
        """Codes `[B, K, L]` (or latents `[B, C, L]`) -> `[B, L, D]`; `start`: the position of the first of them."""
        vectors_BLC = self.latent_vectors(codes_BKL) if self.continuous else self.code_vectors(codes_BKL)
        vectors_BLD = self.mlp(self.projection(vectors_BLC))
        if self.positions is not None:
            end = start + codes_BKL.shape[2]
            if end > self.positions.shape[0]:
                raise DataError(f"{end} image positions: this model has embeddings for {self.positions.shape[0]}")
            vectors_BLD = vectors_BLD + self.positions[start:end]
        return vectors_BLD
