"""Summed cross-entropies of a linear head whose logits are never all in memory.

N tokens, V classes, D width; the code head has K sub-codes for each token.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unitok.core.errors import ConfigError

# Logits of one chunk: 64 MiB in fp32, and as much again for their gradient. On a GPU four times as many: there every
# chunk reads the head's weights and adds to their gradient: of a large vocabulary that takes longer than its products.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_GPU = 2**24, 2**26

# loss, number of right guesses (one for each sub-code), sum of the squared largest logits. A plain tuple: these are
# outputs of modules, and ZeRO must find the tensors in them.
Sums = tuple[Tensor, Tensor, Tensor]


def sums_of_logits(logits: Tensor, targets: Tensor) -> Sums:
    """Sums over logits `[N, V]` (or `[N, K, V]`) and targets `[N]` (`[N, K]`), in fp32."""
    logits = logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
    largest, guess = logits.max(dim=-1)
    return loss, (guess == targets).float().sum(0), largest.square().sum()


def summed_losses(
    head: Callable[[Tensor], Tensor], features: Tensor, targets: Tensor, num_classes: int, method: str
) -> Sums:
    """Sums for the logits `head(features)`, with gradients.

    "plain" computes them all at once; "chunked" so many tokens at a time that a chunk has at most CHUNK_ELEMENTS(_GPU)
    logits, which the backward pass computes again.

    Call it inside the forward of the module that owns the head's weights. ZeRO-3 then gathers them once each way, and
    the number of chunks, which differs between ranks, changes no communication.
    """
    rows = features.shape[0]
    if method != "plain":
        elements = CHUNK_ELEMENTS_GPU if features.is_cuda else CHUNK_ELEMENTS
        rows = max(1, elements // (targets[:1].numel() * num_classes or 1))
    if features.shape[0] <= rows:
        return sums_of_logits(head(features), targets)

    def one_chunk(own_features: Tensor, own_targets: Tensor) -> Sums:
        return sums_of_logits(head(own_features), own_targets)

    parts = [
        # nothing in a chunk is random, so there is no random state to keep
        checkpoint(one_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(features.split(rows), targets.split(rows), strict=True)
    ]
    loss, correct, squared = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return loss, correct, squared


class TextHead(nn.Linear):
    """The text head: logits, or with targets `[N]` for features `[N, D]` the sums of their losses.

    "liger" leaves the squared logits at 0: text has no z-term.
    """

    def forward(self, features: Tensor, targets: Tensor | None = None, method: str = "chunked") -> Any:
        if targets is None:
            return super().forward(features)
        if method == "liger" and targets.numel():  # its kernel needs at least one token
            return _liger_sums(features, self.weight, targets)
        return summed_losses(super().forward, features, targets, self.out_features, method)


def _liger_sums(features_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Sums:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    # summed over chunks of tokens: in bf16 the weight's gradient would lose what the later ones add
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32, return_token_accuracy=True)
    if torch.is_autocast_enabled(features_ND.device.type):  # the kernel takes both in one dtype
        dtype = torch.get_autocast_dtype(features_ND.device.type)
        features_ND, weight_VD = features_ND.to(dtype), weight_VD.to(dtype)
    found = loss(weight_VD, features_ND, targets_N)
    return found.loss, found.token_accuracy.detach() * targets_N.numel(), found.loss.new_zeros(())


def choose_method(setting: str, device: torch.device) -> str:
    """ "chunked", "liger" or "plain" for the setting `cross_entropy`; ConfigError when liger is asked for in vain."""
    from importlib.util import find_spec

    available = find_spec("liger_kernel") is not None and device.type == "cuda"
    if setting == "auto":
        return "liger" if available else "chunked"
    if setting == "liger" and not available:
        raise ConfigError(
            f"cross_entropy=liger needs a CUDA GPU (the run is on {device.type}) and liger-kernel: install "
            "unitok[liger], or use cross_entropy=chunked"
        )
    return setting
