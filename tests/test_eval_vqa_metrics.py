"""Scores of the VQA benchmarks on cases counted by hand, and MMMU's reading beside lm-eval's port of its script."""

import random

import pytest

from unitok.eval import vqa_metrics as metrics
from unitok.eval.benchmarks import score
from unitok.eval.mmmu import open_correct, parse_choice


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("NO", "yes"),  # the script knows two spellings
        ("There is not, I think", "no"),
        ("Yes. No.", "yes"),  # only the first sentence counts
        ("No, it is", "no"),
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_pope_answers(text, answer):
    assert metrics.pope_answer(text) == answer


def test_pope_figures_by_hand():
    """TP 3, FP 1, FN 2, TN 4."""
    pairs = [("yes", "yes")] * 3 + [("yes", "no")] + [("no", "yes")] * 2 + [("no", "no")] * 4
    figures = metrics.pope_figures(pairs)
    assert figures == pytest.approx(
        {"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "f1": 2 * 0.75 * 0.6 / 1.35, "yes_ratio": 0.4}
    )
    assert metrics.pope_figures([("no", "yes")]) == dict.fromkeys(figures, 0.0)
    parts = [("random", *pair) for pair in pairs] + [("popular", "yes", "yes")]
    assert metrics.pope_f1_mean(parts) == pytest.approx((figures["f1"] + 1) / 2)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes", "yes"), ("no.", "no"), ("Not at all", "no"), ("It is, yes", "other"), ("not", "no"), ("", "other")],
)
def test_mme_answers(text, answer):
    assert metrics.mme_answer(text) == answer


def test_mme_scores_by_hand():
    """count: images a (both right), b (one right): acc 3/4, acc+ 1/2. code_reasoning: one image, both right."""
    items = [("count", "a", True), ("count", "a", True), ("count", "b", True), ("count", "b", False)]
    items += [("code_reasoning", "a", True), ("code_reasoning", "a", True)]
    assert metrics.mme_accuracies(items) == {"count": (0.75, 0.5), "code_reasoning": (1.0, 1.0)}
    assert metrics.mme_perception(items) == pytest.approx(125)
    assert metrics.mme_cognition(items) == pytest.approx(200)
    assert metrics.mme_acc(items) == pytest.approx(5 / 6)
    assert metrics.mme_acc_plus(items) == pytest.approx(2 / 3)


def test_mme_halves_are_the_fourteen_categories():
    assert len(metrics.MME_PERCEPTION) == 10 and len({*metrics.MME_PERCEPTION, *metrics.MME_COGNITION}) == 14


def test_gqa_answers_are_equal_but_for_case_and_stops():
    assert metrics.gqa_correct("Table.", "table") and metrics.gqa_correct(" tall table..", "tall table")
    assert not metrics.gqa_correct("the table", "table") and not metrics.gqa_correct("tables", "table")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. blue", "B"),
        ("B.", None),
        ("The answer is C.", "C"),
        ("The answer is C. The answer is D.", None),
        ("b", None),
        ("F", None),
        ("", None),
    ],
)
def test_scienceqa_letters(text, letter):
    assert metrics.scienceqa_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("the answer is B", "B"),
        ("A cup is in it", None),  # "A" may be the article
        ("A dog is in it", "B"),  # and where the letter says nothing, an option's text may
        ("It is B or C: a dog", "B"),
        ("B and C are wrong, it is a cat", "A"),
        ("It is B or C: a dog" + " or so" * 4, None),  # longer than twice all options
        ("B" + " or so" * 9, "B"),
        ("I can't process this file. B", None),
        ("Z, a dog", None),
        ("A", "A"),
        ("B or C", None),
        ("I see a red bird", "C"),
        ("a dog and a red bird", None),
        ("nothing", None),
    ],
)
def test_option_letters(text, letter):
    assert metrics.option_letter(text, {"A": "a cat", "B": "a dog", "C": "a red bird"}) == letter


@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("scienceqa", "The answer is B.", 1.0),
        ("scienceqa", "The answer is F.", 0.0),  # no such letter, so it is as wrong as no answer
        ("scienceqa", "The answer is C.", 0.0),
        ("scienceqa", "", 0.0),
        ("seed", " B\n", 1.0),
        ("seed", "B. down", 0.0),  # as LLaVA's script: the letter alone
        ("seed", "down", 0.0),
    ],
)
def test_an_answer_scored_as_its_benchmark_does(name, answer, right):
    doc = {"question": "q", "choices": ["up", "down"], "answer": 1 if name == "scienceqa" else "B", "image": None}
    doc |= {f"choice_{letter}": text for letter, text in zip("abcd", ("up", "down", "left", "right"), strict=True)}
    assert score(name, doc, answer)["accuracy"] == right


def test_circular_counts_questions_right_in_every_rotation():
    items = [("1", True), ("1", True), ("2", True), ("2", False), ("2", True)]
    assert metrics.circular_accuracy(items) == 0.5
    assert metrics.first_accuracy([(0, True), (1, False), (0, False)]) == 0.5


OPTIONS = {"A": "red", "B": "dark blue", "C": "12"}
CHOICES = [
    "B",
    "(B)",
    "B.",
    "(A) or (C)",
    "A or C, so C",
    "it must be dark blue I would say, not red",
    "I say B because",
    "C 12",
]
OPEN = [
    "42",
    "The answer is 1,234.5",
    "so x = 3.14159\nthe result is 2e3 or -7",
    "It is a cat. So it could be the dog",
    "e",
    "final answer : b",
    "the area is",
    "",
    "thus 3,000 people",
    "Therefore the voltage is .5 V",
    "= 5",
    "B.",
    ".5",
    " E ",
    "10 V.",
]
REFERENCES = ["42", "1234.5", "3.14", ["2000", "-7"], "dog", "e", "b", "B", "3000", "0.5", "5", "cat", "V"]


def test_mmmu_reads_as_the_port_in_lm_eval():
    state = random.getstate()
    from lm_eval.tasks.mmmu import utils as official  # seeds the generator of the process when imported

    random.setstate(state)
    for text in CHOICES:
        assert parse_choice(text, OPTIONS, "x") == official.parse_multi_choice_response(text, list(OPTIONS), OPTIONS)
    outcomes = []
    for text in OPEN:
        for reference in REFERENCES:
            expected = official.eval_open(reference, official.parse_open_response(text))
            assert open_correct(text, reference if isinstance(reference, list) else [reference]) == expected
            outcomes.append(expected)
    assert 10 < sum(outcomes) < len(outcomes) - 10


def test_mmmu_guesses_by_the_question_alone():
    guesses = {key: parse_choice("?", OPTIONS, key) for key in map(str, range(20))}
    assert guesses == {key: parse_choice("no idea", OPTIONS, key) for key in guesses}
    assert set(guesses.values()) == set(OPTIONS)
