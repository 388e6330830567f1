"""Differentiable augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738), with a fading blur.

B images, H W pixels. All random numbers are arguments. Ranks agree when the numbers are drawn for the *global* batch
from (seed, step), and each rank passes its own rows:

    rand3, rand01 = draw(global_batch, torch_rng("diffaug", seed, step))
    rows = slice(rank * B, (rank + 1) * B)
    diff_augment(images_B3HW, rand3, rand01[:, rows], probability, cutout, blur)

Real and reconstructed images that shall be compared fairly get the same numbers or numbers of two `draw`s.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SHIFT = 0.125  # of the side


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers in [0, 1) for `diff_augment`: `rand3` [3] decides what is done, `rand01` [7, batch, 1, 1] how much.

    They live on the generator's device; leave it on the CPU, since `rand3` is read there.
    """
    rand3 = torch.rand(3, generator=generator, device=generator.device)
    return rand3, torch.rand(7, batch, 1, 1, generator=generator, device=generator.device)


def diff_augment(
    images_B3HW: Tensor, rand3: Tensor, rand01_7B11: Tensor, probability: float, cutout: float, blur: float
) -> Tensor:
    """Blur, then with `probability` each: shift, change of colours, a square cut out. `[B, 3, H, W]`, differentiable.

    `rand3` decides for the whole batch, `rand01_7B11` holds per image: shift of rows and of columns, brightness,
    saturation, contrast, row and column of the cut. `cutout` is the cut's share of the side, `blur` in [0, 1] the
    strength of the blur (0: none), which training fades out.
    """
    assert rand01_7B11.shape[:2] == (7, images_B3HW.shape[0]), (rand01_7B11.shape, images_B3HW.shape)
    amounts = rand01_7B11.to(images_B3HW.device)
    # With probability 0 nothing happens, even for a draw of exactly 0
    shift, colour, cut = (probability > 0 and value <= probability for value in rand3.tolist())
    images_B3HW = gaussian_blur(images_B3HW, blur)
    if shift:
        images_B3HW = _shift(images_B3HW, amounts[0].flatten(), amounts[1].flatten())
    if colour:
        images_B3HW = _change_colours(images_B3HW, *amounts[2:5])
    if cut:
        images_B3HW = _cut_out(images_B3HW, amounts[5].flatten(), amounts[6].flatten(), cutout)
    return images_B3HW


def gaussian_blur(images_B3HW: Tensor, strength: float) -> Tensor:
    """Blur with weights `2^-(distance / sigma)^2` up to 3 sigma, `sigma = strength * sqrt(H / 2)`; mirrored borders."""
    channels, height, width = images_B3HW.shape[1:]
    sigma = math.sqrt(height / 2) * strength
    # Mirroring needs a radius below the side; only images of a few pixels come near
    radius = min(math.floor(3 * sigma), height - 1, width - 1)
    if radius < 1:
        return images_B3HW
    distance = torch.arange(-float(radius), radius + 1, device=images_B3HW.device)
    kernel = torch.exp2(-(distance / sigma).square())
    kernel = (kernel / kernel.sum()).to(images_B3HW.dtype).expand(channels, 1, -1)
    rows = F.pad(images_B3HW, (0, 0, radius, radius), mode="reflect")
    columns = F.pad(F.conv2d(rows, kernel[..., None], groups=channels), (radius, radius, 0, 0), mode="reflect")
    return F.conv2d(columns, kernel[:, :, None], groups=channels)


def _shift(images_B3HW: Tensor, row_B: Tensor, column_B: Tensor) -> Tensor:
    """Move the content by up to an eighth of the side; what comes in is 0."""
    for dim, amount_B in ((2, row_B), (3, column_B)):
        side = images_B3HW.shape[dim]
        most = round(side * MAX_SHIFT)
        offset_B = torch.floor(amount_B * (2 * most + 1)).long() - most
        source_BS = torch.arange(side, device=images_B3HW.device) + offset_B[:, None]
        inside_BS = (source_BS >= 0) & (source_BS < side)
        shape = (-1, 1, side, 1) if dim == 2 else (-1, 1, 1, side)
        source = source_BS.clamp(0, side - 1).view(shape).expand_as(images_B3HW)
        images_B3HW = images_B3HW.gather(dim, source) * inside_BS.view(shape)
    return images_B3HW


def _change_colours(images_B3HW: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add up to 0.5, scale about the grey value by 0 to 2 and about the mean by 0.5 to 1.5; amounts are [B, 1, 1]."""
    images_B3HW = images_B3HW + (brightness[:, None] - 0.5)
    grey = images_B3HW.mean(dim=1, keepdim=True)
    images_B3HW = (images_B3HW - grey) * (saturation[:, None] * 2) + grey
    mean = images_B3HW.mean(dim=(1, 2, 3), keepdim=True)
    return (images_B3HW - mean) * (contrast[:, None] + 0.5) + mean


def _cut_out(images_B3HW: Tensor, row_B: Tensor, column_B: Tensor, share: float) -> Tensor:
    """Set a rectangle of `share` of each side, centred anywhere and cut off at the borders, to 0."""
    covered = []
    for side, centre_B in zip(images_B3HW.shape[2:], (row_B, column_B), strict=True):
        size = round(side * share)
        if size < 1:
            return images_B3HW
        first_B = torch.floor(centre_B * (side + 1 - size % 2)).long() - size // 2
        # The clamp keeps at least the border covered when a cut of one or two pixels falls outside
        low_B, high_B = first_B.clamp(0, side - 1), (first_B + size - 1).clamp(0, side - 1)
        position = torch.arange(side, device=images_B3HW.device)
        covered.append((position >= low_B[:, None]) & (position <= high_B[:, None]))
    return images_B3HW * ~(covered[0][:, None, :, None] & covered[1][:, None, None, :])
