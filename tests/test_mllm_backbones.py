"""Families of decoder-only models as backbones: from a folder and from sizes, one code path, tiny random models."""

import json
import shutil

import pytest
import torch
from backbones import FAMILIES, SIZES, byte_level_tokenizer, make_folder
from PIL import Image
from stages import run_stage, write_configs
from tiny import BOI, BOS, EOS, PAD, TEXTS, make_tokenizer, mllm_config, roughen
from transformers import AutoConfig, AutoModelForCausalLM

from unitok.core.errors import CheckpointError, ConfigError, NonFiniteError
from unitok.core.pretrained import load_model_folder
from unitok.data.conversations import MARKS, Turn
from unitok.mllm import UniTokMLLM, UniTokProcessor, backbone
from unitok.mllm.backbone import backbone_places, load_model
from unitok.mllm.backbone_steps import _differences, check_steps
from unitok.mllm.build import BackboneConfig, UniTokMLLMSettings, build_model, build_text_tokenizer
from unitok.mllm.chat import Prompt, generate_answers
from unitok.mllm.processor import UniTokTextTokenizer, load_text_tokenizer, special_ids
from unitok.mllm.shards import load_sharded
from unitok.mllm.start import prepare_model

every_family = pytest.mark.parametrize("family", FAMILIES)
SETTINGS = UniTokMLLMSettings(visual_width=24, visual_num_heads=2, visual_mlp_ratio=1.5, depth_num_layers=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For every family a folder as `save_pretrained` writes it, in several shards, with its tokenizer."""
    return {family: make_folder(family, tmp_path_factory.mktemp("backbones") / family) for family in FAMILIES}


def built(folder, tmp_path, **changes):
    """Text tokenizer and model as a run makes them."""
    given = BackboneConfig(path=str(folder)) if not changes else BackboneConfig(**changes)
    text_tokenizer = build_text_tokenizer(given, lambda: TEXTS, [], tmp_path)
    torch.manual_seed(0)
    return text_tokenizer, build_model(SETTINGS, given, text_tokenizer, make_tokenizer())


@every_family
@torch.no_grad()
def test_a_pretrained_backbone_says_the_same(family, folders, tmp_path):
    """Same text logits as its own class gives; old rows bit for bit, the marks' rows the mean of the old tokens'."""
    folder = folders[family]
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows, known = source.config.vocab_size, len(load_text_tokenizer(folder))
    text_tokenizer, model = built(folder, tmp_path)
    model.eval()
    ids = torch.randint(known, (2, 40), generator=torch.Generator().manual_seed(0))
    wanted = source(ids).logits
    marks = [text_tokenizer.convert_tokens_to_ids(mark) for mark in MARKS]
    assert marks == [known, known + 1, known + 2]
    assert model.config.text_config.vocab_size == max(rows, known + 3) == model.lm_head.out_features
    old = [row for row in range(rows) if row not in marks]
    torch.testing.assert_close(model(input_ids=ids).logits[..., old], wanted[..., old], rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.05, "or the comparison would say nothing"
    pairs = [(model.get_input_embeddings(), source.get_input_embeddings()), (model.lm_head, source.lm_head)]
    for ours, theirs in pairs:
        assert torch.equal(ours.weight[old], theirs.weight[old])
        mean = theirs.weight[:known].mean(0)
        assert all(torch.equal(ours.weight[row], mean) for row in {*marks, *range(rows, len(ours.weight))})
    assert ours.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr(), "a shared head gets its own copy"
    fresh = {name: p for name, p in model.named_parameters() if name.startswith(("depth.", "embedder.mlp"))}
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    for name, parameter in fresh.items():
        if "norm" in name and name.endswith("weight") or name == "embedder.mlp.0.weight":
            assert bool((parameter == 1).all()), name
        elif name.endswith("bias"):
            assert not bool(parameter.any()), name
        else:
            assert 0.01 < float(parameter.std()) < 0.03, name


OTHER_PIECES = {
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "gpt_neox": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("family", OTHER_PIECES)
def test_what_is_stored_in_other_pieces_finds_its_place(family, tmp_path):
    """Every number of a folder of transformers' own, and of an export."""
    config = AutoConfig.for_model(family, **(SIZES | OTHER_PIECES[family] | {"vocab_size": 50}))
    source = roughen(AutoModelForCausalLM.from_config(config))
    source.save_pretrained(tmp_path / "backbone", max_shard_size="20KB")
    model = UniTokMLLM(mllm_config(text=config.to_dict(), depth_intermediate_size=40))
    places, ignored = backbone_places(config)
    load_sharded(model, tmp_path / "backbone", places, ignored=ignored)
    own = source.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith(("backbone.", "lm_head.")):
            assert torch.equal(value, own[name.replace("backbone.", source.base_model_prefix + ".")]), name
    model.save_pretrained(tmp_path / "export")
    again = load_model(tmp_path / "export").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_pieces_that_are_no_rows_are_refused(monkeypatch):
    """Not read into a wrong place: here a family whose matrices are stored the other way round."""
    turned = lambda model, numbers: {name: value.flip(0) for name, value in numbers.items()}  # noqa: E731
    monkeypatch.setattr(backbone, "revert_weight_conversion", turned)
    with pytest.raises(ConfigError, match="a llama is stored in pieces that cannot be read one by one .*another"):
        backbone_places(AutoConfig.for_model("llama", **SIZES))


@pytest.mark.parametrize("extra", [1, 3])
@torch.no_grad()
def test_tokens_without_rows_are_filled_too(extra, folders, tmp_path):
    """A tokenizer may hold more than the model: a `<pad>` that somebody added. Nothing comes from memory as it was."""
    folder = shutil.copytree(folders["llama2"], tmp_path / "padded")
    tokenizer = load_text_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<pad{number}>" for number in range(extra)]})
    tokenizer.save_pretrained(folder)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = source.config.vocab_size
    assert len(load_text_tokenizer(folder)) == rows + extra
    text_tokenizer, model = built(folder, tmp_path)
    assert special_ids(text_tokenizer)["image_token_id"] >= rows + extra
    for ours, theirs in (
        (model.get_input_embeddings(), source.get_input_embeddings()),
        (model.lm_head, source.lm_head),
    ):
        assert torch.equal(ours.weight[:rows], theirs.weight) and len(ours.weight) == rows + extra + 3
        assert torch.equal(ours.weight[rows:], theirs.weight.mean(0).expand(extra + 3, -1))


@every_family
def test_two_steps_of_every_family(family, folders, files, tmp_path):
    """Through the training loop on code shards; the export loads and chats."""
    options = [f"backbone.path={folders[family]}", "backbone.config={}", "steps=2", "ema_decay=null"]
    out = tmp_path / "run"
    log = run_stage("mllm", files["mllm"], out, 1, options)
    assert len(log) == 2 and all(record["loss"] > 0 and record["grad_norm"] > 0 for record in log)
    model = load_model_folder(UniTokMLLM, out / "export").eval()
    processor = UniTokProcessor.from_pretrained(out / "export")
    turns = [Turn("user", "<image>\nwhat color is the circle?"), Turn("assistant", "red"), Turn("user", "sure?")]
    ids = processor.builder.chat(turns, prompt=True).ids
    template = processor.apply_chat_template([turn._asdict() for turn in turns])
    assert (
        "ASSISTANT: red" in template and processor(template, [Image.new("RGB", (9, 9))])["input_ids"][0].tolist() == ids
    )
    codes = torch.zeros(1, model.config.num_codebooks, model.config.num_image_positions, dtype=torch.int64)
    answer = model.generate(input_ids=torch.tensor([ids]), codes=codes, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > len(ids) and isinstance(processor.tokenizer.decode(answer[0, len(ids) :]), str)
    prompt = torch.tensor([processor.builder.text_to_image_prompt("a red circle")])
    assert model.generate_codes(prompt, seeds=[0]).shape == codes.shape


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp("stages"))


@every_family
def test_every_family_from_sizes(family, tmp_path):
    """No pretrained weights: sizes from the configuration, vocabulary from the text tokenizer."""
    settings = {name: value for name, value in FAMILIES[family][2].items() if name != "pad_token_id"}
    text_tokenizer, model = built(None, tmp_path, config=SIZES | settings, text_vocab_size=80)
    assert model.backbone.config.model_type == settings["model_type"]
    assert model.config.text_config.vocab_size == len(text_tokenizer) == model.get_input_embeddings().num_embeddings
    ids = torch.arange(9)[None] + 7  # behind the marks
    assert model(input_ids=ids).logits.shape == (1, 9, len(text_tokenizer))
    parameters = settings.get("rope_parameters", {})
    assert parameters.items() <= model.backbone.config.rope_parameters.items()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("cohere", {"logit_scale": 0.0625}, "logit_scale=0.0625"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
    ],
)
def test_changed_logits_are_refused(family, changes, message, tmp_path):
    """Not silently other logits than the family's own class would give, from sizes or from a folder."""
    with pytest.raises(ConfigError, match=message):
        built(None, tmp_path, config=SIZES | {"model_type": family} | changes)
    byte_level_tokenizer().save_pretrained(tmp_path / "folder")
    AutoConfig.for_model(family, **SIZES, **changes).save_pretrained(tmp_path / "folder")
    with pytest.raises(ConfigError, match=message):
        built(tmp_path / "folder", tmp_path)


