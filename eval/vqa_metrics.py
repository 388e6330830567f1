"""Scores of VQA benchmarks as their own scripts take them: how an answer is read, and what is counted.

Answers are read strictly: what a script counts as wrong (a word around the letter, a missing yes) is wrong here too,
because published numbers depend on it. Soft accuracy of VQAv2 and TextVQA is in `unitok.eval.vqa_accuracy`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

LETTERS = "ABCDEFGHI"
# MME's two halves; the score of a half is the sum over its categories of acc and acc+, each in percent.
MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
# What MMBench's rule takes for a refusal, before it looks for an option.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_OPTION_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def mean(values: Sequence[float]) -> float:
    """Mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


# ---- POPE


def pope_answer(text: str) -> str:
    """ "no" where the first sentence has the word no, No or not; anything else counts as "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_figures(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """accuracy, precision, recall, f1 and yes_ratio of (prediction, answer) pairs; "yes" is the positive class.

    A ratio of nothing (no "yes" at all) is 0.
    """
    both = sum(prediction == answer == "yes" for prediction, answer in pairs)
    said = sum(prediction == "yes" for prediction, _ in pairs)
    true = sum(answer == "yes" for _, answer in pairs)
    precision, recall = both / said if said else 0.0, both / true if true else 0.0
    return {
        "accuracy": mean([prediction == answer for prediction, answer in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": said / len(pairs) if pairs else 0.0,
    }


def pope_f1_mean(items: Sequence[tuple[str, str, str]]) -> float:
    """Mean of the F1 of POPE's parts (random, popular, adversarial), of (part, prediction, answer)."""
    parts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for part, prediction, answer in items:
        parts[part].append((prediction, answer))
    return mean([pope_figures(pairs)["f1"] for pairs in parts.values()])


# ---- MME


def mme_answer(text: str) -> str:
    """ "yes", "no" or "other": the whole answer, else what its first four characters hold."""
    text = text.strip().lower()
    start = text if text in ("yes", "no") else text[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def mme_accuracies(items: Sequence[tuple[str, str, bool]]) -> dict[str, tuple[float, float]]:
    """(acc, acc+) in [0, 1] of every category, of (category, image, correct).

    acc is over questions; acc+ the share of images both of whose questions are answered correctly.
    """
    categories: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for category, image, correct in items:
        categories[category][image].append(correct)
    return {
        name: (
            mean([correct for answers in images.values() for correct in answers]),
            mean([len(answers) == 2 and all(answers) for answers in images.values()]),
        )
        for name, images in categories.items()
    }


def mme_score(items: Sequence[tuple[str, str, bool]], categories: Sequence[str]) -> float:
    """Sum over the categories of 100 (acc + acc+)."""
    found = mme_accuracies(items)
    return sum(100 * sum(found[name]) for name in categories if name in found)


def mme_perception(items: Sequence[tuple[str, str, bool]]) -> float:
    """At most 2000."""
    return mme_score(items, MME_PERCEPTION)


def mme_cognition(items: Sequence[tuple[str, str, bool]]) -> float:
    """At most 800."""
    return mme_score(items, MME_COGNITION)


def mme_acc(items: Sequence[tuple[str, str, bool]]) -> float:
    """Share of questions, over all categories."""
    return mean([correct for _, _, correct in items])


def mme_acc_plus(items: Sequence[tuple[str, str, bool]]) -> float:
    """Share of images with both questions right, over all categories (an image belongs to one category)."""
    merged = [("all", f"{category}/{image}", correct) for category, image, correct in items]
    return mme_accuracies(merged)["all"][1] if merged else 0.0


# ---- GQA


def gqa_correct(text: str, answer: str) -> bool:
    """Equal but for case and full stops at the end."""
    return text.strip().rstrip(".").lower() == answer.strip().lower()


# ---- Multiple choice


def scienceqa_letter(text: str, letters: str = "ABCDE") -> str | None:
    """ScienceQA: the letter alone, "B. ..." or one "The answer is B."; anything else is no answer."""
    text = text.strip()
    if text in set(letters):
        return text
    if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def option_letter(text: str, options: Mapping[str, str]) -> str | None:
    """MMBench's exact matching (VLMEvalKit's `can_infer`, the step before it asks a judge).

    The one option letter that stands as a word of its own, unless "A" is a word among more than three: it may be the
    article. Where that gives nothing, also for several letters, the one option whose text is part of an answer that is
    at most twice as long as all options together. Refusals, and a lone "Z", are no answer.
    """
    words = text.translate(_OPTION_MARKS).split()
    standing = [letter for letter in options if letter in words]
    if any(refusal in text for refusal in _REFUSALS) or (not standing and "Z" in words):
        return None
    if len(standing) == 1 and not ("A" in words and len(words) > 3):
        return standing[0]
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    contained = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return contained[0] if len(contained) == 1 else None


def circular_accuracy(items: Sequence[tuple[str, bool]]) -> float:
    """MMBench's CircularEval: a question counts when it is answered correctly in every rotation of its options.

    items: (question, correct), one for every rotation.
    """
    questions: dict[str, list[bool]] = defaultdict(list)
    for question, correct in items:
        questions[question].append(correct)
    return mean([all(rotations) for rotations in questions.values()])


def first_accuracy(items: Sequence[tuple[int, bool]]) -> float:
    """Accuracy with the options as they stand ("vanilla"), of (rotation, correct)."""
    return mean([correct for rotation, correct in items if rotation == 0])


# ---- Groups


def by_group(items: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean of every group, of (group, score); for tables."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, score in items:
        groups[group].append(score)
    return {group: mean(scores) for group, scores in sorted(groups.items())}


def values(items: Sequence[tuple[Any, float]]) -> list[float]:
    """The scores of (group, score)."""
    return [score for _, score in items]
