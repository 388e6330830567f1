"""The unified model's released layout both ways: same bits, every key accounted for, the convert command, refusals."""

import json
import os
import pickle
import shutil

import pytest
import torch
from PIL import Image
from reference import fixture
from safetensors.torch import load_file, save_file
from tiny import make_mllm, make_text_tokenizer, make_tokenizer, random_codes, roughen

from unitok import UniTokPipeline
from unitok.cli import main
from unitok.core.errors import CheckpointError, ConfigError, UserError
from unitok.data.transforms import padded_transform
from unitok.mllm import UniTokMLLM, UniTokMLLMConfig, UniTokProcessor
from unitok.mllm.official import (
    RELEASED_SAMPLER,
    official_config,
    official_places,
    official_processor,
    official_text_tokenizer,
    save_official,
)
from unitok.mllm.quantize import quantize_weights
from unitok.mllm.shards import save_shards
from unitok.tokenizer.official import save_official as save_tokenizer

K, V, DIM, POSITIONS, WIDTH = 3, 16, 4, 4, 24
ZERO_BIAS = "model.multi_embedder.attn_projection.attn.zero_k_bias"


def states_equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def visual():
    return make_tokenizer(
        projection_mlp_ratio=2.0,
        text_tower={"vocab_size": 49408, "context_length": 9, "width": 8, "heads": 2, "layers": 1, "tokenizer": "clip"},
    )


