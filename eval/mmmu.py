"""How MMMU's own script reads an answer: the chosen letter, or the numbers and phrases of a free answer."""

import re
from collections.abc import Mapping, Sequence

from unitok.core.rng import numpy_rng

_MARKS = ",.!?;:'"
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def parse_choice(text: str, options: Mapping[str, str], key: str) -> str:
    """The letter of a multiple-choice answer: "(B)", a lone "B", or, in more than five words, an option's text.

    Of several candidates the last one counts. Without any the script guesses; here the guess depends on `key` alone.
    """
    for mark in _MARKS:
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        found = [letter for letter in options if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(form.format(letter)))
    if len(text.split()) > 5:
        found = [letter for letter, option in options.items() if option.lower() in text.lower()]
        if found:
            return max(found, key=lambda letter: text.lower().rfind(options[letter].lower()))
    letters = sorted(options)
    return letters[int(numpy_rng("mmmu", key).integers(len(letters)))]


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


def _forms(text: str) -> list[str | float]:
    """What two answers are compared by: a number of two decimals, or lower case (one letter: only beside a space)."""
    text = text.strip()
    if _is_number(text):
        return [round(float(text.replace(",", "")), 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_phrases(text: str) -> list[str]:
    """What follows the last "is", "so", "answer" ... of every line; the whole answer where there is none."""
    # The script also splits at a full stop before a capital, after lower-casing: never.
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        tails = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        shortest = _first_shortest(tails)
        if shortest and shortest not in tuple(_MARKS):
            phrases.append(shortest)
    return phrases or [text]


def _first_shortest(tails: Sequence[str]) -> str:
    """The shortest one; an empty one is given up for what comes after it, as in the script."""
    shortest = ""
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def parse_open(text: str) -> set[str | float]:
    """All phrases and numbers that a free answer may mean."""
    phrases = _key_phrases(text)
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return {form for part in [*phrases, *numbers] for form in _forms(part)}


def open_correct(text: str, answers: Sequence[str]) -> bool:
    """Whether a phrase of the answer holds a reference, or a number equals one."""
    wanted = [form for answer in answers for form in _forms(answer)]
    for found in parse_open(text):
        if isinstance(found, str):
            if any(isinstance(form, str) and form in found for form in wanted):
                return True
        elif found in wanted:
            return True
    return False
