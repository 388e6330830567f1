"""The unified model inside lm-eval: text as `hf`, pictures as our own pipeline, and the command itself."""

import json
import shutil
import time

import pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_text_tokenizer, make_tokenizer, roughen
from transformers import LlamaForCausalLM

from unitok.cli import main
from unitok.commands.lm_eval import _write_runs
from unitok.core.errors import DataError, UserError
from unitok.data.conversations import Turn
from unitok.data.source import open_source
from unitok.eval import lm_eval_model
from unitok.eval.benchmark_data import documents_hash
from unitok.eval.lm_eval_results import date_of
from unitok.mllm.build import BackboneConfig, UniTokMLLMSettings, build_model
from unitok.mllm.pipeline import UniTokPipeline
from unitok.mllm.processor import UniTokProcessor

BACKBONE = pipelines.BACKBONE | {"max_position_embeddings": 96}
TEXTS = [
    ("a photo of", " a red circle"),
    ("is there a green triangle?", " yes"),
    ("", "two blue squares"),
    ("red", " two"),
]


def make_pipeline(folder):
    visual = make_tokenizer()
    text = make_text_tokenizer(folder)
    settings = UniTokMLLMSettings(visual_width=24, visual_num_heads=2, visual_mlp_ratio=1.5, depth_num_layers=1)
    torch.manual_seed(0)
    model = roughen(build_model(settings, BackboneConfig(config=BACKBONE), text, visual)).eval()
    with torch.no_grad():  # our answers never hold image marks, those of `hf` could: make them unlikely
        model.lm_head.weight[model.suppressed_ids()] = 0
    return UniTokPipeline(model, UniTokProcessor(text, model.config, visual.config.image_size), visual)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def lm(pipe):
    from unitok.eval.lm_eval_model import UniTokLM

    return UniTokLM(pipe, batch_size=3)


@pytest.fixture(scope="module")
def hf(pipe):
    """lm-eval's own model on the same backbone and text tokenizer."""
    from lm_eval.models.huggingface import HFLM

    llama = LlamaForCausalLM(pipe.model.config.text_config).eval()
    llama.model.load_state_dict(pipe.model.backbone.state_dict())
    llama.lm_head.load_state_dict(pipe.model.lm_head.state_dict())
    return HFLM(pretrained=llama, tokenizer=pipe.processor.tokenizer, backend="causal", batch_size=2)


