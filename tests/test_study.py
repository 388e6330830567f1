"""The codebook study: its settings are valid, and its verdicts, tables and plot say what the numbers say."""

import json

import pytest
from PIL import Image

from unitok.commands.train import stage_config
from unitok.core.errors import UserError
from unitok.eval.results import read_results
from unitok.scripts import study_codebooks as study
from unitok.scripts.study_report import MEASURES, QUESTIONS, Claim, cell, differ, judge, table, values_of, verdict_text
from unitok.tokenizer.configuration import UniTokConfig
from unitok.tokenizer.settings import check_settings, model_config

BUDGET = {"steps": 9, "mllm_steps": 7, "train_images": 64}


def settings(variant, seed):
    return study.overrides(variant, seed, **BUDGET)


def made_up(variant, seed, value):
    """A run whose every figure grows with `value`."""
    return {
        "variant": variant,
        "seed": seed,
        "budget": BUDGET,
        "overrides": settings(variant, seed),
        "wall_seconds": 1.0,
        "tokenizer": {
            "psnr_db": None if variant == "contrastive" else 20 + value,
            "detector_agreement": value / 10,
            "usage": 0.5,
            "perplexity": 8.0,
        },
        "retrieval": {"top1": None if variant == "reconstruction" else value / 10, "chance": 0.01},
        "vqa": {"accuracy": 0.4 + value / 20, "majority": 0.435},
    }


RUNS = [made_up(v, seed, place + seed / 4) for place, v in enumerate(reversed(study.VARIANTS)) for seed in (1, 0)]


@pytest.mark.parametrize("variant", study.VARIANTS)
def test_every_variant_is_a_valid_configuration_of_equal_width_and_entries(variant):
    config = stage_config("tokenizer", "tokenizer/shapes.yaml", settings(variant, 1)["tokenizer"])
    check_settings(config)
    sizes = model_config(config.model)
    assert isinstance(sizes, UniTokConfig)
    assert sizes.code_width == 32 and sizes.num_codebooks * sizes.codebook_size == 512
    assert (config.seed, config.steps, config.save_every) == (1, 9, 3)
    assert not config.discriminator.enabled and config.loss.adversarial == 0 and config.loss.vq == 1


def test_variants_differ_in_what_they_are_named_for_only():
    """Same data, order, optimizer, steps: what differs is in the model's sizes or the losses."""
    configs = {
        name: stage_config("tokenizer", "tokenizer/shapes.yaml", settings(name, 0)["tokenizer"]).model_dump()
        for name in study.VARIANTS
    }
    for name, config in configs.items():
        expected = {"8x64": set(), "reconstruction": {"loss"}, "contrastive": {"loss"}}.get(name, {"model"})
        assert {key for key, value in config.items() if value != configs["8x64"][key]} == expected


def test_language_model_reads_only_and_fits_every_code_width():
    config = stage_config("mllm", "mllm/shapes.yaml", settings("8x64", 2)["mllm"])
    mixture = config.data.mixture
    assert (mixture.text_to_image, mixture.caption, mixture.chat) == (0, 0, 1) and (config.seed, config.steps) == (2, 7)
    assert config.model.visual_width >= 32


def test_questions_name_known_variants_and_measures():
    asked = set()
    for question in QUESTIONS:
        rows = {variant for variant, _, _ in question.rows}
        asked |= rows
        for claim in question.claims:
            assert set(claim.order) <= rows and claim.measure in MEASURES
    assert asked == set(study.VARIANTS)


def test_a_difference_counts_beyond_the_larger_range():
    assert differ([1.0, 1.2], [1.5, 1.6]) == 1
    assert differ([1.5, 1.6], [1.0, 1.2]) == -1
    assert differ([1.0, 1.2], [1.1, 1.4]) == 0, "the ranges overlap"
    assert differ([1.0, 1.0], [1.3, 2.3]) == 0, "apart, but one range is as large as the difference"
    assert differ([1.0, 1.0], [1.0, 1.0]) == 0


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ([1, 2, 3, 4], "same"),
        ([1, 1, 3, 3], "same"),
        ([4, 3, 2, 1], "opposite"),
        ([1, 1, 1, 1], "within"),
        ([1, 3, 2, 4], "mixed"),
        ([1, 3, 3, 1], "mixed"),
        ([1, 2], "same"),
        ([2, 1], "opposite"),
        ([1, 1.1], "within"),
    ],
)
def test_verdicts(means, verdict):
    assert judge([[mean - 0.1, mean + 0.1] for mean in means]) == verdict


