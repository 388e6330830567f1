"""UniTok: shapes, equality of the fast upsampling, saving and loading, precision, checkpointing, refusals."""

import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import (
    TEXTS,
    assert_same_gradients,
    gradients,
    make_tokenizer,
    random_codes,
    random_pixels,
    text_tower,
    tokenizer_config,
)

from unitok.core.errors import CheckpointError, ConfigError, DataError, UserError
from unitok.core.pretrained import load_model_folder
from unitok.data.sentencepieces import load_sentencepiece, train_sentencepiece
from unitok.tokenizer import TextTowerConfig, UniTok
from unitok.tokenizer.decoder import Upsample
from unitok.tokenizer.projection import AttentionProjection


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("text") / "text.model", 48)


@pytest.fixture
def with_text(text_file):
    vocab_size = load_sentencepiece(text_file).get_piece_size() + 2
    tokenizer = make_tokenizer(text_tower=text_tower(vocab_size=vocab_size))
    tokenizer.set_text_model(text_file)
    return tokenizer


# ---- upsampling


@pytest.mark.parametrize("size", [(5, 5), (4, 7), (1, 3)])
def test_upsample_equals_doubling_then_convolving(size):
    torch.manual_seed(0)
    layer = Upsample(6, 5)
    x = torch.randn(2, 6, *size, requires_grad=True)
    leaves = [x, layer.conv.weight, layer.conv.bias]
    ours = layer(x)
    plain = layer.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    mix = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad((ours * mix).sum(), leaves), torch.autograd.grad((plain * mix).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


# ---- shapes


def test_encode_and_decode_have_the_promised_shapes():
    tokenizer = make_tokenizer()
    pixels = random_pixels(3, 3, 32, 32)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (3, 3, 4) and codes.dtype == torch.int64
    assert codes.shape[2] == tokenizer.config.num_positions
    decoded = tokenizer.decode(codes)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1
    assert tokenizer.code_vectors(codes).shape == (3, 4, 12)
    assert torch.equal(tokenizer.reconstruct(pixels), decoded)
    assert tokenizer.encode(pixels[:0]).shape == (0, 3, 4) and tokenizer(pixels[:0]).codes.shape == (0, 3, 4)
    assert tokenizer.decode(codes[:0]).shape == (0, 3, 32, 32)
    with pytest.raises(DataError, match="codes of torch.float32: expected whole numbers"):
        tokenizer.decode(codes.float())


@pytest.mark.parametrize("size", [(32, 64), (48, 16)])
def test_images_that_are_not_square(size):
    tokenizer = make_tokenizer()
    pixels = random_pixels(2, 3, *size)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (2, 3, size[0] * size[1] // 256)
    assert tokenizer.decode(codes, image_shape=size).shape == pixels.shape
    assert tokenizer(pixels).reconstruction.shape == pixels.shape
    with pytest.raises(DataError, match=r"image_shape=\(H, W\)"):
        tokenizer.decode(codes)


def test_query_tokens_come_before_the_patches():
    tokenizer = make_tokenizer(num_query_tokens=5)
    pixels = random_pixels(2, 3, 32, 32)
    codes = tokenizer.encode(pixels)
    assert codes.shape[2] == 9 == tokenizer.config.num_positions
    assert tokenizer.decode(codes).shape == pixels.shape


@pytest.mark.parametrize("shape", [(1, 3, 40, 32), (1, 3, 32, 31), (1, 1, 32, 32), (3, 32, 32)])
def test_wrong_pixel_shapes_are_refused_by_their_shape(shape):
    with pytest.raises(DataError) as refused:
        make_tokenizer().encode(torch.zeros(shape))
    assert str(list(shape)) in str(refused.value) and "16" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_position_order_is_row_major():
    """Changing the right half of a wide image changes the codes' columns there most, never the positions' order."""
    tokenizer = make_tokenizer()
    codes = random_codes(tokenizer.config, 1, 8)
    first = tokenizer.decode(codes, image_shape=(32, 64))
    changed = codes.clone()
    changed[:, :, 3] = (changed[:, :, 3] + 5) % 16  # row 0, column 3 of a 2 x 4 grid: the upper right corner
    difference = (tokenizer.decode(changed, image_shape=(32, 64)) - first).abs().mean(dim=(0, 1))
    blocks = difference.view(2, 16, 4, 16).mean(dim=(1, 3))
    assert blocks.argmax() == 3


# ---- one pass


def test_forward_agrees_with_encode_decode_and_embed(with_text):
    pixels = random_pixels(2, 3, 32, 32)
    ids = with_text.tokenize_text(["a photo of a red circle", "yes"])
    out = with_text(pixels, ids, with_entropy=True)
    assert torch.equal(out.codes, with_text.encode(pixels))
    torch.testing.assert_close(out.reconstruction.clamp(-1, 1), with_text.decode(out.codes), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.image_embedding, with_text.encode_image(pixels), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.text_embedding, with_text.encode_text(ids), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.image_embedding.norm(dim=-1), torch.ones(2))
    assert out.image_embedding.shape == out.text_embedding.shape == (2, 20)
    assert out.features.shape == (2, 4, 24) and out.usage.shape == (3, 16)


def test_the_last_convolution_makes_the_reconstruction_from_last_hidden():
    tokenizer = make_tokenizer()
    out = tokenizer(random_pixels(1, 3, 32, 32))
    assert torch.equal(tokenizer.decoder.up_conv4.conv2(out.last_hidden), out.reconstruction)


def test_an_image_does_not_depend_on_its_batch():
    tokenizer = make_tokenizer()
    pixels = random_pixels(3, 3, 32, 32)
    together = tokenizer.encode(pixels)
    for index in range(3):
        assert torch.equal(tokenizer.encode(pixels[index : index + 1]), together[index : index + 1])


def test_gradients_reach_everything_that_is_trained(with_text):
    out = with_text(random_pixels(2, 3, 32, 32), with_text.tokenize_text(["red", "two"]))
    similarity = (out.image_embedding @ out.text_embedding.T)[0, 0] * with_text.logit_scale.exp().squeeze()
    found = gradients(out.reconstruction.square().mean() + out.vq_loss + similarity, with_text)
    missing = {name for name, _ in with_text.named_parameters()} - {n for n, g in found.items() if g.abs().sum() > 0}
    assert not missing


# ---- projections


@pytest.mark.parametrize(("in_dim", "out_dim", "heads"), [(24, 12, 2), (12, 24, 2)])
def test_projection_equals_attention_written_out(in_dim, out_dim, heads):
    """Going down heads are averaged, going up they are concatenated; keys have no bias."""
    torch.manual_seed(0)
    layer = AttentionProjection(in_dim, out_dim, heads, mlp_ratio=1.5)
    torch.nn.init.normal_(layer.attn.q_bias)
    torch.nn.init.normal_(layer.attn.v_bias)
    x = torch.randn(2, 5, in_dim)
    normed, inner = layer.norm1(x), max(in_dim, out_dim)
    q, k, v = (normed @ part.T for part in layer.attn.qkv.weight.split(inner))
    q, v = q + layer.attn.q_bias, v + layer.attn.v_bias
    width, outputs = inner // heads, []
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        scores = q[..., columns] @ k[..., columns].transpose(1, 2) / width**0.5
        outputs.append(scores.softmax(-1) @ v[..., columns])
    joined = sum(outputs) / heads if in_dim > out_dim else torch.cat(outputs, dim=-1)
    middle = layer.proj(layer.norm3(x)) + layer.attn.proj(joined)
    torch.testing.assert_close(layer(x), middle + layer.mlp(layer.norm2(middle)), atol=1e-5, rtol=1e-5)


def test_causal_projection_never_sees_later_positions():
    torch.manual_seed(0)
    layer = AttentionProjection(12, 24, 2, mlp_ratio=1.5, causal=True)
    x = torch.randn(2, 6, 12)
    full = layer(x)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(layer(changed)[:, :4], full[:, :4])
    assert not torch.equal(layer(changed)[:, 4:], full[:, 4:])


def test_linear_projection_needs_no_divisible_width():
    tokenizer = make_tokenizer(projection="linear", code_dim=7)
    assert isinstance(tokenizer.quant_proj, torch.nn.Linear)
    assert tokenizer.decode(tokenizer.encode(random_pixels(1, 3, 32, 32))).shape == (1, 3, 32, 32)


# ---- saving and loading


def test_save_and_load_gives_the_same_bits(with_text, tmp_path):
    with_text.save_pretrained(tmp_path)
    expected = {name: value.clone() for name, value in with_text.state_dict().items()}  # a pass counts usage
    for load in (UniTok.from_pretrained, lambda folder: load_model_folder(UniTok, folder)):
        loaded = load(tmp_path).eval()
        state = loaded.state_dict()
        assert state.keys() == expected.keys()
        assert not [name for name in state if not torch.equal(state[name], expected[name])]
        pixels, texts = random_pixels(2, 3, 32, 32), ["a photo of a red circle", "is there a green triangle?"]
        ids = loaded.tokenize_text(texts)
        assert torch.equal(ids, with_text.tokenize_text(texts))
        ours, theirs = loaded(pixels, ids), with_text(pixels, ids)
        assert torch.equal(ours.reconstruction, theirs.reconstruction)
        assert torch.equal(ours.text_embedding, theirs.text_embedding)


def _drop_key(file):
    state = load_file(file)
    state.pop("fc_norm.weight")
    save_file(state, file, metadata={"format": "pt"})


def _add_key(file):
    save_file(load_file(file) | {"extra": torch.zeros(1)}, file, metadata={"format": "pt"})


def _cut_key(file):
    state = load_file(file)
    save_file(state | {"fc_norm.weight": state["fc_norm.weight"][:-1].clone()}, file, metadata={"format": "pt"})


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [_drop_key, _add_key, _cut_key, _truncate])
def test_damaged_folders_are_refused_in_one_line(damage, tmp_path):
    """By the plain loader of transformers, too: it would fill gaps with fresh weights."""
    make_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors")
    for load in (UniTok.from_pretrained, lambda folder: load_model_folder(UniTok, folder)):
        with pytest.raises(CheckpointError) as refused:
            load(tmp_path)
        assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_saving_over_itself_keeps_the_text_model(with_text, tmp_path):
    with_text.save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert torch.equal(UniTok.from_pretrained(tmp_path).tokenize_text(["red"]), with_text.tokenize_text(["red"]))


def test_released_pixel_values_of_a_seed_do_not_drift():
    """Same seed, same model: building is deterministic."""
    pixels = random_pixels(1, 3, 32, 32)
    assert torch.equal(make_tokenizer(seed=3).encode(pixels), make_tokenizer(seed=3).encode(pixels))
    assert not torch.equal(make_tokenizer(seed=3)(pixels).features, make_tokenizer(seed=4)(pixels).features)


def test_without_a_text_tower_open_clip_is_not_needed(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", None)  # importing it now raises ImportError
    tokenizer = make_tokenizer(text_tower=None)
    tokenizer.save_pretrained(tmp_path)
    pixels = random_pixels(1, 3, 32, 32)
    assert torch.equal(UniTok.from_pretrained(tmp_path).eval().encode(pixels), tokenizer.encode(pixels))
    with pytest.raises(UserError, match="no text tower"):
        tokenizer.encode_text(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(UserError, match="no text tower"):
        tokenizer.tokenize_text(["red"])
    with pytest.raises(ImportError):
        make_tokenizer(text_tower=text_tower())


# ---- text


def test_text_ids_begin_and_end_and_long_texts_are_cut(with_text):
    ids = with_text.tokenize_text(["red", "a photo of a red circle " * 5])
    vocab_size, length = with_text.config.text_tower["vocab_size"], 9
    assert ids.shape == (2, length)
    assert ids[:, 0].tolist() == [vocab_size - 2] * 2
    assert ids[1, -1] == vocab_size - 1, "the end token must survive cutting: the tower pools there"
    assert (ids.argmax(dim=1) == torch.tensor([(ids[0] != 0).sum() - 1, length - 1])).all()


def test_text_after_the_end_token_does_not_matter(with_text):
    ids = with_text.tokenize_text(["red"])
    changed = ids.clone()
    changed[:, -1] = 5
    assert torch.equal(with_text.encode_text(ids), with_text.encode_text(changed))


def test_text_tokenizer_refusals(with_text, text_file):
    lost = make_tokenizer(text_tower=text_tower())
    with pytest.raises(UserError, match="text_tokenizer.model"):
        lost.tokenize_text(["red"])
    small = make_tokenizer(text_tower=text_tower(vocab_size=12))
    small.set_text_model(text_file)
    with pytest.raises(UserError, match="vocab_size=12"):
        small.tokenize_text(["red"])


# ---- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code_dim": 5}, r"3\*5=15 does not divide width=24"),
        ({"image_size": 40}, "image_size=40 is not a multiple of 16"),
        ({"num_heads": 5}, "width=24 .* num_heads=5"),
        ({"num_codebooks": 0}, "num_codebooks=0"),
        ({"codebook_size": 1}, "codebook_size=1"),
        ({"codebook_size": 16.0}, "codebook_size=16.0"),
        ({"projection": "conv"}, "projection='conv'"),
    ],
)
def test_contradicting_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as refused:
        tokenizer_config(**changes)
    assert "\n" not in str(refused.value)


def test_configuration_survives_json(tmp_path):
    config = tokenizer_config(text_tower=TextTowerConfig(vocab_size=40, context_length=9, width=16, heads=2, layers=1))
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.text_tower_config == TextTowerConfig(40, 9, 16, 2, 1)


# ---- precision and memory


def test_codes_and_projections_stay_fp32_under_autocast(with_text):
    """bf16 around the codes would change which entry is chosen."""
    pixels, ids = random_pixels(2, 3, 32, 32), with_text.tokenize_text(["red", "two"])
    seen = {}
    for name in ("quant_proj", "quantizer", "post_quant_proj", "fc_norm", "projection", "decoder"):
        part = getattr(with_text, name)
        part.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: (inputs[0], out)}))
    with torch.autocast("cpu", torch.bfloat16):
        out = with_text(pixels, ids)
        assert with_text.encoder.blocks[0].attn.qkv(torch.zeros(1, 24)).dtype == torch.bfloat16  # autocast is on
    first = dict(seen)
    for name in ("quant_proj", "post_quant_proj", "fc_norm", "projection"):
        assert first[name][0].dtype == first[name][1].dtype == torch.float32, name
    assert first["quantizer"][0].dtype == first["quantizer"][1].quantized.dtype == torch.float32
    assert out.features.dtype == out.vq_loss.dtype == out.image_embedding.dtype == torch.float32
    assert out.reconstruction.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(with_text.encode(pixels), out.codes)
        assert with_text.encode_image(pixels).dtype == torch.float32
        torch.testing.assert_close(with_text.encode_image(pixels), out.image_embedding, atol=1e-6, rtol=0)
        with_text.decode(out.codes)
    assert seen["post_quant_proj"][1].dtype == torch.float32


