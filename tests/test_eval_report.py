"""results.json, tables, curves and the report page."""

import json

import pytest
from PIL import Image

from unitok.core.errors import DataError
from unitok.eval.curves import curve_names, curve_svg
from unitok.eval.report import save_chat, save_generations, save_geneval_examples, save_reconstructions, write_report
from unitok.eval.results import demo_results, demo_table, format_table, protocol, read_results, write_results

DOT = Image.new("RGB", (4, 4), "red")


def results(**changes):
    values = {
        "tokenizer": {"psnr_db": 26.4, "detector_agreement": 0.84, "pairs": [(DOT, DOT)]},
        "vqa": {"accuracy": 0.8, "majority": 0.3, "by_type": {"color": {"accuracy": 0.8, "majority": 0.3, "count": 9}}},
        "geneval": {"overall": 0.4, "by_tag": {"colors": 0.4}, "rows": [1], "images": [DOT]},
        "random_codes": {"overall": 0.02, "by_tag": {"colors": 0.02}},
        "reconstruction_ceiling": 0.9,
        "wall_seconds": 61.0,
        "protocol_block": protocol("test", 0, {"images": 1}),
    }
    return demo_results(**(values | changes))


def test_results_have_the_promised_form(tmp_path):
    written = read_results(write_results(tmp_path / "results.json", results()))
    assert list(written) == ["tokenizer", "vqa", "geneval", "wall_seconds", "peak_memory_mb", "protocol"]
    assert written["tokenizer"] == {"psnr_db": 26.4, "detector_agreement": 0.84}, "images stay out of the JSON"
    assert written["geneval"]["random_codes"] == 0.02 and written["geneval"]["reconstruction_ceiling"] == 0.9
    assert written["geneval"]["by_tag"] == {"colors": 0.4} and "rows" not in written["geneval"]
    assert written["peak_memory_mb"] > 10
    assert {"what", "seed", "counts", "versions"} <= set(written["protocol"])
    assert "torch" in written["protocol"]["versions"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_results_that_are_not_finite_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"vqa\.by_type\.color is not a finite"):
        write_results(tmp_path / "results.json", results(vqa={"accuracy": 1.0, "by_type": {"color": float("nan")}}))
    assert not list(tmp_path.iterdir())


def test_unreadable_results_are_named(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="results.json"):
        read_results(tmp_path / "results.json")


def test_table_sets_numbers_right_and_leaves_missing_measures_out():
    text = format_table([["a", "1.5"], ["longer", "12.25"]], ["name", "value"])
    assert text.splitlines() == ["name    value", "------  -----", "a         1.5", "longer  12.25"]
    names = [row[0] for row in demo_table({"vqa": {"accuracy": 0.5, "majority": 0.25}})]
    assert names == ["VQA accuracy"]
    rows = {row[0]: row[1:] for row in demo_table(results())}
    assert rows["GenEval-style score"] == ["0.400", "0.020", "0.900"]


def test_curves_show_what_moves_and_skip_the_rest():
    log = [
        {"step": step, "lr": 0.1, "vq_loss": 1 / step, "loss": 2 / step, "disc": 0.0, "time": step, "bad": float("nan")}
        for step in range(1, 9)
    ]
    assert curve_names(log) == ["loss", "vq_loss", "lr"]
    assert curve_svg(log, "loss").count("<polyline") == 2
    assert curve_svg(log[:1], "loss") == "" and curve_svg(log, "bad") == ""
    assert "var(" not in curve_svg(log, "<b>") and "<b>" not in curve_svg([line | {"<b>": 1} for line in log], "<b>")


def full_run(folder):
    write_results(folder / "results.json", results())
    for stage in ("tokenizer", "mllm"):
        (folder / stage).mkdir()
        lines = [json.dumps({"step": step, f"{stage}_loss": 1 / step}) for step in (1, 2, 3)]
        (folder / stage / "log.jsonl").write_text("\n".join(lines) + "\n")
        (folder / stage / "config.yaml").write_text(f"of_{stage}: <script>\n")
    save_reconstructions(folder, [(DOT, DOT)] * 2, ["a photo of a <circle>"] * 2)
    save_generations(folder, [DOT] * 3, ["one", "two", "three"], [True, False, None], ["colors", "colors", "position"])
    save_chat(
        folder,
        [
            {"role": "user", "content": "what color?", "image": DOT},
            {"role": "assistant", "content": "Red.", "expected": "red"},
            {"role": "assistant", "content": "blue", "expected": "green"},
        ],
    )
    return folder


def test_full_report_is_one_file_with_everything_in_it(tmp_path):
    page = write_report(full_run(tmp_path)).read_text()
    assert page.count("data:image/png;base64,") == 4 + 3 + 1
    assert 'src="http' not in page and "href=" not in page and "<script" not in page, "self-contained, nothing loaded"
    assert "a photo of a &lt;circle&gt;" in page and "&lt;script&gt;" in page, "text is escaped"
    for text in ("tokenizer_loss", "mllm_loss", "26.4", "1 min 1 s", "expected: green", "Protocol of the measurements"):
        assert text in page
    assert page.count('title="correct"') == 1 and page.count('title="not correct"') == 1
    assert "Left out" not in page


def test_missing_and_broken_parts_are_named(tmp_path):
    full_run(tmp_path)
    (tmp_path / "chat.json").unlink()
    (tmp_path / "mllm" / "log.jsonl").write_text('{"step": 1\n')
    (tmp_path / "images" / "generation" / "001.png").unlink()
    page = write_report(tmp_path).read_text()
    assert "chat.json is not in the run folder" in page
    assert "mllm/log.jsonl could not be read" in page and "images/generation/index.json could not be read" in page
    assert "tokenizer_loss" in page and "mllm_loss" not in page


def test_an_index_cannot_pull_other_files_into_the_page(tmp_path):
    (tmp_path / "run").mkdir()
    full_run(tmp_path / "run")
    (tmp_path / "secret.png").write_bytes(b"secret")
    index = tmp_path / "run" / "images" / "generation" / "index.json"
    index.write_text(json.dumps([{"file": "../../../secret.png", "prompt": "p"}]))
    assert "images/generation/index.json could not be read" in write_report(tmp_path / "run").read_text()


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        write_report(tmp_path / "none")


def test_examples_are_the_first_of_every_task(tmp_path):
    rows = [{"tag": tag, "prompt": f"p{index}", "correct": index == 3} for index, tag in enumerate("aabab")]
    save_geneval_examples(tmp_path, {"rows": rows, "images": [DOT] * 5}, per_tag=2)
    index = json.loads((tmp_path / "images" / "generation" / "index.json").read_text())
    assert [(entry["prompt"], entry["tag"], entry["correct"]) for entry in index] == [
        ("p0", "a", False),
        ("p1", "a", False),
        ("p2", "b", False),
        ("p4", "b", False),
    ]
    save_generations(tmp_path, [DOT], ["only"])
    assert len(list((tmp_path / "images" / "generation").glob("*.png"))) == 1, "no image of an earlier report stays"
