"""Every VQA task file of lm-eval on two local documents, with an answering machine in the model's place; re-scoring."""

import json

import pytest
from PIL import Image

from unitok.cli import main
from unitok.core.errors import DataError, UserError
from unitok.data.source import open_source
from unitok.eval.benchmark_data import documents_hash, load_documents, pictures
from unitok.eval.benchmarks import BENCHMARKS, LETTER, SHORT, benchmark
from unitok.eval.rescore import judged, read_samples, rescore_samples
from unitok.eval.vqa_metrics import mean

PICTURE = {"image": "red.png"}
VQA = {"question": "what color?", **PICTURE}
MME = {"category": "count", **PICTURE}
MMMU = {"answer": "B", "image_1": "red.png", "image_2": "blue.png"}
SEED = {"choice_a": "red", "choice_b": "blue", "choice_c": "pink", "choice_d": "black", **PICTURE}
DOCUMENTS = {
    "shapes": [VQA | {"answer": "Red"}, VQA | {"answer": "blue"}, VQA | {"answer": "red"}],
    "vqav2": [
        VQA | {"answers": [{"answer": text} for text in ["red"] * 2 + ["blue"] * 8]},
        VQA | {"answers": [{"answer": "The red."}] * 10},
    ],
    "gqa": [VQA | {"answer": "red"}, VQA | {"answer": "blue"}],
    "textvqa": [
        VQA | {"answers": ["red"] * 10, "ocr_tokens": ["STOP", "NOW"]},
        VQA | {"answers": ["no"] * 10, "ocr_tokens": []},
    ],
    "pope": [
        VQA | {"question": "Is there a cat?", "answer": "yes", "category": "random"},
        VQA | {"question": "Is there a dog?", "answer": "no", "category": "popular"},
    ],
    "mme": [
        MME | {"question": "Is it red? Please answer yes or no.", "answer": "Yes", "question_id": "a.png"},
        MME | {"question": "Is it blue? Please answer yes or no.", "answer": "No", "question_id": "a.png"},
    ],
    "seed": [
        VQA | SEED | {"answer": "A", "data_type": "image"},
        VQA | SEED | {"answer": "B", "data_type": "image"},
        VQA | SEED | {"answer": "B", "data_type": "video"},
    ],
    "scienceqa": [
        {"question": "Which?", "choices": ["up", "down"], "answer": 1, "hint": "Look up.", **PICTURE},
        {"question": "What?", "choices": ["up", "down", "left"], "answer": 0, "hint": "", "image": None},
    ],
    "mmmu": [
        MMMU
        | {
            "id": "1",
            "question": "In <image 2>, which?",
            "options": "['x', '<image 1>']",
            "question_type": "multiple-choice",
        },
        MMMU
        | {
            "id": "2",
            "question": "How many in <image 1>?",
            "options": "[]",
            "question_type": "open",
            "answer": "['3', '4']",
        },
    ],
    "mmvet": [
        VQA | {"question_id": "v1", "answer": "3 <OR> three", "capability": "math,ocr"},
        VQA | {"question_id": "v2", "answer": "red", "capability": "rec"},
    ],
    "mmbench": [
        {
            "index": 7,
            "question": "Which?",
            "hint": "nan",
            "A": "red",
            "B": "blue",
            "C": "pink",
            "D": None,
            "answer": "B",
            **PICTURE,
        },
        {
            "index": 8,
            "question": "Who?",
            "hint": "Look.",
            "A": "cat",
            "B": "dog",
            "C": None,
            "D": None,
            "answer": "A",
            **PICTURE,
        },
        # the set's own rotation of question 8, which is asked by rotating
        {"index": 1000008, "question": "Who?", "hint": "Look.", "A": "dog", "B": "cat", "answer": "B", **PICTURE},
    ],
}
ANSWERS = {
    "what color?": "red",
    "what color?|seed": "A",
    "Is there a cat?": "Yes",
    "Is there a dog?": "Yes",
    "Is it red?": "Yes",
    "Is it blue?": "No",
    "Which?": "B",
    "Which?|mmbench": "blue",
    "What?": "A. up",
    "In <image>, which?": "(B)",
    "How many in <image>?": "I think it is 4.",
    "Who?": "A",
}
EXPECTED = {
    "shapes": {"accuracy": 2 / 3},
    "vqav2": {"accuracy": (0.6 + 1) / 2},
    "gqa": {"accuracy": 0.5},
    "textvqa": {"accuracy": 0.5},
    "textvqa_ocr": {"accuracy": 0.5},
    "pope": {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1, "f1_mean": 0.5},
    "mme": {"perception": 200, "cognition": 0, "acc": 1, "acc_plus": 1},
    "seed": {"accuracy": 0.5},
    "scienceqa": {"accuracy": 1, "img_accuracy": 1},
    "mmmu": {"accuracy": 1},
    "mmvet": {"answered": 1},
    # "blue" is right wherever it stands; "A" is right in one of the two rotations
    "mmbench": {"circular_accuracy": 0.5, "vanilla_accuracy": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name, documents in DOCUMENTS.items():
        (root / name).mkdir()
        for color in ("red", "blue"):
            Image.new("RGB", (9, 7), color).save(root / name / f"{color}.png")
        (root / name / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return root


def answer_to(context):
    """By the question; two benchmarks share wordings."""
    first = next(line for line in context.split("\n") if line.endswith("?"))
    if first == "what color?" and "A. red" in context:
        first += "|seed"
    if first == "Which?" and "pink" in context:
        first += "|mmbench"
    return ANSWERS[first]


@pytest.fixture(scope="module")
def run(data):
    """All tasks in one run of lm-eval; the contexts and pictures that the model was given, by task."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from unitok.commands.lm_eval import task_folders

    class Machine(LM):
        MULTIMODAL = True
        seen: dict = {}

        def generate_until(self, requests):
            for request in requests:
                assert request.args[1]["do_sample"] is False
                self.seen.setdefault(request.task_name, []).append((request.args[0], request.args[2]["visual"]))
            return [answer_to(request.args[0]) for request in requests]

        def loglikelihood(self, requests):
            raise AssertionError("not asked for")

        loglikelihood_rolling = loglikelihood

    machine = Machine()
    manager = TaskManager(include_path=task_folders(), include_defaults=False, metadata={"data": str(data)})
    results = simple_evaluate(
        machine,
        tasks=[f"unitok_{name}" for name in BENCHMARKS],
        task_manager=manager,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return results, machine.seen


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_task_file_gives_the_figures_counted_by_hand(run, name):
    found = run[0]["results"][f"unitok_{name}"]
    figures = {key.removesuffix(",none"): found[key] for key in found if key.endswith(",none") and "stderr" not in key}
    assert figures == pytest.approx(EXPECTED[name])


def test_wordings_are_those_of_llava(run):
    seen = {name.removeprefix("unitok_"): [context for context, _ in asked] for name, asked in run[1].items()}
    assert seen["textvqa"][0] == f"what color?\n{SHORT}"
    assert seen["textvqa_ocr"][0] == f"what color?\nReference OCR token: STOP, NOW\n{SHORT}"
    assert seen["mme"][0] == f"Is it red?\n{SHORT}"
    assert seen["seed"][0] == f"what color?\nA. red\nB. blue\nC. pink\nD. black\n{LETTER}"
    assert seen["scienceqa"] == [
        f"Context: Look up.\nWhich?\nA. up\nB. down\n{LETTER}",
        f"What?\nA. up\nB. down\nC. left\n{LETTER}",
    ]
    assert seen["mmmu"][0] == f"In <image>, which?\n\n(A) x\n(B) <image>\n\n{LETTER}"
    assert seen["mmmu"][1] == f"How many in <image>?\n\n{SHORT}"
    assert seen["mmvet"][0] == "what color?"
    assert seen["mmbench"][1] == f"Which?\nA. blue\nB. pink\nC. red\n{LETTER}"
    assert [text.split("\n")[0] for text in seen["mmbench"]] == ["Which?"] * 3 + ["Look."] * 2


def test_pictures_come_in_the_order_of_the_question(run):
    seen = run[1]
    colors = [[one.getpixel((1, 1)) for one in images] for _, images in seen["unitok_mmmu"]]
    assert colors == [[(0, 0, 255), (255, 0, 0)], [(255, 0, 0)]]
    assert [len(images) for _, images in seen["unitok_scienceqa"]] == [1, 0]


def write_samples(run, name, path):
    """As lm-eval's --log_samples does."""
    samples = run[0]["samples"][f"unitok_{name}"]
    path.write_text("\n".join(json.dumps(sample, default=str) for sample in samples))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rescoring_gives_the_same_figures_without_the_model(run, name, tmp_path):
    found, samples = read_samples(write_samples(run, name, tmp_path / "samples.jsonl"))
    metrics, _ = rescore_samples(found, samples)
    assert found == name
    assert {metric.name: metric.value for metric in metrics} == pytest.approx(EXPECTED[name])


def test_rescoring_by_a_judge(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_judge.py").write_text("def score(question, reference, answer): return float(answer == reference)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path, out = write_samples(run, "mmvet", tmp_path / "samples.jsonl"), tmp_path / "out.json"
    assert main(["eval", "rescore", str(path), "--judge", "my_judge:score", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert {one["metric"]: one["value"] for one in written["metrics"]} == {"answered": 1.0, "score": 0.5}
    assert written["protocol"]["judge"] == "my_judge:score"
    assert written["protocol"]["generation"]["max_gen_toks"] == 1024
    assert written["protocol"]["documents"] == documents_hash("mmvet", DOCUMENTS["mmvet"])
    assert main(["report", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "score of math" in shown and "score of rec" in shown
    assert main(["eval", "rescore", str(path), "--judge", "my_judge:nothing"]) == 2
    assert "my_judge:nothing" in capsys.readouterr().err
    assert main(["eval", "rescore", str(path), "--limit", "0"]) == 2
    capsys.readouterr()
    assert main(["eval", "rescore", str(path), "--judge", "my_judge:score", "--model", "nowhere"]) == 2
    assert "--model nowhere: no such folder" in capsys.readouterr().err
    assert main(["eval", "rescore", str(tmp_path / "none.jsonl"), "--dry-run"]) == 0
    assert "is missing" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "nonsense", '{"doc": {}, "resps": [["x"]]}', '{"doc": {"benchmark": "pope"}}'])
def test_files_that_are_no_samples(tmp_path, text):
    (tmp_path / "samples.jsonl").write_text(text)
    with pytest.raises(DataError, match="samples.jsonl"):
        read_samples(tmp_path / "samples.jsonl")


def test_a_judge_must_give_a_share(run, tmp_path):
    _, samples = read_samples(write_samples(run, "mmvet", tmp_path / "samples.jsonl"))
    with pytest.raises(DataError, match=r"the judge gave 3 .*\[0, 1\]"):
        judged(samples, lambda *_: 3)
    with pytest.raises(DataError, match=r"the judge gave None .*\[0, 1\]"):
        judged(samples, lambda *_: None)


def test_captions_are_the_text_of_the_shapes_world():
    from unitok.eval.lm_eval_tasks.utils import load_texts

    source = open_source("shapes:val?num=3")
    assert load_texts("shapes:val?num=3")["test"]["text"] == [source[index].captions[0] for index in range(3)]


def test_a_damaged_picture_is_named(data):
    (doc, *_) = load_documents("gqa", str(data))
    with pytest.raises(UserError, match="lost.png"):
        pictures(doc | {"image": str(data / "lost.png")})


def test_every_task_file_names_the_metrics_of_its_benchmark():
    from pathlib import Path

    from lm_eval.tasks._yaml_loader import load_yaml

    from unitok.commands.lm_eval import task_folders

    files = {path.stem: path for path in Path(task_folders()[0]).glob("*.yaml")}
    texts = files.pop("shapes_text")
    assert {one["metric"] for one in load_yaml(texts)["metric_list"]} >= {"word_perplexity", "bits_per_byte"}
    assert files.keys() == BENCHMARKS.keys()
    for name, path in files.items():
        task = load_yaml(path)
        assert task["dataset_kwargs"] == {"benchmark": name} and task["task"] == f"unitok_{name}"
        found = {one["metric"]: (one["aggregation"], one["higher_is_better"]) for one in task["metric_list"]}
        # lm-eval gives a standard error where it takes the mean itself
        rules = {key: (rule.total, rule.higher_is_better) for key, rule in benchmark(name).metrics.items()}
        assert found == {key: ("mean" if total is mean else total, up) for key, (total, up) in rules.items()}
