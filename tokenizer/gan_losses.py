"""Losses of a generator and a discriminator on logits of any shape, and the weight that balances them.

`nll` is what the generator minimises besides the adversarial loss (pixels and LPIPS).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unitok.core.errors import ConfigError

# Bounds of the ratio of gradient norms per kind; the square root of kind 3 is taken after the clamp.
WEIGHT_BOUNDS: dict[int, tuple[float, float]] = {
    0: (0.0, 1e4),
    1: (0.015, 1e4),
    2: (0.1, 10.0),
    3: (0.0, 1e4),
    4: (0.015, 1.5),
}
# Guards the division only: gradient norms are of order 1e-2.
NORM_EPS = 1e-6


def hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """`mean(relu(1 - real)) + mean(relu(1 + fake))`, a scalar; 2 when the logits are 0."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def softplus(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """`mean(softplus(-real)) + mean(softplus(fake))`, the cross-entropy of the original GAN; a scalar."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def linear(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """`mean(fake) - mean(real)` (Wasserstein without its Lipschitz penalty), a scalar."""
    return fake_logits.mean() - real_logits.mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge,
    "softplus": softplus,
    "linear": linear,
}


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "hinge") -> Tensor:
    """The loss named `kind`. Raises ConfigError for an unknown name."""
    if kind not in DISCRIMINATOR_LOSSES:
        raise ConfigError(f"discriminator loss {kind!r} is unknown; expected one of {', '.join(DISCRIMINATOR_LOSSES)}")
    return DISCRIMINATOR_LOSSES[kind](real_logits, fake_logits)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """`-mean(fake)`, a scalar; the same for every discriminator loss."""
    return -fake_logits.mean()


@torch.no_grad()
def accuracy_percent(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Percent of real logits above 0 and of fake logits below 0; a logit of 0 counts for neither."""
    return (real_logits > 0).float().mean() * 100, (fake_logits < 0).float().mean() * 100


@torch.no_grad()
def adaptive_weight_from_norms(norm_nll: Tensor, norm_adversarial: Tensor, kind: int) -> Tensor:
    """The adversarial loss's weight: the ratio of both gradient norms at the decoder's last layer, kept in bounds.

    Kinds 0 to 4 differ in the bounds (`WEIGHT_BOUNDS`); kind 3 is the square root of kind 0. Raises ConfigError for
    another kind. Source: VQGAN (arXiv 2012.09841), equation 7; the bounds are those of UniTok's training code.
    """
    if kind not in WEIGHT_BOUNDS:
        kinds = ", ".join(map(str, WEIGHT_BOUNDS))
        raise ConfigError(f"adaptive weight of kind {kind!r} is unknown; expected one of {kinds}")
    low, high = WEIGHT_BOUNDS[kind]
    weight = (norm_nll / (norm_adversarial + NORM_EPS)).clamp(low, high)
    return weight.sqrt() if kind == 3 else weight
