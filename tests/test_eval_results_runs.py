"""The results of every run in one form, and many of them side by side."""

import hashlib
import json
import math
import sys

import pytest
import torch

from unitok.cli import main
from unitok.core.errors import CheckpointError, DataError, UserError
from unitok.eval.benchmarks import BENCHMARKS
from unitok.eval.compare import as_html, as_text, compare, read_runs
from unitok.eval.geneval_score import TAGS
from unitok.eval.paper import PAPER
from unitok.eval.results import (
    Metric,
    bootstrap_error,
    checkpoint_hash,
    protocol_differences,
    read_results,
    run_results,
    share,
    write_run,
)
from unitok.eval.run_form import figures_as_metrics, with_errors
from unitok.eval.zeroshot import accuracies

PROTOCOL = {"sampler": {"guidance_scale": 5.0, "top_k": 0}, "embedder_cache": "consistent", "num_prompts": 553}


def write(path, overall=0.5, benchmark="geneval", seed=0, protocol=PROTOCOL, **more):
    metrics = [Metric("overall", overall, 0.0123, 553), *(Metric(name, value, None, 9) for name, value in more.items())]
    return write_run(path, run_results(benchmark, metrics, protocol, [seed], None))


def test_means_and_standard_errors_by_hand():
    metric = share("accuracy", [True, True, False, True])
    assert (metric.value, metric.n) == (0.75, 4)
    assert metric.standard_error == pytest.approx(math.sqrt(0.25 / 4))  # variance 3/4 * 1/4 * 4/3 = 1/4
    assert share("one", [1.0]).standard_error is None
    with pytest.raises(DataError, match="nothing was scored"):
        share("none", [])


def test_a_run_says_how_it_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/unitok", "eval", "geneval", "--out", "a b.json"])
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = run_results("geneval", [Metric("overall", 0.5, 0.01, 553)], PROTOCOL, [3, 4], tmp_path)
    assert found["command"] == "unitok eval geneval --out 'a b.json'"
    assert found["metrics"] == [{"metric": "overall", "value": 0.5, "standard_error": 0.01, "n": 553}]
    assert found["seeds"] == [3, 4] and found["protocol"] == PROTOCOL and "torch" in found["versions"]
    assert read_results(write_run(tmp_path, found)) == json.loads(json.dumps(found)), "a folder gets results.json"
    with pytest.raises(DataError, match="each name once"):
        run_results("geneval", [Metric("a", 1.0, None, 1)] * 2, {}, [], None)