@pytest.mark.parametrize("family", ["mamba", "jamba", "recurrent_gemma"])
def test_backbones_that_carry_a_state_are_refused(family, tmp_path):
    with pytest.raises(ConfigError, match=f"backbone.config: a {family} carries a state.*such as llama"):
        built(None, tmp_path, config={"model_type": family, "hidden_size": 32})


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
UNSAMPLED = {
    "bert": ({}, "positions see those behind them .hidden states differ by"),
    "roberta": ({"is_decoder": True}, "steps with DynamicCache do not give what a full pass gives"),
    "openai-gpt": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, "steps with DynamicCache do not give"),
    "minimax": ({"head_dim": 8, "num_local_experts": 2}, "its forward pass fails .ValueError: MiniMax uses cache of"),
    "opt": ({"ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, "it reads 16 and gives 16"),
}
SAMPLED = {
    "bert": {"is_decoder": True},
    "ctrl": {"n_embd": 32, "dff": 40, "n_layer": 2, "n_head": 4},
    "falcon": {"alibi": True},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "lfm2": {"full_attn_idxs": [1]},
    "mixtral": MOE | {"sliding_window": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
}


@pytest.mark.parametrize("scale", [1.0, 6.0], ids=["new", "trained"])
@pytest.mark.parametrize("family", UNSAMPLED)
def test_backbones_whose_steps_differ_from_training_are_refused(family, scale):
    """At the start of training and at the first sampling, not only where logits happen to be far off."""
    settings, reason = UNSAMPLED[family]
    torch.manual_seed(0)
    text = {"model_type": family} | settings
    model = roughen(UniTokMLLM(mllm_config(text=text, depth_intermediate_size=40)), scale).train()
    message = f"^a backbone of model_type={family} cannot be sampled from: .*{reason}.*such as llama$"
    with pytest.raises(ConfigError, match=message):
        prepare_model(model, None, torch.device("cpu"))
    assert all(module.training for module in model.modules())
    with pytest.raises(ConfigError, match=message):
        model.eval().generate_codes(torch.tensor([[BOS, BOI]]))
    with pytest.raises(ConfigError, match=message):
        generate_answers(model, [Prompt([BOS, 20])], EOS, PAD)


@pytest.mark.parametrize("scale", [1.0, 6.0], ids=["new", "trained"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_backbones_that_can_be_sampled_from_are_looked_at_once(scale, precision, monkeypatch):
    for family, settings in SAMPLED.items():
        torch.manual_seed(0)
        text = {"model_type": family} | settings
        model = roughen(UniTokMLLM(mllm_config(text=text, depth_intermediate_size=40)), scale).to(precision)
        differences = _differences(model.backbone.eval())
        assert max(differences.values()) < (1e-5 if precision == torch.float32 else 0.02), (family, differences)
        check_steps(model.backbone)
        with monkeypatch.context() as patch:
            patch.setattr(model.backbone, "forward", None)
            check_steps(model.backbone)


def test_broken_weights_are_no_fault_of_the_family():
    model = UniTokMLLM(mllm_config(text={"model_type": "gpt2"}, depth_intermediate_size=40))
    torch.nn.init.constant_(model.get_input_embeddings().weight, torch.nan)
    check_steps(model.backbone)
    with pytest.raises(NonFiniteError):
        model.eval().generate_codes(torch.tensor([[BOS, BOI]]))


def test_backbones_whose_weights_are_elsewhere_are_not_looked_at():
    """In parts on other ranks, where a pass of one rank alone would wait for ever; or not in memory."""
    text = {"model_type": "bert"}
    model = UniTokMLLM(mllm_config(text=text, depth_intermediate_size=40))
    next(model.backbone.parameters()).ds_id = 0
    check_steps(model.backbone)
    with torch.device("meta"):
        check_steps(UniTokMLLM(mllm_config(text=text, depth_intermediate_size=40)).backbone)


def test_a_family_without_a_number_of_positions(tmp_path):
    """Only what its configuration knows is set for it; what a user says wrongly is still named."""
    sizes = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
    with pytest.raises(ConfigError, match="depth_intermediate_size is not set: .*a bloom does not have"):
        built(None, tmp_path, config=sizes)
    settings, given = SETTINGS.model_copy(update={"depth_intermediate_size": 40}), BackboneConfig(config=sizes)
    text_tokenizer = build_text_tokenizer(given, lambda: TEXTS, [], tmp_path)
    model = build_model(settings, given, text_tokenizer, make_tokenizer())
    assert model(input_ids=torch.arange(9)[None] + 7).logits.shape == (1, 9, len(text_tokenizer))
    with pytest.raises(ConfigError, match="unknown key 'backbone.config.max_position_embeddings' for bloom"):
        built(None, tmp_path, config=sizes | {"max_position_embeddings": 64})


def test_backbones_without_a_place_are_refused(tmp_path, folders):
    byte_level_tokenizer().save_pretrained(tmp_path / "phi")
    config = AutoConfig.for_model("phi", **SIZES, vocab_size=300)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "phi")
    with pytest.raises(ConfigError, match=r"lm_head.bias"):
        built(tmp_path / "phi", tmp_path)
    with pytest.raises(ConfigError, match=r"backbone.path=no/where/at/all: neither a local folder nor"):
        built("no/where/at/all", tmp_path)
    damaged = shutil.copytree(folders["qwen2"], tmp_path / "damaged")
    next(damaged.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*: missing"):
        built(damaged, tmp_path)


def test_llamas_text_model_is_read_as_it_is(folders, tmp_path):
    """Not by transformers' own reader, which loses leading spaces; marks added, saved and read again."""
    text_tokenizer, model = built(folders["llama2"], tmp_path)
    assert isinstance(text_tokenizer, UniTokTextTokenizer) and not text_tokenizer.legacy
    processor = UniTokProcessor(text_tokenizer, model.config, 32)
    processor.save_pretrained(tmp_path / "export")
    model.config.save_pretrained(tmp_path / "export")
    again = UniTokProcessor.from_pretrained(tmp_path / "export").tokenizer
    for text in ("  two spaces", "a<image>b</s>c", "<boi><eoi>"):
        assert again.encode(text) == text_tokenizer.encode(text)
    assert again.convert_tokens_to_ids(list(MARKS)) == text_tokenizer.convert_tokens_to_ids(list(MARKS))


def test_settings_beside_llamas_text_model_are_kept(folders, tmp_path):
    """Tokens that were added, `legacy`, begin and end; without any settings it is a plain Llama-2 tokenizer."""
    folder = shutil.copytree(folders["llama2"], tmp_path / "other")
    file = folder / "tokenizer_config.json"
    settings, plain = json.loads(file.read_text()), load_text_tokenizer(folder)
    extra = {"content": "<extra>", "special": True, "normalized": False} | dict.fromkeys(
        ("lstrip", "rstrip", "single_word"), False
    )
    added = settings["added_tokens_decoder"] | {str(len(plain)): extra}
    file.write_text(json.dumps(settings | {"added_tokens_decoder": added, "add_eos_token": True, "legacy": True}))
    other = load_text_tokenizer(folder)
    begin, word, end = *plain.encode("a"), plain.eos_token_id
    assert other.encode("a<extra>") == [begin, word, len(plain), end] and len(other) == len(plain) + 1
    assert other.encode("a</s>a") == [begin, word, end, word, end], "before every part a space"
    assert plain.encode("a</s>a")[3:] != [word]
    file.unlink()
    (folder / "special_tokens_map.json").unlink()
    bare = load_text_tokenizer(folder)
    assert bare.encode("a</s>a") == [begin, word, end, word] and bare.pad_token_id == bare.unk_token_id


@pytest.mark.parametrize("inside", [True, False])
def test_a_backbone_of_two_sets_of_factors_reads_as_far_as_the_short_one(inside):
    """transformers takes the long one for a whole batch as soon as one row needs it."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors} | (
        {"original_max_position_embeddings": 32} if inside else {}
    )
    sizes = SIZES | {"max_position_embeddings": 256, "original_max_position_embeddings": 32, "pad_token_id": 0}
    sizes |= {"model_type": "phi3", "rope_parameters": rope}
    assert mllm_config(text=sizes).context_length == 32
    assert mllm_config(text={"model_type": "llama", **SIZES, "max_position_embeddings": 96}).context_length == 96
