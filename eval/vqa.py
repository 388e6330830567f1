"""Visual question answering: accuracy by type of question, beside the best answer that never looks."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from unitok.core.errors import DataError
from unitok.core.rng import numpy_rng
from unitok.data.source import good_samples
from unitok.eval.progress import batches, progress
from unitok.eval.vqa_accuracy import is_answer, normalise_answer

Answer = Callable[[list[Image.Image], list[str]], list[str]]  # (images, questions) -> one answer each


@dataclass(frozen=True)
class Question:
    """One question to ask: `index` is the position of its image in the source."""

    index: int
    key: str
    type: str
    text: str
    answer: str


def choose_questions(
    source: Any,
    limit: int | None = None,
    seed: int = 0,
    per_image: int = 5,
    rephrase: Callable[[str, Any], str] | None = None,
) -> list[Question]:
    """The questions of an evaluation, from (seed, sample key) alone: at most `per_image` of an image, types in turn.

    Args:
        limit: number of questions; None asks all images of the source.
        rephrase: (question, numpy generator) -> other wording of the same question.

    Raises:
        DataError: the source has no question.
    """
    chosen: list[Question] = []
    for index, sample in good_samples(source):
        if limit is not None and len(chosen) >= limit:
            break
        rng = numpy_rng("vqa", seed, sample.key)
        for kind, text, answer in _in_turn(list(sample.questions or []), rng)[:per_image]:
            worded = text if rephrase is None else rephrase(text, rng)
            chosen.append(Question(index, sample.key, kind, worded, answer))
    if not chosen:
        raise DataError(f"none of the {len(source)} samples has questions; VQA needs (type, question, answer) entries")
    return chosen[:limit]


def _in_turn(questions: list[Any], rng: Any) -> list[tuple[str, str, str]]:
    """Shuffled, then one of each type before a second of any."""
    shuffled = [tuple(questions[position]) for position in rng.permutation(len(questions))]
    seen: Counter[str] = Counter()
    turns = []
    for question in shuffled:
        turns.append(seen[question[0]])
        seen[question[0]] += 1
    return [question for _, question in sorted(zip(turns, shuffled, strict=True), key=lambda pair: pair[0])]


def evaluate_vqa(
    answer_fn: Answer,
    source: Any,
    limit: int | None = None,
    seed: int = 0,
    *,
    train_answers: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 32,
    per_image: int = 5,
    rephrase: Callable[[str, Any], str] | None = None,
) -> dict[str, Any]:
    """Asks `limit` questions about the images of `source`; an answer counts when it equals the reference, normalised.

    Args:
        answer_fn: (images, questions) -> one answer each.
        train_answers: per type of question the answers of the training data, from which the majority answer is taken;
            without it the majority of the asked questions themselves is used, which is a slightly stronger baseline.

    Returns:
        {"accuracy", "majority", "by_type": {type: {"accuracy", "majority", "majority_answer", "count"}},
        "num_questions", "num_images", "records": [{key, type, question, answer, prediction, correct}]}

    Raises:
        DataError: no question, or `answer_fn` gave another number of answers than asked.
    """
    questions = choose_questions(source, limit, seed, per_image, rephrase)
    records = []
    for rows in progress(batches(len(questions), batch_size), "asking"):
        asked = [questions[row] for row in rows]
        predictions = answer_fn([source[question.index].image for question in asked], [q.text for q in asked])
        if len(predictions) != len(asked):
            raise DataError(f"the model gave {len(predictions)} answers to {len(asked)} questions; expected one each")
        records += [_record(question, answer) for question, answer in zip(asked, predictions, strict=True)]
    return summarise_records(records, train_answers)


def _record(question: Question, prediction: str) -> dict[str, Any]:
    return {
        "key": question.key,
        "type": question.type,
        "question": question.text,
        "answer": question.answer,
        "prediction": prediction,
        "correct": is_answer(prediction, question.answer),
    }


def summarise_records(
    records: list[dict[str, Any]],
    train_answers: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Figures of stored records (so answers can be scored again later); see `evaluate_vqa` for the form."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["type"]].append(record)
    by_type = {}
    for kind in sorted(groups):
        group = groups[kind]
        references = [normalise_answer(record["answer"]) for record in group]
        pool = (train_answers or {}).get(kind) or references
        majority = _most_frequent([normalise_answer(answer) for answer in pool])
        by_type[kind] = {
            "accuracy": sum(record["correct"] for record in group) / len(group),
            "majority": references.count(majority) / len(group),
            "majority_answer": majority,
            "count": len(group),
        }
    total = len(records)
    return {
        "accuracy": sum(entry["accuracy"] * entry["count"] for entry in by_type.values()) / total,
        "majority": sum(entry["majority"] * entry["count"] for entry in by_type.values()) / total,
        "by_type": by_type,
        "num_questions": total,
        "num_images": len({record["key"] for record in records}),
        "records": records,
    }


def _most_frequent(answers: list[str]) -> str:
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))
