"""Every command on a tiny run of both stages, and one clear line with exit code 2 for what a user can get wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from unitok.cli import build_parser, main

ROOT = Path(__file__).resolve().parent.parent
TINY_TOKENIZER = [
    "steps=2",
    "log_every=1",
    "engine.micro_batch_size=4",
    "model.image_size=32",
    "model.stage_widths=[8, 8]",
    "model.width=24",
    "model.num_heads=2",
    "model.depth=1",
    "model.num_codebooks=3",
    "model.codebook_size=16",
    "model.stage_depths=[1, 1]",
    "model.decoder_stage_depths=[1, 1]",
    "discriminator.start_step=1",
]
TINY_MODEL = [
    "steps=2",
    "log_every=1",
    "engine.micro_batch_size=4",
    "model.visual_width=24",
    "model.visual_num_heads=2",
    "model.depth_width=24",
    "model.depth_num_heads=2",
    "backbone.config={hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}",
]

PLACES = ["tokenizer=TOKENIZER", "data.codes=RUN/codes"]
STAGE_TWO = ["--config", "mllm/shapes.yaml", *PLACES, *TINY_MODEL]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with shapes as image files, both stages trained for two steps, and two pictures to use."""
    folder = tmp_path_factory.mktemp("cli")
    data = folder / "images"
    data.mkdir()
    from unitok.data.source import open_source

    source = open_source("shapes:train?num=8&size=32")
    for index in range(len(source)):
        sample = source[index]
        sample.image.save(data / f"{sample.key}.png")
        (data / f"{sample.key}.txt").write_text("\n".join(sample.captions))
        questions = [question._asdict() for question in sample.questions]
        (data / f"{sample.key}.json").write_text(json.dumps({"questions": questions}))
    tokenizer = [f"output_dir={folder / 'tokenizer'}", f"data.source={data}", *TINY_TOKENIZER]
    assert main(["train", "tokenizer", "--config", "configs/tokenizer/shapes.yaml", *tokenizer]) == 0
    export, codes = str(folder / "tokenizer" / "export"), str(folder / "codes")
    assert main(["data", "codes", "--tokenizer", export, "--shards", str(data), "--out", codes]) == 0
    model = [f"output_dir={folder / 'mllm'}", f"tokenizer={export}", f"data.codes={codes}", *TINY_MODEL]
    assert main(["train", "mllm", "--config", "configs/mllm/shapes.yaml", *model]) == 0
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    Image.new("RGB", (32, 32), "blue").save(folder / "blue.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


def model_of(run: Path) -> list[str]:
    return ["--model", str(run / "mllm" / "export")]


def tokenizer_of(run: Path) -> list[str]:
    return ["--tokenizer", str(run / "tokenizer" / "export")]


def test_run_folder_holds_what_is_promised(run):
    for stage in ("tokenizer", "mllm"):
        assert (run / stage / "config.yaml").is_file()
        lines = [json.loads(line) for line in (run / stage / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert (run / stage / "checkpoints" / "step_2").is_dir()
    export = run / "mllm" / "export"
    for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.model"):
        assert (export / name).is_file()
    assert (export / "visual_tokenizer" / "model.safetensors").is_file()


def test_generate_is_a_function_of_prompt_and_seed(run, capsys):
    command = ["generate", "a photo of a circle", *model_of(run), "--seed", "3", "--guidance", "2"]
    assert main([*command, "--out", str(run / "a.png")]) == 0
    assert main([*command, "--num", "2", "--out", str(run / "several")]) == 0
    images = sorted((run / "several").glob("*.png"))
    assert len(images) == 2
    assert images[0].read_bytes() == (run / "a.png").read_bytes()
    assert str(run / "a.png") in capsys.readouterr().out


def test_generate_from_file(run):
    (run / "prompts.txt").write_text("a photo of a square\n\na photo of a triangle\n")
    assert main(["generate", "--from-file", str(run / "prompts.txt"), *model_of(run), "--out", str(run / "file")]) == 0
    assert len(list((run / "file").glob("*.png"))) == 2


def test_chat_answers_a_question_and_holds_a_conversation(run, capsys, monkeypatch):
    question = ["chat", "what color is the circle?", "--image", str(run / "red.png"), *model_of(run)]
    assert main([*question, "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    lines = iter(["what color is it?", "", "what <image> is it?", "how many objects are there?"])

    def read(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--image", str(run / "red.png"), *model_of(run), "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.split("\n")) == 3  # two answers, each on its line
    assert "<image>" in printed.err  # a bad line does not end the conversation


def test_reconstruct(run):
    images = [str(run / "red.png"), str(run / "blue.jpg")]
    assert main(["reconstruct", *images, *tokenizer_of(run), "--out", str(run / "back")]) == 0
    assert {path.name for path in (run / "back").iterdir()} == {"red_pair.png", "blue_pair.png"}
    for path in (run / "back").glob("*.png"):
        assert Image.open(path).size == (32 + 2 + 32, 32)


@pytest.mark.parametrize("kind", ["reconstruction", "retrieval", "vqa"])
def test_eval_on_a_source(run, kind, capsys):
    where = tokenizer_of(run) if kind in ("reconstruction", "retrieval") else model_of(run)
    out = run / f"{kind}.json"
    source = ["--source", "shapes:val?num=6&size=32", "--limit", "5", "--out", str(out)]
    assert main(["eval", kind, *where, *source]) == 0
    figures = json.loads(out.read_text())
    assert figures["protocol"]["what"] == kind
    assert "figure" in capsys.readouterr().out


def test_eval_geneval_writes_the_official_folder(run):
    out = run / "geneval.json"
    images = ["--images", str(run / "drawn"), "--samples", "1", "--limit", "6", "--out", str(out)]
    assert main(["eval", "geneval", *model_of(run), *images]) == 0
    assert 0 <= json.loads(out.read_text())["overall"] <= 1
    assert (run / "drawn" / "00000" / "samples" / "00000.png").is_file()


def test_dry_run_measures_nothing(run, capsys):
    assert main(["eval", "vqa", "--model", "nowhere", "--dry-run"]) == 0
    assert "would measure" in capsys.readouterr().out


def test_data_commands(run, capsys):
    assert main(["data", "shapes", "--out", str(run / "shards"), "--num", "5", "--size", "32"]) == 0
    assert main(["data", "check", str(run / "shards")]) == 0
    assert "5" in capsys.readouterr().out
    (run / "images" / "broken.png").write_bytes(b"no image")
    assert main(["data", "check", str(run / "images")]) == 1
    assert "broken" in capsys.readouterr().out
    (run / "images" / "broken.png").unlink()


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["generate", "", "--model", "MODEL"], "empty prompt"),
        (["generate", "--model", "MODEL"], "no prompt"),
        (["generate", "a circle", "--model", "RUN/nowhere"], "nowhere"),
        (["generate", "a circle", "--model", "RUN/tokenizer/export"], "unitok_mllm"),
        (["generate", "a circle", "--model", "MODEL", "--out", "RUN/x.gif"], "x.gif"),
        (["generate", "a circle", "--model", "MODEL", "--num", "0"], "--num"),
        (["generate", "a circle", "--model", "MODEL", "--temperature", "0"], "temperature"),
        (["generate", "a circle", "--model", "MODEL", "--depth-temperature", "-1"], "--depth-temperature -1"),
        (["generate", "--from-file", "RUN/absent.txt", "--model", "MODEL"], "absent.txt"),
        (["chat", "what?", "--image", "RUN/absent.png", "--model", "MODEL"], "absent.png"),
        (["chat", "what?", "--image", "RUN/notes.txt", "--model", "MODEL"], "notes.txt"),
        (["chat", " ", "--model", "MODEL"], "empty question"),
        (["reconstruct", "RUN/absent.png", "--tokenizer", "TOKENIZER"], "absent.png"),
        (["reconstruct", "RUN/red.png", "--tokenizer", "MODEL"], "unitok_mllm"),
        (["eval", "reconstruction", "--tokenizer", "TOKENIZER", "--source", "RUN/nothing"], "nothing"),
        (["eval", "vqa", "--model", "MODEL", "--limit", "0"], "--limit"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "optimiser.lr=1"], "optimizer"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "steps=many"], "steps"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.code_dim=5"], "code_dim"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.codebook_size=1"], "codebook_size"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.image_size=65"], "image_size"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.text_tower.widht=8"], "text_tower.width"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.text_tower.heads=7"], "heads=7"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.stage_depths=[1]"], "stage_depths"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "loss.l1=-1"], "loss.l1"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "ema_decay=1.5"], "ema_decay"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "optimizer.betas=[0.9,1.0]"], "betas"),
        (
            ["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "discriminator.optimizer.start_step=7"],
            "discriminator.start_step",
        ),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.text_tower.context_length=1"], "context_l"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.num_query_tokens=-1"], "num_query_tokens"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.mlp_ratio=0"], "mlp_ratio=0"),
        (["train", "mllm", "--config", "mllm/shapes.yaml", "backbone.text_vocab_size=-5"], "text_vocab_size"),
        (
            ["train", "mllm", "--config", "mllm/shapes.yaml", "data.mixture={text_to_image: 0, caption: 0, chat: 0}"],
            "all 0",
        ),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "model.entropy_temperature=0"], "entropy_temp"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "steps=!!int x"], "steps"),
        (["train", "mllm", *STAGE_TWO, "backbone.path=/nowhere/llama"], "backbone.path=/nowhere/llama"),
        (["train", "mllm", *STAGE_TWO, "backbone.config.model_type=nollama"], "nollama"),
        (["train", "mllm", *STAGE_TWO, "backbone.config.hidden_size=x"], "backbone.config"),
        (["train", "mllm", *STAGE_TWO, "backbone.config.hidden_size=33"], "backbone.config"),
        (["train", "mllm", *STAGE_TWO, "backbone.config.hidden_act=foo"], "foo"),
        (["train", "mllm", *STAGE_TWO, "backbone.config.num_key_value_heads=3"], "num_key_value_heads=3"),
        (["data", "shapes", "--size", "16", "--out", "RUN/small"], "16"),
        (["train", "tokenizer", "--config", "RUN/absent.yaml"], "absent.yaml"),
        (["train", "tokenizer", "--config", "tokenizer/shapes.yaml", "eval_every=5", *TINY_TOKENIZER], "eval_every"),
        (["train", "mllm", "--config", "mllm/shapes.yaml", "loss_normalisation=mean"], "loss_normalisation"),
        (["train", "mllm", "--config", "mllm/shapes.yaml", "data.mixture.chat=-0.1"], "data.mixture.chat"),
        (["train", "mllm", "--config", "mllm/shapes.yaml", "sampler.top_p=0"], "sampler.top_p"),
        (["generate", "a <boi> circle", "--model", "MODEL"], "<boi>"),
        (["chat", "what? <image>", "--model", "MODEL"], "<image>"),
        (["train", "mllm", "--config", "mllm/shapes.yaml", "tokenizer=RUN/nowhere"], "nowhere"),
        (["data", "codes", "--tokenizer", "RUN/nowhere", "--shards", "RUN/images", "--out", "RUN/c"], "nowhere"),
        (["data", "check", "RUN/nothing"], "nothing"),
        (["report", "RUN/nothing"], "nothing"),
        (["paint"], "paint"),
        (["reconstruct", "RUN/red.png", "--tokenizer", "TOKENIZER", "--out", "RUN/notes.txt/x.png"], "notes.txt"),
        (["eval", "geneval", "--model", "MODEL", "--limit", "0"], "--limit"),
        (["eval", "vqa", "--model", "MODEL", "--batch-size", "0"], "--batch-size"),
        (["chat", "what?", "--model", "MODEL", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "a circle", "--model", "MODEL", "--guidance", "nan"], "guidance_scale"),
        (["generate", "a circle", "--seed", "x"], "--seed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, command, named, capsys):
    places = {"RUN": run, "MODEL": run / "mllm" / "export", "TOKENIZER": run / "tokenizer" / "export"}
    for place, path in places.items():
        command = [
            part.replace(place, str(path), 1)
            if part.startswith((place, f"tokenizer={place}", f"data.codes={place}"))
            else part
            for part in command
        ]
    overrides = [f"output_dir={run / 'mistake'}"] if command[0] == "train" else []
    capsys.readouterr()
    assert main([*command, *overrides]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("unitok: error: "), err
    assert named in err[0]
    assert "Traceback" not in err[0]


def test_damaged_weights_are_named(run, capsys):
    import shutil

    broken = run / "broken"
    shutil.copytree(run / "mllm" / "export", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["generate", "a circle", "--model", str(broken)]) == 2
    assert "broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"],
)
def test_damaged_files_of_an_export_are_named(run, tmp_path, name, capsys):
    import shutil

    broken = shutil.copytree(run / "mllm" / "export", tmp_path / "model")
    assert (broken / name).is_file()
    for content in ("", '{"a": ', "[1]"):
        (broken / name).write_text(content)
        assert main(["generate", "a circle", "--model", str(broken)]) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and name in err[0], err


