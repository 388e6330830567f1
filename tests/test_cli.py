"""Every command on a tiny run of both stages."""

import json

import pytest
from PIL import Image
from tiny_runs import TINY_MODEL, model_of, tokenizer_of

from unitok.cli import build_parser, main


def test_run_folder_holds_what_is_promised(tiny_run):
    for stage in ("tokenizer", "mllm"):
        assert (tiny_run / stage / "config.yaml").is_file()
        lines = [json.loads(line) for line in (tiny_run / stage / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert (tiny_run / stage / "checkpoints" / "step_2").is_dir()
    export = tiny_run / "mllm" / "export"
    for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.model"):
        assert (export / name).is_file()
    assert (export / "visual_tokenizer" / "model.safetensors").is_file()


def test_generate_is_a_function_of_prompt_and_seed(tiny_run, capsys):
    command = ["generate", "a photo of a circle", *model_of(tiny_run), "--seed", "3", "--guidance", "2"]
    assert main([*command, "--out", str(tiny_run / "a.png")]) == 0
    assert main([*command, "--num", "2", "--out", str(tiny_run / "several")]) == 0
    images = sorted((tiny_run / "several").glob("*.png"))
    assert len(images) == 2
    assert images[0].read_bytes() == (tiny_run / "a.png").read_bytes()
    assert str(tiny_run / "a.png") in capsys.readouterr().out


def test_generate_from_file(tiny_run):
    prompts, out = tiny_run / "prompts.txt", tiny_run / "file"
    prompts.write_text("a photo of a square\n\na photo of a triangle\n")
    assert main(["generate", "--from-file", str(prompts), *model_of(tiny_run), "--out", str(out)]) == 0
    assert len(list(out.glob("*.png"))) == 2


def test_chat_answers_a_question_and_holds_a_conversation(tiny_run, capsys, monkeypatch):
    question = ["chat", "what color is the circle?", "--image", str(tiny_run / "red.png"), *model_of(tiny_run)]
    assert main([*question, "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    lines = iter(["what color is it?", "", "what <image> is it?", "how many objects are there?"])

    def read(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--image", str(tiny_run / "red.png"), *model_of(tiny_run), "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.split("\n")) == 3  # two answers, each on its line
    assert "<image>" in printed.err  # a bad line does not end the conversation


def test_reconstruct(tiny_run):
    images = [str(tiny_run / "red.png"), str(tiny_run / "blue.jpg")]
    assert main(["reconstruct", *images, *tokenizer_of(tiny_run), "--out", str(tiny_run / "back")]) == 0
    assert {path.name for path in (tiny_run / "back").iterdir()} == {"red_pair.png", "blue_pair.png"}
    for path in (tiny_run / "back").glob("*.png"):
        assert Image.open(path).size == (32 + 2 + 32, 32)


@pytest.mark.parametrize("kind", ["reconstruction", "retrieval", "vqa"])
def test_eval_on_a_source(tiny_run, kind, capsys):
    where = tokenizer_of(tiny_run) if kind in ("reconstruction", "retrieval") else model_of(tiny_run)
    out = tiny_run / f"{kind}.json"
    source = ["--source", "shapes:val?num=6&size=32", "--limit", "5", "--out", str(out)]
    assert main(["eval", kind, *where, *source]) == 0
    figures = json.loads(out.read_text())
    assert figures["protocol"]["what"] == kind
    assert "figure" in capsys.readouterr().out


def test_eval_geneval_writes_the_official_folder(tiny_run):
    out = tiny_run / "geneval.json"
    images = ["--images", str(tiny_run / "drawn"), "--samples", "1", "--limit", "6", "--out", str(out)]
    assert main(["eval", "geneval", *model_of(tiny_run), *images]) == 0
    assert 0 <= json.loads(out.read_text())["overall"] <= 1
    assert (tiny_run / "drawn" / "00000" / "samples" / "00000.png").is_file()


def test_dry_run_measures_nothing(tiny_run, capsys):
    assert main(["eval", "vqa", "--model", "nowhere", "--dry-run"]) == 0
    assert "would measure" in capsys.readouterr().out


def test_data_commands(tiny_run, capsys):
    assert main(["data", "shapes", "--out", str(tiny_run / "shards"), "--num", "5", "--size", "32"]) == 0
    assert main(["data", "check", str(tiny_run / "shards")]) == 0
    assert "5" in capsys.readouterr().out
    (tiny_run / "images" / "broken.png").write_bytes(b"no image")
    assert main(["data", "check", str(tiny_run / "images")]) == 1
    assert "broken" in capsys.readouterr().out
    (tiny_run / "images" / "broken.png").unlink()


def test_a_new_run_trains_its_text_model_anew(tiny_run, tmp_path):
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


def test_every_command_has_help():
    parser = build_parser()
    subparsers = [action for action in parser._actions if hasattr(action, "choices") and action.choices]
    for name, command in subparsers[0].choices.items():
        assert len(command.format_help()) > 100, name
        assert command.format_help().startswith("usage: unitok")


def test_train_on_a_pretrained_backbone_and_conversations_alone(tiny_run, tmp_path, capsys):
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
    record = json.dumps({"image": str(tiny_run / "red.png"), "conversations": talk})
    (tmp_path / "talks.jsonl").write_text(f"{record}\n" * 4)
    export, codes = tiny_run / "tokenizer" / "export", tmp_path / "codes"
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


def test_out_may_be_a_folder_with_a_dot(tiny_run, tmp_path):
    folder = tmp_path / "v1.0"
    out = ["--out", str(folder)]
    assert main(["generate", "a photo of a circle", "a photo of a square", *model_of(tiny_run), *out]) == 0
    assert len(list(folder.glob("*.png"))) == 2
    assert main(["reconstruct", str(tiny_run / "red.png"), *tokenizer_of(tiny_run), *out]) == 0
    assert len(list(folder.glob("*.png"))) == 3


def test_auto_classes_know_an_export(tiny_run):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import unitok.mllm
    from unitok.mllm.processor import UniTokTextTokenizer

    export = tiny_run / "mllm" / "export"
    assert isinstance(AutoConfig.from_pretrained(export), unitok.mllm.UniTokMLLMConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(export), unitok.mllm.UniTokMLLM)
    text = AutoTokenizer.from_pretrained(export)
    assert isinstance(text, UniTokTextTokenizer)
    assert text.decode(text("a photo of a circle", add_special_tokens=False)["input_ids"]) == "a photo of a circle"