def test_the_hash_is_of_the_weights(tmp_path):
    (tmp_path / "visual_tokenizer").mkdir()
    files = {"model.safetensors": b"one", "visual_tokenizer/model.safetensors": b"two"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    lines = "".join(f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in files.items())
    before = checkpoint_hash(tmp_path)
    assert before == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint_hash(tmp_path) == before, "weights only"
    (tmp_path / "visual_tokenizer" / "model.safetensors").write_bytes(b"2")
    assert checkpoint_hash(tmp_path) != before
    with pytest.raises(CheckpointError, match="no weights file"):
        checkpoint_hash(tmp_path / "nothing")


def test_differences_of_protocols_are_named():
    other = {"sampler": {"guidance_scale": 7.0, "top_k": 0}, "embedder_cache": "consistent"}
    assert protocol_differences(PROTOCOL, other) == {"sampler.guidance_scale": (5.0, 7.0), "num_prompts": (553, None)}
    assert protocol_differences(PROTOCOL, PROTOCOL) == {}


def test_runs_stand_beside_the_papers_rows(tmp_path):
    paths = [write(tmp_path / "a.json", 0.5, colors=0.8), write(tmp_path / "b.json", 0.625, seed=1)]
    (table,) = compare(paths)
    assert table.headers == ["run", "checkpoint", "seeds", "overall", "colors", *(t for t in TAGS if t != "colors")]
    assert table.rows[0][:5] == [str(paths[0]), "-", "0", "0.5 ± 0.012", "0.8"]
    assert table.rows[1][2:5] == ["1", "0.625 ± 0.012", ""]
    assert table.rows[2][0].endswith("(published)") and table.rows[2][3:5] == ["0.59", "0.79"]
    assert any("2502.20321" in note for note in table.notes)
    mmmu = compare([write(tmp_path / "c.json", benchmark="mmmu")])[0]
    assert len(mmmu.rows) == 1 and not mmmu.notes, "the paper has no such row"
    both = compare([*paths, tmp_path / "c.json"])
    assert [table.benchmark for table in both] == ["geneval", "mmmu"]
    assert "0.625 ± 0.012" in as_text(both) and "<td>0.625 ± 0.012</td>" in as_html(both)


def test_a_column_of_two_protocols_is_refused_or_explained(tmp_path, capsys):
    other = PROTOCOL | {"embedder_cache": "released"}
    names = ("a.json", "b.json", "c.json")
    paths = [
        str(write(tmp_path / name, colors=0.5, protocol=protocol))
        for name, protocol in zip(names, (PROTOCOL, other, PROTOCOL), strict=True)
    ]
    with pytest.raises(UserError, match=r"different protocols \(embedder_cache: consistent \| released\)"):
        compare(paths)
    assert main(["report", *paths]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    page = tmp_path / "page.html"
    assert main(["report", *paths, "--mixed-protocols", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "overall, colors: [a] and [b] differ in embedder_cache: consistent | released" in out
    assert f"{paths[0]} [a]" in out and f"{paths[1]} [b]" in out and f"{paths[2]} [a]" in out
    assert "embedder_cache: consistent | released" in page.read_text()
    assert "differ in" not in as_text(compare([paths[0], paths[2]]))
    write(tmp_path / "d.json", benchmark="mmmu", protocol=other)
    assert len(compare([paths[0], tmp_path / "d.json"])) == 2, "other benchmarks have other protocols"


def test_what_does_not_belong_to_a_protocol_does_not_separate(tmp_path):
    first = write(tmp_path / "a.json", protocol=PROTOCOL | {"machine": {"cpus": 2}, "versions": {"torch": "1"}})
    second = write(tmp_path / "b.json", protocol=PROTOCOL | {"machine": {"cpus": 8}, "versions": {"torch": "2"}})
    assert "differ in" not in as_text(compare([first, second]))


def test_several_systems_of_one_file_are_rows(tmp_path):
    runs = {}
    for name, value in (("unitok", 0.38), ("sd-vae", 0.87)):
        metrics = figures_as_metrics({"rfid": value, "rfid_se": 0.1, "num_images": 9}, 9)
        runs[name] = run_results("reconstruction", metrics, {}, [0], None)
    path = write_run(tmp_path / "r.json", {"runs": runs})
    (table,) = compare([path])
    assert [row[0] for row in table.rows[:2]] == [f"{path}:unitok", f"{path}:sd-vae"]
    assert [row[3] for row in table.rows[:3]] == ["0.38 ± 0.1", "0.87 ± 0.1", "0.41"]


def test_figures_become_metrics():
    figures = {"psnr_db": 25.0, "psnr_db_se": 0.5, "agreement": None, "by": [1], "kept": True, "num_images": 3}
    assert figures_as_metrics(figures, 3) == [Metric("psnr_db", 25.0, 0.5, 3)]


def test_errors_of_shares_are_those_of_the_outcomes():
    outcomes = [True] * 3 + [False] * 5
    found = with_errors({"top1": 3 / 8, "top5": None}, ("top1", "top5"), 8)
    assert found["top1_se"] == pytest.approx(share("top1", outcomes).standard_error) and "top5_se" not in found


def test_files_of_another_form_are_named(tmp_path, capsys):
    (tmp_path / "demo.json").write_text(json.dumps({"vqa": {"accuracy": 0.5}}))
    with pytest.raises(DataError, match=r"demo.json has no benchmark, metrics, .*give its folder"):
        compare([tmp_path / "demo.json"])
    bad = read_results(write(tmp_path / "a.json"))
    bad["metrics"] = [{"metric": "overall"}]
    (tmp_path / "a.json").write_text(json.dumps(bad))
    with pytest.raises(DataError, match="not the form of results"):
        compare([tmp_path / "a.json"])
    assert main(["report", str(tmp_path), str(tmp_path / "a.json")]) == 2
    assert "one run folder alone" in capsys.readouterr().err


def test_the_papers_data_is_well_formed():
    shares = {"zeroshot", "geneval", "vqav2", "gqa", "textvqa", "pope", "mmvet", "genai_bench"}
    for benchmark, rows in PAPER.items():
        for row in rows:
            assert row.metrics and row.source
            if benchmark in shares:
                assert all(0 < value < 1 for value in row.metrics.values()), benchmark
    tags = {name: value for name, value in PAPER["geneval"][0].metrics.items() if name != "overall"}
    assert sum(tags.values()) / 6 == pytest.approx(PAPER["geneval"][0].metrics["overall"], abs=0.006)


def test_the_papers_metrics_are_named_as_ours():
    """So that `unitok report` sets both into one column. GenAI-Bench is scored by another program."""
    ours = {name: set(rule.metrics) for name, rule in BENCHMARKS.items()} | {
        "reconstruction": {"rfid"},
        "zeroshot": set(accuracies(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))),
        "geneval": {"overall", *TAGS},
        "class_conditional": {"fid", "isc"},
        "mjhq30k": {"fid"},
        "genai_bench": {"basic", "advanced"},
    }
    ours["mmvet"].add("score")
    for benchmark, rows in PAPER.items():
        for row in rows:
            assert set(row.metrics) <= ours[benchmark], benchmark


def test_pope_of_a_run_and_of_the_paper_are_one_column(tmp_path):
    path = write(tmp_path / "pope.json", benchmark="pope", f1_mean=0.8)
    (table,) = compare([path])
    column = table.headers.index("f1_mean")
    assert [row[column] for row in table.rows] == ["0.8", "0.832"]


def test_the_embedded_world_stands_beside_nothing_published(tmp_path):
    """Neither by its prompts and detector, nor by its source, nor by its scenes as classes."""
    made = {"scoring": {"detector": "shapes", "threshold": 0.85}}
    for number, (benchmark, protocol) in enumerate(
        (
            ("geneval", PROTOCOL | made),
            ("zeroshot", {"source": "shapes:val?num=9"}),
            ("zeroshot", {"source": "shards", "world": "shapes"}),
            ("reconstruction", {"source": "shapes"}),
        )
    ):
        (table,) = compare([write(tmp_path / f"{number}.json", benchmark=benchmark, protocol=protocol)])
        assert len(table.rows) == 1 and len(table.headers) == 4, "no row and no column of the paper's"
        assert table.notes == ["Measured on the embedded world; the published rows are of other data, and left out."]
    other = write(tmp_path / "other.json", benchmark="zeroshot", protocol={"source": "shapes_of_mine/val"})
    (table,) = compare([other])
    assert table.rows[-1][0].endswith("(published)") and "their data" in table.notes[-1]
    (mixed,) = compare([tmp_path / "1.json", other], mixed_protocols=True)
    assert len(mixed.rows) == 2 + len(PAPER["zeroshot"])
    (mmmu,) = compare([write(tmp_path / "m.json", benchmark="mmmu", protocol=made)])
    assert not mmmu.notes, "there is nothing to leave out"


def lm_eval_file(path, value=0.5, precision="torch.float32", documents=None, **config):
    """As lm-eval writes it, of a text task, one of ours, and a group."""
    whole = {
        "results": {
            "lambada": {"alias": "lambada", "acc,none": value, "acc_stderr,none": 0.01, "sample_len": 4},
            "unitok_pope": {"accuracy,none": 0.75, "accuracy_stderr,none": "N/A", "f1_mean,none": 0.8},
            "both": {"acc,none": 0.25, "acc,strict": 0.5, "acc_stderr,none": 0.1},
        },
        "group_subtasks": {"both": ["lambada", "unitok_pope"]},
        "configs": {
            "lambada": {"output_type": "loglikelihood", "generation_kwargs": {"until": []}},
            "unitok_pope": {
                "output_type": "generate_until",
                "generation_kwargs": {"do_sample": False},
                "doc_to_image": "def pictures ...",
            },
        },
        "versions": {"lambada": 1.0},
        "n-shot": {"lambada": 0},
        "n-samples": {"lambada": {"effective": 4}, "unitok_pope": {"effective": 8}},
        "config": {"model_args": {"pretrained": "DIR", "seed": 3}, "model_dtype": precision, "model_sha": "abcdef0123"},
    }
    whole["config"] |= {"documents": {"pope": documents}} | config
    path.write_text(json.dumps(whole))
    return path


def test_results_of_lm_eval_stand_beside_others(tmp_path):
    first = lm_eval_file(tmp_path / "results_a.json")
    both, lambada, pope = compare([first, lm_eval_file(tmp_path / "results_b.json", 0.75)])
    assert lambada.headers == ["run", "checkpoint", "seeds", "acc"]
    assert [row[1:] for row in lambada.rows] == [["abcdef01", "3", "0.5 ± 0.01"], ["abcdef01", "3", "0.75 ± 0.01"]]
    assert pope.headers[3:] == ["accuracy", "f1_mean"] and pope.rows[-1][4] == "0.832"
    assert both.headers[3:] == ["acc", "acc (strict)"]
    runs = {run.benchmark: run for run in read_runs(first)}
    assert runs["both"].metrics["acc"] == (0.25, 0.1, 12) and runs["lambada"].protocol["generation"] is None
    assert runs["pope"].protocol["generation"] == {"do_sample": False}
    with pytest.raises(UserError, match=r"precision: float32 \| bfloat16"):
        compare([first, lm_eval_file(tmp_path / "results_c.json", precision="torch.bfloat16")])


@pytest.mark.parametrize(
    ("change", "named", "texts_too"),
    [
        ({"documents": "1234"}, "documents: abcd | 1234", False),
        ({"embedder_cache": "released"}, "embedder_cache: not set | released", False),
        ({"weights": "int8"}, "weights: not set | int8", True),
    ],
)
def test_other_documents_cache_or_weights_are_another_protocol(tmp_path, change, named, texts_too):
    files = [lm_eval_file(tmp_path / "results_a.json", documents="abcd")]
    files.append(lm_eval_file(tmp_path / "results_b.json", **{"documents": "abcd"} | change))
    notes = {table.benchmark: " ".join(table.notes) for table in compare(files, mixed_protocols=True)}
    assert named in notes["pope"] and (named in notes["lambada"]) == texts_too
    with pytest.raises(UserError, match="different protocols"):
        compare(files)


def test_seeds_of_lm_evals_files(tmp_path):
    """Of other models the first of lm-eval's; ours draws by its own alone."""
    for model, own, seed in (("hf", None, "7"), ("unitok", None, "0"), ("unitok", 3, "3")):
        arguments = {"pretrained": "DIR"} | ({"seed": own} if own else {})
        path = lm_eval_file(tmp_path / "results_a.json", model=model, model_args=arguments, random_seed=7)
        assert {run.seeds for run in read_runs(path)} == {seed}, model


def test_bootstrap_is_the_formula_for_a_mean_and_takes_whole_units():
    outcomes = [1.0] * 30 + [0.0] * 50
    error = bootstrap_error(lambda items: sum(items) / len(items), outcomes)
    assert error == pytest.approx(share("a", outcomes).standard_error, rel=0.2)
    assert error == bootstrap_error(lambda items: sum(items) / len(items), outcomes), "the same draws every time"
    pairs = [(number // 2, value) for number, value in enumerate(value for value in outcomes for _ in range(2))]
    by_units = bootstrap_error(lambda items: sum(v for _, v in items) / len(items), pairs, lambda item: item[0])
    assert by_units == pytest.approx(error, rel=1e-9), "the same answer given twice is no second answer"
    assert bootstrap_error(sum, [1.0]) is None


def test_every_command_writes_that_form(tmp_path, capsys):
    """Reconstruction of one and of two systems: `unitok report` reads what the command wrote."""
    from tiny import make_tokenizer

    folders = []
    for seed in (0, 1):
        make_tokenizer(seed).save_pretrained(tmp_path / f"tokenizer{seed}")
        folders += ["--tokenizer", str(tmp_path / f"tokenizer{seed}")]
    source = ["--source", "shapes:val?num=4&size=32", "--limit", "4"]
    one, two = (str(tmp_path / name) for name in ("one.json", "two.json"))
    assert main(["eval", "reconstruction", *folders[:2], *source, "--out", one]) == 0
    capsys.readouterr()
    assert main(["eval", "reconstruction", *folders, *source, "--out", two]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown[:-1])) < 100 and sum(line.startswith("figure ") for line in shown) == 1
    assert main(["report", one, two]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("published" in line and "UniTok" in line for line in lines)
    rows = {line.split()[0]: line.split()[1:] for line in lines if str(tmp_path) in line}
    assert rows[one] == rows[f"{two}:tokenizer0"] != rows[f"{two}:tokenizer1"]
    written = read_results(one)
    psnr = next(row for row in written["metrics"] if row["metric"] == "psnr_db")
    assert psnr["n"] == 4 and psnr["standard_error"] == pytest.approx(written["psnr_db_se"])
    assert written["checkpoint"]["sha256"] == checkpoint_hash(tmp_path / "tokenizer0")