def test_a_new_run_trains_its_text_model_anew(run, tmp_path):
    """What an earlier run left in the folder belongs to other texts; a resumed run keeps its own."""
    from unitok.data.sentencepieces import run_sentencepiece

    stale = tmp_path / "tokenizer.model"
    stale.write_bytes(b"cut sho")
    run_sentencepiece(tmp_path, stale.name, None, lambda: ["a photo of a circle", "two squares"], 60)
    fresh = stale.read_bytes()
    assert fresh != b"cut sho"

    def never() -> list[str]:
        raise AssertionError("a resumed run needs no texts")

    run_sentencepiece(tmp_path / "copy", stale.name, tmp_path, never, 60)
    assert (tmp_path / "copy" / stale.name).read_bytes() == fresh


def test_codes_of_another_tokenizer_are_refused(run, capsys):
    header = run / "codes" / "header.json"
    original = header.read_text()
    header.write_text(json.dumps(json.loads(original) | {"tokenizer": "0" * 16}))
    places = [f"output_dir={run / 'other'}", f"tokenizer={run / 'tokenizer' / 'export'}", f"data.codes={run / 'codes'}"]
    try:
        assert main(["train", "mllm", "--config", "mllm/shapes.yaml", *places, *TINY_MODEL]) == 2
    finally:
        header.write_text(original)
    assert "tokenizer" in capsys.readouterr().err


