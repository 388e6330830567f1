"""The unified model's speed: bytes and FLOPs that are counted, the baseline, the command on a tiny model."""

import argparse
import json
import math

import pytest
import torch
from tiny import figures_of, make_mllm

from unitok.cli import _Parser
from unitok.commands import speed_mllm
from unitok.core.config import load_config
from unitok.core.errors import ConfigError, UserError
from unitok.eval import speed_mllm as speed
from unitok.eval.plain_sampling import plain_codes
from unitok.eval.speed import Setting
from unitok.mllm import cross_entropy
from unitok.mllm.sampler import CodeSampler

TINY = [
    "text_config={model_type: llama, vocab_size: 50, hidden_size: 32, intermediate_size: 40, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}",
    "model.num_codebooks=3",
    "model.codebook_size=16",
    "model.code_dim=4",
    "model.num_image_positions=6",
    "model.visual_width=24",
    "model.visual_num_heads=2",
    "sampling={prompt_length: 5, num_positions: 4, images: 2, guidance_scale: 3.0}",
    "answers={text_length: 6, text_before_image: 2, new_tokens: 3, batch_size: 2, plain_tokens: 2}",
    "training={batch_size: 2, text_length: 4}",
]
SETTING = Setting(torch.device("cpu"), repeats=2)


def arguments(*options: str) -> argparse.Namespace:
    parser = _Parser()
    speed_mllm.add_mllm_arguments(parser)
    return parser.parse_args(options)


def tiny_config() -> speed.MllmSpeedConfig:
    return load_config(speed.MllmSpeedConfig, "mllm/bench.yaml", TINY)


@pytest.mark.parametrize("changes", [{}, {"depth_shared_head": False}, {"depth_width": 24, "depth_num_heads": 3}])
def test_bytes_of_a_position_are_the_weights_that_it_touches(changes):
    """Counted from the names: everything but tables of vectors, depth layers and a shared head once for each code."""
    model = make_mllm(**changes)
    expected = 0
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if any(part in name for part in ("embed_tokens", "lm_head", "code_embeddings", "codebooks", "depth.norm")):
            continue
        shared_head = changes.get("depth_shared_head", True) and name.startswith("depth.head")
        often = name.startswith("depth.layers") or shared_head
        expected += 4 * weight.numel() * (model.config.num_codebooks if often else 1)
    assert speed.bytes_per_position(model) == expected


def test_figures_of_sampling():
    found = speed.sampling_figures([2.0, 1.0, 4.0], images=3, num_positions=10, floor=0.04)
    assert (found["seconds"], found["visual_tokens_per_second"], found["images_per_second"]) == (1.0, 30.0, 3.0)
    assert (found["ms_per_position"], found["floor_ms_per_position"]) == (100.0, 40.0)
    assert found["times_floor"] == pytest.approx(2.5)


def test_flops_of_training_grow_with_the_batch():
    config = tiny_config()
    one, two = (
        speed.training_speed(
            speed.random_model(config, SETTING), speed.TrainingSizes(batch_size=size, text_length=4), SETTING
        )["gflop_per_step"]
        for size in (1, 2)
    )
    assert 1.9 < two / one < 2.05  # the text head reads one position of each sample


@pytest.mark.parametrize("changed", ["chunks", "checkpoints"])
def test_flops_of_training_count_nothing_twice(changed, monkeypatch):
    """What is computed again to save memory is no work of the model; the steps themselves still do it."""
    found = []
    for saving in (False, True):
        model = speed.random_model(tiny_config(), SETTING)
        if saving and changed == "chunks":
            monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2**6)
        elif saving:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(speed.training_speed(model, tiny_config().training, SETTING)["gflop_per_step"])
        assert model.cross_entropy == "chunked" and model.is_gradient_checkpointing == (
            changed == "checkpoints" and saving
        )
    assert found[0] == found[1]


def test_training_is_measured_on_packed_rows():
    """As the large configurations train; one row has the losses of the samples apart."""
    model = speed.random_model(tiny_config(), SETTING)
    batch = speed._training_batch(model, speed.TrainingSizes(batch_size=3, text_length=4), 0)
    packed = speed._packed(batch)
    assert packed["input_ids"].shape == (1, 3 * 10) and "attention_mask" not in packed
    with torch.no_grad():
        ours, apart = model.losses(**packed), model.losses(**batch)
    for name in ("text", "image", "num_text", "num_image"):
        torch.testing.assert_close(ours[name], apart[name])


def test_lower_precision_leaves_codebooks_and_angles():
    model = speed.random_model(tiny_config(), Setting(torch.device("cpu"), "bf16", 1))
    exact = speed.random_model(tiny_config(), SETTING)
    assert model.dtype == torch.bfloat16 and torch.equal(model.embedder.codebooks, exact.embedder.codebooks)
    assert torch.equal(model.backbone.rotary_emb.inv_freq, exact.backbone.rotary_emb.inv_freq)


