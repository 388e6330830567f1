"""The GenEval rule and the soft VQA accuracy: cases by hand, and recorded outcomes of the official scorers."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from reference import REFERENCE

from unitok.core.errors import DataError
from unitok.data.shapes import relations
from unitok.eval.geneval import load_prompts, score_prompt
from unitok.eval.geneval_score import GenEvalRule, relative_position, score_detections, summarise
from unitok.eval.vqa_accuracy import normalise_answer, soft_accuracy

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass
class Thing:
    kind: str
    bbox: tuple[float, float, float, float] = (0, 0, 10, 10)
    color: str = "red"
    score: float = 1.0


def prompt(tag, *include, exclude=()):
    return {"tag": tag, "prompt": "p", "include": list(include), "exclude": list(exclude)}


def recorded_cases(name):
    """What the official scorers said of made-up detections and answers."""
    return [json.loads(line) for line in (FIXTURES / name).read_text().splitlines()]


def test_recorded_geneval_cases():
    """Outcome and reason equal the official scorer's on 300 recorded cases."""

    def without_order(reason):
        found = re.compile(r"found (.*) target$", re.MULTILINE)
        return found.sub(lambda match: " and ".join(sorted(match[1].split(" and "))), reason)

    for case in recorded_cases("geneval_scorer.jsonl"):
        things = [Thing(item["cls"], item["box"], item["color"], item["score"]) for item in case["detections"]]
        correct, reason = score_detections(things, case["metadata"])
        assert (correct, without_order(reason)) == (case["correct"], without_order(case["reason"]))


def test_recorded_vqa_cases():
    for case in recorded_cases("vqa_scorer.jsonl"):
        assert normalise_answer(case["prediction"]) == case["prediction_normalised"]
        assert soft_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["score"], abs=1e-9)


def test_official_prompts_are_read():
    if not (REFERENCE / "geneval" / "evaluation_metadata.jsonl").is_file():
        pytest.skip(
            "no official prompts: set UNITOK_REFERENCE to a folder that holds geneval/evaluation_metadata.jsonl"
        )
    assert len(load_prompts(REFERENCE / "geneval" / "evaluation_metadata.jsonl")) == 553


def test_counts_are_at_least_and_exclude_is_at_most():
    squares = [Thing("square")] * 3
    three = prompt("counting", {"class": "square", "count": 3}, exclude=[{"class": "square", "count": 4}])
    assert score_detections(squares, three) == (True, "")
    assert score_detections(squares[:2], three) == (False, "expected square>=3, found 2")
    assert score_detections([*squares, Thing("square")], three) == (False, "expected square<4, found 4")
    assert score_detections([*squares, Thing("circle")], three)[0]


def test_counting_asks_for_surer_detections():
    things = [Thing("square", score=0.8)]
    clause = {"class": "square", "count": 1}
    assert score_detections(things, prompt("single_object", clause))[0]
    assert not score_detections(things, prompt("counting", clause))[0]
    assert score_detections(things, prompt("counting", clause), GenEvalRule(counting_threshold=0.5))[0]


def test_at_most_max_objects_of_a_class_are_kept_best_first():
    things = [Thing("dot", score=0.5 + index / 100) for index in range(20)]
    kept = GenEvalRule().select(things, "single_object")["dot"]
    assert len(kept) == 16 and kept[0].score == max(thing.score for thing in things)


def test_only_the_surest_object_is_asked_for_its_color():
    """A blue circle seen less surely than a red one does not make "a red circle" of it, nor the other way round."""
    things = [Thing("circle", color="red", score=0.6), Thing("circle", color="blue", score=0.9)]
    want = {"class": "circle", "count": 1, "color": "red"}
    correct, reason = score_detections(things, prompt("colors", want))
    assert (correct, reason) == (False, "expected red circle>=1, found 0 red; and 1 blue")
    things[0].score = 0.95
    assert score_detections(things, prompt("colors", want))[0]


def test_relations():
    target = (40, 40, 60, 60)
    assert relative_position((0, 40, 20, 60), target) == {"left of"}
    assert relative_position((80, 40, 100, 60), target) == {"right of"}
    assert relative_position((40, 0, 60, 20), target) == {"above"}
    assert relative_position((40, 80, 60, 100), target) == {"below"}
    assert relative_position((0, 0, 20, 20), target) == {"left of", "above"}
    assert relative_position(target, target) == set()


