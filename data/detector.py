"""Finds the objects of shapes-world images: the judge of reconstructions and generated images.

No learning: each pixel is explained as a mixture of the ground and one palette colour, connected pixels that are more
object than ground form a component, components that hold several colours are split, and the corners of each part tell
its shape. The score of a detection is its overlap with the ideal shape of its area and centre of mass.

The world's rules are assumed: a bright grey ground, the palette, upright shapes.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from unitok.data.shapes import AREA, BASE_SIZE, COLORS, PALETTE, Scene, Shape, coverage

MIN_AREA = 40.0  # pixels at 64 x 64; the smallest shape of the world has 64
MIN_CORE = 16.0  # pixels of one colour, thin seams removed, that make it a part of its own
EDGE_SHARPENING = 3.0  # a blurred edge is made steeper before shapes are compared; ideal shapes have sharp ones
CORNERS = 0.3  # share of a sharp shape's corners (third or fourth moment) that makes a blob a triangle or a square
TRIANGLE_THIRD = AREA["triangle"] ** -1.5 / 10  # moments of the sharp shapes of area 1
SQUARE_FOURTH = 1 / 60
CENTER_TOLERANCE = 4.0  # pixels at 64 x 64
_PALETTE = np.asarray([PALETTE[name] for name in COLORS], dtype=np.float32)
_CROSS = np.asarray([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)


@dataclass(frozen=True)
class Detection:
    """One found object; `bbox` is x0, y0, x1, y1 in pixels, `score` the overlap (soft IoU) with the ideal shape."""

    kind: str
    color: str
    bbox: tuple[float, float, float, float]
    score: float


def detect(image: Image.Image) -> list[Detection]:
    """The objects of an RGB image, largest first."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    scale = min(pixels.shape[:2]) / BASE_SIZE
    ground = estimate_ground(pixels)
    labels, share = _explain(pixels, ground, _PALETTE)
    found = []
    for component in _components(share > 0.5, MIN_AREA * scale**2):
        for mask, soft, color in _split(pixels, ground, component, labels, scale):
            found.append((float(soft.sum()), _describe(mask, soft, color)))
    return [detection for _, detection in sorted(found, key=lambda pair: -pair[0])]


def estimate_ground(pixels: np.ndarray) -> np.ndarray:
    """The ground's colour [3]: the median of the bright grey pixels, of all pixels where hardly any is bright grey.

    The plain median fails where objects cover half of the image, as four large ones do.
    """
    bright = (pixels.min(-1) > 200) & (np.ptp(pixels, axis=-1) < 30)
    chosen = pixels[bright] if bright.mean() > 0.1 else pixels.reshape(-1, 3)
    return np.median(chosen, axis=0)