@pytest.mark.parametrize("cache", ["consistent", "released"])
def test_baseline_embeds_an_image_once_and_not_its_last_codes(cache):
    model, rows = make_mllm(image_position_embedding=True), []
    model.embedder.register_forward_pre_hook(lambda _, inputs: rows.append(tuple(inputs[0].shape)))
    ids = torch.tensor([[2, 20, 5]] * 4)
    sampler = CodeSampler([0, 1], False, 1.0, 0, 1.0)
    plain = plain_codes(model, ids, torch.ones_like(ids), sampler, 3.0, 7, cache)  # one more than has an embedding
    assert rows == [(2, 3, length if cache == "consistent" else 1) for length in range(1, 7)]
    codes = model.generate_codes(ids, None, 3.0, do_sample=False, num_positions=7, embedder_cache=cache)
    assert torch.equal(codes, plain)


def test_baseline_finds_a_difference(monkeypatch):
    config = tiny_config()
    model = speed.random_model(config, SETTING)
    assert speed.plain_loop(model, config.sampling, "released", SETTING)["equal_codes"]
    original = speed.plain_codes
    monkeypatch.setattr(speed, "plain_codes", lambda *args, **options: original(*args, **options) + 1)
    found = speed.plain_loop(model, config.sampling, "released", SETTING)
    assert not found["equal_codes"]
    rows = speed_mllm._rows({"batches": [], "positions": [], "codebooks": [], "baseline": [found]})
    assert "DIFFERENT" in rows[0][-1]


def test_command_measures_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(speed._BANDWIDTH_BYTES, "cpu", 2**20)
    out = tmp_path / "speed.json"
    options = ["--batches", "1,2", "--positions", "3", "--codebooks", "1,2", "--repeats", "1", "--out", str(out)]
    assert speed_mllm.mllm(arguments(*options, "--device", "cpu", *TINY)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:14]] == [
        "1 images", "2 images", "3 positions", "1 codes a position", "2 codes a position", "plain loop, consistent",
        "plain loop, released", "answers: model.generate, one at a time", "answers: chat, one at a time",
        "answers: chat, batch of 2", "answers: plain loop without a cache", "train",
    ]  # fmt: skip
    assert lines[14].startswith("floor: ") and "equal codes" in lines[7] and "equal codes" in lines[8]
    results = json.loads(out.read_text())
    by_name = {one["metric"]: one["value"] for one in results["metrics"]}
    assert len(by_name) == 5 + 2 + 4 + 4 + 1 and results["seeds"] == [0] and results["checkpoint"] is None
    assert by_name["visual_tokens_per_second, 2 codes"] == results["codebooks"][1]["visual_tokens_per_second"]
    assert by_name["ratio to the plain loop, released"] == results["baseline"][1]["ratio"]
    measured = set(results) - {"protocol", "seeds", "metrics"}
    for name, value in figures_of({key: results[key] for key in measured}):
        assert math.isfinite(value) and value > 0, f"{name} = {value}"
    assert results["batches"][1]["visual_tokens_per_second"] == pytest.approx(2 * 4 / results["batches"][1]["seconds"])
    assert results["protocol"]["clock"] == "CPU time of the process"


def test_command_measures_a_folder_with_quantized_weights(tmp_path, capsys):
    make_mllm().save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--weights", "int8", "--repeats", "1", "--batches", "1", "--positions", "2"]
    assert speed_mllm.mllm(arguments(*options, "--no-train", "--no-answers", "--no-baseline", "--device", "cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-3:-1]] == ["1 images", "2 positions"]


def test_command_measures_a_model_of_few_positions_whatever_the_default(tmp_path, capsys):
    model = make_mllm(image_position_embedding=True)
    model.save_pretrained(tmp_path)
    count = model.config.num_image_positions
    options = ["--model", str(tmp_path), "--repeats", "1", "--batches", "1", "--no-train", "--no-answers"]
    assert speed_mllm.mllm(arguments(*options, "--device", "cpu")) == 0
    assert f"{count} positions" in capsys.readouterr().out


def test_dry_run_measures_nothing(capsys):
    assert speed_mllm.mllm(arguments("--dry-run", "--device", "cpu", "--no-train", "--batches", "3")) == 0
    assert capsys.readouterr().out == (
        "would measure: batches (3,), positions (16, 64), codes a position (1, 2, 4, 8), baseline, answers; fp32 on "
        "cpu\n"
    )


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (["--model", "a", "--config", "b"], UserError, "not both"),
        (["--model", "nowhere", "--no-train"], UserError, "nowhere: no such model folder"),
        (["--batches", "1,0"], UserError, "'1,0': expected numbers of at least 1"),
        (["--batches", "many"], UserError, "'many': expected whole numbers between commas"),
        (["--weights", "int8"], UserError, "add --no-train"),
        (["--weights", "int8", "--no-train", "--codebooks", "2"], UserError, "leave out --model and --weights"),
        (["model.num_codebook=2"], ConfigError, "num_codebooks"),
        (
            ["text_config.hiden_size=32"],
            ConfigError,
            "'text_config.hiden_size' .*'text_config.hidden_size'",
        ),
        (["text_config.hidden_size=30"], ConfigError, "text_config: sizes that do not fit"),
        (["text_config.model_type=lama"], ConfigError, "unknown text_config.model_type='lama'"),
        (["model.image_token_id=null"], UserError, "model.image_token_id is not set"),
    ],
)
def test_errors(options, kind, message):
    with pytest.raises(kind, match=message):
        speed_mllm.mllm(arguments(*options, "--device", "cpu"))