def test_gradient_checkpointing_changes_nothing(with_text):
    pixels, ids = random_pixels(2, 3, 32, 32), with_text.tokenize_text(["red", "two"])
    with_text.train()

    def loss_and_gradients():
        out = with_text(pixels, ids)
        similarity = (out.image_embedding @ out.text_embedding.T).square().sum()
        loss = out.reconstruction.square().mean() + out.vq_loss + similarity
        return loss, gradients(loss, with_text)

    loss, plain = loss_and_gradients()
    with_text.gradient_checkpointing_enable()
    again, checkpointed = loss_and_gradients()
    assert torch.equal(loss, again)
    assert_same_gradients(checkpointed, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_text_tower_in_half_precision_works(with_text, tmp_path, dtype):
    with_text.save_pretrained(tmp_path)
    half = UniTok.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = half.tokenize_text(["red", "two"])
    ours, theirs = half.encode_text(ids), with_text.encode_text(ids)
    assert half.projection.weight.dtype == torch.float32
    assert F.cosine_similarity(ours.float(), theirs).min() > 0.99


def test_a_tokenizer_loaded_in_half_precision_works(tmp_path):
    """Projections and codebooks stay fp32; codes differ only where rounding of the encoder decides."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    half = UniTok.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.quantizer.codebooks.dtype == torch.float32 and half.decoder.norm.weight.dtype == torch.bfloat16
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = half.encode(pixels.bfloat16())
    assert torch.equal(half.encode(pixels.bfloat16().float()), codes), "pixels of any precision"
    assert codes.is_contiguous() and (codes == tokenizer.encode(pixels)).float().mean() > 0.6
    shown = half.decode(tokenizer.encode(pixels)).float()
    assert (shown - tokenizer.reconstruct(pixels)).abs().mean() < 0.02
