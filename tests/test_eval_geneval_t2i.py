"""Images for DPG-Bench, GenAI-Bench and MJHQ-30K: official layouts, shares and FID."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline
from test_eval_fidelity import TinyNetwork

from unitok.cli import main
from unitok.core.errors import DataError
from unitok.eval.fidelity import Features, distances
from unitok.eval.results import read_results
from unitok.eval.t2i_runs import BENCHES, Item, fidelity_metrics, generate_bench, official_file

WORDS = ["red circle", "blue square", "circle", "square", "red", "blue"]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A model, and each benchmark's prompts in its own form."""
    folder = tmp_path_factory.mktemp("t2i")
    make_pipeline(folder / "parts").save_pretrained(folder / "model")
    (folder / "dpg").mkdir()
    for name, text in (("12", "a photo of a red circle\n"), ("7_x", "blue")):
        (folder / "dpg" / f"{name}.txt").write_text(text)
    genai = {
        f"{index:05d}": {"id": f"{index:05d}", "prompt": text, "models": {}} for index, text in enumerate(WORDS[:2])
    }
    (folder / "genai.json").write_text(json.dumps(genai))
    mjhq = {f"id{i}": {"category": ("food", "people")[i % 2], "prompt": text} for i, text in enumerate(WORDS)}
    (folder / "mjhq.json").write_text(json.dumps(mjhq))
    return folder


def command(export, bench, prompts, out, *more):
    words = ["--bench", bench, "--prompts", str(export / prompts), "--model", str(export / "model"), "--out", str(out)]
    return main(["eval", "t2i", *words, *more])


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_dpg_grids_hold_the_four_samples(export, tmp_path, capsys):
    assert command(export, "dpg", "dpg", tmp_path) == 0
    assert files(tmp_path / "images") == ["12.png", "7_x.png"]
    grid = np.asarray(Image.open(tmp_path / "images" / "12.png"))
    samples = [np.asarray(Image.open(tmp_path / "samples" / "12" / f"{i:05d}.png")) for i in range(4)]
    side = len(samples[0])
    corners = [grid[y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
    assert grid.shape == (2 * side, 2 * side, 3)
    assert all(np.array_equal(a, b) for a, b in zip(corners, samples, strict=True))
    assert "compute_dpg_bench.py" in capsys.readouterr().out
    protocol = json.loads((tmp_path / "generation.json").read_text())["protocol"]
    assert protocol["embedder_cache"] == "consistent" and protocol["sampler"]["top_p"] == 0.95


def test_genai_images_are_named_by_id(export, tmp_path):
    assert command(export, "genai", "genai.json", tmp_path, "--limit", "1") == 0
    assert files(tmp_path / "images") == ["00000.jpeg"]
    with Image.open(tmp_path / "images" / "00000.jpeg") as image:
        assert image.format == "JPEG"
        near = np.asarray(image).astype(int) - np.asarray(Image.open(tmp_path / "samples" / "00000.png")).astype(int)
    assert np.abs(near).mean() < 3


def test_shares_make_the_same_images(export, tmp_path, monkeypatch):
    pipe = make_pipeline(tmp_path / "parts")
    items = BENCHES["dpg"].load(export / "dpg")
    assert generate_bench(pipe, "dpg", items, tmp_path / "alone") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, missing in (("1", 2), ("0", 0)):
        monkeypatch.setenv("RANK", rank)
        assert generate_bench(pipe, "dpg", items, tmp_path / "shared") == missing
    alone, shared = (
        {name: Image.open(tmp_path / kind / name).tobytes() for name in files(tmp_path / kind)}
        for kind in ("alone", "shared")
    )
    assert alone == shared and len(alone) == 10


def test_mjhq_fid_equals_that_of_the_features(export, tmp_path, monkeypatch):
    """Category folders, and FID by the features of the very files."""
    monkeypatch.setattr("unitok.eval.fidelity.load_inception", lambda path, device: TinyNetwork())
    reference, rng = tmp_path / "reference", np.random.default_rng(0)
    for index in range(6):
        folder = reference / ("food", "people")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24 + index, 24, 3), dtype=np.uint8)).save(folder / f"id{index}.jpg")
    out = tmp_path / "out"
    measured = ["--reference", str(reference), "--inception", "tiny"]
    assert command(export, "mjhq", "mjhq.json", out, *measured) == 0
    assert files(out / "images") == [f"food/id{i}.png" for i in (0, 2, 4)] + [f"people/id{i}.png" for i in (1, 3, 5)]
    sides = []
    for pattern in ((out / "images"), reference):
        features = Features(TinyNetwork())
        for path in sorted(path for path in pattern.rglob("*") if path.is_file()):
            features.add(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).unsqueeze(0))
        sides.append(features.gathered())
    results = read_results(out / "results.json")
    figures = {row["metric"]: row["value"] for row in results["metrics"]}
    assert figures["fid"] == pytest.approx(distances(*sides)["fid"], rel=1e-6)
    assert results["benchmark"] == "mjhq30k" and results["protocol"]["num_prompts"] == 6
    (reference / "food" / "id0.jpg").unlink()
    with pytest.raises(DataError, match="food/id0.jpg: no such reference image"):
        fidelity_metrics(out, [Item("food/id0", "x")], reference, TinyNetwork())


@pytest.mark.parametrize(
    ("bench", "content", "message"),
    [
        ("mjhq", {"a": {"category": "../up", "prompt": "p"}}, "cannot be a file's name"),
        ("mjhq", {"a": {"prompt": "p"}}, "entry 'a'"),
        ("genai", {"../../x": {"prompt": "p"}}, "cannot be a file's name"),
        ("genai", ["p"], "holds a list"),
        ("genai", {}, "holds no prompt"),
        ("genai", {"1": {"prompt": " "}}, "prompt of 1 is empty"),
        ("dpg", {}, "expected the folder"),
    ],
)
def test_other_files_than_the_benchmarks_are_refused(bench, content, message, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        BENCHES[bench].load(path)


def test_prompts_of_dpg_are_text_files(tmp_path):
    (tmp_path / "1.txt").write_text("a red circle")
    (tmp_path / "._1.txt").write_bytes(b"\x00\x05\x16\x07\xff")  # macOS leaves such files beside others
    assert [item.prompt for item in BENCHES["dpg"].load(tmp_path)] == ["a red circle"]
    (tmp_path / "2.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"2\.txt cannot be read \(UnicodeDecodeError\)"):
        BENCHES["dpg"].load(tmp_path)


def test_options_that_do_not_belong_together(export, tmp_path, capsys):
    assert command(export, "dpg", "dpg", tmp_path, "--inception", "x") == 2
    assert "only for mjhq" in capsys.readouterr().err
    assert command(export, "mjhq", "mjhq.json", tmp_path, "--inception", "x") == 2
    assert "FID needs both" in capsys.readouterr().err
    assert official_file(tmp_path, "mjhq", Item("food/a", "p")) == tmp_path / "images" / "food" / "a.png"
