"""What a user can get wrong: one clear line, and exit code 2."""

import json
import shutil

import pytest
from tiny_runs import TINY_MODEL, TINY_TOKENIZER

from unitok.cli import main

PLACES = ["tokenizer=TOKENIZER", "data.codes=RUN/codes"]
STAGE_TWO = ["--config", "mllm/shapes.yaml", *PLACES, *TINY_MODEL]


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
def test_a_mistake_is_one_line_and_exit_code_2(tiny_run, command, named, capsys):
    places = {"RUN": tiny_run, "MODEL": tiny_run / "mllm" / "export", "TOKENIZER": tiny_run / "tokenizer" / "export"}
    for place, path in places.items():
        command = [
            part.replace(place, str(path), 1)
            if part.startswith((place, f"tokenizer={place}", f"data.codes={place}"))
            else part
            for part in command
        ]
    overrides = [f"output_dir={tiny_run / 'mistake'}"] if command[0] == "train" else []
    capsys.readouterr()
    assert main([*command, *overrides]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("unitok: error: "), err
    assert named in err[0]
    assert "Traceback" not in err[0]


def test_damaged_weights_are_named(tiny_run, capsys):
    broken = tiny_run / "broken"
    shutil.copytree(tiny_run / "mllm" / "export", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["generate", "a circle", "--model", str(broken)]) == 2
    assert "broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"],
)
def test_damaged_files_of_an_export_are_named(tiny_run, tmp_path, name, capsys):
    broken = shutil.copytree(tiny_run / "mllm" / "export", tmp_path / "model")
    assert (broken / name).is_file()
    for content in ("", '{"a": ', "[1]"):
        (broken / name).write_text(content)
        assert main(["generate", "a circle", "--model", str(broken)]) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and name in err[0], err


def test_codes_of_another_tokenizer_are_refused(tiny_run, capsys):
    header = tiny_run / "codes" / "header.json"
    original = header.read_text()
    header.write_text(json.dumps(json.loads(original) | {"tokenizer": "0" * 16}))
    export, codes = tiny_run / "tokenizer" / "export", tiny_run / "codes"
    places = [f"output_dir={tiny_run / 'other'}", f"tokenizer={export}", f"data.codes={codes}"]
    try:
        assert main(["train", "mllm", "--config", "mllm/shapes.yaml", *places, *TINY_MODEL]) == 2
    finally:
        header.write_text(original)
    assert "tokenizer" in capsys.readouterr().err


def test_a_report_on_nonsense_is_refused(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"tokenizer": 3}')
    assert main(["report", str(tmp_path)]) == 2
    assert "tokenizer" in capsys.readouterr().err
