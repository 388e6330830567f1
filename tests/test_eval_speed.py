"""`unitok eval speed tokenizer`: FLOPs against hand counts, figures of a tiny run, errors."""

import argparse
import json
import math

import pytest
import torch
from tiny import figures_of, make_tokenizer, tokenizer_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unitok.cli import _Parser
from unitok.commands import speed
from unitok.core.config import load_config
from unitok.core.errors import ConfigError, UserError
from unitok.core.loop import train
from unitok.eval.flops import MeasuredTask, count_flops, inference_flops, peak_flops, random_batch, training_flops
from unitok.eval.speed import figures, measured_config, measured_run, training_step
from unitok.tokenizer import UniTok
from unitok.tokenizer.decoder import Upsample
from unitok.tokenizer.settings import model_config
from unitok.tokenizer.task import TokenizerTrainConfig

TINY = [
    "engine.micro_batch_size=3",
    "model.image_size=32",
    "model.stage_widths=[8, 8]",
    "model.width=24",
    "model.num_heads=2",
    "model.depth=1",
    "model.num_codebooks=3",
    "model.codebook_size=16",
    "model.stage_depths=[1, 1]",
    "model.decoder_stage_depths=[1, 1]",
]
CPU = torch.device("cpu")
ALL_LOSSES = [
    "loss.lpips=1",
    "loss.entropy=0.1",
    "distill.model=test_resnet",
    "discriminator.kind=dino",
    "discriminator.consistency=1",
]


def tiny_config(*overrides: str) -> TokenizerTrainConfig:
    return measured_config(load_config(TokenizerTrainConfig, "tokenizer/shapes.yaml", [*TINY, *overrides]))


def arguments(*options: str) -> argparse.Namespace:
    parser = _Parser()
    speed.add_speed_arguments(parser)
    return parser.parse_args(options)


# ---- FLOPs


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_encoder_block_is_its_linear_layers_and_attention(place):
    config = tokenizer_config()
    with torch.device(place):
        block = UniTok(config).encoder.blocks[0]
        x_BLC = torch.randn(5, 7, config.width)
    width, hidden, tokens = config.width, int(config.width * config.mlp_ratio), 5 * 7
    linear = 2 * tokens * (3 * width * width + width * width + 3 * width * hidden)  # qkv, projection, gated MLP
    attention = 2 * 2 * tokens * 7 * width  # scores and their use, over all heads
    assert count_flops(lambda: block(x_BLC)) == linear + attention


def test_upsample_counts_the_products_that_it_runs():
    layer, x_BCHW = Upsample(6, 10), torch.randn(2, 6, 5, 4)
    textbook = 2 * 2 * (10 * 8) * 9 * 6 * 10  # 3x3 on the doubled image
    assert count_flops(lambda: layer(x_BCHW)) == textbook * 4 // 9


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_backward_of_a_convolution_counts_twice_its_forward(groups):
    convolution, x_BCHW = nn.Conv2d(8, 16, 3, padding=1, groups=groups), torch.randn(2, 8, 6, 6, requires_grad=True)
    forward = 2 * 2 * 36 * 16 * (8 // groups) * 9
    assert count_flops(lambda: convolution(x_BCHW)) == forward
    assert count_flops(lambda: convolution(x_BCHW).sum().backward()) == 3 * forward
    assert count_flops(lambda: convolution(x_BCHW.detach()).sum().backward()) == 2 * forward


def test_backward_of_attention_counts_twice_its_forward():
    query, key, value = torch.randn(3, 2, 4, 6, 8, requires_grad=True).unbind(0)
    value = torch.randn(2, 4, 6, 8, requires_grad=True)
    forward = 2 * 2 * 4 * 6 * 6 * (8 + 8)
    attend = nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, key, value)) == forward
    assert count_flops(lambda: attend(query, key, value).sum().backward()) == 3 * forward


