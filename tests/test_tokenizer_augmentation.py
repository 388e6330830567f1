"""Augmentation of what the discriminator sees, against the recorded images and a plain loop."""

import math

import pytest
import reference
import torch
from reference import assert_near, numbers
from tiny import random_pixels

from unitok.core.rng import torch_rng
from unitok.tokenizer.diffaug import diff_augment, draw, gaussian_blur


def tensors(name):
    return reference.tensors(f"losses/{name}.safetensors")


def table(name):
    return numbers(f"losses/{name}.json")


@pytest.mark.parametrize("strength", [0.05, 0.25, 0.5, 1.0])
def test_blur_equals_the_recorded_one(strength):
    io = tensors("diffaug")
    assert_near(gaussian_blur(io["x"], strength), io[f"blur_{strength}"])


@pytest.mark.parametrize("draw_number", [21, 22])
@pytest.mark.parametrize(
    ("case", "settings"), [("prob1.cut0.2", (1, 0.2, 0)), ("prob0.5.cut0.4.blur0.3", (0.5, 0.4, 0.3))]
)
def test_augmented_images_equal_the_recorded_ones(draw_number, case, settings):
    io = tensors("diffaug")
    name = f"aug_{draw_number}"
    ours = diff_augment(io["x"], io[f"{name}.rand3"], io[f"{name}.rand01"], *settings)
    assert_near(ours, io[f"{name}.{case}"])


def loop_augment(image, amounts, cutout):
    """One image `[3, H, W]`, pixel by pixel."""
    height, width = image.shape[1:]
    most = [round(side * 0.125) for side in (height, width)]
    down, right = (math.floor(a * (2 * m + 1)) - m for a, m in zip(amounts[:2], most, strict=True))
    moved = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                moved[:, row, column] = image[:, row + down, column + right]
    moved = moved + amounts[2] - 0.5
    grey = moved.mean(0)
    moved = grey + (moved - grey) * amounts[3] * 2
    moved = moved.mean() + (moved - moved.mean()) * (amounts[4] + 0.5)
    sizes = [round(side * cutout) for side in (height, width)]
    centres = [math.floor(a * (s + 1 - c % 2)) for a, s, c in zip(amounts[5:], (height, width), sizes, strict=True)]
    for row in range(sizes[0]):
        for column in range(sizes[1]):
            y, x = row + centres[0] - sizes[0] // 2, column + centres[1] - sizes[1] // 2
            moved[:, min(max(y, 0), height - 1), min(max(x, 0), width - 1)] = 0
    return moved


@pytest.mark.parametrize("shape", [(16, 16), (18, 25)])
@pytest.mark.parametrize("cutout", [0.0, 0.2, 0.45])
def test_augmentation_equals_a_loop_also_in_gradient(shape, cutout):
    pixels = random_pixels(3, 3, *shape).requires_grad_()
    _, amounts = draw(3, torch_rng("augment", 1))
    ours = diff_augment(pixels, torch.zeros(3), amounts, 1.0, cutout, 0.0)
    loops = torch.stack([loop_augment(pixels[i], amounts[:, i].flatten().tolist(), cutout) for i in range(3)])
    torch.testing.assert_close(ours, loops, atol=1e-6, rtol=1e-5)
    weights = random_pixels(*ours.shape, seed=5)
    one, other = (torch.autograd.grad((x * weights).sum(), pixels)[0] for x in (ours, loops))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_augmentation_of_a_part_of_the_batch_is_that_of_the_whole():
    pixels = random_pixels(4, 3, 24, 16)
    rand3, amounts = draw(4, torch_rng("augment", 2))
    whole = diff_augment(pixels, rand3, amounts, 1.0, 0.2, 0.3)
    for rows in (slice(0, 2), slice(2, 4)):
        torch.testing.assert_close(diff_augment(pixels[rows], rand3, amounts[:, rows], 1.0, 0.2, 0.3), whole[rows])


def test_without_probability_and_blur_nothing_changes():
    pixels = random_pixels(2, 3, 16, 16)
    assert torch.equal(diff_augment(pixels, torch.zeros(3), draw(2, torch_rng("a"))[1], 0.0, 0.5, 0.0), pixels)


def test_blur_of_an_image_of_few_pixels():
    pixels = random_pixels(1, 3, 4, 3)
    assert gaussian_blur(pixels, 1.0).shape == pixels.shape
    torch.testing.assert_close(gaussian_blur(torch.full((1, 3, 4, 3), 0.7), 1.0), torch.full((1, 3, 4, 3), 0.7))
