"""ViTamin encoder (arXiv 2404.02132) made of timm's parts: two convolutional stages, then ViT blocks with gated MLPs.

B batch, L tokens (query tokens first, then patches row by row), C width.
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unitok.core.errors import DataError
from unitok.tokenizer.configuration import DOWNSAMPLING, UniTokConfig

NORM_EPS = 1e-6


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382) that takes its draws from outside, so that they belong to the samples.

    `scales_B` is 0 for the samples that skip the branch and 1 / (1 - rate) for the others; None changes nothing.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.scales_B = rate, None

    def forward(self, x_BLC: Tensor) -> Tensor:
        if self.scales_B is None or not self.training:
            return x_BLC
        return x_BLC * self.scales_B.to(x_BLC.dtype).view(-1, 1, 1)


def transformer_blocks(config: UniTokConfig) -> nn.ModuleList:
    """The pre-norm blocks that encoder and decoder share in form (not in weights)."""
    blocks = nn.ModuleList(
        Block(
            config.width,
            config.num_heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
            mlp_layer=GeGluMlp,
            act_layer="gelu_tanh",
        )
        for _ in range(config.depth)
    )
    for index, block in enumerate(blocks):
        rate = config.drop_path * index / max(1, config.depth - 1)
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    return blocks


def set_drop_path(blocks: nn.ModuleList, draws_BN: Tensor | None) -> None:
    """Give two uniform draws per block, `[B, 2 * depth]`, to the blocks' DropPath modules (None: no dropping)."""
    for index, block in enumerate(blocks):
        for offset, module in enumerate((block.drop_path1, block.drop_path2)):
            if draws_BN is None or module.rate == 0:
                module.scales_B = None
            else:
                module.scales_B = (draws_BN[:, 2 * index + offset] >= module.rate) / (1 - module.rate)


def run_blocks(blocks: nn.ModuleList, x_BLC: Tensor, checkpointing: bool) -> Tensor:
    """Run the blocks; with `checkpointing` activations are recomputed in the backward pass."""
    for block in blocks:
        x_BLC = checkpoint(block, x_BLC, use_reentrant=False) if checkpointing and block.training else block(x_BLC)
    return x_BLC


class ViTaminEncoder(nn.Module):
    """Pixels `[B, 3, H, W]` in [-1, 1] -> tokens `[B, num_query_tokens + H/16 * W/16, C]`.

    Raises DataError when H or W is not a multiple of 16.
    """

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        sizes = VitCfg(
            embed_dim=(*config.stage_widths, config.width),
            depths=(*config.stage_depths, config.depth),
            stem_width=config.stem_width,
        )
        self.backbone = MbConvStages(sizes)
        self.query_tokens = (
            nn.Parameter(torch.zeros(1, config.num_query_tokens, config.width)) if config.num_query_tokens else None
        )
        # Zeros in every known checkpoint and never trained, but part of the released state: ViTamin needs no positions.
        self.register_buffer("pos_embed", torch.zeros(1, 1, config.width))
        self.blocks = transformer_blocks(config)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.gradient_checkpointing = False

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        height, width = pixels_B3HW.shape[-2:]
        if pixels_B3HW.dim() != 4 or pixels_B3HW.shape[1] != 3 or height % DOWNSAMPLING or width % DOWNSAMPLING:
            raise DataError(
                f"pixels of shape {list(pixels_B3HW.shape)}: expected [B, 3, H, W] with H and W multiples of "
                f"{DOWNSAMPLING}; resize or crop the image first"
            )
        x_BLC = self.backbone(pixels_B3HW).flatten(2).transpose(1, 2)
        if self.query_tokens is not None:
            x_BLC = torch.cat([self.query_tokens.expand(x_BLC.shape[0], -1, -1), x_BLC], dim=1)
        return self.norm(run_blocks(self.blocks, x_BLC + self.pos_embed, self.gradient_checkpointing))
