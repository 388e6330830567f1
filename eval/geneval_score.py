"""GenEval's rule: does an image, given as detected objects, show what its prompt asks for?

Behaviour of the official scorer (djghosh13/geneval): per class the detections above a score threshold, best first;
every `include` clause needs its count, colour and relation to an earlier clause; no `exclude` clause may be reached.
The overall score is the mean of the task means, so a task with few prompts weighs as much as one with many.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unitok.core.errors import DataError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

_NO_OFFSET = 1e-3  # below this many pixels on both axes nothing is said about the position


class Detected(Protocol):
    """One object found by a detector (`unitok.data.detector.Detection` is one)."""

    kind: str
    color: str
    bbox: Sequence[float]  # x0, y0, x1, y1
    score: float


@dataclass(frozen=True)
class GenEvalRule:
    """Thresholds of the scorer; the defaults are the official ones, made for Mask2Former's scores."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1

    def select(self, detections: Iterable[Detected], tag: str) -> dict[str, list[Detected]]:
        """Detections by class, best first, above the threshold of the task and at most `max_objects` each.

        Of equal scores the later one is the better: numpy's stable order, reversed. The official scorer takes numpy's
        default order, which for equal scores depends on the processor; ours must not.
        """
        threshold = self.counting_threshold if tag == "counting" else self.threshold
        by_kind: dict[str, list[Detected]] = {}
        for item in sorted(detections, key=lambda item: item.score)[::-1]:
            group = by_kind.setdefault(item.kind, []) if item.score > threshold else None
            if group is not None and len(group) < self.max_objects:
                group.append(item)
        return by_kind


OFFICIAL_RULE = GenEvalRule()

# For `unitok.data.detector`, whose score is the overlap with an ideal shape and no confidence. One threshold for every
# task, high enough that blots decoded from random codes do not pass for objects (measured in LOG.md).
SHAPES_RULE = GenEvalRule(threshold=0.85, counting_threshold=0.85)


def relative_position(box_a: Sequence[float], box_b: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Where box A lies seen from box B: a subset of left of, right of, above, below.

    An offset counts only beyond `threshold` times the two sizes along that axis, and only where it makes up more than
    half of the distance between the centres.
    """
    offsets, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (box_a[low] + box_a[high] - box_b[low] - box_b[high]) / 2
        sizes = abs(box_a[high] - box_a[low]) + abs(box_b[high] - box_b[low])
        offsets.append(offset)
        beyond.append(math.copysign(max(abs(offset) - threshold * sizes, 0.0), offset))
    if all(abs(value) < _NO_OFFSET for value in beyond):
        return set()
    distance = math.hypot(*offsets)
    dx, dy = (value / distance for value in beyond)
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in found.items() if holds}


def score_detections(
    detections: Iterable[Detected],
    metadata: Mapping[str, Any],
    rule: GenEvalRule = OFFICIAL_RULE,
) -> tuple[bool, str]:
    """(correct, reason) of one image; `reason` names every clause that failed, one a line, and is empty if none did."""
    objects = rule.select(detections, metadata["tag"])
    reasons: list[str] = []
    groups: list[list[Detected] | None] = []  # per include clause the objects that met it, None where it failed
    for clause in metadata.get("include", []):
        found = objects.get(clause["class"], [])[: clause["count"]]
        failures = _clause_failures(clause, found, groups, rule)
        reasons += failures
        groups.append(None if failures else found)
    for clause in metadata.get("exclude", []):
        count = len(objects.get(clause["class"], []))
        if count >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return not reasons, "\n".join(reasons)


@dataclass(frozen=True)
class _Recorded:
    """A detection of a plain record."""

    kind: str
    color: str
    bbox: Sequence[float]
    score: float


def score_prompt(
    metadata: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    rule: GenEvalRule = OFFICIAL_RULE,
) -> tuple[bool, str]:
    """(correct, reason) of one image given as raw detections, `{"cls", "box": [x0, y0, x1, y1], "score", "color"}`.

    `color` is what the colour classifier would name; it may be missing where the prompt asks for none.

    Raises:
        DataError: a detection lacks a field.
    """
    items = []
    for index, record in enumerate(detections):
        missing = [key for key in ("cls", "box", "score") if key not in record]
        if missing:
            raise DataError(f"detection {index} lacks {', '.join(missing)}; expected cls, box, score and color")
        items.append(_Recorded(record["cls"], str(record.get("color", "")), record["box"], float(record["score"])))
    return score_detections(items, metadata, rule)


def _clause_failures(
    clause: Mapping[str, Any],
    found: list[Detected],
    groups: list[list[Detected] | None],
    rule: GenEvalRule,
) -> list[str]:
    kind, count = clause["class"], clause["count"]
    if len(found) < count:
        return [f"expected {kind}>={count}, found {len(found)}"]
    wanted = clause.get("color")
    colors = [] if wanted is None else [item.color for item in found]  # naming a colour may cost a network's pass
    if wanted is not None and colors.count(wanted) < count:
        others = ", ".join(f"{colors.count(name)} {name}" for name in COLORS if name in colors)
        return [f"expected {wanted} {kind}>={count}, found {colors.count(wanted)} {wanted}; and {others}"]
    return _position_failures(clause, found, groups, rule) if clause.get("position") is not None else []


def _position_failures(
    clause: Mapping[str, Any],
    found: list[Detected],
    groups: list[list[Detected] | None],
    rule: GenEvalRule,
) -> list[str]:
    relation, target_index = clause["position"]
    targets = groups[target_index]
    if targets is None:
        return [f"no target for {clause['class']} to be {relation}"]
    for item in found:
        for target in targets:
            relations = relative_position(item.bbox, target.bbox, rule.position_threshold)
            if relation not in relations:
                seen = " and ".join(sorted(relations))
                return [f"expected {clause['class']} {relation} target, found {seen} target"]
    return []


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of result rows (`tag`, `prompt`, `correct`).

    Returns {"overall": mean of the task means, "by_tag": {tag: share correct}, "image_accuracy", "prompt_accuracy":
    share of prompts with at least one correct image, "num_images", "num_prompts"}.
    """
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(bool(row["correct"]))
        identity = str(row.get("metadata", row["prompt"]))
        by_prompt[identity] = by_prompt.get(identity, False) or bool(row["correct"])
    order = [tag for tag in TAGS if tag in by_tag] + sorted(set(by_tag) - set(TAGS))
    means = {tag: sum(by_tag[tag]) / len(by_tag[tag]) for tag in order}
    return {
        "overall": sum(means.values()) / len(means) if means else 0.0,
        "by_tag": means,
        "image_accuracy": sum(map(sum, by_tag.values())) / len(rows) if rows else 0.0,
        "prompt_accuracy": sum(by_prompt.values()) / len(by_prompt) if by_prompt else 0.0,
        "num_images": len(rows),
        "num_prompts": len(by_prompt),
    }
