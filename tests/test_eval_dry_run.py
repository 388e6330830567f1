"""Every kind of `unitok eval`: its common options, what --dry-run lists, and what a run says of missing files."""

import argparse
import json

import pytest

from unitok.cli import build_parser, main
from unitok.eval.benchmarks import BENCHMARKS

# One invocation of each kind with nothing there, and what the dry run must say of every missing thing.
NOWHERE = "nowhere"
FID_INCEPTION = "FID's InceptionV3"
FROM_GENEVAL, INCEPTION = "github.com/djghosh13/geneval", "github.com/toshas/torch-fidelity"
DRY_RUNS = [
    (
        "reconstruction --source nowhere --tokenizer none --inception i.pth --lpips l.pth",
        ["data source 'nowhere'", "https://image-net.org", "missing: none", INCEPTION, "lpips_with_vgg.pth"],
    ),
    ("reconstruction --tokenizer none", ["missing: none", "left out: LPIPS", "left out: rFID", INCEPTION]),
    ("retrieval --source nowhere --tokenizer none", ["missing: none", "cocodataset.org"]),
    ("vqa --source nowhere --model none", ["missing: none", "shapes:val", "unitok lm-eval --dry-run"]),
    ("geneval --prompts none.jsonl --model none", ["missing: none.jsonl", FROM_GENEVAL, "missing: none:"]),
    (
        "zeroshot --source nowhere --model none --model open_clip:ViT-B-32:openai --train t --captions c --classes k "
        "--templates m",
        [
            "missing: nowhere",
            "image-net.org",
            "missing: none",
            "missing: t:",
            "missing: c:",
            "missing: k:",
            "missing: m",
        ]
        + ["needed: open_clip:ViT-B-32:openai"],
    ),
    ("geneval-generate --prompts none.jsonl --model none --out o", ["missing: none.jsonl", FROM_GENEVAL]),
    (
        "geneval-score nowhere --detector mask2former",
        ["missing: nowhere", "geneval-generate", "facebook/mask2former-swin-small-coco-instance", "CLIP"],
    ),
    (
        "geneval-score nowhere --detector owlv2 --detector-weights ./none --clip c",
        ["missing: ./none", "google/owlv2-base-patch16-ensemble", "missing: c: CLIP"],
    ),
    ("t2i --bench dpg --prompts p --model none --out o", ["missing: p", "TencentQQGYLab/ELLA", "missing: none"]),
    ("t2i --bench genai --prompts p --model none --out o", ["missing: p", "BaiqiL/GenAI-Bench-1600"]),
    ("t2i --bench mjhq --prompts p --model none --out o", ["missing: p", "playgroundai/MJHQ-30K", INCEPTION]),
    ("gfid --model none --out o", ["missing: none", "openai/guided-diffusion", INCEPTION]),
    ("gfid --model none --out o --reference r --inception i", ["missing: r", "missing: i"]),
    ("gfid --model none --out o --reference r --limit 9", ["9 images", "missing: r", f"left out: {FID_INCEPTION}"]),
    ("t2i --bench mjhq --prompts p --out o --reference r", ["missing: p", "missing: r", f"left out: {FID_INCEPTION}"]),
    ("t2i --bench dpg --prompts p --out o --limit 5", ["each of the first 5 prompts"]),
    ("geneval-generate --prompts p --out o --limit 5", ["each of the first 5 prompts"]),
    (
        "geneval-score nowhere --detector owlv2 --detector-weights google/owlv2 --clip hub:a/b --limit 5",
        ["needed: hub:google/owlv2", "needed: hub:a/b: fetched from the hub; CLIP", "each of the first 5 prompts"],
    ),
    (
        "reconstruction --tokenizer hub:a/b --inception hub:c/d/e",
        ["needed: hub:a/b: diffusers fetches it", "needed: hub:c/d/e: torch-fidelity's InceptionV3"],
    ),
    ("rescore none.jsonl", ["none.jsonl", "--log_samples", "left out: scores of a judge"]),
    ("speed tokenizer --config tokenizer/shapes.yaml", ["would measure"]),
    ("speed mllm --config mllm/bench.yaml", ["would measure"]),
]


def kinds():
    """Every kind that the command line has, with its parser."""
    found = build_parser()
    for name in ("eval", None):
        action = next(one for one in found._actions if isinstance(one, argparse._SubParsersAction))
        if name is None:
            return action.choices
        found = action.choices[name]
    raise AssertionError("no kinds")


def test_every_kind_is_tried_here():
    assert {command.split()[0] for command, _ in DRY_RUNS} == set(kinds())


@pytest.mark.parametrize("kind", sorted(set(kinds()) - {"speed"}))
def test_every_kind_has_the_common_options(kind):
    options = {option for action in kinds()[kind]._actions for option in action.option_strings}
    assert {"--limit", "--seed", "--out", "--dry-run"} <= options


