"""Soft accuracy of free-form answers, as TextVQA and VQAv2 are scored (EvalAI rules).

The rules are copied in behaviour, odd corners included, because published numbers depend on them: possessives are cut
off (`let's` -> `let 's`), at most 32 full stops are removed, number words up to ten become digits.
"""

import re
from collections.abc import Sequence

_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1)
}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_STOP_NOT_BEFORE_DIGIT = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_MAX_STOPS_REMOVED = 32  # the official code passes re.UNICODE (= 32) where `count` is expected

_CONTRACTIONS_ONE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
_CONTRACTIONS_MANY = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
""".split()


def _contractions() -> dict[str, str]:
    """Misspelt -> proper form: every way of losing exactly one apostrophe, and two odd entries of the official list."""
    table = {"somebody'd": "somebodyd", "'ows'at": "'ow's'at"}
    for word in _CONTRACTIONS_ONE + _CONTRACTIONS_MANY:
        for mark in re.finditer("'", word):
            table[word[: mark.start()] + word[mark.end() :]] = word
    return table


_CONTRACTIONS = _contractions()


def normalise_answer(text: str) -> str:
    """The form in which answers are compared: lower case, digits for number words, no articles, no punctuation."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _strip_punctuation(text).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def is_answer(prediction: str, answer: str) -> bool:
    """Whether a prediction is the one right answer, in the form in which answers are compared; in their own where
    nothing is left of the answer in that, as of "A"."""
    wanted = normalise_answer(answer)
    if not wanted:
        return prediction.strip().lower() == answer.strip().lower()
    return normalise_answer(prediction) == wanted


def _strip_punctuation(text: str) -> str:
    joined_number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or joined_number else " ")
    return _STOP_NOT_BEFORE_DIGIT.sub("", out, count=_MAX_STOPS_REMOVED)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score in [0, 1] of one prediction against the answers of several people.

    Mean, over leaving each person out, of min(1, agreeing others / 3); with a single reference answer, exact match.
    """
    wanted = normalise_answer(prediction)
    agree = [normalise_answer(answer) == wanted for answer in answers]
    if len(agree) == 1:
        return float(agree[0])
    total = sum(agree)
    return sum(min(1.0, (total - own) / 3) for own in agree) / len(agree) if agree else 0.0
