"""One image position as one step: embedding of the last codes, backbone, K depth steps, guidance, choice of new codes.

B images, R rows (B, or 2B with guidance: conditional rows first), T prompt length, S slots of the backbone's cache,
K codebooks, L positions, D width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unitok.mllm.backbone_steps import backbone_steps
from unitok.mllm.embedder_steps import EmbedderSteps
from unitok.mllm.sampler import CodeSampler, check_logits

if TYPE_CHECKING:
    from unitok.mllm.model import UniTokMLLM


class PositionStepper:
    """All caches, in tensors of fixed size, and the step that fills them.

    With `static`, steps have the same shapes at every position, and slots that are not filled yet are masked; without
    (on the CPU), a step sees just the filled slots. `alone`: see `EmbedderSteps`.
    """

    def __init__(
        self, model: "UniTokMLLM", rows: int, slots: int, length: int, guided: bool, alone: bool, static: bool
    ) -> None:
        like = model.lm_head.weight.new_empty(0)
        self.depth, self.guided, self.static = model.depth, guided, static
        self.slots, self.length, self.num_codebooks = slots, length, model.config.num_codebooks
        self.images = rows // 2 if guided else rows
        self.backbone = backbone_steps(model.backbone, rows, slots, like)
        self.embedder = EmbedderSteps(model.embedder, self.images, length, alone, like)
        self.depth_cache = model.depth.new_cache(rows, like)
        self.guidance = like.new_ones((), dtype=torch.float32)  # bf16 would round 7.3 to 7.3125
        self.place = torch.zeros(1, dtype=torch.long, device=like.device)
        self.slot = torch.zeros_like(self.place)
        sizes = (self.images, self.num_codebooks, model.config.codebook_size)
        self.uniform_BKV = torch.zeros(sizes, device=like.device)
        self.prompt_length, self.sampler = 0, None

    def start(self, prompts_RTD: Tensor, mask_RT: Tensor, sampler: CodeSampler, guidance_scale: float) -> Tensor:
        """Read the prompts; the codes `[B, K]` of the first position. NonFiniteError where the backbone is broken."""
        self.sampler = sampler if self.sampler is None else self.sampler.take(sampler)
        self.guidance.fill_(guidance_scale)
        self.prompt_length = mask_RT.shape[1]
        self.go_to(0)
        hidden_RD = self.backbone.start(prompts_RTD, mask_RT)
        check_logits(hidden_RD)  # here on every device: later positions are not looked at one by one
        self.roll()
        return self._choose(hidden_RD)

    def roll(self) -> None:
        """New random numbers for the next position, in the tensor that a recorded step reads."""
        if self.sampler.do_sample:
            self.sampler.fill_(self.uniform_BKV)

    def go_to(self, position: int) -> None:
        """Make `position` the one whose codes the next step reads."""
        self.place.fill_(position)
        self.slot.fill_(self.prompt_length + position)

    def next(self, codes_BK: Tensor, position: int) -> Tensor:
        """The codes `[B, K]` of the position after `position`, whose codes are given."""
        ends = (self.length, self.slots) if self.static else (position + 1, self.prompt_length + position + 1)
        self.roll()
        return self.step(codes_BK, *ends)

    def step(self, codes_BK: Tensor, place_end: int, slot_end: int) -> Tensor:
        """As `next`, at the position that was gone to, and goes on by one."""
        vectors_BD = self.embedder(codes_BK, self.place, place_end)
        inputs_RD = torch.cat([vectors_BD, vectors_BD]) if self.guided else vectors_BD
        counted = self.backbone.graphable and not self.static
        hidden_RD = self.backbone(inputs_RD, slot_end - 1 if counted else self.slot, slot_end)
        self.place.add_(1)
        self.slot.add_(1)
        return self._choose(hidden_RD)

    def _choose(self, hidden_RD: Tensor) -> Tensor:
        """The K codes `[B, K]` of one position, one after the other through the depth transformer.

        On a CPU NonFiniteError for those of a broken model; elsewhere every look would wait for the device.
        """
        inputs, codes, largest = hidden_RD, [], []
        for index in range(self.num_codebooks):
            logits = self.depth.step(index, inputs, self.depth_cache)
            if self.guided:
                conditional, unconditional = logits.chunk(2)
                logits = torch.lerp(unconditional.float(), conditional.float(), self.guidance)
            code_B, largest_B = self.sampler.choose(logits, index, self.uniform_BKV[:, index])
            codes.append(code_B)
            largest.append(largest_B)
            inputs = torch.cat([code_B, code_B]) if self.guided else code_B
        if hidden_RD.device.type == "cpu" and not torch.compiler.is_compiling():
            check_logits(torch.stack(largest))
        return torch.stack(codes, dim=-1)
