"""The adversarial part of stage one: discriminators, what they see, and the adaptive weight.

B images of a micro-batch on this rank, H W pixels, h w patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.core.distributed import all_reduce_sum_, rank, world_size
from unitok.core.errors import ConfigError
from unitok.core.rng import torch_rng
from unitok.tokenizer.diffaug import diff_augment, draw
from unitok.tokenizer.dino import DinoDiscriminator, FrozenDino
from unitok.tokenizer.gan_losses import accuracy_percent, adaptive_weight_from_norms, discriminator_loss
from unitok.tokenizer.settings import RANDOM_WEIGHTS, DiscriminatorConfig

Crop = tuple[int, int] | None


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

    def draw_crop(self, height: int, width: int, generator: torch.Generator) -> Crop:
        """It sees whole images."""
        return None

    def forward(self, pixels_B3HW: Tensor, crop: Crop = None) -> Tensor:
        return self.layers(pixels_B3HW)


class Discriminator(nn.Module):
    """A network that judges several batches in one call, since an engine may run once per backward pass only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, views: list[Tensor], crops: list[Crop]) -> list[Tensor]:
        """Logits of each of the `views` (pixels `[B, 3, H, W]`), which the network sees at its crop."""
        return [self.network(view, crop).float() for view, crop in zip(views, crops, strict=True)]


def build_discriminator(config: DiscriminatorConfig) -> Discriminator:
    """The network that the configuration names; UserError where weights of others are missing or do not fit."""
    if config.kind == "patch":
        return Discriminator(PatchDiscriminator(config.channels, config.num_layers))
    random = config.dino_weights == RANDOM_WEIGHTS
    dino = FrozenDino.random() if random else FrozenDino.from_file(config.dino_weights)
    return Discriminator(
        DinoDiscriminator(dino, config.key_depths, config.kernel_size, config.norm, config.spectral_norm)
    )


class Augmentation:
    """What the discriminator gets to see of a micro-batch. All draws belong to (seed, step, micro-batch, purpose) and
    the place of an image in the *global* micro-batch, so they do not depend on how it is spread over ranks."""

    def __init__(self, config: DiscriminatorConfig, seed: int, step: int, micro_index: int) -> None:
        self.config, self.key = config, (seed, step, micro_index)
        past = step - config.start_step
        self.blur = max(0.0, 1 - past / config.blur_steps) if config.blur_steps else 0.0

    def view(self, pixels_B3HW: Tensor, purpose: str) -> Tensor:
        """Augmented with the configured probability, and blurred as long as the blur has not faded out."""
        return self._augmented(pixels_B3HW, purpose, self.config.augment_probability, self.config.cutout, self.blur)

    def strong_view(self, pixels_B3HW: Tensor, purpose: str) -> Tensor:
        """Always augmented, never blurred: the other side of balanced consistency."""
        return self._augmented(pixels_B3HW, purpose, 1.0, self.config.consistency_cutout, 0.0)

    def crop(self, network: nn.Module, pixels_B3HW: Tensor, purpose: str) -> Crop:
        """Where the network looks at these images."""
        height, width = pixels_B3HW.shape[-2:]
        return network.draw_crop(height, width, torch_rng("crop", purpose, *self.key))

    def _augmented(self, pixels: Tensor, purpose: str, probability: float, cutout: float, blur: float) -> Tensor:
        if probability == 0 and blur == 0:
            return pixels
        count = pixels.shape[0]
        rand3, rand01 = draw(count * world_size(), torch_rng("augmentation", purpose, *self.key))
        own = slice(rank() * count, (rank() + 1) * count)
        return diff_augment(pixels, rand3, rand01[:, own], probability, cutout, blur)


def adversarial_loss(discriminator: Discriminator, fake_B3HW: Tensor, augmentation: Augmentation) -> Tensor:
    """`-mean(D(fake))`, which the generator minimises; to be called on the bare module, not on its engine."""
    view = augmentation.view(fake_B3HW, "generator")
    (logits,) = discriminator([view], [augmentation.crop(discriminator.network, view, "generator")])
    return -logits.mean()


def discriminator_losses(
    engine: nn.Module, real_B3HW: Tensor, fake_B3HW: Tensor, augmentation: Augmentation, config: DiscriminatorConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss on real and reconstructed images, by one call of its engine, and what to log of it.

    With balanced consistency, real and reconstructed images are judged again under strong augmentation, and the mean
    squared change of the logits is added.
    """
    network = engine.module.network
    views = [torch.cat([augmentation.view(real_B3HW, "real"), augmentation.view(fake_B3HW, "fake")])]
    if config.consistency > 0:
        strong = augmentation.strong_view(real_B3HW, "strong real"), augmentation.strong_view(fake_B3HW, "strong fake")
        views.append(torch.cat(strong))
    crop = augmentation.crop(network, real_B3HW, "discriminator")  # both views of an image at the same place
    logits = engine(views, [crop] * len(views))
    real_logits, fake_logits = logits[0].chunk(2)
    loss = discriminator_loss(real_logits, fake_logits, config.loss)
    metrics = {"discriminator": loss}
    if config.consistency > 0:
        consistency = F.mse_loss(logits[1], logits[0])
        metrics["consistency"] = consistency
        loss = loss + config.consistency * consistency
    metrics["accuracy_real"], metrics["accuracy_fake"] = accuracy_percent(real_logits, fake_logits)
    return loss, metrics


@torch.no_grad()
def adaptive_weight(
    last_hidden: Tensor, reconstruction_grad: Tensor, adversarial_grad: Tensor, kernel_shape: torch.Size, kind: int = 0
) -> Tensor:
    """Ratio of the two losses' gradient norms at the decoder's last convolution (VQGAN, equation 7), within bounds.

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
    return adaptive_weight_from_norms(norms[0], norms[1], kind)