def _explain(pixels: np.ndarray, ground: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel as a mixture of `ground` and one colour: which colour explains it best, and that colour's share.

    So the blurred edge of a red object is "half red", not pink.
    """
    offset = (pixels - ground).reshape(-1, 3)
    axes = palette - ground
    lengths = np.maximum((axes**2).sum(1), 1.0)
    shares = np.clip(offset @ axes.T / lengths, 0.0, 1.0)
    # |offset - share * axis|^2 without the term that all colours have in common
    errors = shares**2 * lengths - 2 * shares * (offset @ axes.T)
    best = errors.argmin(1)
    chosen = shares[np.arange(len(best)), best]
    return best.reshape(pixels.shape[:2]), chosen.reshape(pixels.shape[:2])


def _components(mask: np.ndarray, min_area: float) -> list[np.ndarray]:
    from scipy import ndimage

    numbered, count = ndimage.label(mask)
    areas = np.bincount(numbered.ravel(), minlength=count + 1)
    return [numbered == number for number in range(1, count + 1) if areas[number] >= min_area]


def _split(
    pixels: np.ndarray,
    ground: np.ndarray,
    component: np.ndarray,
    labels: np.ndarray,
    scale: float,
) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """The parts of a component: (mask, coverage in [0, 1] with the soft edge, colour name) of each."""
    from scipy import ndimage

    colors = _measured_colors(pixels, component, labels, scale)
    nearest, share = _explain(pixels, ground, colors)
    reach = ndimage.binary_dilation(component, _CROSS)
    parts = []
    for index in range(len(colors)):
        own = nearest == index
        for mask in _components(component & own & (share > 0.5), MIN_AREA * scale**2):
            mask = ndimage.binary_fill_holes(mask)
            edge = ndimage.binary_dilation(mask, _CROSS) & ~mask & reach & own
            soft = np.where(mask, np.maximum(share, 0.5), np.where(edge, share, 0.0))
            soft = np.clip((soft - 0.5) * EDGE_SHARPENING + 0.5, 0.0, 1.0)
            color = np.median(pixels[_core(mask)], axis=0)
            parts.append((mask, soft, COLORS[((_PALETTE - color) ** 2).sum(1).argmin()]))
    return parts


def _core(mask: np.ndarray) -> np.ndarray:
    """What is left of a part after taking off its outermost pixels, two layers if that leaves enough."""
    from scipy import ndimage

    for layers in (2, 1):
        core = ndimage.binary_erosion(mask, _CROSS, iterations=layers)
        if core.sum() >= MIN_CORE / 2:
            return core
    return mask


def _measured_colors(pixels: np.ndarray, component: np.ndarray, labels: np.ndarray, scale: float) -> np.ndarray:
    """The colours a component really holds, [number, 3], as they look in it.

    A colour counts where a piece of it survives the removal of everything thinner than three pixels: the seam between
    two touching objects mixes into other colours of the palette, but stays thin.
    """
    from scipy import ndimage

    measured = []
    for index in np.unique(labels[component]):
        cores = _components(ndimage.binary_opening(component & (labels == index), _CROSS), MIN_CORE * scale**2)
        if cores:
            core = np.logical_or.reduce(cores)
            measured.append(np.median(pixels[_core(core)], axis=0))
    return np.asarray(measured if measured else [np.median(pixels[component], axis=0)], dtype=np.float32)


def _describe(mask: np.ndarray, soft: np.ndarray, color: str) -> Detection:
    """Shape, box and score of a part."""
    rows, columns = np.nonzero(soft > 0)
    top, bottom, left, right = rows.min() - 2, rows.max() + 3, columns.min() - 2, columns.max() + 3
    window = np.zeros((bottom - top, right - left))
    window[2:-2, 2:-2] = soft[top + 2 : bottom - 2, left + 2 : right - 2]
    x = np.arange(left, right)[None, :] + 0.5
    y = np.arange(top, bottom)[:, None] + 0.5
    area = window.sum()
    center = float((window * x).sum() / area), float((window * y).sum() / area)
    kind = _kind(window / area, (x - center[0] + 1j * (y - center[1])) / math.sqrt(area))
    ideal = coverage(kind, center, math.sqrt(area / AREA[kind]), x, y)
    overlap = float(np.minimum(ideal, window).sum() / np.maximum(ideal, window).sum())
    return Detection(kind, color, _bounds(window, float(left), float(top)), overlap)


def _kind(weights: np.ndarray, z: np.ndarray) -> str:
    """The shape by its moments of order 3 and 4 around the centre: mean of z^3 and z^4, z = x + iy over sqrt(area).

    Blur alike in all directions cannot make them out of nothing: both stay 0 for a circle, a rounded square keeps its
    share of the fourth and a rounded triangle its share of the third. So the boundary lies low, at CORNERS of what the
    sharp shape has; a fill ratio or an overlap with sharp shapes would call most rounded squares circles.
    """
    third, fourth = (weights * z**3).sum().imag, -(weights * z**4).sum().real
    if third > CORNERS * TRIANGLE_THIRD:
        return "triangle"
    return "square" if fourth > CORNERS * SQUARE_FOURTH else "circle"


def _bounds(window: np.ndarray, left: float, top: float) -> tuple[float, float, float, float]:
    """Box of the pixels that are more object than ground."""
    rows, columns = np.nonzero(window > 0.5)
    return (
        left + float(columns.min()),
        top + float(rows.min()),
        left + float(columns.max()) + 1,
        top + float(rows.max()) + 1,
    )


def agrees(scene: Scene, detections: Sequence[Detection]) -> bool:
    """Whether the detections are the scene: as many, same shapes and colours, boxes' centres within tolerance."""
    wanted, found = defaultdict(list), defaultdict(list)
    for item in scene.objects:
        wanted[item.kind, item.color].append(item)
    for item in detections:
        found[item.kind, item.color].append(item)
    if {name: len(items) for name, items in wanted.items()} != {name: len(items) for name, items in found.items()}:
        return False
    tolerance = CENTER_TOLERANCE * scene.size / BASE_SIZE
    return all(_matches(items, found[name], tolerance) for name, items in wanted.items())


def _matches(wanted: list[Shape], found: list[Detection], tolerance: float) -> bool:
    return any(
        all(math.dist(_center(a.bbox), _center(b.bbox)) <= tolerance for a, b in zip(wanted, order, strict=True))
        for order in permutations(found)
    )


def _center(box: tuple[float, float, float, float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
