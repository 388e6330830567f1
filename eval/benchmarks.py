"""VQA benchmarks: where their data are, how a question is asked, how an answer is scored.

One table for lm-eval's task files, for re-scoring stored answers, and for `--dry-run`. A document is a row of the data
set on the hub; wordings are those of LLaVA-1.5's evaluation, which the models of this family are compared with.
"""

import ast
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unitok.core.errors import DataError
from unitok.eval import mmmu
from unitok.eval import vqa_metrics as metrics
from unitok.eval.vqa_accuracy import soft_accuracy

Doc = Mapping[str, Any]
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Metric:
    """`item(doc, answer)` is what is kept of one answer, `total(items)` the figure of all.

    `unit(item)`: what was drawn by itself, for the standard error: questions on one picture that are counted together
    are one unit (None: every answer is one).
    """

    item: Callable[[Doc, str], Any]
    total: Callable[[Sequence[Any]], float] = metrics.mean
    higher_is_better: bool = True
    unit: Callable[[Any], Hashable] | None = None


@dataclass(frozen=True)
class Benchmark:
    """`hub`, `config`, `split`: the data set. `fields`: what a document must have. `images`: fields with pictures.

    `without_pictures`: some of its questions have none; anywhere else a document without one is an error.
    `rotations`: how often a document is asked, each time with its options moved on by one (1: once, as it stands).
    """

    hub: str
    split: str
    fields: tuple[str, ...]
    ask: Callable[[Doc], str]
    metrics: Mapping[str, Metric]
    config: str | None = None
    images: tuple[str, ...] = ("image",)
    without_pictures: bool = False
    keep: Callable[[Doc], bool] | None = None
    rotations: Callable[[Doc], int] | None = None
    image_config: tuple[str, str] | None = None  # (configuration of the pictures, field that names one)
    generated: bool = False  # `hub` is a source of ours that needs no data
    setting: Mapping[str, Any] = field(default_factory=dict)  # what a protocol names beside the task


def score(name: str, doc: Doc, answer: str) -> dict[str, Any]:
    """What every metric of a benchmark keeps of one answer."""
    text = answer.strip()
    return {metric: rule.item(doc, text) for metric, rule in benchmark(name).metrics.items()}


