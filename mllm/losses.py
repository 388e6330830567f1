"""What the unified model learns: summed cross-entropies of text ids and image codes.

B batch, T sequence, I images of a batch in order of appearance, K codebooks, L image positions, D model width, N
predicted image positions.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from unitok.core.errors import DataError
from unitok.mllm.configuration import IGNORE


@dataclass
class LossSums(ModelOutput):
    """Sums over tokens and their counts; dividing by *global* counts is the caller's part."""

    text: Tensor | None = None
    image: Tensor | None = None
    image_z: Tensor | None = None  # squares of the largest logit of every code
    num_text: Tensor | None = None
    num_image: Tensor | None = None
    text_correct: Tensor | None = None
    image_correct: Tensor | None = None  # [K]


def split_by_length(lengths: list[int], always: bool = False) -> list[list[int]]:
    """Rows in two parts, short and long, such that padding each to its own longest row costs least; in one part where
    nothing is saved, unless `always` (and there is more than one row)."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    if len(order) < 2 or (lengths[order[0]] == lengths[order[-1]] and not always):
        return [order]
    costs = {n: n * lengths[order[n - 1]] + (len(order) - n) * lengths[order[-1]] for n in range(1, len(order))}
    best = min(costs, key=costs.get)
    return [order[:best], order[best:]]


def sequence_ends(position_ids_T: Tensor) -> dict[str, Any]:
    """Where sequences of a packed row end, under transformers' names of flash-attn's arguments."""
    starts = (position_ids_T == 0).nonzero().flatten().int()
    ends = F.pad(starts, (0, 1), value=position_ids_T.numel())
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


class LossMixin:
    """`losses` of the unified model."""

    cross_entropy = "chunked"  # see `unitok.mllm.cross_entropy`

    def losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        codes: Tensor | None,
        learn_image: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        input_codes: Tensor | None = None,
    ) -> LossSums:
        """Summed cross-entropies of one batch, right-padded or packed.

        Args:
            input_ids, labels: `[B, T]`; labels are not shifted, IGNORE where nothing is learnt.
            codes: `[I, K, L]` of all images in order of appearance. learn_image: bool `[I]`, which of them to predict.
            attention_mask: `[B, T]` of right-padded rows, of one sequence each.
            position_ids: `[B, T]` of packed rows, in place of `attention_mask`: a sequence begins at every 0, is seen
                by itself alone, and its first label is IGNORE.
            input_codes: what is read in place of `codes`, which are predicted all the same.
        """
        inputs_BTD = self.embed(input_ids, codes if input_codes is None else input_codes)
        if position_ids is None:
            hidden_BTD = self._hidden_states(inputs_BTD, attention_mask)
        else:
            hidden_BTD = self._packed_hidden_states(inputs_BTD, position_ids)
        targets_BT = labels[:, 1:]
        keep_BT = targets_BT != IGNORE
        # Only learnt positions go through the head. An empty selection still runs it, so that under ZeRO-3 every rank
        # gathers the same parameters whatever its batch holds.
        text, text_correct, _ = self.lm_head(hidden_BTD[:, :-1][keep_BT], targets_BT[keep_BT], self.cross_entropy)
        hidden_ND, codes_NK = self._image_targets(input_ids, hidden_BTD, codes, learn_image, position_ids)
        num_positions = codes_NK.shape[0]
        if num_positions == 0:
            hidden_ND, codes_NK = hidden_BTD[:1, 0] * 0, codes_NK.new_zeros(1, self.config.num_codebooks)
        image, correct_K, image_z = self.depth.losses(hidden_ND, codes_NK, self.cross_entropy)
        factor = float(num_positions > 0)
        return LossSums(
            text=text,
            image=image * factor,
            image_z=image_z * factor,
            num_text=keep_BT.sum(),
            num_image=torch.tensor(num_positions * self.config.num_codebooks, device=text.device),
            text_correct=text_correct,
            image_correct=correct_K * factor,
        )

    def _packed_hidden_states(self, inputs_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """The backbone's output of packed rows: from positions that start anew transformers makes block-diagonal masks.

        flash-attn's kernels for sequences of different lengths want all of them in one row. Where the sequences begin
        is found here once: transformers would ask the GPU in every layer, and wait.
        """
        shape = inputs_BTD.shape
        sequences: dict[str, Any] = {}
        if self.backbone.config._attn_implementation.startswith("flash"):
            inputs_BTD, position_ids_BT = inputs_BTD.flatten(0, 1)[None], position_ids_BT.flatten()[None]
            parameters = inspect.signature(self.backbone.forward).parameters.values()
            if any(one.kind is one.VAR_KEYWORD for one in parameters):
                sequences = sequence_ends(position_ids_BT[0])
        hidden_BTD = self.backbone(
            inputs_embeds=inputs_BTD, position_ids=position_ids_BT, use_cache=False, **sequences
        ).last_hidden_state
        return hidden_BTD.view(shape)

    def _hidden_states(self, inputs_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """The backbone's output of a right-padded batch, with short and long rows run apart.

        Conversations are several times as long as captions: padded together, most positions would be padding. Of
        a model that ZeRO 3 has partitioned there are always two parts if there are two rows: every rank has as many
        rows, and so all make the same calls whatever their lengths.
        """
        lengths = mask_BT.sum(dim=1).tolist()
        is_partitioned = any(hasattr(parameter, "ds_id") for parameter in self.backbone.parameters())
        hidden_BTD = torch.zeros_like(inputs_BTD)
        for rows in split_by_length(lengths, always=is_partitioned):
            longest = max(lengths[row] for row in rows)
            part = self.backbone(
                inputs_embeds=inputs_BTD[rows, :longest], attention_mask=mask_BT[rows, :longest], use_cache=False
            ).last_hidden_state
            hidden_BTD = hidden_BTD.index_put(
                (torch.tensor(rows, device=part.device),), F.pad(part, (0, 0, 0, inputs_BTD.shape[1] - longest))
            )
        return hidden_BTD

    def _image_targets(
        self,
        input_ids: Tensor,
        hidden_BTD: Tensor,
        codes: Tensor | None,
        learn_image: Tensor,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `[N, D]` that predict image positions (each one place before it) and their codes `[N, K]`."""
        if codes is None or codes.is_floating_point():
            if bool(learn_image.any()):
                raise DataError("images to learn without their codes: latents can be read only")
            empty = torch.zeros(0, self.config.num_codebooks, dtype=torch.long, device=input_ids.device)
            return hidden_BTD[:1, :0].flatten(0, 1), empty
        is_image_BT = self._placeholders(input_ids)
        is_first_BT = torch.zeros_like(is_image_BT) if position_ids is None else position_ids == 0
        is_first_BT[:, 0] = True
        if bool((is_image_BT & is_first_BT).any()):
            raise DataError("a sequence begins with an image position: nothing stands before it to predict it from")
        learnt = learn_image.repeat_interleave(codes.shape[2])  # one flag per placeholder, in order of appearance
        wanted_BT = torch.zeros_like(is_image_BT).masked_scatter(is_image_BT, learnt)
        return hidden_BTD[:, :-1][wanted_BT[:, 1:]], codes[learn_image].transpose(1, 2).flatten(0, 1)
