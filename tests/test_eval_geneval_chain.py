"""GenEval's two steps on folders: images into the official layout, and scores of it, shared and interrupted."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from geneval_folders import CASES, write_folder
from PIL import Image
from pipelines import make_pipeline

from unitok.cli import main
from unitok.core.errors import DataError, UserError
from unitok.core.workers import forking
from unitok.eval.geneval import make_grid, score_prompt
from unitok.eval.geneval_detect import SHAPES_RULE, shapes_detector
from unitok.eval.geneval_run import GENERATION, generate_folder, geneval_metrics, read_generation, score_run
from unitok.eval.results import read_results

FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = [
    {
        "tag": "colors",
        "include": [{"class": "circle", "count": 1, "color": "red"}],
        "prompt": "a photo of a red circle",
    },
    {"tag": "counting", "include": [{"class": "square", "count": 2}], "prompt": "a photo of two squares"},
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"},
]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def counting_detector(calls):
    """The shapes detector, which notes every image it sees."""
    detector = shapes_detector()
    inner = detector.detect

    def detect(image):
        calls.append(image)
        return inner(image)

    return replace(detector, detect=detect)


def test_plain_records_score_as_the_official_scorer_says():
    """The interface for detections from elsewhere, on the recorded outcomes."""

    def unordered(reason):
        return re.sub(r"found (.*) target$", lambda m: " and ".join(sorted(m[1].split(" and "))), reason, flags=re.M)

    for line in (FIXTURES / "geneval_scorer.jsonl").read_text().splitlines():
        case = json.loads(line)
        correct, reason = score_prompt(case["metadata"], case["detections"])
        assert (correct, unordered(reason)) == (case["correct"], unordered(case["reason"]))
    with pytest.raises(DataError, match="detection 0 lacks box"):
        score_prompt(PROMPTS[0], [{"cls": "circle", "score": 1.0, "color": "red"}])


def test_every_tag_is_scored_right_and_the_summary_reads_it(tmp_path, capsys):
    """Right, wrong colour, wrong count, swapped position: rows, counts by tag, and the official summary's figures."""
    import pandas

    expected = write_folder(tmp_path / "images")
    assert main(["eval", "geneval-score", str(tmp_path / "images"), "--detector", "shapes"]) == 0
    rows = rows_of(tmp_path / "images" / "results.jsonl")
    assert {row["filename"]: (row["correct"], row["reason"]) for row in rows} == expected
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert all(json.loads(row["metadata"])["tag"] == row["tag"] for row in rows)
    box = json.loads(rows[0]["details"])["circle"][0]
    assert len(box) == 5 and box[:4] == pytest.approx([6, 22, 26, 42], abs=1.5)

    table = pandas.read_json(tmp_path / "images" / "results.jsonl", orient="records", lines=True)
    by_tag = table.groupby("tag", sort=False)["correct"]
    counts = {tag: (int(own.sum()), len(own)) for tag, own in by_tag}
    assert counts == {case[0]["tag"]: (1, len(case[1])) for case in CASES}
    results = read_results(tmp_path / "images" / "results.json")
    metrics = {row["metric"]: row for row in results["metrics"]}
    assert metrics["overall"]["value"] == pytest.approx(by_tag.mean().mean())
    assert metrics["prompt_accuracy"]["value"] == table.groupby("metadata")["correct"].any().mean() == 1.0
    assert metrics["position"]["value"] == pytest.approx(1 / 3)
    scoring = results["protocol"]["scoring"]
    assert scoring["detector"] == "shapes" and scoring["counting_threshold"] == SHAPES_RULE.counting_threshold
    assert scoring["position_threshold"] == 0.1 and scoring["max_objects"] == 16
    assert results["protocol"]["num_images"] == len(rows) and results["checkpoint"] is None
    assert "overall" in capsys.readouterr().out


def test_standard_errors_are_over_prompts():
    """Four equal samples of a prompt are one trial, not four."""

    def row(tag, prompt, correct):
        return {"tag": tag, "prompt": prompt, "correct": correct}

    rows = [row("colors", name, right) for name, right in (("a", True), ("b", False)) for _ in range(4)]
    rows += [row("position", "c", True)] * 4 + [row("position", "d", True)] * 4
    metrics = {metric.name: metric for metric in geneval_metrics(rows)}
    assert metrics["colors"].value == 0.5 and metrics["colors"].n == 2
    assert metrics["colors"].standard_error == pytest.approx(0.5)  # sd of (1, 0) is 0.707, over sqrt(2)
    assert metrics["overall"].value == 0.75 and metrics["overall"].standard_error == pytest.approx(0.25)
    assert geneval_metrics(rows[:4])[0].standard_error is None, "one prompt tells nothing about the spread"


