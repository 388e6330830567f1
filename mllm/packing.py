"""A look at whether a backbone keeps apart what stands in one packed row.

transformers makes block-diagonal masks from positions that begin anew, but not in every family: some ignore positions
or carry a state along the row, and would let a sample see the one before it without a word.
"""

import torch
from torch import nn

from unitok.core.errors import ConfigError

_LENGTH = 8


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """ConfigError unless packed sequences get the hidden states `[T, D]` that each has alone.

    The backbone must run as it does in training (device, precision, attention, partitions; every rank calls), so this
    belongs into the first packed forward pass. Both sequences stand in front once, where nothing is before them, and
    once behind the other: in one pass of equal shapes, so that nothing but a leak makes more than a rounding error.
    """
    backbone, device = model.backbone, next(model.backbone.parameters()).device
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().num_embeddings
    first, second = torch.randint(size, (2, _LENGTH), generator=generator).to(device)
    ids_BT = torch.stack([torch.cat([first, second]), torch.cat([second, first])])
    positions_BT = torch.arange(_LENGTH, device=device).repeat(2, 2)
    # flash-attn computes in lower precision alone; all else is seen most clearly without
    lower = torch.is_autocast_enabled(device.type) and backbone.config._attn_implementation.startswith("flash")
    training = backbone.training
    backbone.eval()  # no dropout
    try:
        with torch.autocast(device.type, enabled=lower):
            hidden_BTD = model._packed_hidden_states(model.get_input_embeddings()(ids_BT), positions_BT)
    finally:
        backbone.train(training)
    rounded = lower or hidden_BTD.dtype != torch.float32
    front, behind = hidden_BTD[:, :_LENGTH].float(), hidden_BTD[:, _LENGTH:].flip(0).float()
    difference = float(((front - behind).norm(dim=-1) / front.norm(dim=-1).clamp(min=1e-12)).max())
    # what sees another sample changes by a large part of itself, least in a small new model in fp32: by some percent
    if not difference < (2e-2 if rounded else 1e-3):
        config = backbone.config
        raise ConfigError(
            f"data.pack=true: with a backbone of model_type={config.model_type} (attention "
            f"{config._attn_implementation}) samples of one row see each other (hidden states differ by "
            f"{difference:.2g} of their size from those alone); set data.pack=false"
        )
