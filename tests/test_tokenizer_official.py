"""The released layout both ways, its refusals, the convert command, and initial weights from CLIP models."""

import json
import os
import pickle
import shutil

import pytest
import torch
from reference import fixture
from safetensors.torch import save_file
from tiny import TEXTS, random_pixels, text_tower, tokenizer_config
from tiny import make_tokenizer as make_tiny

from unitok.cli import main
from unitok.core.errors import CheckpointError, ConfigError, UserError
from unitok.data.sentencepieces import load_sentencepiece, train_sentencepiece
from unitok.tokenizer import TextTowerConfig, UniTok
from unitok.tokenizer.configuration import VITAMIN_SIZES
from unitok.tokenizer.initial import load_clip, load_tokenizer
from unitok.tokenizer.official import official_args, official_config, save_official, to_official_state

CLIP_TOWER = {"vocab_size": 49408, "context_length": 9, "width": 8, "heads": 2, "layers": 2, "tokenizer": "clip"}


def make_tokenizer(seed=0, **changes):
    """A tiny one that the released layout can hold: its projections' MLPs are always twice as wide."""
    return make_tiny(seed, **({"projection_mlp_ratio": 2.0} | changes))


def states_equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def tokenizer():
    """Used for a few batches, so that its running usage is not empty."""
    model = make_tokenizer(text_tower=CLIP_TOWER, num_query_tokens=2, drop_path=0.1)
    with torch.no_grad():
        for seed in range(3):
            model(random_pixels(2, 3, 32, 32, seed=seed))
    return model


@pytest.mark.parametrize("changes", [{}, {"projection": "linear"}, {"num_codebooks": 1, "code_dim": 12}])
def test_every_way_round_gives_the_same_bits(tmp_path, changes):
    """Save, load, released layout, load, and back again."""
    tokenizer = make_tokenizer(text_tower=CLIP_TOWER, **changes)
    tokenizer(random_pixels(2, 3, 32, 32))
    tokenizer.save_pretrained(tmp_path / "folder")
    loaded = UniTok.from_pretrained(tmp_path / "folder").eval()
    assert save_official(loaded, tmp_path / "released" / "one.pth") == []
    official = UniTok.from_official(tmp_path / "released" / "one.pth")
    assert states_equal(official, tokenizer) and not official.training
    official.save_pretrained(tmp_path / "again")
    again = UniTok.from_pretrained(tmp_path / "again").eval()
    assert states_equal(again, tokenizer)
    pixels = random_pixels(2, 3, 32, 32, seed=5)
    assert torch.equal(again.reconstruct(pixels), tokenizer.reconstruct(pixels))
    ours, theirs = tokenizer.config.to_dict(), again.config.to_dict()
    assert {key for key in ours if ours[key] != theirs.get(key)} <= {"_name_or_path"}