def test_a_killed_scoring_goes_on(tmp_path):
    """A process killed while it writes a line: the next one scores what is missing, and nothing twice."""
    expected = write_folder(tmp_path / "images")
    out = tmp_path / "results.jsonl"
    with forking():
        child = os.fork()
    if child == 0:
        calls = []
        detector = counting_detector(calls)
        inner = detector.detect

        def detect(image):
            if len(calls) == 5:
                part = next((tmp_path / "results.jsonl.parts").glob("*.jsonl"))
                with part.open("a") as file:
                    file.write('{"filename": "00002/sam')
                os._exit(9)
            return inner(image)

        score_run(tmp_path / "images", replace(detector, detect=detect), out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and not out.exists()
    calls = []
    rows = score_run(tmp_path / "images", counting_detector(calls), out)
    assert len(calls) == len(expected) - 5
    assert [row["filename"] for row in rows] == list(expected) and rows == rows_of(out)
    assert {row["filename"]: (row["correct"], row["reason"]) for row in rows} == expected
    calls.clear()
    assert score_run(tmp_path / "images", counting_detector(calls), out) == rows and not calls
    image = tmp_path / "images" / "00000" / "samples" / "00000.png"
    Image.new("RGB", (64, 64), "white").save(image)
    again = score_run(tmp_path / "images", counting_detector(calls), out)
    assert len(calls) == 1 and not again[0]["correct"], "an image drawn anew is scored anew"


def test_processes_share_the_scoring(tmp_path):
    write_folder(tmp_path / "images")
    alone = score_run(tmp_path / "images", shapes_detector(), tmp_path / "alone.jsonl")
    out, calls = tmp_path / "shared.jsonl", [[], [], []]
    parts = [score_run(tmp_path / "images", counting_detector(calls[i]), out, part=(i, 3)) for i in (2, 0, 1)]
    assert parts[:2] == [None, None] and parts[2] == alone == rows_of(out)
    assert sorted(map(len, calls)) == [4, 5, 5]
    other = [score_run(tmp_path / "images", counting_detector([]), out, part=(i, 2)) for i in (0, 1)]
    assert other == [alone, alone], "another number of processes finds all scored"
    first = score_run(tmp_path / "images", shapes_detector(), tmp_path / "first.jsonl", limit=2)
    assert first == alone[:4]


def test_scores_of_another_protocol_are_not_mixed_in(tmp_path):
    write_folder(tmp_path / "images")
    out = tmp_path / "results.jsonl"
    score_run(tmp_path / "images", shapes_detector(), out)
    with pytest.raises(UserError, match=r"threshold 0.85 \(now 0.5\)"):
        score_run(tmp_path / "images", shapes_detector(replace(SHAPES_RULE, threshold=0.5)), out)
    metadata = tmp_path / "images" / "00000" / "metadata.jsonl"
    metadata.write_text(json.dumps({"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "p"}))
    with pytest.raises(UserError, match="'cow', which shapes cannot find"):
        score_run(tmp_path / "images", shapes_detector(), tmp_path / "other.jsonl")
    with pytest.raises(DataError, match="holds no GenEval sample"):
        score_run(tmp_path, shapes_detector(), out)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geneval")
    make_pipeline(folder / "parts").save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in PROMPTS))
    return folder


def command(export, out, *more):
    prompts = ["--prompts", str(export / "prompts.jsonl"), "--model", str(export / "model")]
    return main(["eval", "geneval-generate", *prompts, "--samples", "2", "--out", str(out), *more])


def pictures(folder):
    return {str(path.relative_to(folder)): Image.open(path).tobytes() for path in sorted(folder.rglob("*.png"))}


def test_generation_is_the_same_alone_shared_and_interrupted(export, tmp_path):
    assert command(export, tmp_path / "alone") == 0
    alone = pictures(tmp_path / "alone")
    samples = [f"{prompt:05d}/samples/{sample:05d}.png" for prompt in range(3) for sample in range(2)]
    assert sorted(alone) == sorted([*samples, *(f"{prompt:05d}/grid.png" for prompt in range(3))])
    assert len({alone[name] for name in samples}) == 6
    assert [json.loads((tmp_path / "alone" / f"{i:05d}" / "metadata.jsonl").read_text()) for i in range(3)] == PROMPTS
    try:
        for rank in ("1", "0"):
            assert command(export, tmp_path / "shared", "--rank", rank, "--world-size", "2") == 0
    finally:
        os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")
    assert pictures(tmp_path / "shared") == alone
    (tmp_path / "shared" / samples[3]).unlink()
    (tmp_path / "shared" / "00001" / "grid.png").unlink()
    before = (tmp_path / "shared" / samples[0]).stat().st_mtime_ns
    assert command(export, tmp_path / "shared") == 0
    assert pictures(tmp_path / "shared") == alone
    assert (tmp_path / "shared" / samples[0]).stat().st_mtime_ns == before, "what is there is left as it is"


def test_a_grid_holds_all_samples_that_were_added(export, tmp_path):
    prompts = ["--prompts", str(export / "prompts.jsonl"), "--model", str(export / "model"), "--limit", "1"]
    folder, seen = tmp_path / "00000", []
    for samples in (1, 3, 4, 2):
        command = ["eval", "geneval-generate", *prompts, "--samples", str(samples), "--out", str(tmp_path)]
        assert main(command) == 0
        made = sorted((folder / "samples").glob("*.png"))
        with Image.open(folder / "grid.png") as grid:
            assert np.array_equal(np.asarray(grid), np.asarray(make_grid([Image.open(path) for path in made])))
        seen.append((len(made), (folder / "grid.png").stat().st_mtime_ns))
    assert [count for count, _ in seen] == [1, 3, 4, 4] and seen[2] == seen[3], "nothing was added"


def test_no_process_adds_images_of_other_settings(export, tmp_path, capsys, monkeypatch):
    for rank, more, code in (("0", (), 0), ("1", ("--seed", "5"), 2), ("1", ("--guidance", "1"), 2), ("1", (), 0)):
        with monkeypatch.context() as launcher:
            launcher.setenv("RANK", "0"), launcher.setenv("WORLD_SIZE", "1")  # the command sets them
            assert command(export, tmp_path / "out", "--rank", rank, "--world-size", "2", *more) == code
        assert not code or "now it is" in capsys.readouterr().err
    assert len(list((tmp_path / "out").rglob("samples/*.png"))) == 6


def test_what_is_missing_is_no_score(export, tmp_path):
    """Images that `generation.json` names, also where a smaller command was given since; fewer prompts by --limit."""
    out, scored = tmp_path / "out", tmp_path / "results.jsonl"
    assert command(export, out) == 0
    assert command(export, out, "--limit", "1") == 0
    counts = read_generation(out)["protocol"]
    assert (counts["num_prompts"], counts["samples_per_prompt"]) == (3, 2)
    (out / "00002" / "samples" / "00001.png").unlink()
    with pytest.raises(DataError, match=r"holds 5 of 6 images; .*goes on, or score fewer prompts \(--limit\)"):
        score_run(out, shapes_detector(), scored)
    assert len(score_run(out, shapes_detector(), scored, limit=2)) == 4
    assert command(export, out) == 0
    assert len(score_run(out, shapes_detector(), scored)) == 6


def test_a_prompt_that_asks_for_something_else_is_scored_anew(tmp_path):
    write_folder(tmp_path / "images")
    out, file = tmp_path / "results.jsonl", tmp_path / "images" / "00000" / "metadata.jsonl"
    before = score_run(tmp_path / "images", shapes_detector(), out)
    entry = json.loads(file.read_text())
    entry["include"] = [{"class": "triangle", "count": 4}]
    file.write_text(json.dumps(entry))
    calls = []
    after = score_run(tmp_path / "images", counting_detector(calls), out)
    asked = [row["filename"].startswith("00000/") for row in after]
    assert len(calls) == sum(asked) > 0 and not any(
        row["correct"] for row, own in zip(after, asked, strict=True) if own
    )
    assert [row for row, own in zip(after, asked, strict=True) if not own] == before[sum(asked) :]


def test_scores_tell_how_the_images_were_made(export, tmp_path, capsys):
    assert command(export, tmp_path / "images", "--limit", "1", "--guidance", "3", "--seed", "5") == 0
    assert main(["eval", "geneval-score", str(tmp_path / "images"), "--detector", "shapes"]) == 0
    results = read_results(tmp_path / "images" / "results.json")
    generation = results["protocol"]["generation"]
    assert generation["sampler"]["guidance_scale"] == 3.0 and generation["sampler"]["top_k"] == 12
    assert generation["embedder_cache"] == "consistent" and generation["rewrite"] is None
    assert generation["prompts"]["file"] == "prompts.jsonl" and generation["samples_per_prompt"] == 2
    assert results["seeds"] == [5] and len(results["checkpoint"]["sha256"]) == 64
    capsys.readouterr()
    assert command(export, tmp_path / "images", "--limit", "1", "--guidance", "4", "--seed", "5") == 2
    assert "sampler.guidance_scale 3.0, now it is 4.0" in capsys.readouterr().err


def test_both_ways_of_the_embedded_world_agree(export, tmp_path):
    """`unitok eval geneval` in one go, and `geneval-score` on the folder that it kept: the same figures."""
    words = ["--model", str(export / "model"), "--limit", "6", "--samples", "2", "--images", str(tmp_path / "images")]
    assert main(["eval", "geneval", *words, "--out", str(tmp_path / "one.json")]) == 0
    assert main(["eval", "geneval", *words, "--seed", "3"]) == 2, "two runs in one folder"
    assert main(["eval", "geneval-score", str(tmp_path / "images"), "--detector", "shapes"]) == 0
    one, two = read_results(tmp_path / "one.json"), read_results(tmp_path / "images" / "results.json")
    assert one["metrics"] == two["metrics"] and one["protocol"]["scoring"] == two["protocol"]["scoring"]
    assert one["protocol"]["embedder_cache"] == "consistent" and one["protocol"]["sampler"]["top_k"] == 12
    assert one["seeds"] == [0] and one["checkpoint"]["sha256"]


def test_rewriting_is_named_and_whole(export, tmp_path, capsys):
    rewrite = tmp_path / "words.json"
    rewrite.write_text(json.dumps({entry["prompt"]: entry["prompt"].replace("a photo of", "red") for entry in PROMPTS}))
    assert command(export, tmp_path / "images", "--rewrite", str(rewrite)) == 0
    assert read_generation(tmp_path / "images")["protocol"]["rewrite"]["file"] == "words.json"
    assert json.loads((tmp_path / "images" / "00000" / "metadata.jsonl").read_text()) == PROMPTS[0], "as it stands"
    assert json.loads(Image.open(tmp_path / "images" / "00000" / "samples" / "00000.png").info["unitok"])["prompt"] == (
        "red a red circle"
    )
    rewrite.write_text(json.dumps({PROMPTS[0]["prompt"]: "other"}))
    assert command(export, tmp_path / "others", "--rewrite", str(rewrite)) == 2
    assert "lacks 2 prompts, such as 'a photo of two squares'" in capsys.readouterr().err


def test_a_folder_of_other_prompts_is_refused(export, tmp_path):
    pipe = make_pipeline(tmp_path / "parts")
    generate_folder(pipe, PROMPTS[:1], tmp_path / "images", 1)
    with pytest.raises(UserError, match="holds another prompt than 'a photo of two squares'"):
        generate_folder(pipe, PROMPTS[1:2], tmp_path / "images", 1)
    (tmp_path / "images" / GENERATION).write_text("{}")
    with pytest.raises(DataError, match="expected protocol, seed and checkpoint"):
        read_generation(tmp_path / "images")


@pytest.mark.parametrize(
    ("words", "listed"),
    [
        (["geneval-generate", "--prompts", "/nowhere/e.jsonl", "--model", "/nowhere/m", "--out", "x"],
         ["/nowhere/e.jsonl: GenEval's prompts; from github.com/djghosh13", "/nowhere/m: the unified model"]),
        (["geneval-score", "/nowhere/images", "--detector", "mask2former"],
         ["/nowhere/images: images in GenEval's layout", "mask2former-swin-small-coco-instance", "CLIP"]),
        (["geneval-score", "/nowhere/images", "--detector", "owlv2", "--clip", "/nowhere/clip.pt"],
         ["owlv2-base", "missing: /nowhere/clip.pt"]),
        (["geneval", "--prompts", "/nowhere/e.jsonl", "--model", "/nowhere/m"],
         ["/nowhere/e.jsonl: GenEval's prompts", "missing: /nowhere/m"]),
        (["vqa", "--source", "/nowhere/images", "--model", "/nowhere/m"], ["/nowhere/images", "missing: /nowhere/m"]),
        (["retrieval", "--source", "/nowhere/images"], ["/nowhere/images", "runs/demo/model/visual_tokenizer"]),
        (["reconstruction", "--source", "/nowhere/images"], ["/nowhere/images"]),
        (["t2i", "--bench", "mjhq", "--prompts", "/nowhere/meta.json", "--out", "x"],
         ["playgroundai/MJHQ-30K", "--reference", "--inception"]),
    ],
)  # fmt: skip
def test_a_dry_run_lists_what_is_missing(words, listed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no demo has left the default models
    assert main(["eval", *words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert [text for text in listed if text not in out] == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--detector", "shapes", "--rank", "2", "--world-size", "2"], "--rank 2 --world-size 2"),
        (["--detector", "shapes", "--clip", "x"], "--detector shapes needs no"),
        (["--detector", "shapes", "--out", "x.json"], "ending in .jsonl"),
        (["--detector", "mask2former"], "--clip is not set"),
        (["--detector", "mask2former", "--limit", "1", "--detector-weights", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_in_scoring_is_one_line(words, named, tmp_path, capsys):
    write_folder(tmp_path)
    assert main(["eval", "geneval-score", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
