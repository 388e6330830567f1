"""A tiny run of both stages, made by the commands, and the settings that make a run tiny."""

import json
from pathlib import Path

from PIL import Image

from unitok.cli import main
from unitok.data.source import open_source

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


def make_run(folder: Path) -> Path:
    """A folder with shapes as image files, both stages trained for two steps, and two pictures to use."""
    data = folder / "images"
    data.mkdir()
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