def test_running_usage_of_a_released_file_is_not_overwritten_by_the_first_batch(tokenizer, tmp_path):
    """The released code counts batches in a plain int, so a file from there does not say how many there were."""
    save_official(tokenizer, tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert content.pop("usage_updates") == 3
    torch.save(content, tmp_path / "x.pth")
    loaded = UniTok.from_official(tmp_path / "x.pth")
    assert int(loaded.quantizer.usage_updates) == 100
    content["args"].pop("preprocess")
    torch.save(content, tmp_path / "x.pth")
    assert UniTok.from_official(tmp_path / "x.pth").config.preprocess == "inference", "as the release does"
    before = loaded.quantizer.usage_average.clone()
    loaded(random_pixels(1, 3, 32, 32, seed=9))
    assert (loaded.quantizer.usage_average - before).abs().max() < 0.011


def test_a_sentencepiece_tower_travels_with_its_file(tmp_path):
    text_file = train_sentencepiece(TEXTS, tmp_path / "text.model", 48)
    size = load_sentencepiece(text_file).get_piece_size() + 2
    tokenizer = make_tokenizer(text_tower=text_tower(vocab_size=size))
    tokenizer.set_text_model(text_file)
    save_official(tokenizer, tmp_path / "out" / "x.pth")
    loaded = UniTok.from_official(tmp_path / "out" / "x.pth")
    assert torch.equal(loaded.tokenize_text(TEXTS), tokenizer.tokenize_text(TEXTS))
    save_official(tokenizer, tmp_path / "out" / "again.pth")  # of the same model: they share the file
    other = make_tokenizer(text_tower=text_tower(vocab_size=size))
    other.set_text_model(train_sentencepiece([text[::-1] for text in TEXTS], tmp_path / "other.model", 48))
    with pytest.raises(ConfigError, match="text_tokenizer.model is another checkpoint's"):
        save_official(other, tmp_path / "out" / "y.pth")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".pth", ".model", ".json"}
    assert not (tmp_path / "out" / "y.pth").exists()
    assert torch.equal(
        UniTok.from_official(tmp_path / "out" / "x.pth").tokenize_text(TEXTS), loaded.tokenize_text(TEXTS)
    )
    (tmp_path / "out" / "text_tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="text_tokenizer.model"):
        UniTok.from_official(tmp_path / "out" / "x.pth")


@pytest.mark.parametrize("ratio", [1.25, 3.0])
def test_the_blocks_ratio_is_not_that_of_the_projections(ratio, tmp_path):
    tokenizer = make_tokenizer(text_tower=CLIP_TOWER, mlp_ratio=ratio)
    assert tokenizer.quant_proj.mlp.w0.weight.shape[0] == 2 * tokenizer.config.code_width
    assert tokenizer.post_quant_proj.mlp.w0.weight.shape[0] == 2 * tokenizer.config.width
    save_official(tokenizer, tmp_path / "x.pth")
    assert states_equal(UniTok.from_official(tmp_path / "x.pth"), tokenizer)


def test_sizes_of_another_checkpoint_are_not_replaced(tokenizer, tmp_path):
    save_official(tokenizer, tmp_path / "a.pth")
    save_official(tokenizer, tmp_path / "b.pth")
    with pytest.raises(ConfigError, match="a folder of its own"):
        save_official(make_tokenizer(text_tower=CLIP_TOWER, num_heads=4), tmp_path / "c.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth", "vit_config.json"]


@pytest.mark.parametrize("name", VITAMIN_SIZES)
def test_released_names_need_no_size_file(name, tmp_path):
    usual = {"mlp_ratio": 2.0, "projection_mlp_ratio": 2.0, "stage_depths": (2, 4), "decoder_stage_depths": (4, 2)}
    codes = {"num_codebooks": 8, "code_dim": 8, "text_tower": TextTowerConfig(**CLIP_TOWER)}
    config = tokenizer_config(**VITAMIN_SIZES[name], **usual, **codes)
    args, sizes = official_args(config)
    assert args["model"] == name and sizes is None
    back = official_config(args, tmp_path / "x.pth")
    assert (back.width, back.depth, back.stage_widths) == (config.width, config.depth, config.stage_widths)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": "residual", "code_dim": 12},
        {"projection_causal": True},
        {"projection_mlp_ratio": 3.0},
        {"text_tower": None},
    ],
)
def test_what_the_released_code_cannot_run_is_not_written(changes, tmp_path):
    with pytest.raises(ConfigError, match="keep the UniTok folder"):
        save_official(make_tokenizer(**({"text_tower": CLIP_TOWER} | changes)), tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


# ---- refusals


class Evil:
    def __reduce__(self):
        return (os.system, ("echo executed > executed",))


def _edit(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pickle(path):
    path.write_bytes(pickle.dumps({"args": {}, "trainer": {"unitok": Evil()}}))


def _evil_inside(path):
    torch.save({"args": {"model": Evil()}, "trainer": {"unitok": {}}}, path)


def _state(change):
    return lambda path: _edit(path, lambda content: change(content["trainer"]["unitok"]))


def _rename(state):
    state["encoder.blocks.0.attn.QKV.weight"] = state.pop("encoder.blocks.0.attn.qkv.weight")


def _cut(state):
    state["fc_norm.weight"] = state["fc_norm.weight"][:-1]


def _key_bias(state):
    state["quant_proj.attn.zero_k_bias"] = state["quant_proj.attn.zero_k_bias"] + 1


SIZES_TEXT = (
    '{"stem": 8, "dims": [8, 16, 24], "depths": [1, 1], "depth": 1, "heads": 5, "mlp_ratio": 1.25, '
    '"decoder_depths": [1, 1]}'
)
REFUSALS = {
    "truncated": (_truncate, "cannot read weights"),
    "pickled code": (_pickle, "cannot read weights"),
    "code inside": (_evil_inside, "more than tensors"),
    "renamed": (_state(_rename), r"missing: encoder\.blocks\.0\.attn\.qkv\.weight; unexpected: encoder.*QKV"),
    "extra": (_state(lambda s: s.update(extra=torch.zeros(1))), "unexpected: extra"),
    "missing": (_state(lambda s: s.pop("decoder.norm.bias")), r"missing: decoder\.norm\.bias"),
    "shape": (_state(_cut), r"wrong shape: fc_norm\.weight \[23\] instead of \[24\]"),
    "key bias": (_state(_key_bias), "zero_k_bias is not zero"),
    "no args": (lambda p: _edit(p, lambda c: c.pop("args")), "'args'"),
    "no state": (lambda p: _edit(p, lambda c: c["trainer"].pop("unitok")), "trainer.unitok"),
    "odd sizes": (lambda p: _edit(p, lambda c: c["args"].update(vocab_size=47)), "do not divide into 3"),
    "argument lost": (lambda p: _edit(p, lambda c: c["args"].pop("img_size")), "img_size"),
    "argument wrong": (lambda p: _edit(p, lambda c: c["args"].update(embed_dim="many")), "many"),
    "unknown projection": (lambda p: _edit(p, lambda c: c["args"].update(quant_proj="conv")), "conv"),
    "no sizes": (lambda p: (p.parent / "vit_config.json").unlink(), "vit_config.json"),
    "half the sizes": (lambda p: (p.parent / "vit_config.json").write_text('{"stem": 8}'), "dims"),
    "no codebooks": (lambda p: _edit(p, lambda c: c["args"].update(num_codebooks=0)), "do not divide into 0"),
    "endless": (lambda p: _edit(p, lambda c: c["args"].update(img_size=float("inf"))), "do not describe"),
    "a fraction": (lambda p: _edit(p, lambda c: c["args"].update(img_size=32.7)), "img_size=32.7"),
    "odd image": (lambda p: _edit(p, lambda c: c["args"].update(img_size=50)), "sizes do not fit.*50"),
    "odd heads": (lambda p: (p.parent / "vit_config.json").write_text(SIZES_TEXT), "sizes do not fit.*num_heads"),
    "a number as name": (_state(lambda s: s.update({3: torch.zeros(1)})), "by name"),
    "a list": (lambda p: torch.save([1, 2], p), "no released checkpoint"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_damaged_files_are_refused_in_one_line(tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    save_official(tokenizer, path)
    damage, message = REFUSALS[name]
    damage(path)
    with pytest.raises(CheckpointError, match=message) as refused:
        UniTok.from_official(path)
    assert "\n" not in str(refused.value) and "x.pth" in str(refused.value) or "vit_config.json" in str(refused.value)
    assert not (tmp_path / "executed").exists(), "a checkpoint was able to run a command"


def test_recorded_checkpoint_damaged_by_a_key_is_refused(tmp_path):
    folder = fixture("tokenizer_small")
    for name in ("checkpoint.pth", "vit_config.json"):
        shutil.copy(folder / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    _edit(tmp_path / "checkpoint.pth", lambda content: _rename(content["trainer"]["unitok"]))
    with pytest.raises(CheckpointError, match="missing.*unexpected"):
        UniTok.from_official(tmp_path / "checkpoint.pth")


# ---- the command


def test_convert_command_both_ways(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "own")
    assert main(["convert", "tokenizer", str(tmp_path / "own"), str(tmp_path / "x.pth")]) == 0
    assert main(["convert", "tokenizer", str(tmp_path / "x.pth"), str(tmp_path / "back")]) == 0
    assert states_equal(UniTok.from_pretrained(tmp_path / "back"), tokenizer)
    capsys.readouterr()
    for source, dest, what in (
        ("own", "y", "must be a released file"),
        ("x.pth", "y.pth", "must be a folder"),
        ("x.pth", "own", "not empty"),
        ("nowhere.pth", "z", "no such file"),
    ):
        assert main(["convert", "tokenizer", str(tmp_path / source), str(tmp_path / dest)]) == 2
        error = capsys.readouterr().err
        assert what in error and error.count("\n") == 1


# ---- initial weights


def clip_file(model, path, drop=(), change=None):
    """A file in OpenCLIP's layout with the parts that a ViTamin CLIP model shares with `model`."""
    names = {"encoder.backbone.": "visual.trunk.patch_embed.backbone.", "encoder.blocks.": "visual.trunk.blocks.",
             "fc_norm.": "visual.trunk.fc_norm.", "text_encoder.": "text.", "encoder.norm.": "visual.trunk.norm.",
             "projection.": "visual.head.proj."}  # fmt: skip
    state = {"logit_scale": torch.tensor(3.5), "text.attn_mask": torch.zeros(9, 9), "visual.trunk.extra": torch.ones(2)}
    for name, value in model.state_dict().items():
        prefix = next((p for p in names if name.startswith(p)), None)
        if prefix and name not in drop:
            state[names[prefix] + name.removeprefix(prefix)] = value.clone()
    if change:
        change(state)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    return path


def test_clip_weights_begin_encoder_and_text_tower(tmp_path):
    source, target = (make_tokenizer(seed=s, text_tower=CLIP_TOWER) for s in (1, 2))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    report = load_clip(target, clip_file(source, tmp_path / "clip.pt", drop=("projection.bias",)))
    expected = source.state_dict()
    for name, value in target.state_dict().items():
        if name.startswith(("encoder.", "text_encoder.", "fc_norm.")) or name == "projection.weight":
            assert torch.equal(value, expected[name]), name
        elif name == "logit_scale":
            assert value.item() == 3.5
        else:
            assert torch.equal(value, before[name]), name
    assert report.unused == ["visual.trunk.extra"]
    assert set(report.not_loaded) | set(report.loaded) == set(before) and "projection.bias" in report.not_loaded
    assert "decoder.*" in str(report) and "visual.trunk.extra" in str(report)


def test_clip_layout_is_open_clips(tmp_path):
    """A model built by open_clip itself: every tensor of its image trunk and text tower finds its place."""
    import open_clip

    clip = open_clip.create_model("ViTamin-S", pretrained=None)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    tower = TextTowerConfig(width=384, heads=6, layers=12)
    from unitok.tokenizer import UniTokConfig

    model = UniTok(UniTokConfig(**VITAMIN_SIZES["vitamin_small"], image_size=224, embed_dim=384, text_tower=tower))
    report = load_clip(model, tmp_path / "clip.pt")
    left = [name for name in report.not_loaded if name.startswith(("encoder", "text_encoder"))]
    assert set(left) <= {"encoder.pos_embed", "encoder.norm.weight", "encoder.norm.bias"}
    assert report.unused == ["visual.trunk.pos_embed"]  # UniTok's encoder has no positions
    assert {"fc_norm.weight", "projection.weight", "logit_scale"} <= set(report.loaded)
    assert torch.equal(model.text_encoder.text_projection, clip.text.text_projection)


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("visual.trunk.blocks.0.attn.qkv.weight"), "missing: encoder.blocks.0.attn.qkv.weight"),
    (lambda s: s.update({"text.ln_final.bias": torch.zeros(3)}), "wrong shape: text_encoder.ln_final.bias"),
])  # fmt: skip
def test_clip_files_that_do_not_fit_are_refused(tmp_path, change, message):
    model = make_tokenizer(text_tower=CLIP_TOWER)
    with pytest.raises(CheckpointError, match=message):
        load_clip(model, clip_file(model, tmp_path / "clip.pt", change=change))
    with pytest.raises(UserError, match="init_clip"):
        load_clip(model, tmp_path / "nowhere.pt")


def test_a_tokenizer_begins_another(tokenizer, tmp_path):
    save_official(tokenizer, tmp_path / "x.pth")
    tokenizer.save_pretrained(tmp_path / "folder")
    for source in ("x.pth", "folder"):
        target = make_tokenizer(seed=4, text_tower=CLIP_TOWER, num_query_tokens=2, distill_dim=5)
        report = load_tokenizer(target, tmp_path / source)
        assert target.config.preprocess == "plain"
        assert report.not_loaded == ["distill_head.weight", "distill_head.bias"] and not report.unused
        assert all(torch.equal(target.state_dict()[name], value) for name, value in tokenizer.state_dict().items())
    for changes, name in (({"num_heads": 4}, "num_heads"), ({"projection_causal": True}, "projection_causal"),
                          ({"text_tower": CLIP_TOWER | {"heads": 4}}, "text_tower")):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"made with {name}="):
            load_tokenizer(
                make_tokenizer(num_query_tokens=2, **({"text_tower": CLIP_TOWER} | changes)), tmp_path / "folder"
            )
    other = make_tokenizer(text_tower=CLIP_TOWER, num_query_tokens=2, codebook_size=8)
    with pytest.raises(CheckpointError, match="quantizer.codebooks"):
        load_tokenizer(other, tmp_path / "folder")


def test_safetensors_in_the_released_layout(tokenizer, tmp_path):
    state = {name: value.clone() for name, value in to_official_state(tokenizer).items()}
    save_file(state, tmp_path / "model.safetensors")
    args, sizes = official_args(tokenizer.config)
    with pytest.raises(CheckpointError, match="args.json"):
        UniTok.from_official(tmp_path / "model.safetensors")
    (tmp_path / "args.json").write_text(json.dumps(args))
    (tmp_path / "vit_config.json").write_text(json.dumps(sizes))
    loaded = UniTok.from_official(tmp_path / "model.safetensors")
    assert torch.equal(loaded.quantizer.codebooks, tokenizer.quantizer.codebooks)