@pytest.mark.parametrize("changes", [{}, {"num_query_tokens": 2}, {"quantizer": "residual", "projection": "linear"}])
def test_inference_flops_are_those_of_the_cpu_and_linear_in_the_batch(changes):
    model = make_tokenizer(**changes)
    flops = inference_flops(model.config, 48)
    length = 9 + model.config.num_query_tokens
    codes_BKL = torch.zeros(3, model.config.num_codebooks, length, dtype=torch.long)
    for batch in (1, 3):
        pixels = torch.zeros(batch, 3, 48, 48)
        assert count_flops(lambda pixels=pixels: model.encode(pixels)) == batch * flops["encode"]
        assert count_flops(lambda batch=batch: model.decode(codes_BKL[:batch], (48, 48))) == batch * flops["decode"]
    with FlopCounterMode(display=False) as reference:  # torch's own count agrees on forward passes
        model.encode(pixels)
    assert reference.get_total_flops() == 3 * flops["encode"]
    if not changes:
        config = model.config
        assert flops["search"] == 2 * config.num_codebooks * config.codebook_size * config.code_dim


def test_training_flops_are_those_of_the_step_on_the_cpu():
    config = tiny_config(*ALL_LOSSES, "reconstruction_batch_size=2", "model.drop_path=0.1")
    assert training_flops(config) == training_flops(config, place="cpu") > 0
    assert torch.autocast.__name__ == "autocast"  # what counting needed is undone


def test_training_flops_are_three_times_those_of_what_is_trained():
    """Decoder-only fine-tuning: the frozen part once, the decoder three times; nothing that saves memory counts."""
    off = [
        "loss.contrastive=0",
        "discriminator.enabled=false",
        "trainable=decoder",
        "init_from=nowhere",
        "revive.every=0",
    ]
    config = tiny_config(*off)
    sizes = model_config(config.model)
    with torch.device("meta"):
        model, features_BLC = UniTok(sizes), torch.empty(1, sizes.num_positions, sizes.width)
    decoder = count_flops(lambda: model.decoder(features_BLC))
    forward, head = inference_flops(sizes, sizes.image_size), 2 * sizes.width * sizes.embed_dim
    expected = forward["encode"] + head + forward["decode"] + 2 * decoder
    for changes in ({}, {"gradient_checkpointing": True}, {"compile": True}):
        assert training_flops(config.model_copy(update=changes)) == expected


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_peak_by_gpu_name(name, bf16):
    assert peak_flops(name, "bf16") == bf16


def test_figures():
    found = figures("image", 8, 5e9, ([2.0, 1.0, 4.0], 3.0), peak=1e12)
    assert (found["images_per_second"], found["seconds"], found["gflop_per_second"]) == (4.0, 2.0, 20.0)
    assert found["mfu"] == 0.02 and found["gflop_per_image"] == 5.0


# ---- the command


def test_command_measures_a_configuration(tmp_path, capsys):
    out = tmp_path / "speed.json"
    options = ["--config", "tokenizer/shapes.yaml", "--batch-size", "2", "--repeats", "1", "--out", str(out)]
    found = arguments(*options, "--train-batch-size", "4", "--image-size", "48", "--device", "cpu", *TINY)
    assert speed.tokenizer(found) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:6]] == ["encode", "decode", "search", "train"]
    assert all(line.split()[-1] == "-" for line in table[2:6])  # no MFU on a CPU
    results = json.loads(out.read_text())
    for part, unit in (("encode", "image"), ("decode", "image"), ("search", "position"), ("train", "image")):
        for name, value in figures_of(results[part]):
            least_fits = value >= 0 if "memory" in name else value > 0
            assert math.isfinite(value) and least_fits, f"{part}{name} = {value}"
        assert f"{unit}s_per_second" in results[part] and results[part]["mfu"] is None
    assert results["search"]["positions_per_call"] == 2 * 9
    assert results["train"]["images_per_call"] == results["protocol"]["counts"]["train_batch_size"] == 4
    assert results["protocol"]["image_size"] == 48 and results["protocol"]["training"]["perceptual_weights"] is None


