"""The shapes world: scenes, what is said about them, and the detector that judges images of them."""

import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from unitok.core.errors import DataError, UserError
from unitok.core.rng import derive_seed, numpy_rng, torch_rng
from unitok.data.captions import (
    QUESTION_TYPES,
    caption,
    geneval_prompts,
    paraphrase,
    questions,
    true_captions,
    whole_captions,
)
from unitok.data.detector import SQUARE_FOURTH, TRIANGLE_THIRD, Detection, agrees, detect
from unitok.data.shapes import (
    COLORS,
    GAP,
    NUMBER_WORDS,
    PALETTE,
    RELATIONS,
    SHAPES,
    TAGS,
    clear_relation,
    coverage,
    relations,
    render,
    sample_scene,
    scene_from_dict,
)
from unitok.data.source import open_source
from unitok.eval.geneval_score import GenEvalRule, relative_position, score_detections

SCENES = [sample_scene(11, "val", index) for index in range(500)]
IMAGES = [render(scene) for scene in SCENES]
DETECTIONS = [detect(image) for image in IMAGES]


def test_seeds_depend_on_every_part_and_its_type():
    parts = [(1,), ("1",), (0, 1), ("ab", "c"), ("a", "bc"), ("abc",), (1, "a"), ("a", 1), (10, 1), (1, 0, 1)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("shapes", np.int64(3)) == derive_seed("shapes", 3) == 483979780748213879
    assert numpy_rng(1).random() == numpy_rng(1).random() != numpy_rng(2).random()
    assert torch_rng(1).initial_seed() == derive_seed(1)
    with pytest.raises(TypeError, match=r"1\.5"):
        derive_seed(1.5)


def test_scenes_follow_the_rules_of_the_world():
    for scene in SCENES:
        assert 1 <= len(scene.objects) <= 4 and 235 <= scene.ground <= 250
        for item in scene.objects:
            assert 7 - 1e-3 <= item.radius <= 13 + 1e-3
            assert all(abs(a - b) <= 8 for a, b in zip(item.rgb, PALETTE[item.color], strict=True))
            border = min(*item.center, *(64 - value for value in item.center)) - item.radius
            assert border >= GAP - 2e-3
        for number, a in enumerate(scene.objects):
            for b in scene.objects[:number]:
                assert math.dist(a.center, b.center) - a.radius - b.radius >= GAP - 3e-3
    kinds = Counter(scene.kind for scene in SCENES)
    assert set(kinds) == {*TAGS, "free"} and 0.18 < kinds["free"] / 500 < 0.32
    two_kinds = [s for s in SCENES if s.kind in ("two_object", "position", "color_attr")]
    assert all(len({item.kind for item in s.objects}) == 2 == len(s.objects) for s in two_kinds)
    assert all(len({item.color for item in s.objects}) == 2 for s in SCENES if s.kind == "color_attr")
    assert all(len({item.kind for item in s.objects}) == 1 < len(s.objects) for s in SCENES if s.kind == "counting")


def test_scenes_are_determined_by_seed_split_and_index():
    again = sample_scene(11, "val", 3)
    assert again == SCENES[3] and render(again).tobytes() == IMAGES[3].tobytes()
    others = [sample_scene(11, "train", 3), sample_scene(12, "val", 3), sample_scene(11, "val", 4)]
    assert all(scene.objects != again.objects for scene in others)
    assert scene_from_dict(again.to_dict()) == again
    with pytest.raises(DataError, match="test.*train, val"):
        sample_scene(0, "test", 0)
    with pytest.raises(DataError, match="'color'"):
        scene_from_dict(again.to_dict() | {"objects": [{"kind": "circle", "colour": "red"}]})
    with pytest.raises(DataError, match="scene"):
        scene_from_dict([1, 2])


def test_render_fills_the_area_of_each_shape_with_its_colour():
    for scene, image in zip(SCENES[:60], IMAGES[:60], strict=True):
        pixels = np.asarray(image, dtype=float)
        assert (pixels[0] == scene.ground).all()
        for item in scene.objects:
            x0, y0, x1, y1 = (round(value) for value in item.bbox)
            window = pixels[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1]
            axis = np.asarray(item.rgb) - scene.ground
            area = ((window - scene.ground) @ axis / (axis @ axis)).sum()
            expected = {"circle": math.pi, "square": 2, "triangle": 3 * math.sqrt(3) / 4}[item.kind] * item.radius**2
            if len(scene.objects) == 1:
                assert area == pytest.approx(expected, rel=0.03)
            assert tuple(pixels[int(item.center[1]), int(item.center[0])]) == item.rgb


def test_captions_hold_under_the_geneval_scorer():
    """Every caption of the data set, scored on what the detector finds in the image it describes."""
    rule = GenEvalRule(threshold=0.5, counting_threshold=0.5)
    seen = Counter()
    for scene, detections in zip(SCENES, DETECTIONS, strict=True):
        for tag, captions in true_captions(scene).items():
            for metadata in captions:
                assert metadata["tag"] == tag
                correct, reason = score_detections(detections, metadata, rule)
                assert correct, (scene, metadata, reason)
        tag, text, metadata = caption(scene, numpy_rng("c", scene.key))
        assert (tag, text) == (metadata["tag"], metadata["prompt"])
        assert scene.kind in (tag, "free")
        seen[tag] += 1
    assert set(seen) == set(TAGS)


def test_relations_are_those_of_the_geneval_scorer():
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = ((x, y, x + w, y + h) for x, y, w, h in rng.uniform(1, 40, size=(2, 4)))
        assert relations(a, b) == relative_position(a, b)


def test_caption_wording_and_prompts():
    prompts = geneval_prompts(60, seed=1)
    assert Counter(prompt["tag"] for prompt in prompts) == dict.fromkeys(TAGS, 10)
    assert prompts == geneval_prompts(60, seed=1) and prompts[:6] != geneval_prompts(6, seed=2)
    one, number, color = "an? [a-z]+", "(two|three|four) (circle|square|triangle)s", "an? [a-z]+ [a-z]+"
    forms = {
        "single_object": one,
        "two_object": f"{one} and {one}",
        "counting": number,
        "colors": color,
        "position": f"{one} ({'|'.join(RELATIONS)}) {one}",
        "color_attr": f"{color} and {color}",
    }
    for prompt in prompts:
        assert re.fullmatch(f"a photo of {forms[prompt['tag']]}", prompt["prompt"]), prompt
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", prompt["prompt"])
    position = next(p for p in prompts if p["tag"] == "position")
    assert position["include"][1]["position"][1] == 0 and " a " + position["include"][1]["class"] in position["prompt"]
    counting = next(p for p in prompts if p["tag"] == "counting")
    assert counting["exclude"] == [
        {"class": counting["include"][0]["class"], "count": counting["include"][0]["count"] + 1}
    ]
    texts = [p["prompt"] for p in geneval_prompts(6 * 27) if p["tag"] == "colors"]
    assert len(set(texts)) == 27  # none twice before all are used


def oracle(scene, question):
    """The set of right answers to a canonical question, by reading the question."""
    words = question.rstrip("?").split()
    items = scene.objects
    if question.startswith("what color"):
        return {i.color for i in items if i.kind == words[-1]}
    if question.startswith("what shape"):
        return {i.kind for i in items if i.color == words[-2]}
    if question.startswith("how many"):
        return {NUMBER_WORDS[sum(words[2] in ("objects", f"{i.kind}s") for i in items) - 1]}
    if question.startswith("is there"):
        return {"yes" if any([i.color, i.kind] == words[-2:] for i in items) else "no"}
    relation = next(name for name in RELATIONS if f" {name} " in question)
    anchors = [i for i in items if i.kind == words[-1]]
    assert len(anchors) == 1
    return {i.kind for i in items if i is not anchors[0] and relation in relations(i.bbox, anchors[0].bbox)}


def test_questions_have_one_right_answer_and_balanced_yes_and_no():
    answers = defaultdict(Counter)
    for scene in SCENES:
        asked = questions(scene)
        assert len({qa.question for qa in asked}) == len(asked) and asked == questions(scene)
        for qa in asked:
            assert oracle(scene, qa.question) == {qa.answer}, (scene, qa)
            answers[qa.type][qa.answer] += 1
    assert set(answers) == set(QUESTION_TYPES)
    assert answers["exists"]["yes"] == answers["exists"]["no"]
    assert set(answers["color"]) == set(COLORS) and set(answers["position"]) == set(SHAPES)
    # The wording alone must not give the answer away: per asked colour about half of the answers are yes.
    by_color = defaultdict(list)
    for scene in SCENES:
        for qa in questions(scene):
            if qa.type == "exists":
                by_color[qa.question.split()[-2]].append(qa.answer == "yes")
    assert all(0.4 < np.mean(values) < 0.6 for values in by_color.values())


def test_position_questions_cover_every_clear_pair():
    scene = next(s for s in SCENES if s.kind == "position")
    a, b = scene.objects
    asked = {(qa.question, qa.answer) for qa in questions(scene) if qa.type == "position"}
    expected = {(f"what is {clear_relation(x, y)} the {y.kind}?", x.kind) for x, y in ((a, b), (b, a))}
    assert asked == expected


def test_paraphrases_keep_the_words_that_matter():
    rng = np.random.default_rng(0)
    for scene in SCENES[:40]:
        for qa in questions(scene):
            variants = {paraphrase(qa.question, rng) for _ in range(40)}
            assert len(variants) >= 6
            content = {w for w in re.findall("[a-z]+", qa.question) if w in {*COLORS, *SHAPES, "objects", "left"}}
            for variant in variants:
                assert content <= set(re.findall("[a-z]+", variant.lower())), (qa.question, variant)
    assert "what color is the circle?" in {paraphrase("what color is the circle?", rng) for _ in range(200)}
    assert paraphrase("which digit is this?", np.random.default_rng(0)).lower().startswith("which digit is this")


def blurred(image, sigma):
    pixels = ndimage.gaussian_filter(np.asarray(image, dtype=float), (sigma, sigma, 0))
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def agreement(scenes, images):
    return np.mean([agrees(scene, detect(image)) for scene, image in zip(scenes, images, strict=True)])


def test_detector_agrees_with_rendered_and_degraded_scenes():
    """Measured on 300 scenes: 1.0 clean, blurred by sigma 1 and 1.5, under noise of 8 levels; 0.97 at sigma 2."""
    assert np.mean([agrees(s, d) for s, d in zip(SCENES, DETECTIONS, strict=True)]) >= 0.97
    few, images = SCENES[:150], IMAGES[:150]
    assert agreement(few, [blurred(image, 1.0) for image in images]) >= 0.97
    assert agreement(few, [blurred(image, 1.5) for image in images]) >= 0.94
    assert agreement(few, [blurred(image, 2.0) for image in images]) >= 0.92
    noise = np.random.default_rng(0)
    noisy = [np.clip(np.asarray(image) + noise.normal(0, 8, (64, 64, 3)), 0, 255) for image in images]
    assert agreement(few, [Image.fromarray(pixels.astype(np.uint8)) for pixels in noisy]) >= 0.97
    small = [sample_scene(1, "val", index, size=32) for index in range(40)]
    large = [sample_scene(1, "val", index, size=128) for index in range(20)]
    assert agreement(small, map(render, small)) >= 0.97 and agreement(large, map(render, large)) >= 0.97


def test_detector_separates_touching_colours_and_ignores_specks():
    pixels = np.full((64, 64, 3), 242, dtype=np.uint8)
    assert detect(Image.fromarray(pixels)) == []
    pixels[20:36, 16:32] = PALETTE["red"]
    pixels[20:36, 32:48] = PALETTE["blue"]
    pixels[50:55, 50:55] = PALETTE["green"]
    for image in (Image.fromarray(pixels), blurred(Image.fromarray(pixels), 1.0)):
        found = {(item.kind, item.color) for item in detect(image)}
        assert found == {("square", "red"), ("square", "blue")}
    boxes = sorted(item.bbox for item in detect(Image.fromarray(pixels)))
    assert boxes == [(16.0, 20.0, 32.0, 36.0), (32.0, 20.0, 48.0, 36.0)]


def test_detector_constants_are_the_moments_of_sharp_shapes():
    axis = np.arange(400) + 0.5
    x, y = axis[None, :], axis[:, None]
    for kind, third, fourth in (
        ("circle", 0, 0),
        ("square", 0, SQUARE_FOURTH),
        ("triangle", TRIANGLE_THIRD, 0),
    ):
        weights = coverage(kind, (200, 200), 180, x, y)
        z = (x - 200 + 1j * (y - 200)) / math.sqrt(weights.sum())
        moments = [(weights * z**order).sum() / weights.sum() for order in (3, 4)]
        assert moments[0].imag == pytest.approx(third, abs=1e-4) and -moments[1].real == pytest.approx(fourth, abs=1e-4)


def test_agreement_needs_every_object_at_its_place():
    scene = next(s for s in SCENES if s.kind == "color_attr")
    exact = [Detection(item.kind, item.color, item.bbox, 1.0) for item in scene.objects]
    assert agrees(scene, exact) and agrees(scene, exact[::-1])
    first, second = exact
    shifted = Detection(first.kind, first.color, tuple(value + 3 for value in first.bbox), 1.0)  # 4.2 pixels away
    other = Detection(first.kind, second.color, first.bbox, 1.0)
    for wrong in ([first], [first, second, first], [shifted, second], [other, second], []):
        assert not agrees(scene, wrong)


def test_user_errors_are_one_family():
    assert issubclass(DataError, UserError) and issubclass(UserError, ValueError)


def test_whole_captions_are_true_and_speak_of_every_object():
    for index in range(60):
        scene = sample_scene(5, "train", index)
        true = {entry["prompt"]: entry for entries in true_captions(scene).values() for entry in entries}
        for text in whole_captions(scene):
            assert sum(clause["count"] for clause in true[text]["include"]) == len(scene.objects), text
        if len(scene.objects) == 1:
            assert len(whole_captions(scene)) == 2  # with and without its colour


def test_a_sample_is_its_words_and_its_image() -> None:
    """Read together, from one drawing of the scene, or apart."""
    source = open_source("shapes:val?num=5&size=48")
    for index in range(5):
        sample, words = source.read(index), source.words(index)
        assert sample.key == source.key(index) and sample.full_size == (48, 48)
        assert {name: getattr(sample, name) for name in vars(words)} == vars(words)
        assert sample.image.tobytes() == render(words.meta["scene"]).tobytes()
