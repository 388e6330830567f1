"""The shapes world: small scenes of coloured circles, squares and triangles, drawn from a seed.

A scene is a pure function of (seed, split, index). All shapes stand upright (squares on a side, triangles on their
base), with a circumradius of 7 to 13 pixels at 64 x 64; other sizes scale it. Lengths are pixels, x to the right and y
downwards, pixel centres at half-integers. Boxes are x0, y0, x1, y1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from unitok.core.errors import DataError
from unitok.core.rng import numpy_rng

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (130, 50, 180),
    "pink": (250, 150, 190),
    "brown": (120, 75, 40),
    "black": (20, 20, 20),
}
COLORS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle")
NUMBER_WORDS = ("one", "two", "three", "four")
COUNT_WORDS = NUMBER_WORDS[1:]  # the counts of the "counting" form
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "val")

BASE_SIZE, MIN_SIZE = 64, 32
RADIUS = (7.0, 13.0)
GAP = 2.0  # between objects, and to the border
GROUND = (235, 250)
COLOR_JITTER = 8
FREE_SHARE = 0.25

# What a circumradius of 1 gives.
AREA = {"circle": math.pi, "square": 2.0, "triangle": 0.75 * math.sqrt(3)}
_EXTENT = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(0.5), math.sqrt(0.5)),
    "triangle": (-0.5 * math.sqrt(3), -1.0, 0.5 * math.sqrt(3), 0.5),
}


@dataclass(frozen=True)
class Shape:
    """One object: `color` is a name of the palette, `rgb` the jittered colour that is drawn."""

    kind: str
    color: str
    rgb: tuple[int, int, int]
    center: tuple[float, float]  # of the circumscribed circle
    radius: float

    @property
    def bbox(self) -> tuple[float, float, float, float]:
        x, y = self.center
        x0, y0, x1, y1 = (value * self.radius for value in _EXTENT[self.kind])
        return x + x0, y + y0, x + x1, y + y1


@dataclass(frozen=True)
class Scene:
    """`kind` is one of TAGS (what the caption will speak about) or "free"."""

    key: str
    size: int
    ground: int
    objects: tuple[Shape, ...]
    kind: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `scene_from_dict`."""
        return asdict(self)


def is_scene_dict(data: Any) -> bool:
    """Does this claim to be a scene? Whether it is one, `scene_from_dict` tells."""
    return isinstance(data, Mapping) and {"objects", "ground"} <= data.keys()