@pytest.fixture(scope="module")
def released(tmp_path_factory, visual):
    """A small model in the released layout, with grouped heads, its running usage counted, and the text tokenizer."""
    folder = tmp_path_factory.mktemp("released") / "model"
    shutil.copytree(fixture("mllm/tokenizer"), folder)
    settings = {
        "model_type": "mini_gemini", "architectures": ["MiniGeminiLlamaForCausalLM"], "mm_hidden_size": 1024,
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_theta": 500.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    sizes = {"vocab": K * V, "width": K * DIM, "K": K, "embed": WIDTH, "positions": POSITIONS, "note": "made for tests"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    torch.manual_seed(3)
    model = roughen(UniTokMLLM(official_config(folder)))
    model.embedder.codebooks.copy_(visual.quantizer.codebooks.detach())
    model.embedder.code_usage.uniform_()
    own = model.state_dict()
    state = {key: place.of(own[place.name]) for key, (place,) in official_places(model).items()}
    save_shards(state | {ZERO_BIAS: torch.zeros(WIDTH)}, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(visual, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "unitok_tokenizer.pth"
    save_tokenizer(visual, path)
    return path


def changed(folder, target, change=None, **settings):
    """A copy of a released folder with other tensors or settings."""
    shutil.copytree(folder, target)
    if change is not None:
        state = load_file(target / "model.safetensors")
        change(state)
        save_file(state, target / "model.safetensors")
    if settings:
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | settings))
    return target


# ---- both ways


def test_every_way_round_gives_the_same_bits(released, tmp_path, visual):
    model = UniTokMLLM.from_official(released)
    assert not model.training and model.visual_tokenizer is None
    assert model.config.depth_num_key_value_heads == 2 and model.config.embedder_cache == "released"
    assert model.config.text_config.rope_parameters["rope_theta"] == model.depth.rope_theta == 500.0
    model.save_pretrained(tmp_path / "own")
    own = UniTokMLLM.from_pretrained(tmp_path / "own")
    assert states_equal(own, model) and own.config.to_dict().keys() == model.config.to_dict().keys()
    assert own.generation_config.image_sampler == RELEASED_SAMPLER
    assert own.generation_config.eos_token_id == 2
    assert save_official(own, tmp_path / "again", official_processor(released, model)) == []
    before, after = (load_file(folder / "model.safetensors") for folder in (released, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = UniTokMLLM.from_official(tmp_path / "again")
    assert states_equal(again, model)
    for name, value in json.loads((released / "sizes.json").read_text()).items():
        assert name == "note" or json.loads((tmp_path / "again" / "sizes.json").read_text())[name] == value
    processors = [official_processor(folder, model) for folder in (released, tmp_path / "again")]
    texts = ["  two spaces", "a</s>b", ""]
    assert [[p.tokenizer.encode(t) for t in texts] for p in processors][0] == [
        processors[1].tokenizer.encode(text) for text in texts
    ]
    codes = random_codes(model.config, 1, POSITIONS)
    assert torch.equal(again.embed_codes(codes), model.embed_codes(codes))


def test_stored_numbers_keep_their_type(released, tmp_path):
    """A release in bf16 stays in bf16, unless another type is asked for; then it is rounded once. Codebooks are not."""
    half = {key: tensor.bfloat16() for key, tensor in load_file(released / "model.safetensors").items()}
    folder = changed(released, tmp_path / "half")
    save_file(half, folder / "model.safetensors")
    model = UniTokMLLM.from_official(folder)
    wide_ones = [name for name, tensor in model.state_dict().items() if tensor.dtype != torch.bfloat16]
    assert wide_ones == ["embedder.codebooks"] and model.embedder.codebooks.dtype == torch.float32
    whole, rounded = UniTokMLLM.from_official(released), UniTokMLLM.from_official(released, dtype=torch.bfloat16)
    assert torch.equal(rounded.embedder.codebooks, whole.embedder.codebooks) and rounded.dtype == torch.bfloat16
    save_official(rounded, tmp_path / "again")
    assert states_equal(UniTokMLLM.from_official(tmp_path / "again"), rounded)
    assert UniTokMLLM.from_official(tmp_path / "again").dtype == torch.bfloat16
    wide = UniTokMLLM.from_official(folder, dtype=torch.float32)
    assert all(
        torch.equal(a.float(), b) for a, b in zip(model.state_dict().values(), wide.state_dict().values(), strict=True)
    )
    assert model.backbone.rotary_emb.inv_freq.dtype == torch.float32, "rotary angles in bf16 would blur positions"


def test_shards_of_either_format_give_the_same_bits(released, tmp_path):
    """A re-sharded release; `.bin` files are read without executing anything."""
    state, whole = load_file(released / "model.safetensors"), UniTokMLLM.from_official(released)
    parts = [list(state)[start::4] for start in range(4)]
    for format in ("safetensors", "bin"):
        folder = changed(released, tmp_path / format)
        (folder / "model.safetensors").unlink()
        stem = "model" if format == "safetensors" else "pytorch_model"
        names = [f"{stem}-{i + 1:05d}-of-00004.{format}" for i in range(4)]
        for name, keys in zip(names, parts, strict=True):
            part = {key: state[key] for key in keys}
            save_file(part, folder / name) if format == "safetensors" else torch.save(part, folder / name)
        weight_map = {key: name for name, keys in zip(names, parts, strict=True) for key in keys}
        (folder / f"{stem}.{format}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert states_equal(UniTokMLLM.from_official(folder), whole)
    single = changed(released, tmp_path / "single")
    (single / "model.safetensors").unlink()
    torch.save(state, single / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert states_equal(UniTokMLLM.from_official(single), whole)
    save_official(whole, tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2
    assert states_equal(UniTokMLLM.from_official(tmp_path / "small"), whole)


def test_the_visual_tokenizer_comes_along_but_not_into_the_state(released, tokenizer_file, visual, tmp_path):
    model = UniTokMLLM.from_official(released, tokenizer=tokenizer_file)
    assert torch.equal(model.visual_tokenizer.quantizer.codebooks, visual.quantizer.codebooks)
    assert not any("visual" in name for name in [*model.state_dict(), *dict(model.named_modules())])
    pipeline = UniTokPipeline.from_official(released, tokenizer=tokenizer_file, device="cpu")
    (image,) = pipeline.generate_images("a red cat", seed=1)
    assert image.size == (32, 32) and pipeline.image_sampler == RELEASED_SAMPLER
    picture = Image.new("RGB", (20, 10), "red")
    assert torch.equal(pipeline.processor.pixels([picture])[0], padded_transform(picture, 32))
    assert isinstance(pipeline.answer([picture], ["what?"])[0], str)
    pipeline.save_pretrained(tmp_path / "export")
    again = UniTokPipeline.from_pretrained(tmp_path / "export", device="cpu")
    assert again.generate_images("a red cat", seed=1)[0].tobytes() == image.tobytes()
    assert torch.equal(again.processor.pixels([picture]), pipeline.processor.pixels([picture]))


def test_convert_both_ways(released, tokenizer_file, tmp_path, capsys):
    export, back = tmp_path / "export", tmp_path / "back"
    assert main(["convert", "mllm", str(released), str(export), "--tokenizer", str(tokenizer_file)]) == 0
    assert capsys.readouterr().out.strip() == str(export)
    pipeline = UniTokPipeline.from_pretrained(export, device="cpu")
    assert pipeline.tokenizer.config.num_positions == POSITIONS
    own, given = UniTokProcessor.from_pretrained(export).tokenizer, official_text_tokenizer(released)
    assert own.encode("  two") == given.encode("  two")
    assert main(["convert", "mllm", str(export), str(back)]) == 0
    assert "convert tokenizer" in capsys.readouterr().out
    before, after = (load_file(folder / "model.safetensors") for folder in (released, back))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert states_equal(UniTokMLLM.from_official(back, tokenizer=tokenizer_file), UniTokMLLM.from_official(released))


def test_convert_says_what_an_export_lacks(released, visual, tmp_path, capsys):
    bare = changed(released, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    assert main(["convert", "mllm", str(bare), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "ids only" in printed and "codes only" in printed and "--tokenizer" in printed
    assert states_equal(UniTokMLLM.from_pretrained(tmp_path / "out"), UniTokMLLM.from_official(released))
    with pytest.raises(UserError, match="visual_tokenizer"):
        UniTokPipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=r"has no tokenizer.model"):
        UniTokPipeline.from_official(bare, tokenizer=visual)


def test_usage_of_an_own_model_is_its_tokenizers(released, visual, tmp_path):
    """Own exports do not count usage; the released layout wants it."""
    model = UniTokMLLM.from_official(released)
    config = model.config.to_dict() | {"code_usage": False, "embedder_cache": "consistent"}
    own = UniTokMLLM(type(model.config).from_dict(config))
    own.load_state_dict({name: value for name, value in model.state_dict().items() if "code_usage" not in name})
    own.keep_tokenizer(visual)
    left_out = save_official(own, tmp_path / "released")
    assert left_out == ["embedder_cache=consistent"]
    as_released, own_way = official_processor(released, own), official_processor(released, own)
    own_way.image_preprocess, own_way.truncate_pixels = "plain", False
    assert save_official(own, tmp_path / "same", as_released) == left_out
    lost = ["image_preprocess=plain", "truncate_pixels=False"]
    assert save_official(own, tmp_path / "lost", own_way) == left_out + lost
    saved = UniTokMLLM.from_official(tmp_path / "released")
    assert torch.equal(saved.embedder.code_usage, visual.quantizer.usage_average)


def test_a_shared_head_is_read_and_never_written(released, tmp_path):
    """Its tensor may be missing, or there beside what makes no difference; what is written has two matrices."""

    def share(state):
        del state["lm_head.weight"]

    def repeat(state):
        state["lm_head.weight"] = torch.full_like(state["lm_head.weight"], 7.0)  # transformers does not read it

    for name, change in (("missing", share), ("there", repeat)):
        folder = changed(released, tmp_path / name, change, tie_word_embeddings=True)
        model = UniTokMLLM.from_official(folder)
        assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    with torch.no_grad():
        model.lm_head.weight += 1
    save_official(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert states_equal(UniTokMLLM.from_official(tmp_path / "out"), model)


def test_what_old_versions_of_transformers_stored_is_passed_over(released, tmp_path):
    """Rotary frequencies, in fp32 also beside weights in bf16."""

    def add(state):
        state |= {key: tensor.bfloat16() for key, tensor in state.items() if "quantizer" not in key}
        for layer in ("model.layers.0", "model.layers.1", "ar_head.layers.0"):
            state[f"{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    model = UniTokMLLM.from_official(changed(released, tmp_path / "old", add))
    assert model.dtype == torch.bfloat16
    assert states_equal(model, UniTokMLLM.from_official(released, dtype=torch.bfloat16))


# ---- refusals


class _Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _drop(state):
    del state["lm_head.weight"], state["ar_head.norm.weight"]


def _extra(state):
    state["model.surplus"] = torch.zeros(1)


def _transpose(state):
    state["ar_head.linear_head.weight"] = state["ar_head.linear_head.weight"].T.contiguous()


def _key_bias(state):
    state[ZERO_BIAS] = torch.ones(WIDTH)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (_drop, {}, r"missing: .*lm_head.weight.*|missing: .*ar_head.norm.weight"),
        (_extra, {}, r"unexpected: model.surplus"),
        (_transpose, {}, r"wrong shape: ar_head.linear_head.weight \[32, 16\] instead of \[16, 32\]"),
        (_key_bias, {}, r"zero_k_bias is not zero"),
        (None, {"hidden_size": 64}, r"wrong shape: .* and \d+ more"),
        (None, {"hidden_act": "gelu"}, r"hidden_act='gelu' \(expected 'silu'\)"),
        (None, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_type='linear'"),
        (None, {"attention_bias": True}, r"attention_bias=True \(expected False\)"),
        (None, {"mlp_bias": True}, r"mlp_bias=True"),
        (None, {"head_dim": 16}, r"head_dim=16 \(expected 8\)"),
        (None, {"model_type": "llama"}, r"type 'llama', expected the released 'mini_gemini'"),
        (None, {"num_attention_heads": 5}, r"sizes do not fit"),
    ],
)
def test_damaged_releases_are_refused_in_one_line(released, tmp_path, change, settings, message):
    folder = changed(released, tmp_path / "odd", change, **settings)
    with pytest.raises(CheckpointError, match=message) as refused:
        UniTokMLLM.from_official(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


@pytest.mark.parametrize("sizes", [{"K": 0}, {"vocab": 47}, {"embed": "wide"}, {"embed": 4}])
def test_sizes_that_fit_nothing_are_refused(released, tmp_path, sizes):
    folder = changed(released, tmp_path / "odd")
    given = json.loads((folder / "sizes.json").read_text())
    (folder / "sizes.json").write_text(json.dumps(given | sizes))
    with pytest.raises(CheckpointError, match=r"sizes.json: "):
        UniTokMLLM.from_official(folder)


def test_code_in_a_file_is_not_executed(released, tmp_path):
    folder = changed(released, tmp_path / "odd")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": _Malice(tmp_path / "executed")}))
    with pytest.raises(CheckpointError, match=r"more than tensors|no file of tensors"):
        UniTokMLLM.from_official(folder)
    assert not (tmp_path / "executed").exists()


def test_missing_pieces_are_named(released, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config.json"):
        UniTokMLLM.from_official(tmp_path / "nowhere")
    folder = changed(released, tmp_path / "odd")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights in it; expected one of model.safetensors"):
        UniTokMLLM.from_official(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "mini_gemini"}))
    with pytest.raises(CheckpointError, match=r"lacks vocab_size, hidden_size"):
        UniTokMLLM.from_official(folder)


def test_a_text_model_of_another_vocabulary_is_refused(released, tmp_path):
    folder = changed(released, tmp_path / "odd")
    shutil.copyfile(make_text_tokenizer(tmp_path).vocab_file, folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"<0x00> has id \d+, the released model's begin_image_id is 3"):
        UniTokMLLM.from_official(folder)


def test_another_visual_tokenizer_is_refused(released, tmp_path):
    for changes, message in (({}, "codebooks"), ({"codebook_size": 32}, "codebook_size"), ({"image_size": 48}, "pos")):
        other = make_tokenizer(seed=5, **changes)
        with pytest.raises(UserError, match=message):
            UniTokMLLM.from_official(released, tokenizer=other)


def test_models_that_the_released_code_could_not_run_are_refused(tmp_path):
    model = make_mllm(depth_shared_head=False, chat_image_marks=True)
    with pytest.raises(ConfigError, match=r"depth_shared_head=False .*chat_image_marks=True .*keep the export"):
        save_official(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' \(expected 'silu'\)"),
        ({"attention_bias": True}, r"attention_bias=True"),
        ({"mlp_bias": True}, r"mlp_bias=True"),
        ({"head_dim": 16}, r"head_dim=16 \(expected 8\)"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, r"rope_type='linear'"),
        ({"visual_input": "quantized"}, r"visual_input='quantized' \(expected 'codes'\)"),
    ],
)
def test_settings_that_the_layout_has_no_place_for_are_refused(released, tmp_path, changes, message):
    """Nothing is written that reads as another model, or as none."""
    values = official_config(released).to_dict()
    outer = {name: value for name, value in changes.items() if name in values}
    inner = {name: value for name, value in changes.items() if name not in values}
    text = values["text_config"] | inner
    model = UniTokMLLM(UniTokMLLMConfig(**(values | outer | {"text_config": text})))
    with pytest.raises(ConfigError, match=f"no place for {message}.*; keep the export"):
        save_official(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_fewer_bits_are_not_written(released, tmp_path):
    model = UniTokMLLM.from_official(released)
    quantize_weights(model, "int8")
    with pytest.raises(UserError, match=r"int8 weights, which cannot be saved; .* weights='int8' when loading"):
        save_official(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_refuses_in_one_line(released, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for arguments, message in (
        ([str(tmp_path / "no"), str(tmp_path / "out")], "no config.json"),
        ([str(released), str(tmp_path / "full")], "not an empty folder"),
        ([str(released), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "no.pth")], "no such file"),
    ):
        assert main(["convert", "mllm", *arguments]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
        assert not (tmp_path / "out").exists()
