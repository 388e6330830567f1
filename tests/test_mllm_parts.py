"""The unified model's parts on their own: where modalities join, the depth transformer, the code embedder."""

import pytest
import torch
from tiny import BOS, IMAGE, PAD, every_mllm_variant, make_mllm, make_tokenizer, random_codes

from unitok.core.errors import DataError

L = 6
IMG = [IMAGE] * L

# ---- where modalities join


def test_image_vectors_stand_at_their_placeholders_in_order():
    model = make_mllm(image_position_embedding=True)
    codes = random_codes(model.config, 3, L)
    ids = torch.tensor([[BOS, *IMG, 9, *IMG], [BOS, 8, *IMG, *([PAD] * L)]])
    inputs, vectors = model.embed(ids, codes), model.embed_codes(codes)
    assert torch.equal(inputs[0, 1 : 1 + L], vectors[0])
    assert torch.equal(inputs[0, 2 + L :], vectors[1])
    assert torch.equal(inputs[1, 2 : 2 + L], vectors[2])
    words = model.get_input_embeddings().weight
    assert torch.equal(inputs[0, 1 + L], words[9]) and torch.equal(inputs[1, :2], words[[BOS, 8]])


def test_a_placeholder_outside_the_vocabulary():
    """The released model's placeholder is no word of its tokenizer."""
    model = make_mllm(image_token_id=4000)
    codes = random_codes(model.config, 1, L)
    inputs = model.embed(torch.tensor([[BOS, *([4000] * L)]]), codes)
    assert torch.equal(inputs[0, 1:], model.embed_codes(codes)[0])


@pytest.mark.parametrize(
    ("ids", "images", "numbers"),
    [
        ([[BOS, *IMG]], 2, ("6 image placeholders", "fill 12")),
        ([[BOS, *IMG, IMAGE]], 1, ("7 image placeholders", "fill 6")),
        ([[BOS, 9]], 1, ("0 image placeholders", "fill 6")),
        ([[BOS, *IMG]], 0, ("6 image placeholders", "fill 0")),
        ([[BOS, *IMG, IMAGE, IMAGE], [BOS, IMAGE, IMAGE, IMAGE, IMAGE, 9, 9, 9, 9]], 2, ("row 0", "8", "6")),
    ],
)
def test_placeholders_and_codes_must_agree(ids, images, numbers):
    """The last case: sums agree, but an image would run over into the next row."""
    model = make_mllm()
    codes = random_codes(model.config, images, L) if images else None
    with pytest.raises(DataError) as refused:
        model.embed(torch.tensor(ids), codes)
    assert all(number in str(refused.value) for number in numbers) and "\n" not in str(refused.value)


@pytest.mark.parametrize("bad", [-1, 16])
def test_codes_outside_the_codebook_are_refused(bad):
    model = make_mllm()
    codes = random_codes(model.config, 1, L)
    codes[0, 1, 2] = bad
    with pytest.raises(DataError, match="expected 0 to 15"):
        model.embed(torch.tensor([[BOS, *IMG]]), codes)
    with pytest.raises(DataError, match=r"expected \[B, K=3, L\]"):
        model.embed(torch.tensor([[BOS, *IMG]]), codes[:, :2])


def test_more_positions_than_embeddings_are_refused():
    model = make_mllm(image_position_embedding=True)
    with pytest.raises(DataError, match="7 image positions.* 6"):
        model.embed_codes(random_codes(model.config, 1, 7))


# ---- depth transformer and embedder on their own


@every_mllm_variant
def test_depth_steps_equal_the_teacher_forced_pass(changes):
    model = make_mllm(**changes)
    torch.manual_seed(1)
    hidden, codes = torch.randn(5, 32), random_codes(model.config, 5, 1)[:, :, 0]
    full = model.depth(hidden, codes)
    cache, inputs = model.depth.new_cache(5, like=hidden), hidden
    with torch.no_grad():
        for k in range(model.config.num_codebooks):
            logits = model.depth.step(k, inputs, cache)
            assert logits.shape == (5, 16)
            torch.testing.assert_close(logits, full[:, k], atol=1e-5, rtol=1e-5)
            inputs = codes[:, k]


def test_depth_output_k_depends_on_the_codes_before_k_only():
    model = make_mllm()
    hidden, codes = torch.randn(4, 32), random_codes(model.config, 4, 1)[:, :, 0]
    full = model.depth(hidden, codes)
    for changed in range(3):
        other = codes.clone()
        other[:, changed] = (other[:, changed] + 1) % 16
        logits = model.depth(hidden, other)
        assert torch.equal(logits[:, : changed + 1], full[:, : changed + 1])
        if changed < 2:
            assert not torch.allclose(logits[:, changed + 1], full[:, changed + 1])


def test_depth_layer_is_a_llama_layer():
    """Same parameters, same output as transformers' own layer (the released depth layers are Llama's)."""
    from transformers import LlamaConfig, LlamaModel

    model = make_mllm(depth_num_layers=2)
    config = LlamaConfig(
        vocab_size=4, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=model.config.text_config.rms_norm_eps,
    )  # fmt: skip
    llama = LlamaModel(config).eval()
    state = {}
    for name, tensor in model.depth.state_dict().items():
        if name.startswith(("layers.", "norm.")):
            parts = name.split(".")
            is_mlp = parts[-2] in ("gate_proj", "up_proj", "down_proj")
            state[".".join([*parts[:2], "mlp", *parts[2:]]) if is_mlp else name] = tensor
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert set(missing) == {"embed_tokens.weight"} and not unexpected
    hidden, codes = torch.randn(3, 32), random_codes(model.config, 3, 1)[:, :, 0]
    inputs = [hidden] + [embed(codes[:, k]) for k, embed in enumerate(model.depth.code_embeddings)]
    out = llama(inputs_embeds=torch.stack(inputs, dim=1)).last_hidden_state
    logits = out @ model.depth.head.weight[0].T + model.depth.head.bias[0]
    torch.testing.assert_close(model.depth(hidden, codes), logits, atol=1e-4, rtol=1e-4)


def test_embedder_is_causal():
    model = make_mllm()
    codes = random_codes(model.config, 2, L)
    vectors = model.embed_codes(codes)
    changed = codes.clone()
    changed[:, :, 4] = (changed[:, :, 4] + 3) % 16
    other = model.embed_codes(changed)
    assert torch.equal(other[:, :4], vectors[:, :4])
    assert (other[:, 4:] - vectors[:, 4:]).abs().amax(dim=(0, 2)).min() > 0


def test_attach_tokenizer_takes_codebooks_and_projection():
    tokenizer = make_tokenizer()
    model = make_mllm(num_image_positions=4)
    model.attach_tokenizer(tokenizer)
    codes = random_codes(model.config, 2, 4)
    torch.testing.assert_close(model.embedder.code_vectors(codes), tokenizer.code_vectors(codes), atol=1e-6, rtol=0)
    for name, tensor in tokenizer.post_quant_proj.state_dict().items():
        assert torch.equal(model.embedder.projection.state_dict()[name], tensor)
    assert "embedder.codebooks" not in dict(model.named_parameters()), "codebooks are the tokenizer's: not trained"
    with pytest.raises(DataError, match=r"\[3, 20, 4\].*\[3, 16, 4\]"):
        model.attach_tokenizer(make_tokenizer(codebook_size=20))