def test_command_measures_a_tokenizer_folder(tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--repeats", "1", "--batch-size", "2"]
    assert speed.tokenizer(arguments(*options, "--precision", "bf16", "--train-batch-size", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["encode", "decode", "search", "train"]
    assert speed.tokenizer(arguments(*options, "--no-train")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_training_needs_no_weights_of_others_and_writes_nothing(tmp_path):
    missing = ["loss.lpips_weights=no.pth", "distill.weights=no.pth", "discriminator.dino_weights=no.pth"]
    config = tiny_config(*ALL_LOSSES, *missing, f"output_dir={tmp_path / 'none'}")
    with measured_run(config, CPU) as (run, _):
        training_step(run, random_batch(config))
        assert run.step == 1 and run.emas["tokenizer"].updates == 1
    assert not (tmp_path / "none").exists()


def test_measured_step_is_that_of_the_training_loop(tmp_path):
    """Bit for bit: weights of both networks after two steps, with accumulation and stochastic depth."""
    config = tiny_config("steps=2", "engine.accumulation_steps=2", "model.drop_path=0.2", f"output_dir={tmp_path}")
    batch = random_batch(config)

    class Looped(MeasuredTask):
        def load_batch(self, indices, epoch):
            return batch

        def export(self, modules, folder):
            folder.mkdir()

        def after_step(self, modules, step):
            super().after_step(modules, step)
            self.weights = [p.detach().clone() for module in modules.values() for p in module.parameters()]

    task = Looped(config, CPU)
    train(task, config)
    with measured_run(config, CPU) as (run, _):
        before = [p.detach().clone() for module in run.modules.values() for p in module.parameters()]
        for _ in range(2):
            training_step(run, batch)
        weights = [p for module in run.modules.values() for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, task.weights, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True) if b.dim() > 1)


def test_dry_run_measures_nothing(capsys):
    assert speed.tokenizer(arguments("--config", "tokenizer/shapes.yaml", "--dry-run", "--device", "cpu")) == 0
    plan = capsys.readouterr().out
    assert plan == (
        "would measure: encode, decode and search, 32 images of 64 px a call; a training step of 16 a micro-batch; "
        "fp32 on cpu\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "runs/demo/model/visual_tokenizer"),
        (["--tokenizer", "a", "--config", "b"], "not both"),
        (["--tokenizer", "a", "seed=1"], "seed=1: settings go with --config"),
        (["--tokenizer", "nowhere"], "nowhere: no such model folder"),
        (["--config", "nowhere"], "neither a file nor a packaged one"),
        (["--config", "tokenizer/shapes.yaml", "model.widht=3"], "unknown key"),
        (["--config", "tokenizer/shapes.yaml", "--image-size", "40"], "--image-size 40 is not a multiple of 16"),
        (["--config", "tokenizer/shapes.yaml", "--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
        (["--config", "tokenizer/shapes.yaml", "--repeats", "0"], "--repeats"),
    ],
)
def test_errors(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no demo has run there
    with pytest.raises(UserError) as caught:
        speed.tokenizer(arguments(*options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_errors_without_the_parser(monkeypatch):
    found = arguments("--config", "tokenizer/shapes.yaml")
    found.precision = "fp8"
    with pytest.raises(UserError, match="--precision fp8: expected one of fp32, bf16"):
        speed.tokenizer(found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda, but torch finds no GPU here"):
        speed.tokenizer(arguments("--config", "tokenizer/shapes.yaml", "--device", "cuda"))
    with pytest.raises(ConfigError, match="loss.contrastive > 0 needs a text tower"):
        speed.tokenizer(arguments("--config", "tokenizer/shapes.yaml", "model.text_tower=null"))