def test_no_verdict_without_two_seeds_of_every_variant():
    assert judge([[1.0, 1.1], []]) == "missing"
    assert judge([[1.0, 1.1], [3.0]]) == "missing"


def test_values_are_in_the_order_of_seeds_and_none_is_left_out():
    assert values_of(RUNS, "8x64", "psnr") == [27.0, 27.25]
    assert values_of(RUNS, "contrastive", "psnr") == [] and values_of(RUNS, "reconstruction", "retrieval") == []


def test_a_sentence_says_claim_verdict_and_means():
    claim = Claim("more is better", "psnr", ("linear", "8x64"), "1, 2")
    assert verdict_text(claim, RUNS) == (
        "Paper: more is better (1, 2). **The same order here**: PSNR (dB) 20.12, 27.12."
    )
    chain = Claim("more is better", "psnr", ("1x512", "8x64", "linear"), "1, 2, 3")
    assert "**The opposite order here**" not in verdict_text(chain, RUNS)
    assert verdict_text(chain, RUNS).endswith("step by step: up, down.")
    assert "not measured" in verdict_text(claim, RUNS[:2]).lower()


def test_tables_show_mean_range_and_gaps():
    assert cell([1.0, 2.0], ".1f") == "1.5 [1.0, 2.0]"
    assert cell([1.0], ".1f") == "1.0" and cell([], ".1f") == "-"
    lines = table(QUESTIONS[2], RUNS).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 5
    assert lines[3].startswith("| contrastive only | - |") and lines[3].endswith("| -, 68.95 |")


def put(out, runs):
    for run in runs:
        folder = study.run_folder(out, run["variant"], run["seed"])
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(run))


def test_report_of_finished_runs(tmp_path):
    put(tmp_path, RUNS[2:])  # one variant is missing
    assert study.main(["--out", str(tmp_path), "--report-only"]) == 0
    results = read_results(tmp_path / "results.json")
    assert len(results["runs"]) == len(RUNS) - 2 and results["protocol"]["budget"] == BUDGET
    assert {entry["verdict"] for entry in results["verdicts"]} >= {"missing"}
    text = (tmp_path / "codebooks.md").read_text()
    assert "9 steps of 16 images" in text and "seeds 0, 1" in text
    assert all(question.title in text for question in QUESTIONS)
    with Image.open(tmp_path / "codebooks.png") as picture:
        assert picture.width > 1000


def test_runs_of_another_budget_are_refused(tmp_path, capsys):
    put(tmp_path, RUNS)
    assert study.main(["--out", str(tmp_path), "--steps", "5"]) == 2
    assert "take another --out" in capsys.readouterr().out
    changed = RUNS[0] | {"budget": BUDGET | {"steps": 10}}
    (study.run_folder(tmp_path, RUNS[0]["variant"], RUNS[0]["seed"]) / "result.json").write_text(json.dumps(changed))
    assert study.main(["--out", str(tmp_path), "--report-only"]) == 2
    assert "unequal budgets" in capsys.readouterr().out


def test_nothing_to_report_is_said(tmp_path, capsys):
    assert study.main(["--out", str(tmp_path), "--report-only"]) == 2
    assert "no finished run" in capsys.readouterr().out


def test_a_failed_run_stops_the_study_with_its_message(tmp_path, monkeypatch):
    def start(arguments, variant, seed):
        folder = study.run_folder(arguments.out, variant, seed)
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text("first\nunitok: error: the reason\n")
        return study.subprocess.Popen([study.sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(study, "start", start)
    arguments = study.parser().parse_args(["--out", str(tmp_path), "--workers", "1"])
    with pytest.raises(UserError, match="exit code 3.*the reason"):
        study.run_all(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["8x64-seed0"]
