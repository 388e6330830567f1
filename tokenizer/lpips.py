"""LPIPS with VGG16 (arXiv 1801.03924): distance of normalised features, weighted per channel by learned heads.

B images, H W pixels, C channels of a slice. Parameter names are those of UniTok's released `lpips_with_vgg.pth`.
Images are not resized. The released training code leaves LPIPS out below 48 pixels a side, here its weight decides; 16
is the least that the four poolings allow.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from unitok.core.errors import UserError
from unitok.tokenizer.weights import LPIPS_WEIGHTS, Foreign, find_weights, load_strict, read_weights

# Widths of the convolutions of each slice; a max pooling stands before every slice but the first
SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and deviation for pixels in [-1, 1]
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10
# Packages that ship the heads for VGG16, with the place inside
HEADS = (("torchmetrics", "functional/image/lpips_models/vgg.pth"), ("lpips", "weights/v0.1/vgg.pth"))


class _VGG16(nn.Module):
    """The thirteen convolutions of VGG16, cut after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""

    def __init__(self) -> None:
        super().__init__()
        before = 3
        for index, widths in enumerate(SLICES, start=1):
            layers: list[nn.Module] = [] if index == 1 else [nn.MaxPool2d(2)]
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.add_module(f"slice{index}", nn.Sequential(*layers))

    def forward(self, x_B3HW: Tensor) -> Iterator[Tensor]:
        for part in self.children():
            x_B3HW = part(x_B3HW)
            yield x_B3HW


class _Head(nn.Module):
    """Weight per channel. Position 0 was a dropout, which a fixed network does not use."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.model(x_BCHW)


class LPIPS(nn.Module):
    """Frozen perceptual distance; make it with `from_file` or `random`, since a bare one has torch's initial weights.

    It holds 59 MB and has no state worth saving: keep it out of the trained model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale_inv", torch.tensor(SCALE).view(1, 3, 1, 1).reciprocal(), persistent=False)
        self.net = _VGG16()
        self.lins = nn.ModuleList(_Head(widths[-1]) for widths in SLICES)
        self.requires_grad_(False).eval()

    def forward(self, reconstruction_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        """Mean distance over the batch, a scalar, for pixels in [-1, 1]; gradient flows to the first argument only."""
        assert reconstruction_B3HW.shape == target_B3HW.shape, (reconstruction_B3HW.shape, target_B3HW.shape)
        if min(reconstruction_B3HW.shape[-2:]) < 16:
            raise UserError(f"LPIPS needs at least 16 pixels a side, got {list(reconstruction_B3HW.shape)}")
        with torch.no_grad():
            targets = [_normalised(x) for x in self.net(self._whitened(target_B3HW))]
        distance = reconstruction_B3HW.new_zeros((), dtype=torch.float32)
        features = self.net(self._whitened(reconstruction_B3HW))
        for x_BCHW, target_BCHW, head in zip(features, targets, self.lins, strict=True):
            # Each pixel of a slice counts the same, so the mean over pixels and images is that over images
            distance = distance + head((_normalised(x_BCHW) - target_BCHW).square()).float().mean()
        return distance

    def _whitened(self, pixels_B3HW: Tensor) -> Tensor:
        return (pixels_B3HW.float() - self.shift) * self.scale_inv

    @classmethod
    def from_file(cls, path: str | Path | None, names: Foreign = LPIPS_WEIGHTS) -> "LPIPS":
        """Weights of `path` (a file or `hub:OWNER/REPOSITORY/FILE`) in one of two layouts.

        UniTok's `lpips_with_vgg.pth` (`net.slice1.0.weight`, `lins.0.model.1.weight`), or torchvision's VGG16
        (`features.0.weight`), which is completed by the heads that torchmetrics or lpips ships.
        Raises UserError without a file, and CheckpointError for a file that cannot be read or does not fit.
        """
        file = find_weights(names.field, path, names.what, names.hint)
        state = read_weights(file)
        model = cls()
        if "features.0.weight" in state:
            state = _from_torchvision(state) | _shipped_heads()
        load_strict(model, state, "LPIPS with VGG16", file)
        return model

    @classmethod
    def random(cls, seed: int = 0) -> "LPIPS":
        """The same weights for the same seed on every machine: for tests, and for trying out without the file."""
        model = cls()
        with torch.no_grad():
            for index, (key, value) in enumerate(sorted(model.state_dict().items())):
                noise = torch.randn(
                    value.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed + index)
                )
                if value.dim() == 1:
                    noise *= 0.05
                elif key.startswith("lins."):
                    noise = noise.abs() * 0.1  # a distance needs weights that are not negative
                else:
                    noise *= math.sqrt(2 / value[0].numel())
                value.copy_(noise)
        return model


def _normalised(x_BCHW: Tensor) -> Tensor:
    """Length 1 over the channels. vector_norm has gradient 0 at 0, where a square root has none."""
    x_BCHW = x_BCHW.float()
    return x_BCHW / (torch.linalg.vector_norm(x_BCHW, dim=1, keepdim=True) + EPS)


def _from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the slices for `features.N`; the classifier is left out."""
    places, position = {}, 0
    for index, widths in enumerate(SLICES, start=1):
        pooling = int(index > 1)
        for offset in range(pooling + 2 * len(widths)):
            places[str(position)] = f"net.slice{index}.{offset}"
            position += 1
    renamed = {}
    for key, value in state.items():
        block, _, rest = key.partition(".")
        if block == "classifier":
            continue
        number, _, kind = rest.partition(".")
        # What is no layer of VGG16 keeps its name and is reported as unexpected
        renamed[f"{places[number]}.{kind}" if block == "features" and number in places else key] = value
    return renamed


def _shipped_heads() -> dict[str, Tensor]:
    for package, place in HEADS:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        file = Path(spec.origin).parent / place
        if file.is_file():
            return {f"lins.{key.removeprefix('lin')}": value for key, value in read_weights(file).items()}
    packages = " or ".join(package for package, _ in HEADS)
    raise UserError(f"the heads of LPIPS for torchvision's VGG16 come with {packages}; install one of them")
