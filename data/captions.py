"""What can truthfully be said and asked about a scene of the shapes world.

Captions have GenEval's six forms with metadata in GenEval's format. A caption holds under GenEval's scorer: a form that
speaks of "the" object of a shape is used only where the scene has one of that shape.
"""

from collections import Counter
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from unitok.core.rng import numpy_rng
from unitok.data.shapes import COLORS, COUNT_WORDS, NUMBER_WORDS, RELATIONS, SHAPES, TAGS, Scene, Shape
from unitok.data.shapes import clear_relation as relation_of
from unitok.data.shapes import relations as official_relations

QUESTION_TYPES = ("color", "shape", "count", "exists", "position")

Metadata = dict[str, Any]


class QA(NamedTuple):
    """A question in its canonical wording and its answer of one word."""

    type: str
    question: str
    answer: str


def with_article(words: str) -> str:
    """ "orange circle" -> "an orange circle"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# --- captions -------------------------------------------------------------------------------------------------------
# One function per form: from the form's own facts to the metadata of a prompt, its text under "prompt".


def _single_object(kind: str) -> Metadata:
    return _metadata("single_object", with_article(kind), [{"class": kind, "count": 1}])


def _two_object(kind_a: str, kind_b: str) -> Metadata:
    include = [{"class": kind_a, "count": 1}, {"class": kind_b, "count": 1}]
    return _metadata("two_object", f"{with_article(kind_a)} and {with_article(kind_b)}", include)


def _counting(kind: str, count: int) -> Metadata:
    words = f"{NUMBER_WORDS[count - 1]} {kind}s"
    exclude = [{"class": kind, "count": count + 1}]
    return _metadata("counting", words, [{"class": kind, "count": count}], exclude)


def _colors(color: str, kind: str) -> Metadata:
    return _metadata("colors", with_article(f"{color} {kind}"), [{"class": kind, "count": 1, "color": color}])


def _position(kind_a: str, relation: str, kind_b: str) -> Metadata:
    include = [{"class": kind_b, "count": 1}, {"class": kind_a, "count": 1, "position": [relation, 0]}]
    return _metadata("position", f"{with_article(kind_a)} {relation} {with_article(kind_b)}", include)


def _color_attr(color_a: str, kind_a: str, color_b: str, kind_b: str) -> Metadata:
    include = [{"class": kind_a, "count": 1, "color": color_a}, {"class": kind_b, "count": 1, "color": color_b}]
    text = f"{with_article(f'{color_a} {kind_a}')} and {with_article(f'{color_b} {kind_b}')}"
    return _metadata("color_attr", text, include)


def _metadata(tag: str, words: str, include: list[Metadata], exclude: list[Metadata] | None = None) -> Metadata:
    out: Metadata = {"tag": tag, "include": include}
    if exclude:
        out["exclude"] = exclude
    return out | {"prompt": f"a photo of {words}"}


def true_captions(scene: Scene) -> dict[str, list[Metadata]]:
    """Every caption of the six forms that is true of the scene, by tag; tags without one are left out."""
    counts = Counter(item.kind for item in scene.objects)
    single = [item for item in scene.objects if counts[item.kind] == 1]
    pairs = list(permutations(single, 2))
    found: dict[str, list[Metadata]] = {
        "single_object": [_single_object(kind) for kind in counts],
        "two_object": [_two_object(a, b) for a, b in permutations(counts, 2)],
        "counting": [_counting(kind, count) for kind, count in counts.items() if count > 1],
        "colors": [_colors(item.color, item.kind) for item in single],
        "position": [_position(a.kind, rel, b.kind) for a, b in pairs if (rel := relation_of(a, b))],
        "color_attr": [_color_attr(a.color, a.kind, b.color, b.kind) for a, b in pairs if a.color != b.color],
    }
    return {tag: captions for tag, captions in found.items() if captions}


def caption(scene: Scene, rng: np.random.Generator) -> tuple[str, str, Metadata]:
    """(tag, text, metadata) of one true caption: of the scene's own form, of any true form for free scenes."""
    captions = true_captions(scene)
    tag = scene.kind if scene.kind in captions else list(captions)[rng.integers(len(captions))]
    metadata = captions[tag][rng.integers(len(captions[tag]))]
    return tag, metadata["prompt"], metadata


def whole_captions(scene: Scene) -> list[str]:
    """The true captions that speak of every object of the scene; none for most scenes of three or more kinds."""
    count = len(scene.objects)
    entries = [entry for entries in true_captions(scene).values() for entry in entries]
    return [entry["prompt"] for entry in entries if sum(clause["count"] for clause in entry["include"]) == count]


