"""Sampling of image codes as a plain loop on the model's own modules: what the engine is compared with.

The backbone has a growing cache; the depth transformer runs anew for each code on all that the position has so far;
the embedder runs anew on what it sees: the whole prefix ("consistent") or the newest position alone ("released").

B images, R rows (B, or 2B with guidance), T prompt length, K codebooks, L positions, D width.
"""

from typing import Any

import torch
from torch import Tensor

from unitok.mllm import UniTokMLLM
from unitok.mllm.sampler import CodeSampler


@torch.no_grad()
def plain_codes(
    model: UniTokMLLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    sampler: CodeSampler,
    guidance_scale: float = 1.0,
    num_positions: int | None = None,
    embedder_cache: str | None = None,
) -> Tensor:
    """Codes `[B, K, L]` for left-padded prompts `[R, T]`, as `generate_codes` promises them."""
    whole_prefix = (embedder_cache or model.config.embedder_cache) == "consistent"
    guided = guidance_scale > 1
    mask_RT, cache = attention_mask, None
    inputs_RTD = model.embed(input_ids, None)
    codes_BKL = torch.empty(0)
    length = num_positions or model.config.num_image_positions
    for position in range(length):
        positions_RT = (mask_RT.cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_RTD.shape[1] :]
        outputs: Any = model.backbone(
            inputs_embeds=inputs_RTD,
            attention_mask=mask_RT,
            position_ids=positions_RT,
            past_key_values=cache,
            use_cache=True,
        )
        cache = outputs.past_key_values
        codes_BK1 = _plain_position(model, outputs.last_hidden_state[:, -1], sampler, guidance_scale).unsqueeze(-1)
        codes_BKL = torch.cat([codes_BKL, codes_BK1], dim=-1) if position else codes_BK1
        if position == length - 1:
            break  # nobody reads the last codes
        vectors_B1D = _plain_vectors(model, codes_BKL, whole_prefix)
        inputs_RTD = torch.cat([vectors_B1D, vectors_B1D]) if guided else vectors_B1D
        mask_RT = torch.cat([mask_RT, mask_RT.new_ones(mask_RT.shape[0], 1)], dim=1)
    return codes_BKL


def _plain_vectors(model: UniTokMLLM, codes_BKL: Tensor, whole_prefix: bool) -> Tensor:
    """The newest position's input vector `[B, 1, D]`, which both halves of guidance read."""
    if whole_prefix:
        return model.embedder(codes_BKL)[:, -1:]
    return model.embedder(codes_BKL[:, :, -1:], start=codes_BKL.shape[-1] - 1)


def _plain_position(model: UniTokMLLM, hidden_RD: Tensor, sampler: CodeSampler, guidance_scale: float) -> Tensor:
    """The K codes `[B, K]` of one position."""
    depth = model.depth
    inputs = [depth.in_proj(hidden_RD)]
    codes: list[Tensor] = []
    for index in range(model.config.num_codebooks):
        logits = depth.head(depth.run_layers(torch.stack(inputs, dim=1)))[:, -1]
        if guidance_scale > 1:
            conditional, unconditional = logits.float().chunk(2)
            logits = unconditional + guidance_scale * (conditional - unconditional)
        codes.append(sampler(logits, index))
        if index < len(depth.code_embeddings):
            code_R = torch.cat([codes[-1], codes[-1]]) if guidance_scale > 1 else codes[-1]
            inputs.append(depth.code_embeddings[index](code_R))
    return torch.stack(codes, dim=-1)