def totals(name: str, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """All figures of a benchmark, of what `score` gave for every answer."""
    return {
        metric: float(rule.total([item[metric] for item in items])) for metric, rule in benchmark(name).metrics.items()
    }


def benchmark(name: str) -> Benchmark:
    """DataError for an unknown name."""
    if name not in BENCHMARKS:
        raise DataError(f"no benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


# ---- Wordings


def _short(doc: Doc) -> str:
    return f"{doc['question']}\n{SHORT}"


def _short_with_ocr(doc: Doc) -> str:
    return f"{doc['question']}\nReference OCR token: {', '.join(doc['ocr_tokens'])}\n{SHORT}"


def _mme_question(doc: Doc) -> str:
    return f"{doc['question'].replace('Please answer yes or no.', '').strip()}\n{SHORT}"


def _choices(question: str, options: Mapping[str, str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in options.items()]
    return "\n".join([question, *lines, LETTER])


def _seed_options(doc: Doc) -> dict[str, str]:
    return {letter: doc[f"choice_{letter.lower()}"] for letter in "ABCD"}


def _scienceqa_question(doc: Doc) -> str:
    context = f"Context: {doc['hint']}\n" if doc.get("hint") else ""
    return _choices(context + doc["question"], dict(zip("ABCDE", doc["choices"], strict=False)))


def mmbench_options(doc: Doc) -> dict[str, str]:
    """Letter -> text of a rotation: the options moved on by `rotation`, the letters staying where they are."""
    texts = [doc[letter] for letter in "ABCD" if _given(doc.get(letter))]
    shift = doc.get("rotation") or 0
    return dict(zip("ABCD", texts[shift:] + texts[:shift], strict=False))


def _given(text: Any) -> bool:
    return isinstance(text, str) and text.strip().lower() not in ("", "nan", "none")


def _mmbench_question(doc: Doc) -> str:
    hint = f"{doc['hint']}\n" if _given(doc.get("hint")) else ""
    return _choices(hint + doc["question"], mmbench_options(doc))


def _mmbench_correct(doc: Doc, answer: str) -> bool:
    options = mmbench_options(doc)
    letter = metrics.option_letter(answer, options)
    return letter is not None and options[letter] == doc[doc["answer"]]


def mmmu_options(doc: Doc) -> dict[str, str]:
    """Letter -> text; the data set holds the list as text."""
    options = doc["options"]
    options = ast.literal_eval(options) if isinstance(options, str) else options
    return dict(zip(metrics.LETTERS, options, strict=False))


def _mmmu_question(doc: Doc) -> str:
    """MMMU's own prompt; every "<image n>" becomes a mark, which the model's own place for an image replaces."""
    if doc["question_type"] == "multiple-choice":
        lines = [f"({letter}) {option}" for letter, option in mmmu_options(doc).items()]
        text = "\n\n".join([doc["question"], "\n".join(lines), LETTER])
    else:
        text = f"{doc['question']}\n\n{SHORT}"
    return text


def _mmmu_correct(doc: Doc, answer: str) -> float:
    reference = doc["answer"]
    if doc["question_type"] == "multiple-choice":
        return float(mmmu.parse_choice(answer, mmmu_options(doc), doc["id"]) == reference)
    if isinstance(reference, str) and reference.startswith("["):
        reference = ast.literal_eval(reference)
    return float(mmmu.open_correct(answer, [reference] if isinstance(reference, str) else reference))


# ---- Scores


def _soft(doc: Doc, answer: str) -> float:
    answers = doc["answers"]
    return soft_accuracy(answer, [str(one["answer"] if isinstance(one, Mapping) else one) for one in answers])


def _pope_pair(doc: Doc, answer: str) -> tuple[str, str]:
    return metrics.pope_answer(answer), doc["answer"].strip().lower()


def _pope(figure: str) -> Metric:
    higher = figure != "yes_ratio"
    return Metric(_pope_pair, lambda pairs: metrics.pope_figures(pairs)[figure], higher)


def _mme(total: Callable[[Sequence[Any]], float]) -> Metric:
    def item(doc: Doc, answer: str) -> tuple[str, str, bool]:
        correct = metrics.mme_answer(answer) == doc["answer"].strip().lower()
        return doc["category"], str(doc["question_id"]), correct

    return Metric(item, total, unit=lambda kept: kept[:2])


def _scienceqa_correct(doc: Doc, answer: str) -> bool:
    letter = metrics.scienceqa_letter(answer)
    # A letter beyond the options ("The answer is F.") is an answer as wrong as none.
    return letter is not None and "ABCDE"[: len(doc["choices"])].find(letter) == doc["answer"]


def _exact(rule: Callable[[Doc, str], bool]) -> dict[str, Metric]:
    return {"accuracy": Metric(lambda doc, answer: float(rule(doc, answer)))}


_QUESTION = ("question", "answer")
BENCHMARKS: dict[str, Benchmark] = {
    "shapes": Benchmark(
        "shapes:val?num=500",
        "val",
        _QUESTION,
        lambda doc: doc["question"],
        _exact(lambda doc, answer: soft_accuracy(answer, [doc["answer"]]) == 1.0),
        generated=True,
    ),
    "vqav2": Benchmark("lmms-lab/VQAv2", "validation", ("question", "answers"), _short, {"accuracy": Metric(_soft)}),
    "gqa": Benchmark(
        "lmms-lab/GQA",
        "testdev",
        _QUESTION,
        _short,
        _exact(lambda doc, answer: metrics.gqa_correct(answer, doc["answer"])),
        config="testdev_balanced_instructions",
        image_config=("testdev_balanced_images", "imageId"),
    ),
    "textvqa": Benchmark(
        "lmms-lab/textvqa",
        "validation",
        ("question", "answers"),
        _short,
        {"accuracy": Metric(_soft)},
        setting={"ocr_hints": False},
    ),
    "textvqa_ocr": Benchmark(
        "lmms-lab/textvqa",
        "validation",
        ("question", "answers", "ocr_tokens"),
        _short_with_ocr,
        {"accuracy": Metric(_soft)},
        setting={"ocr_hints": True},
    ),
    "pope": Benchmark(
        "lmms-lab/POPE",
        "test",
        (*_QUESTION, "category"),
        _short,
        {name: _pope(name) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")}
        | {"f1_mean": Metric(lambda doc, text: (doc["category"], *_pope_pair(doc, text)), metrics.pope_f1_mean)},
    ),
    "mme": Benchmark(
        "lmms-lab/MME",
        "test",
        (*_QUESTION, "category", "question_id"),
        _mme_question,
        {
            "perception": _mme(metrics.mme_perception),
            "cognition": _mme(metrics.mme_cognition),
            "acc": _mme(metrics.mme_acc),
            "acc_plus": _mme(metrics.mme_acc_plus),
        },
    ),
    "seed": Benchmark(
        "lmms-lab/SEED-Bench",
        "test",
        (*_QUESTION, "choice_a", "choice_b", "choice_c", "choice_d"),
        lambda doc: _choices(doc["question"], _seed_options(doc)),
        _exact(lambda doc, answer: answer == doc["answer"]),  # as LLaVA's script: "A." or "A. red" is wrong
        keep=lambda doc: doc.get("data_type", "image") == "image",
    ),
    "scienceqa": Benchmark(
        "lmms-lab/ScienceQA",
        "test",
        (*_QUESTION, "choices"),
        _scienceqa_question,
        {
            "accuracy": Metric(lambda doc, answer: float(_scienceqa_correct(doc, answer))),
            "img_accuracy": Metric(
                lambda doc, answer: (bool(doc.get("image")), float(_scienceqa_correct(doc, answer))),
                lambda items: metrics.mean([right for has_image, right in items if has_image]),
            ),
        },
        config="ScienceQA-FULL",
        without_pictures=True,
    ),
    "mmmu": Benchmark(
        "lmms-lab/MMMU",
        "validation",
        (*_QUESTION, "id", "options", "question_type"),
        _mmmu_question,
        {"accuracy": Metric(_mmmu_correct)},
        images=tuple(f"image_{number}" for number in range(1, 8)),
    ),
    "mmvet": Benchmark(
        "lmms-lab/MMVet",
        "test",
        (*_QUESTION, "question_id", "capability"),
        lambda doc: doc["question"],
        # Scored by a judge, later: `unitok eval rescore --judge`. A run keeps the answers.
        {"answered": Metric(lambda doc, answer: float(bool(answer)))},
    ),
    "mmbench": Benchmark(
        "lmms-lab/MMBench",
        "dev",
        (*_QUESTION, "index", "A", "B"),
        _mmbench_question,
        {
            "circular_accuracy": Metric(
                lambda doc, answer: (str(doc["index"]), _mmbench_correct(doc, answer)),
                metrics.circular_accuracy,
                unit=lambda kept: kept[0],
            ),
            "vanilla_accuracy": Metric(
                lambda doc, answer: (doc["rotation"], _mmbench_correct(doc, answer)), metrics.first_accuracy
            ),
        },
        config="en",
        # The set holds every rotation as a row of its own, by the index of the question plus millions: we rotate.
        keep=lambda doc: int(doc["index"]) < 1_000_000,
        rotations=lambda doc: len([letter for letter in "ABCD" if _given(doc.get(letter))]),
    ),
}
