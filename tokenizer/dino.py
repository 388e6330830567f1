"""A discriminator on the features of a frozen DINOv2 (after StyleGAN-T, arXiv 2301.09515).

B images, H W pixels, h w patches of a grid, L of them, C feature channels, N logits of all heads together.

Parameter names are those of `dinov2_vits14_pretrain.pth` and of UniTok's discriminator, so both can be exchanged.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.core.errors import ConfigError, UserError
from unitok.tokenizer.dino_heads import NORM_EPS, make_head
from unitok.tokenizer.weights import DINO_WEIGHTS, Foreign, find_weights, load_strict, read_weights

# The released DINOv2 resizes its position embedding by (side + 0.1) / side of training, and is used like that
POSITION_OFFSET = 0.1
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
KEY_DEPTHS = (0, 2, 5, 8, 11)
CROP_PROBABILITY = 0.5


@dataclass(frozen=True)
class DinoConfig:
    """Sizes of the transformer; the defaults are DINOv2-S. `image_size` is what the position embedding is made for."""

    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 14
    image_size: int = 518
    mlp_ratio: float = 4.0


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        qkv = self.qkv(x_BLC).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLC)))


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x_BLC: Tensor) -> Tensor:
        return x_BLC * self.gamma


class _Block(nn.Module):
    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = _Attention(width, config.num_heads)
        self.ls1 = _LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = _MLP(width, int(width * config.mlp_ratio))
        self.ls2 = _LayerScale(width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC = x_BLC + self.ls1(self.attn(self.norm1(x_BLC)))
        return x_BLC + self.ls2(self.mlp(self.norm2(x_BLC)))


class _PatchEmbed(nn.Module):
    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, stride=config.patch_size)


class FrozenDino(nn.Module):
    """DINOv2 without registers; never trained, but gradients flow through it to the pixels."""

    def __init__(self, config: DinoConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DinoConfig()
        self.grid = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, config.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, config.embed_dim))  # unused, but part of the file
        self.patch_embed = _PatchEmbed(config)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)  # unused: features are taken before it
        self.requires_grad_(False).eval()

    def forward(self, x_B3HW: Tensor, key_depths: Sequence[int]) -> list[Tensor]:
        """Tokens `[B, 1 + L, C]`, the class token first, after each block of `key_depths` (ascending).

        Pixels are normalised as for ImageNet; both sides are multiples of the patch.
        """
        x_BChw = self.patch_embed.proj(x_B3HW)
        height, width = x_BChw.shape[-2:]
        x_BLC = x_BChw.flatten(2).transpose(1, 2).float()  # under autocast only the products are rounded
        x_BLC = torch.cat([self.cls_token.expand(x_BLC.shape[0], -1, -1), x_BLC], dim=1)
        x_BLC = x_BLC + self._positions(height, width)
        taken = []
        for depth, block in enumerate(self.blocks[: max(key_depths) + 1]):
            x_BLC = block(x_BLC)
            if depth in key_depths:
                taken.append(x_BLC)
        return taken

    def _positions(self, height: int, width: int) -> Tensor:
        """`[1, 1 + L, C]`, resized by bicubic interpolation without antialiasing if the grid is another one."""
        if height == width == self.grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        scale = [(side + POSITION_OFFSET) / self.grid for side in (height, width)]
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        assert patches.shape[-2:] == (height, width), (patches.shape, height, width)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    @classmethod
    def from_file(
        cls, path: str | Path | None, config: DinoConfig | None = None, names: Foreign = DINO_WEIGHTS
    ) -> "FrozenDino":
        """Weights of `path` (a file or `hub:OWNER/REPOSITORY/FILE`), all of them and no others.

        Raises UserError without a file, and CheckpointError for a file that cannot be read or does not fit.
        """
        file = find_weights(names.field, path, names.what, names.hint)
        model = cls(config)
        load_strict(model, read_weights(file), f"DINOv2 of width {model.config.embed_dim}", file)
        return model

    @classmethod
    def random(cls, config: DinoConfig | None = None, seed: int = 0) -> "FrozenDino":
        """The same weights for the same seed on every machine: for tests, and for trying out without the file."""
        model = cls(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in sorted(model.named_parameters()):
                if name.endswith(("_token", "pos_embed")):
                    value.normal_(0, 0.1, generator=generator)
                elif value.dim() > 1:
                    value.normal_(0, value[0].numel() ** -0.5, generator=generator)
                elif name.endswith("bias"):
                    value.zero_()
        return model


class DinoDiscriminator(nn.Module):
    """Small convolutional heads on features of several depths: pixels `[B, 3, H, W]` -> logits `[B, N]`.

    N is the number of heads times that of patches. The DINO network is no submodule: it is neither trained nor saved,
    stays float32 (autocast still applies inside it), and only follows the discriminator from device to device.

    Images become squares of `image_side` pixels. None, the default, is the largest multiple of the patch that fits the
    image (56 of 64, 252 of 256). They are cropped at `crop`, or else resized: by averaging ("area") if they are higher
    than the square, bicubically if not, and not at all if they fit.
    """

    def __init__(
        self,
        dino: FrozenDino,
        key_depths: Sequence[int] = KEY_DEPTHS,
        kernel_size: int = 9,
        norm: str = "gn",
        spectral_norm: bool = False,
        image_side: int | None = None,
    ) -> None:
        super().__init__()
        width, depth, patch = dino.config.embed_dim, dino.config.depth, dino.config.patch_size
        self.key_depths = tuple(key_depths)
        if list(self.key_depths) != sorted({d for d in self.key_depths if 0 <= d < depth}) or not self.key_depths:
            raise ConfigError(f"key_depths={list(key_depths)}: expected ascending numbers of the {depth} DINO blocks")
        # The circular padding takes at most all patches
        self.least_side = patch * math.ceil(math.sqrt(max(2, kernel_size) // 2))
        if image_side is not None and (image_side % patch or image_side < self.least_side):
            raise ConfigError(f"image_side={image_side}: expected a multiple of {patch}, at least {self.least_side}")
        self.image_side = image_side
        self._dino = (dino,)  # in a tuple: a plain attribute would become a submodule
        mean, std = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        self.register_buffer("x_scale", 0.5 / std)
        self.register_buffer("x_shift", (0.5 - mean) / std)
        self.heads = nn.ModuleList(make_head(width, kernel_size, norm, spectral_norm) for _ in self.key_depths)

    @property
    def dino(self) -> FrozenDino:
        return self._dino[0]

    def side(self, height: int, width: int) -> int:
        """Side of the square that DINO gets for images of this size."""
        if self.image_side is not None:
            return self.image_side
        patch = self.dino.config.patch_size
        return max(self.least_side, min(height, width) // patch * patch)

    def draw_crop(self, height: int, width: int, generator: torch.Generator) -> tuple[int, int] | None:
        """With probability 1/2 a place to crop at, if both sides are larger than DINO's; None is to resize.

        The same numbers are drawn either way, so the generator's later numbers do not depend on the outcome.
        """
        side = self.side(height, width)
        coin, row, column = torch.rand(3, generator=generator, device=generator.device).tolist()
        if height <= side or width <= side or coin > CROP_PROBABILITY:
            return None
        return int(row * (height - side + 1)), int(column * (width - side + 1))

    def forward(self, pixels_B3HW: Tensor, crop: tuple[int, int] | None = None) -> Tensor:
        """Logits `[B, N]`, the first head's first, of pixels in [-1, 1].

        `crop` is (row, column) of the square's upper left corner, from `draw_crop`; None resizes.
        """
        x_B3HW = self._square(pixels_B3HW.float() * self.x_scale + self.x_shift, crop)
        logits = []
        for tokens_BLC, head in zip(self.dino(x_B3HW, self.key_depths), self.heads, strict=True):
            x_BCL = (tokens_BLC[:, 1:] + tokens_BLC[:, :1]).transpose(1, 2)
            logits.append(head(x_BCL.to(head[2].bias.dtype)).flatten(1))
        return torch.cat(logits, dim=1)

    def _square(self, x_B3HW: Tensor, crop: tuple[int, int] | None) -> Tensor:
        height, width = x_B3HW.shape[-2:]
        side = self.side(height, width)
        if crop is not None:
            row, column = crop
            if not (0 <= row <= height - side and 0 <= column <= width - side):
                raise UserError(f"crop={crop} of {side} pixels does not lie in an image of {height} x {width}")
            return x_B3HW[:, :, row : row + side, column : column + side]
        if height == width == side:
            return x_B3HW
        return F.interpolate(x_B3HW, size=(side, side), mode="area" if height > side else "bicubic")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DinoDiscriminator":
        """Conversion to bfloat16 or float16 is for the heads only; DINO and its input follow to the device."""
        exact = {name: getattr(self, name) for name in ("x_scale", "x_shift")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, value.to(getattr(self, name).device))
        self.dino.to(self.x_scale.device)
        return self