def test_every_command_has_help():
    parser = build_parser()
    subparsers = [action for action in parser._actions if hasattr(action, "choices") and action.choices]
    for name, command in subparsers[0].choices.items():
        assert len(command.format_help()) > 100, name
        assert command.format_help().startswith("usage: unitok")


def test_train_on_a_pretrained_backbone_and_conversations_alone(run, tmp_path, capsys):
    """`backbone.path` with its own tokenizer, on a JSONL file that holds no caption: only answers are learnt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from unitok.core.pretrained import load_model_folder
    from unitok.core.runlog import read_log
    from unitok.mllm import UniTokMLLM

    words = ["<unk>", "<s>", "</s>", "what", "is", "it", "?", "red", "USER", "ASSISTANT", ":"]
    plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes))
    for one in (own, backbone):
        one.save_pretrained(tmp_path / "llama")
    talk = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "red"}]
    record = json.dumps({"image": str(run / "red.png"), "conversations": talk})
    (tmp_path / "talks.jsonl").write_text(f"{record}\n" * 4)
    export, codes = run / "tokenizer" / "export", tmp_path / "codes"
    shards = ["--shards", str(tmp_path / "talks.jsonl"), "--out", str(codes)]
    assert main(["data", "codes", "--tokenizer", str(export), *shards]) == 0
    train = ["train", "mllm", "--config", "mllm/shapes.yaml", *TINY_MODEL[:-1], f"tokenizer={export}"]
    train += [f"data.codes={codes}", f"output_dir={tmp_path / 'out'}", f"backbone.path={tmp_path / 'llama'}"]
    assert main([*train, "backbone.config={hidden_size: 8}"]) == 2
    assert "backbone.config" in capsys.readouterr().err
    assert main([*train, "backbone.config={}", "optimizer.lr=0"]) == 0
    log = read_log(tmp_path / "out" / "log.jsonl")
    assert len(log) == 2 and all(record["text"] > 0 and "image" not in record for record in log)
    model = load_model_folder(UniTokMLLM, tmp_path / "out" / "export")
    assert model.config.text_config.vocab_size == len(words) + 3 + 0  # the three marks; no pad: it is the end
    kept = model.backbone.embed_tokens.weight[: len(words)]
    assert kept.equal(backbone.model.embed_tokens.weight), "the pretrained embeddings were not taken"


@pytest.mark.slow
def test_quick_demo_writes_everything_and_goes_on_after_a_stop(tmp_path):
    """`unitok demo --quick`: stopped in its first stage, then run to the end."""
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "unitok", "demo", "--quick", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "was stopped; the same command goes on" in rest, rest
    assert [path.name for path in (out / "tokenizer" / "checkpoints").iterdir()] != []
    assert not (out / "results.json").exists()
    spent = json.loads((out / "spent.json").read_text())["training"]["seconds"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "resuming tokenizer from" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert {"tokenizer", "vqa", "geneval", "wall_seconds", "peak_memory_mb"} <= results.keys()
    assert results["wall_seconds"] > spent > 0
    assert (out / "model" / "config.json").is_file() and (out / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_wheel_generates_and_trains_from_another_folder(run, tmp_path):
    """The wheel with the libraries that it names, in an empty environment: nothing of this one is on its path."""
    own = ROOT / ".venv-uv" / "bin" / "uv"
    uv = str(own) if own.is_file() else shutil.which("uv")
    assert uv is not None, "needs uv to build and install the wheel: `make setup` puts it into .venv-uv"

    def do(*command: str) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=clean, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    foreign = ("PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")
    clean = {name: value for name, value in os.environ.items() if name not in foreign} | {"OMP_NUM_THREADS": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would put what lies there into the wheel
    do(uv, "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), str(ROOT))
    versions = ["--frozen", "--no-default-groups", "--no-emit-project", "--no-hashes", "--project", str(ROOT)]
    do(uv, "export", "--quiet", *versions, "--output-file", str(tmp_path / "versions.txt"))
    do(uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "env"))
    python, unitok = (str(tmp_path / "env" / "bin" / name) for name in ("python", "unitok"))
    wheel = str(next(tmp_path.glob("unitok-*.whl")))
    do(uv, "pip", "install", "--quiet", "--python", python, "--constraint", str(tmp_path / "versions.txt"), wheel)
    where = do(python, "-c", "import sys, unitok.tokenizer as t; print(t.__file__, *sys.path)").split()
    assert str(tmp_path / "env") in where[0] and str(ROOT) not in " ".join(where)
    do(unitok, "generate", "a photo of a circle", *model_of(run), "--out", "circle.png")
    assert (elsewhere / "circle.png").is_file()
    data = ["data.source=shapes:train?num=8&size=32", "output_dir=trained"]
    do(unitok, "train", "tokenizer", "--config", "tokenizer/shapes.yaml", *data, *TINY_TOKENIZER)
    assert (elsewhere / "trained" / "export" / "model.safetensors").is_file()
    places = ["output_dir=mllm", f"tokenizer={run / 'tokenizer' / 'export'}", f"data.codes={run / 'codes'}"]
    do(unitok, "train", "mllm", "--config", "mllm/shapes.yaml", *places, *TINY_MODEL)
    assert (elsewhere / "mllm" / "export" / "model.safetensors").is_file()


def test_out_may_be_a_folder_with_a_dot(run, tmp_path):
    folder = tmp_path / "v1.0"
    prompts = ["generate", "a photo of a circle", "a photo of a square", *model_of(run)]
    assert main([*prompts, "--out", str(folder)]) == 0
    assert len(list(folder.glob("*.png"))) == 2
    assert (
        main(
            [
                "reconstruct",
                str(run / "red.png"),
                "--tokenizer",
                str(run / "tokenizer" / "export"),
                "--out",
                str(folder),
            ]
        )
        == 0
    )
    assert len(list(folder.glob("*.png"))) == 3


def test_a_report_on_nonsense_is_refused(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"tokenizer": 3}')
    assert main(["report", str(tmp_path)]) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_auto_classes_know_an_export(run):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import unitok.mllm
    from unitok.mllm.processor import UniTokTextTokenizer

    export = run / "mllm" / "export"
    assert isinstance(AutoConfig.from_pretrained(export), unitok.mllm.UniTokMLLMConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(export), unitok.mllm.UniTokMLLM)
    text = AutoTokenizer.from_pretrained(export)
    assert isinstance(text, UniTokTextTokenizer)
    assert text.decode(text("a photo of a circle", add_special_tokens=False)["input_ids"]) == "a photo of a circle"
