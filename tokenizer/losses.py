"""Losses of stage one that need no second network (paper, section 3.1).

B local batch, G global batch (all ranks), D embedding channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.core.distributed import all_reduce_sum_, gather_with_grad, rank, world_size


def reconstruction_loss(reconstruction: Tensor, target: Tensor, l1_weight: float, l2_weight: float) -> Tensor:
    """Weighted mean absolute and mean squared error of pixels in [-1, 1]."""
    return l1_weight * F.l1_loss(reconstruction, target) + l2_weight * F.mse_loss(reconstruction, target)


def contrastive_loss(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, has_text_B: Tensor | None = None
) -> Tensor:
    """Symmetric CLIP loss of this rank's rows against the global batch; its mean over ranks is the global loss.

    Rows where `has_text_B` is False have no caption: they are neither pairs nor negatives.

    Features are gathered with gradient, so ranks of `G / ranks` pairs train like one process with G pairs.
    `logit_scale` is the log of the scale; the task keeps it in bounds after every step.
    """
    image_GD, text_GD = gather_with_grad(image_BD), gather_with_grad(text_BD)
    scale = logit_scale.exp()
    count, first = image_BD.shape[0], rank() * image_BD.shape[0]
    targets_B = torch.arange(count, device=image_BD.device) + first
    logits_2BG = torch.stack([scale * image_BD @ text_GD.T, scale * text_BD @ image_GD.T])
    if has_text_B is None:
        return F.cross_entropy(logits_2BG.flatten(0, 1), targets_B.repeat(2))
    present_G = all_reduce_sum_(F.pad(has_text_B.float(), (first, text_GD.shape[0] - first - count))) > 0
    losses = F.cross_entropy(
        logits_2BG.masked_fill(~present_G, -torch.inf)[:, has_text_B].flatten(0, 1),
        targets_B[has_text_B].repeat(2),
        reduction="sum",
    )
    # The engine averages over ranks: sums are scaled so that this gives sum / global number of pairs.
    return losses * (world_size() / (2 * present_G.sum().clamp(min=1))) + 0 * logits_2BG.sum()
