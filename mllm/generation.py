"""Sampling of image codes with classifier-free guidance and key-value caches in all three places that need one.

The work of a position is one step of `PositionStepper`: on the CPU it runs eagerly, on a GPU compiled as a CUDA graph.

B images, R rows (B, or 2B with guidance: conditional rows first), T prompt length, K codebooks, V entries, L positions.
"""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from unitok.core.errors import DataError, UserError
from unitok.mllm.configuration import EmbedderCache
from unitok.mllm.graphed import SLOT_MULTIPLE, GraphedStepper, graphed_stepper
from unitok.mllm.sampler import CodeSampler, Setting, check_guidance
from unitok.mllm.stepper import PositionStepper


class CodeGenerationMixin:
    """`generate_codes` of the unified model."""

    def generate_codes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        guidance_scale: float = 1.0,
        do_sample: bool = True,
        temperature: Setting = 1.0,
        top_k: Setting = 0,
        top_p: Setting = 1.0,
        depth_temperature: Setting | None = None,
        num_positions: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        embedder_cache: str | None = None,
        on_position: Callable[[int, int], None] | None = None,
        graph: bool | None = None,
    ) -> Tensor:
        """Codes int64 `[B, K, num_positions]` of images for left-padded prompts that end with the begin-of-image id.

        With `guidance_scale > 1` `input_ids` `[2B, T]` holds the conditional rows first and as many unconditional rows
        after them; logits are `uncond + scale * (cond - uncond)` and both rows continue with the same code.
        `depth_temperature`: of all codes of a position but the first (None: `temperature`). Temperatures, top-k and
        top-p are one number, or one for each image.
        `seeds`: one per image; the same seed gives the same image whatever else is in the batch, as long as no two
        codes are as good as equal: rounding depends on the batch. None is 0 to B - 1: like everything here, it does not
        depend on a global generator.
        `on_position(done, num_positions)` is called after every position; on a GPU the call waits for it to be done.
        `graph`: compile a position's step and replay it as a CUDA graph, which takes a minute or more at the first call
        of these sizes (None: on a GPU, where the backbone's layers are Llama's).
        On the CPU in fp32 the weights are copied for the time of the call, in a form that multiplies faster.
        """
        if self.config.visual_input != "codes":
            raise UserError(f"this model only understands images (visual_input={self.config.visual_input})")
        num_positions = self.config.num_image_positions if num_positions is None else num_positions
        embedder_cache = embedder_cache or self.config.embedder_cache
        mask_RT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.dim() != 2 or input_ids.shape[1] < 1 or mask_RT.shape != input_ids.shape:
            raise DataError(
                f"input_ids of shape {list(input_ids.shape)} and attention_mask of {list(mask_RT.shape)}: expected "
                "[rows, T] of both, with T at least 1"
            )
        rows = input_ids.shape[0]
        self._check_generation(rows, num_positions, embedder_cache, guidance_scale)
        guided = guidance_scale > 1
        images = rows // 2 if guided else rows
        seeds = range(images) if seeds is None else seeds
        seeds = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
        if len(seeds) != images:
            raise UserError(f"{len(seeds)} seeds for {images} images: give one seed per image")
        sampler = CodeSampler(seeds, do_sample, temperature, top_k, top_p, depth_temperature, input_ids.device)
        if not bool((mask_RT[:, -1] != 0).all()):
            raise DataError(
                f"the attention mask ends in 0 in rows {(mask_RT[:, -1] == 0).nonzero().flatten().tolist()[:8]}: "
                "expected left-padded prompts, whose last id is the begin-of-image id; pad on the left"
            )

        def report(done: int) -> None:
            if on_position is None:
                return
            if input_ids.is_cuda:  # else the last one would be reported long before the first is done
                torch.cuda.current_stream(input_ids.device).synchronize()
            on_position(done, num_positions)

        with torch.inference_mode():
            stepper = self._stepper(
                sampler, rows=rows, slots=input_ids.shape[1] + num_positions, length=num_positions, guided=guided,
                alone=embedder_cache == "released", graph=input_ids.is_cuda if graph is None else graph,
            )  # fmt: skip
            columns = [stepper.start(self.embed(input_ids, None), mask_RT, sampler, guidance_scale)]
            report(1)
            for position in range(num_positions - 1):
                columns.append(stepper.next(columns[-1], position))
                report(position + 2)
            codes_BKL = torch.stack(columns, dim=-1)
        return codes_BKL.clone()  # outside, so that it is a tensor like any other

    def _stepper(self, sampler: CodeSampler, graph: bool, slots: int, **sizes: Any) -> PositionStepper | GraphedStepper:
        if not graph:
            return PositionStepper(self, slots=slots, static=False, **sizes)
        if self.device.type != "cuda":
            raise UserError(f"graph=True needs a CUDA device, the model is on {self.device}; leave graph out")
        slots = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE
        return graphed_stepper(self, (sampler.do_sample, sampler.filtered), slots=slots, **sizes)

    def _check_generation(self, rows: int, num_positions: int, embedder_cache: str, guidance_scale: float) -> None:
        """UserError or DataError for what `generate_codes` cannot do."""
        if rows < 1:
            raise DataError("no prompts: expected input_ids [rows, T] with at least one row")
        if num_positions < 1:
            raise UserError(f"num_positions={num_positions}: an image has at least 1")
        if embedder_cache not in get_args(EmbedderCache):
            raise UserError(f"embedder_cache={embedder_cache!r}: expected one of {', '.join(get_args(EmbedderCache))}")
        check_guidance(guidance_scale)
        if guidance_scale > 1 and rows % 2:
            raise DataError(f"guidance needs conditional and unconditional rows, as many of each: got {rows} rows")
        positions = self.embedder.positions
        if positions is not None and num_positions - 1 > positions.shape[0]:  # the last one's codes are not read
            raise DataError(f"{num_positions - 1} image positions: this model has embeddings for {positions.shape[0]}")