def scene_from_dict(data: Mapping[str, Any]) -> Scene:
    """The scene of a `to_dict()`; DataError when it is none."""
    try:
        objects = tuple(
            Shape(item["kind"], item["color"], tuple(item["rgb"]), tuple(item["center"]), item["radius"])
            for item in data["objects"]
        )
        return Scene(data["key"], data["size"], data["ground"], objects, data["kind"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"not a scene ({type(error).__name__}: {error}); expected what `unitok data shapes` writes"
        ) from None


def relations(box_a: Sequence[float], box_b: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Where box A lies seen from box B, by GenEval's rule: a subset of RELATIONS, of two neighbours at most.

    An offset counts beyond `threshold` times the two sizes along its axis, and only if what is left of it makes up
    more than half of the distance between the centres.
    """
    dx, dy = ((box_a[i] + box_a[i + 2] - box_b[i] - box_b[i + 2]) / 2 for i in (0, 1))
    sizes = [box_a[i + 2] - box_a[i] + box_b[i + 2] - box_b[i] for i in (0, 1)]
    distance = math.hypot(dx, dy)
    beyond = [max(abs(offset) - threshold * size, 0.0) for offset, size in zip((dx, dy), sizes, strict=True)]
    found = set()
    if beyond[0] > 0.5 * distance:
        found.add("left of" if dx < 0 else "right of")
    if beyond[1] > 0.5 * distance:
        found.add("above" if dy < 0 else "below")
    return found


def clear_relation(a: Shape, b: Shape) -> str | None:
    """The one relation of `a` to `b` that nobody would dispute: twice as far along its axis as along the other."""
    dx, dy = (abs(a.bbox[i] + a.bbox[i + 2] - b.bbox[i] - b.bbox[i + 2]) for i in (0, 1))
    found = relations(a.bbox, b.bbox)
    if len(found) != 1 or max(dx, dy) < 2 * min(dx, dy):
        return None
    return next(iter(found))


def sample_scene(seed: int, split: str, index: int, size: int = BASE_SIZE) -> Scene:
    """Scene `index` of a split. Splits never share a scene's random state, whatever the seeds."""
    if split not in SPLITS:
        raise DataError(f"shapes split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    if size < MIN_SIZE:
        raise DataError(f"shapes size {size} is too small to tell shapes apart; expected at least {MIN_SIZE}")
    rng = numpy_rng("shapes", split, seed, index)
    kind = "free" if rng.random() < FREE_SHARE else TAGS[rng.integers(len(TAGS))]
    kinds, colors = _kinds_and_colors(kind, rng)
    while True:
        placed = _place(len(kinds), size, rng)
        objects = tuple(
            Shape(shape, color, _jitter(color, rng), center, radius)
            for shape, color, (center, radius) in zip(kinds, colors, placed, strict=True)
        )
        if kind != "position" or clear_relation(objects[0], objects[1]):
            break
    ground = int(rng.integers(GROUND[0], GROUND[1] + 1))
    return Scene(f"{split}-{seed}-{index:06d}", size, ground, objects, kind)


def _kinds_and_colors(kind: str, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    if kind in ("two_object", "position", "color_attr"):
        kinds = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:2]]
    elif kind == "counting":
        kinds = [SHAPES[rng.integers(len(SHAPES))]] * int(rng.integers(2, 5))
    else:
        count = int(rng.integers(1, 5)) if kind == "free" else 1
        kinds = [SHAPES[i] for i in rng.integers(len(SHAPES), size=count)]
    if kind == "color_attr":
        return kinds, [COLORS[i] for i in rng.permutation(len(COLORS))[:2]]
    return kinds, [COLORS[i] for i in rng.integers(len(COLORS), size=len(kinds))]


def _jitter(color: str, rng: np.random.Generator) -> tuple[int, int, int]:
    shifted = np.asarray(PALETTE[color]) + rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, size=3)
    return tuple(np.clip(shifted, 0, 255).tolist())


def _place(count: int, size: int, rng: np.random.Generator) -> list[tuple[tuple[float, float], float]]:
    """Centres and radii of circles that keep GAP from each other and the border."""
    scale = size / BASE_SIZE
    gap = GAP * max(scale, 1.0)
    while True:
        placed: list[tuple[tuple[float, float], float]] = []
        for _ in range(20 * count):
            radius = float(rng.uniform(*RADIUS)) * scale
            x, y = rng.uniform(radius + gap, size - radius - gap, size=2).tolist()
            if all(math.hypot(x - u, y - v) >= radius + other + gap for (u, v), other in placed):
                placed.append(((round(x, 3), round(y, 3)), round(radius, 3)))
            if len(placed) == count:
                return placed


def coverage(kind: str, center: tuple[float, float], radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Antialiased coverage in [0, 1] of the pixels whose centres are `x` and `y` (arrays that broadcast)."""
    dx, dy = x - center[0], y - center[1]
    if kind == "circle":
        distance = np.hypot(dx, dy) - radius
    elif kind == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius * math.sqrt(0.5)
    else:  # an upright equilateral triangle is the meeting of three half-planes at radius / 2 from its centre
        slope = 0.5 * math.sqrt(3) * np.abs(dx) - 0.5 * dy
        distance = np.maximum(dy, slope) - radius / 2
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene) -> Image.Image:
    """The RGB image of a scene, antialiased by the distance of each pixel to the outline."""
    pixels = np.full((scene.size, scene.size, 3), float(scene.ground), dtype=np.float64)
    for item in scene.objects:
        x0, y0, x1, y1 = item.bbox
        left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
        right, bottom = min(int(x1) + 2, scene.size), min(int(y1) + 2, scene.size)
        x = np.arange(left, right)[None, :] + 0.5
        y = np.arange(top, bottom)[:, None] + 0.5
        alpha = coverage(item.kind, item.center, item.radius, x, y)[..., None]
        window = pixels[top:bottom, left:right]
        window += alpha * (np.asarray(item.rgb) - window)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))