def test_offset_below_a_tenth_of_the_sizes_says_nothing():
    target = (40.0, 40.0, 60.0, 60.0)  # sizes 20 + 20: offsets up to 4 do not count
    assert relative_position((44, 40, 64, 60), target) == set()
    # 9 of offset leave (9 - 4) / 9 > 0.5; 7 leave 3 / 7 < 0.5
    assert relative_position((49, 40, 69, 60), target) == {"right of"}
    assert relative_position((47, 40, 67, 60), target) == set()


def test_the_shapes_world_states_positions_by_the_same_rule():
    rng = np.random.default_rng(0)
    for _ in range(500):
        x, y = rng.uniform(0, 40, (2, 2))
        a, b = ((*low, *(low + rng.uniform(5, 25, 2))) for low in (x, y))
        assert relative_position(a, b) == relations(a, b)


def test_position_needs_its_target():
    include = ({"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]})
    circle, square = Thing("circle", (0, 40, 20, 60)), Thing("square", (40, 40, 60, 60))
    assert score_detections([circle, square], prompt("position", *include))[0]
    circle.bbox = (80, 40, 100, 60)
    assert score_detections([circle, square], prompt("position", *include)) == (
        False,
        "expected circle left of target, found right of target",
    )
    reason = score_detections([circle], prompt("position", *include))[1]
    assert reason == "expected square>=1, found 0\nno target for circle to be left of"


def test_a_color_or_position_of_null_asks_for_none(tmp_path):
    """As without the field; an index that is no whole number is refused, not met while scoring."""
    clauses = [{"class": "square", "count": 1, "position": None, "color": None}, {"class": "circle", "count": 1}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(prompt("position", *clauses) | {"prompt": "p"}))
    (metadata,) = load_prompts(path)
    found = [{"cls": name, "box": [0, 0, 9, 9], "score": 0.95} for name in ("square", "circle")]
    assert score_prompt(metadata, found) == (True, "")
    for index in (0.0, False, "0", [0]):
        clauses[1]["position"] = ["left of", index]
        path.write_text(json.dumps(prompt("position", *clauses) | {"prompt": "p"}))
        with pytest.raises(DataError, match="index of an earlier clause"):
            load_prompts(path)


def test_overall_is_the_mean_of_task_means():
    rows = [{"tag": "colors", "prompt": "a", "correct": True}] * 3 + [
        {"tag": "position", "prompt": "b", "correct": False}
    ]
    scores = summarise(rows)
    assert scores["overall"] == 0.5 and scores["image_accuracy"] == 0.75
    assert scores["by_tag"] == {"colors": 1.0, "position": 0.0} and scores["prompt_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "is not JSON"),
        ("[1]", "list"),
        ('{"tag": "colors", "prompt": "p"}', "lacks include"),
        ('{"tag": "t", "prompt": "p", "include": [{"class": "cat"}]}', "include[0]"),
        ('{"tag": "t", "prompt": "p", "include": [{"class": "a", "count": 1, "position": ["left of", 0]}]}', "earlier"),
        ('{"tag": "t", "prompt": "p", "include": [{"class": ["a"], "count": 1}]}', "include[0]"),
        ('{"tag": "t", "prompt": "p", "include": [{"class": "a", "count": true}]}', "include[0]"),
        ('{"tag": "t", "prompt": "p", "include": null}', "lacks include"),
    ],
)
def test_bad_prompt_is_named_with_its_line(tmp_path, line, named):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"tag": "t", "prompt": "p", "include": []}\n' + line + "\n")
    with pytest.raises(DataError, match=re.escape(f"{path}:2")) as caught:
        load_prompts(path)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_soft_accuracy_by_hand():
    assert soft_accuracy("The Red.", ["red"]) == 1.0
    assert soft_accuracy("3", ["three"]) == 1.0
    assert soft_accuracy("red", ["blue"]) == 0.0
    # two of ten agree: leaving one of them out 1/3 (twice), leaving another out 2/3 (eight times)
    assert soft_accuracy("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx((2 / 3 + 8 * 2 / 3) / 10)
    assert soft_accuracy("red", []) == 0.0
