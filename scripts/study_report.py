"""What the codebook study shows: verdicts computed from its figures, tables beside the paper's numbers, and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unitok.eval.results import write_results

Verdict = Literal["same", "opposite", "mixed", "within", "missing"]
Run = Mapping[str, Any]
FIGURE = "codebooks.png"


@dataclass(frozen=True)
class Measure:
    """A figure of a run: where it stands in the result, how it is shown, and its baseline where there is one."""

    path: tuple[str, str]
    name: str
    form: str
    baseline: tuple[str, str] | None = None


MEASURES: dict[str, Measure] = {
    "psnr": Measure(("tokenizer", "psnr_db"), "PSNR (dB)", ".2f"),
    "agreement": Measure(("tokenizer", "detector_agreement"), "detector agreement", ".3f"),
    "retrieval": Measure(("retrieval", "top1"), "retrieval top 1", ".3f", ("retrieval", "chance")),
    "vqa": Measure(("vqa", "accuracy"), "VQA accuracy", ".3f", ("vqa", "majority")),
    "usage": Measure(("tokenizer", "usage"), "usage", ".2f"),
    "perplexity": Measure(("tokenizer", "perplexity"), "perplexity", ".1f"),
}
PLOTTED = ("psnr", "retrieval", "vqa")


@dataclass(frozen=True)
class Claim:
    """`text` says what the paper found: that `measure` grows along `order`. `paper`: its numbers, in that order."""

    text: str
    measure: str
    order: tuple[str, ...]
    paper: str


@dataclass(frozen=True)
class Question:
    """One comparison: (variant, label, the paper's figure for it) per row, and the claims about it."""

    title: str
    paper_column: str
    rows: tuple[tuple[str, str, str], ...]
    claims: tuple[Claim, ...]


_BOOKS = ("1x512", "2x256", "4x128", "8x64")
QUESTIONS: tuple[Question, ...] = (
    Question(
        "Number of codebooks",
        "paper: codebooks, rFID (less is better), zero-shot accuracy",
        (
            ("1x512", "1 x 512", "1 x 16384: 1.50, 41.0"),
            ("2x256", "2 x 256", "2 x 8192: 0.98, 43.9"),
            ("4x128", "4 x 128", "4 x 4096: 0.54, 44.7"),
            ("8x64", "8 x 64", "8 x 2048: 0.33, 46.1"),
        ),
        (
            Claim("more codebooks reconstruct better", "psnr", _BOOKS, "rFID 1.50, 0.98, 0.54, 0.33"),
            Claim("more codebooks find captions better", "retrieval", _BOOKS, "accuracy 41.0, 43.9, 44.7, 46.1"),
            Claim("more codebooks answer better", "vqa", _BOOKS, "no number for questions in this comparison"),
        ),
    ),
    Question(
        "Multi-codebook or residual quantization",
        "paper: rFID, zero-shot accuracy",
        (("residual", "residual 8 x 64", "3.46, 58.8"), ("8x64", "multi-codebook 8 x 64", "0.55, 63.7")),
        (
            Claim("multi-codebook reconstructs better", "psnr", ("residual", "8x64"), "rFID 3.46, 0.55"),
            Claim("multi-codebook finds captions better", "retrieval", ("residual", "8x64"), "accuracy 58.8, 63.7"),
            Claim("multi-codebook answers better", "vqa", ("residual", "8x64"), "no number for questions"),
        ),
    ),
    Question(
        "What the tokenizer is trained for",
        "paper: rFID, VQAv2",
        (
            ("reconstruction", "reconstruction only", "0.82, 56.33"),
            ("contrastive", "contrastive only", "-, 68.95"),
            ("8x64", "both", "0.72, 69.14"),
        ),
        (
            Claim("both answer better than reconstruction only", "vqa", ("reconstruction", "8x64"), "56.33, 69.14"),
            Claim(
                "contrastive only beats reconstruction only", "vqa", ("reconstruction", "contrastive"), "56.33, 68.95"
            ),
            Claim("both answer as well as contrastive only, or better", "vqa", ("contrastive", "8x64"), "68.95, 69.14"),
            Claim("both reconstruct no worse", "psnr", ("reconstruction", "8x64"), "rFID 0.82, 0.72"),
        ),
    ),
    Question(
        "Attention or linear projection into the codes",
        "paper",
        (("linear", "linear", "figure only"), ("8x64", "attention", "figure only")),
        (
            Claim("attention reconstructs better", "psnr", ("linear", "8x64"), "a figure without numbers"),
            Claim("attention finds captions better", "retrieval", ("linear", "8x64"), "a figure without numbers"),
            Claim("attention answers better", "vqa", ("linear", "8x64"), "a figure without numbers"),
        ),
    ),
)


# ---- figures and verdicts


def values_of(runs: Sequence[Run], variant: str, measure: str) -> list[float]:
    """The figure of every seed, in the order of seeds; empty where the variant is not trained for it."""
    part, key = MEASURES[measure].path
    chosen = sorted((run for run in runs if run["variant"] == variant), key=lambda run: run["seed"])
    return [run[part][key] for run in chosen if run[part][key] is not None]


def differ(low: Sequence[float], high: Sequence[float]) -> int:
    """1 or -1: `high` lies above or below `low` by more than the spread; 0: by no more.

    The spread is the larger of the two ranges over seeds; the difference is that of the means.
    """
    spread = max(max(low) - min(low), max(high) - min(high))
    difference = float(np.mean(high) - np.mean(low))
    return 0 if abs(difference) <= spread else int(np.sign(difference))


def judge(groups: Sequence[Sequence[float]]) -> Verdict:
    """Whether figures grow along `groups` (the seeds of each variant, in the paper's order from worst to best).

    "same" or "opposite": first and last differ by more than the spread, and no step goes the other way by more than
    the spread. "within": no two variants differ by more than the spread. Everything else is "mixed".
    """
    if any(len(group) < 2 for group in groups):
        return "missing"
    pairs = [differ(low, high) for index, low in enumerate(groups) for high in groups[index + 1 :]]
    if not any(pairs):
        return "within"
    ends = differ(groups[0], groups[-1])
    if ends == 0 or -ends in pairs:
        return "mixed"
    return "same" if ends > 0 else "opposite"


_WORDS: dict[Verdict, str] = {
    "same": "the same order here",
    "opposite": "the opposite order here",
    "mixed": "neither the same order nor the opposite one here",
    "within": "nothing beyond the spread of the seeds here",
    "missing": "not measured here with two seeds",
}


def verdict_text(claim: Claim, runs: Sequence[Run]) -> str:
    """One sentence: the claim, what this study shows of it, and the means."""
    groups = [values_of(runs, variant, claim.measure) for variant in claim.order]
    verdict, measure = judge(groups), MEASURES[claim.measure]
    text = f"Paper: {claim.text} ({claim.paper}). **{_WORDS[verdict].capitalize()}**"
    if verdict == "missing":
        return f"{text}."
    means = ", ".join(format(float(np.mean(group)), measure.form) for group in groups)
    steps = ""
    if len(groups) > 2 and verdict in ("same", "opposite", "mixed"):
        signs = {1: "up", -1: "down", 0: "within the spread"}
        steps = "; step by step: " + ", ".join(signs[differ(*pair)] for pair in zip(groups, groups[1:], strict=False))
    return f"{text}: {measure.name} {means}{steps}."


# ---- tables


def cell(values: Sequence[float], form: str) -> str:
    """Mean and range over seeds."""
    if not values:
        return "-"
    mean, low, high = (format(float(value), form) for value in (np.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{low}, {high}]"


def table(question: Question, runs: Sequence[Run]) -> str:
    """A markdown table of one question."""
    heads = ["variant", *(measure.name for measure in MEASURES.values()), question.paper_column]
    lines = [heads, ["---"] * len(heads)]
    for variant, label, paper in question.rows:
        cells = [cell(values_of(runs, variant, name), measure.form) for name, measure in MEASURES.items()]
        lines.append([label, *cells, paper])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def baselines(runs: Sequence[Run]) -> dict[str, float]:
    """Chance and majority answer, which are the same for every run."""
    known = {name: measure.baseline for name, measure in MEASURES.items() if measure.baseline}
    return {name: runs[0][part][key] for name, (part, key) in known.items()}


def document(runs: Sequence[Run], protocol: Mapping[str, Any], questions: Sequence[Question]) -> str:
    """The text of codebooks.md."""
    base, spent, batch, counts = baselines(runs), protocol["budget"], protocol["batch"], protocol["counts"]
    seeds = ", ".join(map(str, protocol["seeds"]))
    settings = ", ".join(f"`{setting}`" for setting in protocol["overrides"]["tokenizer"])
    parts = [
        "# The paper's questions about codebooks, at 64 pixels",
        "Written by `python scripts/study_codebooks.py`. UniTok ([arXiv 2502.20321](https://arxiv.org/abs/2502.20321)) "
        "trained its variants on OpenImages and on 128 to 512 million image-text pairs; here each is a tokenizer of "
        "about 0.9 M parameters on the shapes world. Only orders can be compared, not numbers.",
        f"Every variant: {spent['steps']} steps of {batch['tokenizer']} images with configs/tokenizer/shapes.yaml and "
        f"{settings}, then a language model for {spent['mllm_steps']} steps of {batch['mllm']} conversations on "
        f"its codes; seeds {seeds}; {counts['images']} held-out scenes, {counts['questions']} questions. The code "
        "vector has 32 channels and the codebooks hold 512 entries together. No variant was tuned by itself.",
        "Figures are means over seeds, with the lowest and the highest in brackets. Baselines: retrieval by chance "
        f"{base['retrieval']:.3f}, most frequent answer {base['vqa']:.3f}. Usage is the share of a codebook's entries "
        "that the held-out scenes use, perplexity the effective number of them (both means over codebooks). A "
        "difference of means counts when it is larger than the larger of the two ranges over seeds. That is a rule of "
        "thumb: two seeds show large effects only.",
        f"![PSNR, retrieval and VQA accuracy of every variant]({FIGURE})",
    ]
    for question in questions:
        verdicts = "\n".join(f"- {verdict_text(claim, runs)}" for claim in question.claims)
        parts += [f"## {question.title}", table(question, runs), verdicts]
    return "\n\n".join(parts) + "\n"


# ---- plot


def plot(path: Path, runs: Sequence[Run], questions: Sequence[Question]) -> Path:
    """A dot per seed, a bar over their range, a line at the mean; one panel per measure, grouped by question."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places, y = [], 0.0
    for question in questions:
        places.append((y, question.title, [(y + 1 + i, *row[:2]) for i, row in enumerate(question.rows)]))
        y += len(question.rows) + 1.6
    figure = Figure(figsize=(11, 0.33 * y + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PLOTTED), sharey=True)
    base = baselines(runs)
    for axes, name in zip(panels, PLOTTED, strict=True):
        for _, _, rows in places:
            for height, variant, _ in rows:
                known = any(run["variant"] == variant for run in runs)
                missing = "not trained for it" if known else "not measured"
                _draw(axes, height, values_of(runs, variant, name), variant == "8x64", missing)
        if name in base:
            axes.axvline(base[name], color="0.5", linestyle="--", linewidth=1)
            words = " chance" if name == "retrieval" else " most frequent answer"
            axes.text(base[name], y - 0.75, words, fontsize=8, color="0.4", va="bottom")
        axes.set_xlabel(MEASURES[name].name)
        axes.grid(axis="x", color="0.92")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    _label(panels[0], places, y)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    return path


def _draw(axes: Any, height: float, values: Sequence[float], highlighted: bool, missing: str) -> None:
    """The seeds of one variant, or the word for their absence."""
    color = "#b5432a" if highlighted else "#2f5d8a"
    if not values:
        style = {"transform": axes.get_yaxis_transform(), "fontsize": 8, "color": "0.5", "va": "center"}
        axes.text(0.05, height, missing, **style)
        return
    axes.plot([min(values), max(values)], [height, height], color=color, linewidth=2, alpha=0.5)
    axes.plot(values, [height] * len(values), "o", color=color, markersize=5, alpha=0.7, markeredgewidth=0)
    axes.plot([np.mean(values)], [height], "|", color=color, markersize=13, markeredgewidth=2)


def _label(axes: Any, places: Sequence[tuple[float, str, list[tuple[float, str, str]]]], bottom: float) -> None:
    """Names of questions and variants beside the first panel."""
    ticks = [(height, label) for _, _, rows in places for height, _, label in rows]
    axes.set_yticks([height for height, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(bottom - 0.6, -0.6)
    style = {"transform": axes.get_yaxis_transform(), "fontsize": 9, "weight": "bold", "ha": "right", "va": "center"}
    for top, title, _ in places:
        axes.text(-0.02, top, title, **style)


def write_report(
    out: Path, runs: Sequence[Run], protocol: Mapping[str, Any], questions: Sequence[Question]
) -> list[Path]:
    """Writes results.json, codebooks.md and codebooks.png into `out`."""
    verdicts = [
        asdict(claim) | {"verdict": judge([values_of(runs, variant, claim.measure) for variant in claim.order])}
        for question in questions
        for claim in question.claims
    ]
    results = {"runs": list(runs), "verdicts": verdicts, "protocol": dict(protocol)}
    text = out / "codebooks.md"
    text.write_text(document(runs, protocol, questions), encoding="utf-8")
    return [write_results(out / "results.json", results), text, plot(out / FIGURE, runs, questions)]
