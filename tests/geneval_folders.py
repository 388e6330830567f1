"""Folders in GenEval's official layout with drawn scenes whose right scores are known."""

import json

from unitok.data.shapes import PALETTE, Scene, Shape, render

LEFT, RIGHT, TOP, BOTTOM = (16, 32), (48, 32), (32, 16), (32, 48)
CORNERS = ((16, 16), (48, 16), (16, 48), (48, 48))


def scene(*objects):
    """Image of (kind, colour, centre) objects."""
    shapes = tuple(Shape(kind, color, PALETTE[color], center, 10.0) for kind, color, center in objects)
    return render(Scene("drawn", 64, 235, shapes, "free"))


def squares(count):
    return [("square", "blue", center) for center in CORNERS[:count]]


def entry(tag, *include, exclude=()):
    found = {"tag": tag, "include": list(include), "prompt": f"a photo for {tag}"}
    return found | ({"exclude": list(exclude)} if exclude else {})


def one(kind, **more):
    return {"class": kind, "count": 1, **more}


# per tag: the prompt's metadata, and (objects, whether they are right, reason) of each sample
CASES = [
    (
        entry("single_object", one("circle")),
        [
            ([("circle", "red", LEFT)], True, ""),
            ([("square", "red", LEFT)], False, "expected circle>=1, found 0"),
        ],
    ),
    (
        entry("two_object", one("circle"), one("square")),
        [
            ([("circle", "red", LEFT), ("square", "red", RIGHT)], True, ""),
            ([("circle", "red", LEFT), ("circle", "red", RIGHT)], False, "expected square>=1, found 0"),
        ],
    ),
    (
        entry("counting", {"class": "square", "count": 3}, exclude=[{"class": "square", "count": 4}]),
        [
            (squares(3), True, ""),
            (squares(2), False, "expected square>=3, found 2"),
            (squares(4), False, "expected square<4, found 4"),
        ],
    ),
    (
        entry("colors", one("circle", color="red")),
        [
            ([("circle", "red", LEFT)], True, ""),
            ([("circle", "blue", LEFT)], False, "expected red circle>=1, found 0 red; and 1 blue"),
        ],
    ),
    (
        entry("position", one("square"), one("circle", position=["left of", 0])),
        [
            ([("circle", "red", LEFT), ("square", "red", RIGHT)], True, ""),
            ([("square", "red", LEFT), ("circle", "red", RIGHT)], False,
             "expected circle left of target, found right of target"),
            ([("circle", "red", TOP), ("square", "red", BOTTOM)], False,
             "expected circle left of target, found above target"),
        ],
    ),
    (
        entry("color_attr", one("circle", color="red"), one("square", color="green")),
        [
            ([("circle", "red", LEFT), ("square", "green", RIGHT)], True, ""),
            ([("circle", "green", LEFT), ("square", "red", RIGHT)], False,
             "expected red circle>=1, found 0 red; and 1 green\nexpected green square>=1, found 0 green; and 1 red"),
        ],
    ),
]  # fmt: skip


def write_folder(folder, cases=CASES):
    """The official layout; returns {file name: (right, reason)}."""
    expected = {}
    for index, (metadata, samples) in enumerate(cases):
        (folder / f"{index:05d}" / "samples").mkdir(parents=True)
        (folder / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        for number, (objects, right, reason) in enumerate(samples):
            name = f"{index:05d}/samples/{number:05d}.png"
            scene(*objects).save(folder / name)
            expected[name] = (right, reason)
    return expected
