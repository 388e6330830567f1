"""Heads of the DINO discriminator: convolutions along the sequence of patches.

B images, C channels, L patches. Names and shapes are those of UniTok's discriminator.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.core.errors import ConfigError

NORM_EPS = 1e-6
NORM_GROUPS = 32
VIRTUAL_BATCH = 8
INITIAL_GAIN = 0.5


class LocalBatchNorm(nn.Module):
    """Batch norm over consecutive groups of at most 8 images, always with the statistics of the group itself.

    So a rank needs no other rank, and the discriminator sees the variety of a few images at a time.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCL: Tensor) -> Tensor:
        groups = x_BCL.tensor_split(math.ceil(x_BCL.shape[0] / VIRTUAL_BATCH))
        normed = [F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=NORM_EPS) for x in groups]
        return torch.cat(normed)


class SpectralConv1d(nn.Conv1d):
    """Convolution whose weight is divided by an estimate of its largest singular value (arXiv 1802.05957).

    In training mode every forward pass improves the estimate by one step of power iteration, as torch's spectral_norm
    does; the names are also its names.
    """

    def __init__(self, *args: int, **kwargs: int | str) -> None:
        super().__init__(*args, **kwargs)
        weight = self.weight
        del self.weight
        self.register_parameter("weight_orig", weight)
        matrix = weight.detach().flatten(1)
        self.register_buffer("weight_u", F.normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(matrix.shape[1]), dim=0))

    def forward(self, x_BCL: Tensor) -> Tensor:
        # Products element by element: under autocast a matrix product would round sigma to bfloat16
        matrix = self.weight_orig.flatten(1)
        if self.training:
            with torch.no_grad():
                self.weight_v.copy_(F.normalize((matrix * self.weight_u[:, None]).sum(dim=0), dim=0))
                self.weight_u.copy_(F.normalize((matrix * self.weight_v).sum(dim=1), dim=0))
        # Copies, because the next pass changes the buffers, maybe before this pass's backward
        sigma = (matrix * self.weight_u.clone()[:, None] * self.weight_v.clone()).sum()
        return self._conv_forward(x_BCL, self.weight_orig / sigma, self.bias)


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x_BCL: Tensor) -> Tensor:
        return (self.fn(x_BCL) + x_BCL) / math.sqrt(2)


def make_head(width: int, kernel_size: int, norm: str, spectral_norm: bool) -> nn.Sequential:
    """Features `[B, width, L]` -> logits `[B, 1, L]`; `norm` is "gn" or "bn".

    Raises ConfigError for another norm, an even kernel, or a width that groups of channels do not divide.
    """
    if norm not in ("gn", "bn"):
        raise ConfigError(f"discriminator norm {norm!r} is unknown; expected gn or bn")
    if norm == "gn" and width % NORM_GROUPS:
        raise ConfigError(f"norm gn needs features of a multiple of {NORM_GROUPS} channels, not {width}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(f"kernel_size={kernel_size}: expected an odd number")
    conv_type = SpectralConv1d if spectral_norm else nn.Conv1d

    def conv(out: int, kernel: int) -> nn.Conv1d:
        made = conv_type(width, out, kernel, padding=kernel // 2, padding_mode="circular")
        nn.init.xavier_normal_(made.weight_orig if spectral_norm else made.weight, gain=INITIAL_GAIN)
        nn.init.zeros_(made.bias)
        return made

    def block(kernel: int) -> nn.Sequential:
        made_norm = LocalBatchNorm(width) if norm == "bn" else nn.GroupNorm(NORM_GROUPS, width, eps=NORM_EPS)
        return nn.Sequential(conv(width, kernel), made_norm, nn.LeakyReLU(0.2))

    return nn.Sequential(block(1), _Residual(block(kernel_size)), conv(1, 1))
