"""Losses of stage one that need no second network (paper, section 3.1).

B local batch, G global batch (all ranks), D embedding channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.core.distributed import gather_with_grad, rank


def reconstruction_loss(reconstruction: Tensor, target: Tensor, l1_weight: float, l2_weight: float) -> Tensor:
    """Weighted mean absolute and mean squared error of pixels in [-1, 1]."""
    return l1_weight * F.l1_loss(reconstruction, target) + l2_weight * F.mse_loss(reconstruction, target)


def contrastive_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric CLIP loss of this rank's rows against the global batch; its mean over ranks is the global loss.

    Features are gathered with gradient, so ranks of `G / ranks` pairs train like one process with G pairs.
    `logit_scale` is the log of the scale; the task keeps it in bounds after every step.
    """
    image_GD, text_GD = gather_with_grad(image_BD), gather_with_grad(text_BD)
    scale = logit_scale.exp()
    targets = torch.arange(image_BD.shape[0], device=image_BD.device) + rank() * image_BD.shape[0]
    image_loss = F.cross_entropy(scale * image_BD @ text_GD.T, targets)
    text_loss = F.cross_entropy(scale * text_BD @ image_GD.T, targets)
    return (image_loss + text_loss) / 2


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """`mean(relu(1 - real)) + mean(relu(1 + fake))`, halved."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