@pytest.mark.parametrize(("device", "ranks", "expected"), [
    ("cuda:0", False, "cuda:0"), ("cuda:0", True, "own"), (None, True, "own"), ("cuda:3", True, "cuda:3"),
])  # fmt: skip
def test_each_rank_has_its_own_gpu(device, ranks, expected, monkeypatch):
    """lm-eval's default, cuda:0, names no GPU in particular."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lm_eval_model, "is_distributed", lambda: ranks)
    monkeypatch.setattr(lm_eval_model, "inference_device", lambda: "own")
    monkeypatch.setattr(lm_eval_model.UniTokPipeline, "from_pretrained", lambda folder, device, dtype: device)
    assert lm_eval_model._open("folder", device, torch.float32) == expected


@pytest.fixture(scope="module")
def samples():
    source = open_source("shapes:val?num=6&size=32")
    return [source[index] for index in range(len(source))]


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def asked(samples, **settings):
    settings = {"until": [], "do_sample": False, "max_gen_toks": 8} | settings
    return [request("generate_until", one.questions[0][1], settings, {"visual": [one.image]}) for one in samples]


def test_loglikelihood_is_that_of_hf(lm, hf):
    ours, theirs = (one.loglikelihood([request("loglikelihood", *pair) for pair in TEXTS]) for one in (lm, hf))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    assert len({round(value, 3) for value, _ in ours}) == len(TEXTS)


def test_rolling_loglikelihood_is_that_of_hf_beyond_the_context(lm, hf):
    texts = ["a photo of two blue squares", "what color is the circle? " * 30]
    ours, theirs = (
        one.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts]) for one in (lm, hf)
    )
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("until", [[], ["r"]])
def test_generated_text_is_that_of_hf(lm, hf, until):
    settings = {"until": until, "do_sample": False, "max_gen_toks": 12}
    texts = ["a photo of a red circle", "red", "what color is the circle? yes " * 20]
    ours, theirs = (
        one.generate_until([request("generate_until", text, dict(settings)) for text in texts]) for one in (lm, hf)
    )
    assert ours == theirs
    assert len(set(ours)) > 1 or until


def test_answers_about_pictures_are_those_of_the_pipeline(lm, pipe, samples):
    expected = pipe.chat_batch(
        [
            [{"role": "user", "content": [{"type": "image", "image": s.image}, {"type": "text", "text": q}]}]
            for s, q in ((s, s.questions[0][1]) for s in samples)
        ],
        max_new_tokens=8,
    )
    found = lm.generate_until(asked(samples))
    assert [text.strip() for text in found] == [text.strip() for text in expected]
    assert len(set(found)) > 1


def test_pictures_stand_where_the_text_has_marks(lm, pipe, samples):
    marked = request("generate_until", "<image>\nred <image>", {"max_gen_toks": 4}, {"visual": [samples[0].image] * 2})
    (prompt,) = lm._prompts([marked.args], 4)
    ids = pipe.processor.builder.chat([Turn("user", "<image>\nred <image>")], prompt=True).ids
    assert prompt.ids == ids and prompt.codes.shape[0] == 2


def test_likelihood_of_choices_is_that_of_one_pass_by_hand(lm, pipe, samples):
    choices = ["red", "two blue squares"]
    requests = [
        request("loglikelihood", "what color is the circle?", " " + choice, {"visual": [sample.image]})
        for sample in samples[:2]
        for choice in choices
    ]
    mixed = [requests[0], request("loglikelihood", *TEXTS[0]), *requests[1:]]
    found = lm.loglikelihood(mixed)
    assert found[1] == pytest.approx(lm.loglikelihood([mixed[1]])[0], abs=1e-5)
    by_hand = []
    for sample in samples[:2]:
        for choice in choices:
            turns = [Turn("user", "<image>\nwhat color is the circle?"), Turn("assistant", choice)]
            sequence = pipe.processor.builder.chat(turns)
            ids = torch.tensor([sequence.ids])
            with torch.no_grad():
                logits = pipe.model(ids, codes=torch.stack(pipe.image_codes([sample.image]))).logits[0, :-1]
            learnt = [place for place, label in enumerate(sequence.labels) if label >= 0][:-1]  # without the end
            scores = logits.log_softmax(-1)
            by_hand.append(sum(scores[place - 1, sequence.ids[place]].item() for place in learnt))
    assert [value for value, _ in found[:1] + found[2:]] == pytest.approx(by_hand, abs=1e-4)


def test_pictures_are_encoded_once(lm, pipe, samples, monkeypatch):
    from unitok.eval.lm_eval_model import UniTokLM

    fresh = UniTokPipeline(pipe.model, pipe.processor, pipe.tokenizer)
    calls = []
    encode = pipe.tokenizer.encode
    monkeypatch.setattr(pipe.tokenizer, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    UniTokLM(fresh, batch_size=2).generate_until(asked([samples[0]] * 5, max_gen_toks=1))
    assert sum(calls) == 1


def test_drawn_answers_depend_on_the_request_alone(pipe, samples):
    from unitok.eval.lm_eval_model import UniTokLM

    settings = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    one, other, third = (
        UniTokLM(pipe, batch_size=size, seed=seed).generate_until(asked(samples, **settings))
        for size, seed in ((1, 3), (4, 3), (4, 4))
    )
    assert one == other != third


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("red <image>", {"max_gen_toks": 4}, {"visual": []}), "1 x <image>"),
        (("red", {"max_gen_toks": 4, "num_beams": 3}, {"visual": []}), "num_beams"),
        (("red", {"max_gen_toks": 96}), "max_gen_toks=96"),
        (("red " * 90, {"max_gen_toks": 4}, {"visual": []}), "reads 96"),
    ],
)
def test_what_cannot_be_asked(lm, arguments, words):
    with pytest.raises(UserError, match=words):
        lm.generate_until([request("generate_until", *arguments)])


def test_what_cannot_be_made_or_scored(pipe, lm, samples):
    from unitok.eval.lm_eval_model import UniTokLM

    with pytest.raises(UserError, match="pretrained=DIR"):
        UniTokLM()
    for options, words in (
        ({"parallelise": True}, "parallelise=True: unknown"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"dtype": "int3"}, "dtype=int3"),
    ):
        with pytest.raises(UserError, match=words):
            UniTokLM(pipe, **options)
    with pytest.raises(DataError, match="pictures"):
        lm.loglikelihood_rolling([request("loglikelihood_rolling", "red", {"visual": [samples[0].image]})])
    with pytest.raises(DataError, match="no text"):
        lm.loglikelihood([request("loglikelihood", "red", "  ", {"visual": [samples[0].image]})])


VQA_TASK = """
task: shapes_vqa
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_image: !function local.pictures
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function local.score
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 16}
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT_TASK = """
task: shapes_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["red", "blue", "two", "yes"]
doc_to_target: "{{target}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
LOCAL = """
from PIL import Image
from unitok.eval.vqa_accuracy import soft_accuracy
def pictures(doc): return [Image.open(doc["path"])]
def score(doc, results): return {"acc": soft_accuracy(results[0], [doc["answer"]])}
"""


@pytest.fixture(scope="module")
def world(pipe, samples, tmp_path_factory):
    """An export folder, and a VQA and a text task on the shapes world. Half the answers are what the model says, so
    that a score is neither 0 nor 1."""
    folder = tmp_path_factory.mktemp("world")
    pipe.save_pretrained(folder / "model")
    said = pipe.answer([s.image for s in samples], [s.questions[0][1] for s in samples])
    rows = []
    for index, sample in enumerate(samples):
        path = folder / f"{index}.png"
        sample.image.save(path)
        answer = said[index] if index % 2 else "surely not this"
        rows.append({"path": str(path), "question": sample.questions[0][1], "answer": answer, "target": index % 4})
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local.py").write_text(LOCAL)
    for name, text in (("vqa", VQA_TASK), ("text", TEXT_TASK)):
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(folder / "data.json")))
    return folder


def test_the_command_runs_a_vqa_and_a_text_task_offline(world, pipe, lm, hf, samples, monkeypatch):
    from unitok.eval.vqa_accuracy import soft_accuracy

    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_HOME", str(world / "hub"))):
        monkeypatch.setenv(name, value)
    out = world / "out"
    arguments = [
        "--model_args",
        f"pretrained={world / 'model'}",
        "--tasks",
        "shapes_vqa,shapes_text",
        "--device",
        "cpu",
    ]
    more = ["--include_path", str(world / "tasks"), "--output_path", str(out), "--log_samples", "--batch_size", "4"]
    runs = world / "runs.json"
    assert main(["lm-eval", *arguments, *more, "--out", str(runs)]) == 0
    results = json.loads(next(out.rglob("results_*.json")).read_text())
    rows = json.loads((world / "data.json").read_text())
    said = pipe.answer([s.image for s in samples], [row["question"] for row in rows])
    ours = sum(soft_accuracy(text, [row["answer"]]) for text, row in zip(said, rows, strict=True)) / len(rows)
    assert results["results"]["shapes_vqa"]["acc,none"] == pytest.approx(ours)
    assert ours == 0.5
    choices = ["red", "blue", "two", "yes"]
    right = 0
    for row in rows:
        scores = hf.loglikelihood([request("loglikelihood", row["question"], f" {choice}") for choice in choices])
        right += max(range(4), key=lambda index, s=scores: s[index][0]) == row["target"]
    assert results["results"]["shapes_text"]["acc,none"] == pytest.approx(right / len(rows))
    written = json.loads(runs.read_text())["runs"]
    assert written["shapes_vqa"]["metrics"][0] | {"standard_error": 0} == {
        "metric": "acc", "value": pytest.approx(ours), "standard_error": 0, "n": len(rows),
    }  # fmt: skip
    assert written["shapes_text"]["benchmark"] == "shapes_text" and written["shapes_vqa"]["checkpoint"]["sha256"]
    assert written["shapes_vqa"]["command"].endswith(f"--out {runs}")
    assert written["shapes_vqa"]["protocol"]["generation"]["max_gen_toks"] == 16
    kept = [json.loads(line) for line in next(out.rglob("samples_shapes_vqa_*.jsonl")).read_text().splitlines()]
    assert [one["resps"][0][0].strip() for one in kept] == [text.strip() for text in said]


def test_kept_answers_give_standard_errors_and_captions_a_perplexity(world, monkeypatch, capsys):
    """Our own tasks through the command: an ordinary mean, and a text task that is no VQA benchmark."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    documents = [{"question": "Is it red?", "answer": "yes", "category": "random", "image": "../../0.png"}]
    (world / "data" / "pope").mkdir(parents=True)
    (world / "data" / "pope" / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    monkeypatch.setenv("UNITOK_DATA", str(world / "data"))
    out = world / "ours.json"
    command = ["lm-eval", "--model_args", f"pretrained={world / 'model'}", "--device", "cpu", "--limit", "4"]
    more = [
        "--tasks",
        "unitok_shapes,unitok_shapes_text,unitok_pope",
        "--log_samples",
        "--output_path",
        str(world / "ours"),
    ]
    more += ["--gen_kwargs", "max_gen_toks=4", "--seed", "7"]
    assert main([*command, *more, "--out", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    vqa, text = runs["unitok_shapes"], runs["unitok_shapes_text"]
    assert vqa["benchmark"] == "shapes" and vqa["metrics"][0]["n"] == 4
    assert vqa["metrics"][0]["standard_error"] is not None
    values = {row["metric"]: row["value"] for row in text["metrics"]}
    assert values["word_perplexity"] > values["byte_perplexity"] > 1
    assert text["protocol"]["generation"] is None and vqa["protocol"]["answers"] == 4
    assert vqa["protocol"]["embedder_cache"] == "consistent" and text["protocol"]["embedder_cache"] is None
    assert runs["unitok_pope"]["protocol"]["documents"] == documents_hash("pope", documents)
    assert vqa["seeds"] == text["seeds"] == [7], "of --seed"
    assert main(["report", str(out), str(next((world / "ours").rglob("results_*.json")))]) == 0
    samples = next((world / "ours").rglob("samples_unitok_shapes_2*.jsonl"))
    again = world / "again.json"
    model = ["--model", str(world / "model")]
    assert main(["eval", "rescore", str(samples), *model, "--out", str(again)]) == 0
    assert main(["report", str(out), str(again)]) == 0, "re-scored answers have the protocol of the run that gave them"
    assert "shapes_text" in capsys.readouterr().out


def test_kept_answers_are_those_of_their_model(world, monkeypatch):
    """lm-eval's cache knows the rank alone; and its results may have a name of their own."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    other = shutil.copytree(world / "model", world / "other")
    state = load_file(other / "model.safetensors")
    state["lm_head.weight"] = -state["lm_head.weight"]
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    kept = []
    for model in ("model", "other", "model"):
        command = ["lm-eval", "--model_args", f"pretrained={world / model}", "--device", "cpu", "--limit", "3"]
        command += ["--tasks", "unitok_shapes", "--use_cache", str(world / "cache"), "--gen_kwargs", "max_gen_toks=4"]
        named = world / f"{model}-{len(kept)}.json"
        assert main([*command, "--output_path", str(named), "--log_samples", "--out", str(world / "runs.json")]) == 0
        assert json.loads((world / "runs.json").read_text())["runs"]["unitok_shapes"]["metrics"][0]["n"] == 3
        answers = next(
            world.glob(f"**/samples_unitok_shapes_{date_of(next(world.glob(f'{named.stem}_*.json')))}.jsonl")
        )
        kept.append([json.loads(line)["resps"] for line in answers.read_text().splitlines()])
    assert kept[0] == kept[2] != kept[1] and len(list(world.glob("cache-*"))) == 2
    with pytest.raises(UserError, match="lm-eval wrote no results into"):
        _write_runs(world / "nothing", time.time() + 60, "out.json")


def test_an_unknown_task_is_one_line(capsys):
    assert main(["lm-eval", "--tasks", "nonsense", "--model_args", "pretrained=x"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("unitok: error: Tasks not found: nonsense")


def test_the_command_lists_missing_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UNITOK_DATA", str(tmp_path))
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "data.jsonl").touch()
    assert main(["lm-eval", "--dry-run", "--tasks", "unitok_pope,unitok_mme"]) == 0
    shown = capsys.readouterr().out
    assert "unitok_pope  there" in shown and "hf download lmms-lab/MME --repo-type dataset" in shown
    assert "vqav2" not in shown