def geneval_prompts(num: int, seed: int = 0) -> list[Metadata]:
    """`num` prompts in GenEval's format, the six tags in turn, none twice before all of its tag have been used."""
    pairs = list(permutations(SHAPES, 2))
    spaces: dict[str, list[Metadata]] = {
        "single_object": [_single_object(kind) for kind in SHAPES],
        "two_object": [_two_object(a, b) for a, b in pairs],
        "counting": [_counting(kind, 2 + i) for kind in SHAPES for i in range(len(COUNT_WORDS))],
        "colors": [_colors(color, kind) for color in COLORS for kind in SHAPES],
        "position": [_position(a, relation, b) for a, b in pairs for relation in RELATIONS],
        "color_attr": [_color_attr(c, a, d, b) for a, b in pairs for c, d in permutations(COLORS, 2)],
    }
    orders = {tag: numpy_rng("geneval prompts", seed, tag).permutation(len(space)) for tag, space in spaces.items()}
    prompts = []
    for index in range(num):
        tag, turn = TAGS[index % len(TAGS)], index // len(TAGS)
        prompts.append(spaces[tag][orders[tag][turn % len(orders[tag])]])
    return prompts


# --- questions ------------------------------------------------------------------------------------------------------


def questions(scene: Scene) -> list[QA]:
    """All canonical questions with one right answer. Of the "exists" questions half are answered yes."""
    kinds = Counter(item.kind for item in scene.objects)
    colors = Counter(item.color for item in scene.objects)
    out = [QA("color", f"what color is the {i.kind}?", i.color) for i in scene.objects if kinds[i.kind] == 1]
    out += [QA("shape", f"what shape is the {i.color} object?", i.kind) for i in scene.objects if colors[i.color] == 1]
    out += [QA("count", f"how many {kind}s are there?", NUMBER_WORDS[n - 1]) for kind, n in kinds.items()]
    out.append(QA("count", "how many objects are there?", NUMBER_WORDS[len(scene.objects) - 1]))
    for color, kind in _present_and_absent(scene):
        answer = "yes" if any((i.color, i.kind) == (color, kind) for i in scene.objects) else "no"
        out.append(QA("exists", f"is there {with_article(f'{color} {kind}')}?", answer))
    anchors = [item for item in scene.objects if kinds[item.kind] == 1]
    return out + [qa for anchor in anchors for qa in _position_questions(scene, anchor)]


def _present_and_absent(scene: Scene) -> list[tuple[str, str]]:
    """The (colour, shape) pairs of the scene, each followed by a near miss: one attribute changed, not in the scene.

    Half of the changes take an attribute that another object has, so that counting attributes is not enough.
    """
    rng = numpy_rng("exists", scene.key)
    present = list(dict.fromkeys((item.color, item.kind) for item in scene.objects))
    out, used = [], set(present)
    for color, kind in present:
        misses = [(c, kind) for c in COLORS] + [(color, k) for k in SHAPES]
        misses = [pair for pair in misses if pair not in used]
        swaps = [(c, k) for c, k in misses if any(c == d for d, _ in present) and any(k == m for _, m in present)]
        keep_color = bool(rng.random() < 0.5)
        others = [pair for pair in misses if (pair[0] == color) == keep_color] or misses
        pool = swaps if swaps and rng.random() < 0.5 else others
        miss = pool[rng.integers(len(pool))]
        used.add(miss)
        out += [(color, kind), miss]
    return out


def _position_questions(scene: Scene, anchor: Shape) -> list[QA]:
    """Asked where exactly one object lies clearly in that direction and no other can be said to."""
    others = [item for item in scene.objects if item is not anchor]
    out = []
    for relation in RELATIONS:
        lying = [item for item in others if relation in official_relations(item.bbox, anchor.bbox)]
        if len(lying) == 1 and relation_of(lying[0], anchor) == relation:
            out.append(QA("position", f"what is {relation} the {anchor.kind}?", lying[0].kind))
    return out


# Other beginnings of the canonical questions; the rest of the question is kept.
_BEGINNINGS: dict[str, tuple[str, ...]] = {
    "what color is ": ("what colour is ", "which color is ", "tell me the color of ", "what is the color of "),
    "what shape is ": ("which shape is ", "what is the shape of ", "tell me the shape of "),
    "how many ": ("what is the number of ", "count the "),
    "is there ": ("do you see ", "can you see ", "does the image show "),
    "what is ": ("which shape is ", "what lies ", "which object is "),
}


def paraphrase(question: str, rng: np.random.Generator) -> str:
    """The same question in other words: another beginning, colour for color, a capital, no question mark.

    The canonical wording comes back too. Questions of other worlds keep their words and vary in form only.
    """
    text = question
    for beginning, others in _BEGINNINGS.items():
        if question.startswith(beginning):
            options = (beginning, *others)
            chosen = options[rng.integers(len(options))]
            rest = question.removeprefix(beginning)
            if beginning == "how many " and chosen != beginning:
                rest = rest.replace(" are there?", "." if chosen.startswith("count") else "?")
            text = chosen + rest
            break
    if rng.random() < 0.2:
        text = text.replace("color", "colour")
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    if text.startswith(("tell me", "Tell me")) or rng.random() < 0.3:
        text = text.rstrip("?.")
    return text
