"""Models that only understand: codes, quantized or continuous features, shards with latents, and their refusals."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from stages import COMMON, SOURCE, mllm_values, plain_steps, task_of
from tiny import make_tokenizer, random_pixels

from unitok.cli import main
from unitok.core.errors import ConfigError, DataError, UserError
from unitok.data.codes import LATENT_WIDTH, CodeSource, write_codes
from unitok.data.source import open_source
from unitok.data.transforms import eval_transform
from unitok.mllm.pipeline import UniTokPipeline
from unitok.tokenizer import UniTok

READING = "data.mixture={text_to_image: 0, caption: 1, chat: 1}"
OWN = "model={visual_width: 24, visual_num_heads: 2, visual_mlp_ratio: 1.5}"  # as in the tiny visual tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mllm.yaml` with what it names, and the same codes with latents beside them, made by the command."""
    folder = tmp_path_factory.mktemp("visual")
    (folder / "mllm.yaml").write_text(yaml.safe_dump(COMMON | mllm_values(folder) | {"output_dir": "unset"}))
    arguments = ["--tokenizer", str(folder / "visual"), "--shards", SOURCE, "--out", str(folder / "latents")]
    assert main(["data", "codes", *arguments, "--latents"]) == 0
    return folder


@pytest.mark.parametrize("quantizer", ["multi_codebook", "residual"])
def test_latents_are_what_is_quantized(quantizer: Any) -> None:
    sizes = {} if quantizer == "multi_codebook" else {"quantizer": "residual", "code_dim": 12}
    tokenizer = make_tokenizer(**sizes)
    pixels = random_pixels(3, 3, 32, 32)
    latents = tokenizer.latents(pixels)
    assert latents.shape == (3, 4, tokenizer.config.code_width) and latents.dtype == torch.float32
    assert torch.equal(tokenizer.quantizer.encode(latents), tokenizer.encode(pixels))
    parts = latents.unflatten(-1, (-1, tokenizer.config.code_dim))
    torch.testing.assert_close(parts.norm(dim=-1), torch.ones(parts.shape[:-1]))


def test_shards_with_latents(folder: Path) -> None:
    """The same codes as without; latents are read on demand and rounded to fp16."""
    plain, source = CodeSource(folder / "codes"), CodeSource(folder / "latents")
    assert source[7].latents is None and LATENT_WIDTH not in plain.header
    source.read_latents()
    tokenizer, images = UniTok.from_pretrained(folder / "visual").eval(), open_source(SOURCE)
    for index in (0, 7):
        assert torch.equal(source[index].codes, plain[index].codes)
        pixels = eval_transform(images[index].image, 32, tokenizer.config.preprocess)[None]
        expected = tokenizer.latents(pixels)[0]
        assert source[index].latents.dtype == torch.float16
        torch.testing.assert_close(source[index].latents.float(), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(DataError, match="codes without latents; encode the images again with unitok data codes --lat"):
        plain.read_latents()


@pytest.mark.parametrize("damage", ["shape", "infinite", "absent"])
def test_latents_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    source = CodeSource(folder / "latents")
    source.read_latents()
    sample = source[0]
    if damage == "shape":
        sample.latents = sample.latents[:, 1:]
    elif damage == "infinite":
        sample.latents[0, 0] = float("inf")
    else:
        sample.latents = None
    with pytest.raises(DataError, match=r"latents of train-0-000000 are float16 .*expected finite float16 \[L, C\] = "):
        write_codes([sample], tmp_path / "codes", source.header)
    reader, read = source.reader, source.reader.read
    broken = io.BytesIO()
    np.save(broken, np.zeros((4, 11), dtype=np.float16))
    reader.read = lambda index, names=None: read(index, names) | {"latents.npy": broken.getvalue()}
    with pytest.raises(DataError, match=r"float16 \(4, 11\); expected"):
        source[0]


def understanding(folder: Path, out: Path, visual_input: str, *more: str) -> Any:
    codes = folder / ("latents" if visual_input == "continuous" else "codes")
    options = [OWN, f"model.visual_input={visual_input}", f"data.codes={codes}", READING]
    return task_of(folder, out, *options, "recipe=llava_sft", *more)


@pytest.mark.parametrize("visual_input", ["codes", "quantized", "continuous"])
def test_a_model_reads_what_it_was_made_for(folder: Path, tmp_path: Path, visual_input: str) -> None:
    """Its features are the tokenizer's own; it trains by both recipes, is exported, answers, and does not draw."""
    task = understanding(folder, tmp_path, visual_input, "data.pack=true")
    tokenizer = task.visual
    fresh = task.build()["mllm"].module.model
    pixels = random_pixels(2, 3, 32, 32)
    latents, codes = tokenizer.latents(pixels), tokenizer.encode(pixels)
    given = latents.transpose(1, 2) if visual_input == "continuous" else codes
    vectors = latents if visual_input == "continuous" else tokenizer.code_vectors(codes)
    own = fresh.embedder.mlp(tokenizer.post_quant_proj(vectors))
    assert torch.allclose(fresh.embed_codes(given), own, atol=1e-6) == (visual_input != "codes")  # those are causal
    before = {name: value.clone() for name, value in fresh.embedder.state_dict().items()}
    model, log = plain_steps(task)
    after = model.embedder.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if name.startswith("mlp.")} and log[1]["text"] > 0

    module = torch.nn.Module()
    module.model = model
    task.export({"mllm": module}, tmp_path / "export")
    pipeline = UniTokPipeline.from_pretrained(tmp_path / "export")
    image = open_source(SOURCE)[0].image
    seen = []
    pipeline.model.embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert isinstance(pipeline.answer([image], ["what color is it?"])[0], str)
    assert seen[0].is_floating_point() == (visual_input == "continuous")
    if visual_input != "codes":
        with pytest.raises(UserError, match=f"only understands images \\(visual_input={visual_input}\\)"):
            pipeline.generate_images("a red circle")


def test_what_it_cannot_read_or_learn_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="codes without latents"):
        understanding(folder, tmp_path, "continuous", f"data.codes={folder / 'codes'}").build()
    options = [OWN, "model.visual_input=quantized"]
    with pytest.raises(ConfigError, match="visual_input=quantized is for understanding alone, but data.mixture"):
        task_of(folder, tmp_path, *options).build()
    with pytest.raises(DataError, match="visual_input=quantized reads the visual tokenizer's own projection"):
        understanding(folder, tmp_path, "quantized", "model.visual_width=48").build()
    task = understanding(folder, tmp_path, "continuous")
    model = task.build()["mllm"].module.model
    with pytest.raises(DataError, match=r"torch.int64 of shape \[1, 3, 4\]: .*visual_input=continuous reads"):
        model.embed_codes(torch.zeros(1, 3, 4, dtype=torch.long))


def test_documents_beside_latents(folder: Path, tmp_path: Path) -> None:
    """A batch may hold both, or documents alone."""
    (tmp_path / "texts.txt").write_text("a red circle\nand a blue square\n")
    mixture = "data.mixture={text_to_image: 0, caption: 0, plain: 1, chat: 0, text: 1}"
    task = understanding(folder, tmp_path, "continuous", mixture, f"data.texts=[{tmp_path / 'texts.txt'}]")
    _, log = plain_steps(task)
    assert all(record["samples_text"] > 0 and record["samples_plain"] > 0 for record in log)
    texts = [index for index in range(48) if task.text_order.turn(index, 0)]
    batch = task.load_batch(texts[:2], 0)
    assert batch["codes"].shape == (0, task.visual.config.code_width, 4) and batch["codes"].dtype == torch.float16
