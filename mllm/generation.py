"""Sampling of image codes with classifier-free guidance and key-value caches in all three places that need one.

B images, R rows (B, or 2B with guidance: conditional rows first), T prompt length, K codebooks, V entries, L positions.
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from unitok.core.errors import DataError, UserError
from unitok.core.rng import derive_seed
from unitok.mllm.configuration import EmbedderCache
from unitok.tokenizer.projection import ProjectionCache


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Temperature, then top-k (0 = off; ties with the k-th value stay), then nucleus filtering of logits `[..., V]`."""
    logits = logits / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        drop_sorted = probs.cumsum(dim=-1) - probs > top_p  # mass *before* an entry; the first is always kept
        drop = torch.zeros_like(drop_sorted).scatter(-1, order, drop_sorted)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


class CodeSampler:
    """Draws one code per image; each image has its own random stream, so its picture does not depend on the batch.

    `temperature` holds for the first code of a position, `depth_temperature` (None: the same) for the others. The first
    code mostly settles what stands there, the others how it looks: only the first choice should vary between images,
    while the look should be the likeliest one, or the parts of one object fall apart.
    """

    def __init__(
        self,
        seeds: Sequence[int] | None,
        do_sample: bool,
        temperature: float,
        top_k: int,
        top_p: float,
        depth_temperature: float | None = None,
    ) -> None:
        self.depth_temperature = temperature if depth_temperature is None else depth_temperature
        for name, value in (("temperature", temperature), ("depth_temperature", self.depth_temperature)):
            if do_sample and not 0 < value < math.inf:
                raise UserError(f"{name}={value}: must be positive (use do_sample=False for the likeliest code)")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p}: expected a share in (0, 1]")
        if top_k < 0 or top_k != int(top_k):
            raise UserError(f"top_k={top_k}: expected 0 (off) or a positive number")
        self.do_sample, self.temperature, self.top_k, self.top_p = do_sample, temperature, top_k, top_p
        self.generators = [torch.Generator().manual_seed(derive_seed("image", seed)) for seed in seeds or []]

    def __call__(self, logits_BV: Tensor, index: int) -> Tensor:
        """Codes `[B]` number `index` (0 to K - 1) of a position."""
        if not self.do_sample:
            return logits_BV.argmax(dim=-1)
        temperature = self.depth_temperature if index else self.temperature
        probs_BV = filter_logits(logits_BV.float(), temperature, self.top_k, self.top_p).softmax(dim=-1)
        # argmax(p / e) with e ~ Exp(1) draws from p, and needs only this image's own noise.
        noise = torch.stack([torch.empty(probs_BV.shape[-1]).exponential_(generator=g) for g in self.generators])
        return (probs_BV / noise.to(probs_BV.device)).argmax(dim=-1)


class CodeGenerationMixin:
    """`generate_codes` of the unified model."""

    @torch.no_grad()
    def generate_codes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        guidance_scale: float = 1.0,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        depth_temperature: float | None = None,
        num_positions: int | None = None,
        seeds: Sequence[int] | None = None,
        embedder_cache: str | None = None,
    ) -> Tensor:
        """Codes int64 `[B, K, num_positions]` of images for left-padded prompts that end with the begin-of-image id.

        With `guidance_scale > 1` `input_ids` `[2B, T]` holds the conditional rows first and as many unconditional rows
        after them; logits are `uncond + scale * (cond - uncond)` and both rows continue with the same code.
        `depth_temperature`: of all codes of a position but the first (None: `temperature`).
        `seeds`: one per image; the same seed gives the same image whatever else is in the batch. None is 0 to B - 1:
        like everything here, it does not depend on a global generator.
        """
        if self.config.visual_input != "codes":
            raise UserError(f"this model only understands images (visual_input={self.config.visual_input})")
        num_positions = self.config.num_image_positions if num_positions is None else num_positions
        embedder_cache = embedder_cache or self.config.embedder_cache
        if num_positions < 1:
            raise UserError(f"num_positions={num_positions}: an image has at least 1")
        if embedder_cache not in get_args(EmbedderCache):
            raise UserError(f"embedder_cache={embedder_cache!r}: expected one of {', '.join(get_args(EmbedderCache))}")
        rows = input_ids.shape[0]
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise UserError(f"guidance_scale={guidance_scale}: expected a number of at least 1 (up to 1 is off)")
        guided = guidance_scale > 1
        if guided and rows % 2:
            raise DataError(f"guidance needs conditional and unconditional rows, as many of each: got {rows} rows")
        images = rows // 2 if guided else rows
        seeds = list(range(images)) if seeds is None else list(seeds)
        if len(seeds) != images:
            raise UserError(f"{len(seeds)} seeds for {images} images: give one seed per image")
        sampler = CodeSampler(seeds, do_sample, temperature, top_k, top_p, depth_temperature)
        consistent = embedder_cache == "consistent"
        mask_RT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        state: dict[str, Any] = {"cache": None, "mask": mask_RT}
        hidden_RD = self._advance(self.embed(input_ids, None), state)
        projection_cache = ProjectionCache()
        columns = []
        for position in range(num_positions):
            codes_BK = self._sample_position(hidden_RD, sampler, guidance_scale if guided else None)
            columns.append(codes_BK)
            if position + 1 < num_positions:
                codes_RK1 = (torch.cat([codes_BK, codes_BK]) if guided else codes_BK).unsqueeze(-1)
                cache = projection_cache if consistent else ProjectionCache()
                hidden_RD = self._advance(self.embedder(codes_RK1, cache, start=position), state)
        return torch.stack(columns, dim=-1)

    def _advance(self, inputs_RTD: Tensor, state: dict[str, Any]) -> Tensor:
        """Feed new input vectors to the backbone; the last hidden state `[R, D]`."""
        if state["cache"] is not None:
            state["mask"] = torch.cat([state["mask"], state["mask"].new_ones(inputs_RTD.shape[0], 1)], dim=1)
        positions_RT = (state["mask"].cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_RTD.shape[1] :]
        outputs = self.backbone(
            inputs_embeds=inputs_RTD,
            attention_mask=state["mask"],
            position_ids=positions_RT,
            past_key_values=state["cache"],
            use_cache=True,
        )
        state["cache"] = outputs.past_key_values
        return outputs.last_hidden_state[:, -1]

    def _sample_position(self, hidden_RD: Tensor, sampler: CodeSampler, guidance_scale: float | None) -> Tensor:
        """The K codes `[B, K]` of one position, one after the other through the depth transformer's own cache."""
        cache = self.depth.new_cache(hidden_RD.shape[0], like=hidden_RD)
        inputs, codes = hidden_RD, []
        for index in range(self.config.num_codebooks):
            logits = self.depth.step(index, inputs, cache)
            if guidance_scale is not None:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + guidance_scale * (conditional - unconditional)
            code_B = sampler(logits, index)
            codes.append(code_B)
            inputs = torch.cat([code_B, code_B]) if guidance_scale is not None else code_B
        return torch.stack(codes, dim=-1)
