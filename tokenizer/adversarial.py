"""The adversarial part of stage one: a small patch discriminator and the adaptive weight.

B batch, H W pixels, h w patches.
"""

import torch
from torch import Tensor, nn

from unitok.core.distributed import all_reduce_sum_, world_size
from unitok.core.errors import ConfigError


class PatchDiscriminator(nn.Module):
    """Strided convolutions: pixels `[B, 3, H, W]` -> one logit per patch `[B, 1, h, w]`.

    Group norm instead of batch norm: statistics of a batch would depend on how it is spread over ranks.
    """

    def __init__(self, channels: int = 32, num_layers: int = 3) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise ConfigError(f"discriminator.channels={channels}: expected a multiple of 4 (for 8 groups per norm)")
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for _ in range(1, num_layers):
            layers += [
                nn.Conv2d(width, width * 2, 4, stride=2, padding=1),
                nn.GroupNorm(8, width * 2),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        layers.append(nn.Conv2d(width, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        return self.layers(pixels_B3HW)


@torch.no_grad()
def adaptive_weight(
    last_hidden: Tensor, reconstruction_grad: Tensor, adversarial_grad: Tensor, kernel_shape: torch.Size
) -> Tensor:
    """Ratio of the two losses' gradient norms at the decoder's last convolution, at most 1e4 (VQGAN, equation 7).

    The gradient at that convolution follows from its input and the gradients at its output, so no parameter is touched
    (it may be partitioned). Both gradients are averaged over ranks before their norms, hence equal for any number.
    """
    gradients = torch.stack(
        [
            torch.nn.grad.conv2d_weight(last_hidden.float(), kernel_shape, gradient.float(), padding=1)
            for gradient in (reconstruction_grad, adversarial_grad)
        ]
    )
    norms = (all_reduce_sum_(gradients) / world_size()).flatten(1).norm(dim=1)
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
