"""Products and attention on a CPU, prepared or in blocks, are the ordinary ones."""

import pytest
import torch
import torch.nn.functional as F

from unitok.core import onednn
from unitok.mllm import linears


@pytest.mark.parametrize("bias", [True, False])
def test_wide_products_are_the_ordinary_ones(bias, monkeypatch):
    rng, calls, original = torch.Generator().manual_seed(0), [], onednn.packed_product
    layer = torch.nn.Linear(40, 24, bias=bias)
    wide, narrow = torch.randn(3, onednn.LEAST_ROWS, 40, generator=rng), torch.randn(2, 3, 40, generator=rng)
    monkeypatch.setattr(onednn, "packed_product", lambda: calls.append(1) or original())
    with torch.no_grad(), onednn.WideProducts():
        torch.testing.assert_close(layer(wide), F.linear(wide, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            layer(wide.transpose(0, 1)), layer(wide).transpose(0, 1), atol=1e-5, rtol=1e-5, msg="strided input"
        )
        used = len(calls)
        layer(narrow), layer.double()(wide.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(wide).dtype == torch.bfloat16
    assert used == 4 and len(calls) == used
    with onednn.WideProducts():
        layer(wide).sum().backward()
    assert len(calls) == used and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("length", "kv_heads"), [(2 * onednn.QUERIES, 4), (2 * onednn.QUERIES + 5, 2)])
def test_long_causal_attention_in_blocks_is_the_ordinary_one(length, kv_heads, monkeypatch):
    used, original = [], onednn.causal_in_blocks
    monkeypatch.setattr(onednn, "causal_in_blocks", lambda *args: used.append(1) or original(*args))
    query, key, value = (torch.randn(2, length, heads, 8).transpose(1, 2) for heads in (4, kv_heads, kv_heads))
    attend, more = F.scaled_dot_product_attention, {"scale": 0.3, "enable_gqa": kv_heads < 4}
    expected = attend(query, key, value, is_causal=True, **more)
    with torch.no_grad(), onednn.WideProducts():
        torch.testing.assert_close(attend(query, key, value, is_causal=True, **more), expected, atol=1e-5, rtol=1e-5)
        assert len(used) == 1
        attend(query, key, value, **more), attend(query[:, :, :-1], key, value, is_causal=True, **more)
        attend(query[:, :, :60], key[:, :, :60], value[:, :, :60], is_causal=True, **more)
    with onednn.WideProducts():  # gradients
        attend(query, key, value, is_causal=True, **more)
    assert len(used) == 1


@pytest.mark.parametrize("before", [0, 1, 40])
@pytest.mark.parametrize("length", [1, onednn.QUERIES, 2 * onednn.QUERIES + 5])
def test_blocks_of_attention_follow_on_what_is_known_and_hide_padding(before, length):
    total, generator = before + length, torch.Generator().manual_seed(before + length)
    query = torch.randn(3, 4, length, 8, generator=generator)
    key, value = torch.randn(2, 3, 2, total, 8, generator=generator)
    causal = torch.ones(length, total, dtype=torch.bool).tril(before)
    seen = (torch.rand(3, 1, 1, total, generator=generator) < 0.7) & causal | causal.triu(before)
    for mask, given in ((causal, None), (seen, seen)):
        expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
        found = onednn.causal_in_blocks(query, key, value, 0.3, True, given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_weights_in_blocks_are_kept_until_a_source_changes(monkeypatch):
    """Also where no version counter tells, and where sums stay the same; one that is dropped takes its blocks along."""
    made, weight, other = [], torch.nn.Parameter(torch.randn(24, 16)), torch.randn(24, 16)

    def blocks(name="sum", owner=weight):
        return onednn.kept_packed(owner, name, [owner, other], 3, lambda: made.append(1) or owner.detach() + other)

    x = torch.randn(3, 16)
    product = lambda: onednn.packed_product()(x, blocks(), None, "none", [], "")  # noqa: E731
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: weight.data.copy_(weight.data[:, torch.randperm(16)]),
            lambda: other.neg_(),
        ):
            change()
            before = len(made)
            torch.testing.assert_close(product(), x @ (weight + other).T, atol=1e-5, rtol=1e-5)
            assert blocks() is blocks() and len(made) == before + 1
    assert blocks("another") is not blocks()
    monkeypatch.setattr(onednn, "MOST_KEPT_BYTES", 100)
    large = torch.randn(24, 16)
    assert blocks(owner=large) is not blocks(owner=large)
    held = len(onednn._KEPT)
    del large
    assert len(onednn._KEPT) == held - 1


def test_wide_products_are_on_for_prompts_only():
    assert isinstance(onednn.wide_products(torch.zeros(2, 32, dtype=torch.long)), onednn.WideProducts)
    assert isinstance(onednn.wide_products(torch.zeros(2, 32, 8)), onednn.WideProducts)
    assert not isinstance(onednn.wide_products(torch.zeros(8, 1, dtype=torch.long)), onednn.WideProducts)
    assert not isinstance(onednn.wide_products(torch.zeros(2, 3, 800)), onednn.WideProducts)


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [24, 800])  # 800 x 800 are too many weights to be turned
def test_prepared_products_are_the_ordinary_ones_on_any_processor(intel, bias, size, monkeypatch):
    monkeypatch.setattr(linears, "is_intel", lambda: intel)
    layer = torch.nn.Linear(size, size, bias=bias)
    for rows in (1, 8, 70):
        x = torch.randn(rows, size)
        for _ in range(2):  # the second time the weights are others
            with torch.no_grad():
                layer.weight.mul_(-1.5)
                expected = layer(x)
            product = linears.linear_map(layer.weight, layer.bias, rows, layer.weight)
            torch.testing.assert_close(product(x), expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(linears.joined([layer], rows)(x), expected, atol=1e-4, rtol=1e-4)