@pytest.mark.parametrize(("command", "words"), DRY_RUNS, ids=[command[:50] for command, _ in DRY_RUNS])
def test_dry_run_lists_what_is_missing_and_where_it_comes_from(command, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *command.split(), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert [word for word in words if word not in shown] == [], shown
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_dry_run_of_lm_eval(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("UNITOK_DATA", str(tmp_path))
    arguments = ["--model_args", "dtype=bfloat16,pretrained=none", "--tasks", "unitok_pope,hellaswag"]
    assert main(["lm-eval", "--dry-run", *arguments]) == 0
    shown = capsys.readouterr().out
    for word in ("hf download lmms-lab/POPE", "hellaswag", "from the hub", "missing: none: the unified model"):
        assert word in shown
    assert "unitok_mme" not in shown
    monkeypatch.delenv("UNITOK_DATA")
    assert main(["lm-eval", "--dry-run", *arguments]) == 0
    fetch = "hf download lmms-lab/POPE --repo-type dataset --local-dir DIR/pope, and set UNITOK_DATA=DIR"
    assert fetch in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tasks", "listed"),
    [
        (["--tasks=unitok_pope"], ["unitok_pope"]),
        (["-t", "unitok_pope", "unitok_gqa"], ["unitok_pope", "unitok_gqa"]),
        (["--tasks", "unitok_text*"], ["unitok_textvqa", "unitok_textvqa_ocr"]),
        (["--tasks", "unitok_shapes_text"], ["unitok_shapes_text"]),
        (["--tasks", "unitok_nonsense,unitok_pope"], ["unitok_nonsense", "unitok_pope"]),
        (["--tasks", "unitok_nonsense"], ["unitok_nonsense"]),
        (["--tasks", "unitok_vqa"], [f"unitok_{name}" for name in BENCHMARKS]),
        ([], [f"unitok_{name}" for name in BENCHMARKS]),
    ],
)
def test_dry_run_of_lm_eval_lists_the_tasks_asked_for(tasks, listed, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("UNITOK_DATA", raising=False)
    assert main(["lm-eval", *tasks, "--dry-run"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])
    assert list(rows) == listed
    assert [task for task, text in rows.items() if text.startswith("no such task")] == [
        task for task in listed if task == "unitok_nonsense"
    ]
    assert main(["lm-eval", *tasks, "--dry-run", "--metadata", json.dumps({"data": str(tmp_path)})]) == 0
    assert (f"no folder {tmp_path / 'pope'}" in capsys.readouterr().out) == ("unitok_pope" in listed)


FAILURES = [
    ("eval reconstruction --source shapes:val?num=2 --inception i.pth", "--inception=i.pth does not exist", INCEPTION),
    ("eval reconstruction --source shapes:val?num=2 --lpips l.pth", "--lpips=l.pth does not exist", "vgg16-397923af"),
    ("eval reconstruction --source nowhere", "data source 'nowhere' does not exist", "expected"),
    ("eval geneval --prompts none.jsonl", "GenEval prompts from none.jsonl", FROM_GENEVAL),
    ("eval geneval-generate --prompts none.jsonl --out o", "GenEval prompts from none.jsonl", FROM_GENEVAL),
    ("eval geneval-score nowhere --detector mask2former", "nowhere is no folder", "geneval-generate"),
    ("eval t2i --bench dpg --prompts p --out o", "p: no prompts of DPG-Bench", "TencentQQGYLab/ELLA"),
    ("eval t2i --bench mjhq --prompts p --out o", "p: no prompts of MJHQ-30K", "playgroundai/MJHQ-30K"),
    ("eval t2i --bench mjhq --prompts p --out o --reference r", "--reference and --inception", "give both or none"),
    ("eval t2i --bench mjhq --prompts p --out o --reference r --inception i", "--reference r: no such", "--dry-run"),
    ("eval t2i --bench mjhq --prompts p --out o --reference . --inception i", "--inception=i does not", INCEPTION),
    ("eval gfid --model none --out o --reference r --inception i", "--reference r: no such file", "--dry-run"),
    ("eval gfid --model none --out o --reference . --inception i", "--inception=i does not exist", INCEPTION),
    ("eval gfid --model none --out o --reference .", "--reference and --inception", "give both or none"),
    ("eval t2i --bench imagenet --prompts p --out o", "invalid choice: 'imagenet'", "mjhq"),
    ("eval zeroshot --source shapes:val?num=30 --model open_clip:ViT-B-32:w.pt", "no such file or name", "openai"),
    ("eval rescore none.jsonl", "none.jsonl: cannot be read", "samples_*.jsonl"),
    ("eval rescore none.jsonl --judge nobody:score --dry-run", "nobody:score", "PYTHONPATH"),
    ("eval vqa --model none", "none: no such model folder", "none"),
    ("eval vqa --limit 0", "0 is not at least 1", "--limit"),
    ("report none.json", "cannot read none.json", "results.json"),
]


@pytest.mark.parametrize(("command", "named", "remedy"), FAILURES, ids=[command[:60] for command, *_ in FAILURES])
def test_failures_are_one_line_with_the_remedy(command, named, remedy, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("unitok: error: ") and error.count("\n") == 1
    assert named in error and remedy in error


def test_files_of_no_form_are_named(tmp_path, capsys):
    """lm-eval's files are read; what looks like one but was cut off is not."""
    path = tmp_path / "results_x.json"
    whole = {"results": {"a": {"acc,none": 1.0, "acc_stderr,none": "N/A"}}, "configs": {"a": {}}, "config": {}}
    path.write_text(json.dumps(whole | {"n-samples": {"a": {"effective": 2}}}))
    assert main(["report", str(path)]) == 0
    path.write_text(json.dumps(whole | {"results": {"a": {}}, "n-samples": {"a": {"effective": 2}}}))
    assert main(["report", str(path)]) == 2
    assert "a has no figures" in capsys.readouterr().err
