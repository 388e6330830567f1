"""Decoder that mirrors the ViTamin encoder: ViT blocks, then convolutional stages that double the image four times.

B batch, L tokens, C width, H W pixels.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, make_divisible
from torch import Tensor, nn

from unitok.core.errors import DataError
from unitok.tokenizer.configuration import DOWNSAMPLING, UniTokConfig
from unitok.tokenizer.encoder import NORM_EPS, run_blocks, transformer_blocks

EXPANSION = 4


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution, computed on the small image.

    After doubling, the three rows under the kernel come from only two rows of the small image (likewise columns), so
    each of the four output phases is a 2x2 convolution whose weights are sums of the 3x3 weights: the same numbers with
    4/9 of the products, and the doubled image is never stored.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, _, height, width = x_BCHW.shape
        padded = F.pad(x_BCHW, (1, 1, 1, 1))
        rows = []
        for kernel_rows, top in zip(_phases(self.conv.weight, dim=2), (0, 1), strict=True):
            columns = [
                F.conv2d(padded[:, :, top : top + height + 1, left : left + width + 1], kernel, self.conv.bias)
                for kernel, left in zip(_phases(kernel_rows, dim=3), (0, 1), strict=True)
            ]
            rows.append(torch.stack(columns, dim=-1))  # [B, C, H, W, 2]
        return torch.stack(rows, dim=3).view(batch, self.conv.out_channels, 2 * height, 2 * width)


def _phases(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Fold a kernel of three taps into two for the even and for the odd outputs along `dim`."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


class InvertedBottleneck(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 reduction, shortcut; `upsample` doubles the image between the first two."""

    def __init__(self, in_dim: int, out_dim: int, upsample: bool) -> None:
        super().__init__()
        hidden = make_divisible(out_dim * EXPANSION)
        self.shortcut = Upsample(in_dim, out_dim) if upsample else nn.Identity()
        self.pre_norm = LayerNorm2d(in_dim, eps=NORM_EPS)
        self.conv1_1x1 = nn.Conv2d(in_dim, hidden, 1)
        self.up = Upsample(hidden, hidden) if upsample else nn.Identity()
        self.conv2_kxk = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv3_1x1 = nn.Conv2d(hidden, out_dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.up(F.gelu(self.conv1_1x1(self.pre_norm(x_BCHW))))
        return self.conv3_1x1(F.gelu(self.conv2_kxk(hidden))) + self.shortcut(x_BCHW)


class OutputUpsample(nn.Module):
    """Last doubling and the convolution to RGB; `conv2` is where the adaptive adversarial weight is measured."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = Upsample(in_dim, hidden)
        self.norm1 = LayerNorm2d(hidden, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(hidden, 3, 3, padding=1)

    def hidden(self, x_BCHW: Tensor) -> Tensor:
        return F.gelu(self.norm1(self.conv1(x_BCHW)))


def _stage(in_dim: int, out_dim: int, depth: int) -> nn.Sequential:
    return nn.Sequential(
        *(InvertedBottleneck(out_dim if i else in_dim, out_dim, upsample=i == 0) for i in range(depth))
    )


class ViTaminDecoder(nn.Module):
    """Tokens `[B, L, C]` -> pixels `[B, 3, H, W]`, not clamped. Query tokens are dropped after the blocks."""

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        low, high = config.stage_widths
        depth1, depth2 = config.decoder_stage_depths
        self.num_query_tokens = config.num_query_tokens
        self.blocks = transformer_blocks(config)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.up_conv1 = Upsample(config.width, high)
        self.up_conv2 = _stage(high, high, depth1)
        self.up_conv3 = _stage(high, low, depth2)
        self.up_conv4 = OutputUpsample(low, config.stem_width)
        self.gradient_checkpointing = False

    def forward(self, x_BLC: Tensor, image_shape: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Pixels and the input of the last convolution. `image_shape` (H, W) defaults to a square."""
        x_BLC = self.norm(run_blocks(self.blocks, x_BLC, self.gradient_checkpointing))[:, self.num_query_tokens :]
        height, width = _grid(x_BLC.shape[1], image_shape)
        x_BCHW = x_BLC.transpose(1, 2).reshape(x_BLC.shape[0], x_BLC.shape[2], height, width)
        x_BCHW = self.up_conv1(x_BCHW)
        for stage in (self.up_conv2, self.up_conv3):
            x_BCHW = run_blocks(stage, x_BCHW, True) if self.gradient_checkpointing else stage(x_BCHW)
        last_hidden = self.up_conv4.hidden(x_BCHW)
        return self.up_conv4.conv2(last_hidden), last_hidden


def _grid(num_patches: int, image_shape: tuple[int, int] | None) -> tuple[int, int]:
    if image_shape is None:
        side = round(num_patches**0.5)
        height, width = side, side
    else:
        height, width = image_shape[0] // DOWNSAMPLING, image_shape[1] // DOWNSAMPLING
    if height * width != num_patches:
        raise DataError(
            f"{num_patches} image positions do not fill a {height}x{width} grid; for an image that is not square give "
            f"image_shape=(H, W) in pixels"
        )
    return height, width
