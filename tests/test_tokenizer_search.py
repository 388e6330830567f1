"""Search, entropy loss and usage counts in blocks against the plain formulas, in value and gradient."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from unitok.core.errors import ConfigError, DataError
from unitok.tokenizer import search as module
from unitok.tokenizer.search import entropy_loss, search, search_features, usage_counts

# K, N, V, D; whole and broken groups of 64 entries, one of everything, more channels than entries
SIZES = [
    (3, 37, 100, 5),
    (1, 1, 1, 1),
    (2, 50, 64, 8),
    (5, 9, 65, 3),
    (2, 3, 7, 20),
    (4, 130, 129, 1),
    (2, 11, 4096, 8),
]


def pair(k, n, v, d, seed=0):
    """Unit chunks `[K, N, D]`, strided as the quantizer's, and unit codebooks `[K, V, D]`."""
    generator = torch.Generator().manual_seed(seed)
    chunks = torch.randn(n, k, d, generator=generator).transpose(0, 1)
    return F.normalize(chunks, dim=-1), F.normalize(torch.randn(k, v, d, generator=generator), dim=-1)


def plain_search(chunks, codebooks):
    return torch.bmm(chunks, codebooks.mT).argmax(-1)


def plain_entropy(chunks, codebooks, temperature, mean=None):
    """Softmax over all entries at once; `mean` replaces the value, not the gradient, of the mean assignment."""
    logits = 2.0 * torch.bmm(chunks, codebooks.mT) / temperature
    probs = logits.softmax(-1)
    own = probs.mean(1)
    own = own if mean is None else own + (mean - own).detach()
    return ((own * (own + 1e-7).log()).sum(-1) - (probs * logits.log_softmax(-1)).sum(-1).mean(-1)).mean()


def value_and_gradients(function, chunks, codebooks):
    leaves = [chunks.clone().requires_grad_(), codebooks.clone().requires_grad_()]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, leaves)]


def relative(one, other):
    return ((one.double() - other).norm() / other.norm()).item()


@pytest.mark.parametrize("elements", [1 << 20, 1000, 1], ids=["default", "small", "columns"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_search_equals_product_and_argmax(sizes, elements, monkeypatch):
    """With uneven last blocks, and one chunk at a time when not even one fits the limit."""
    monkeypatch.setattr(module, "CPU_ELEMENTS", elements)
    chunks, codebooks = pair(*sizes)
    codes = search(chunks, codebooks)
    assert codes.dtype == torch.int64 and codes.shape == sizes[:2]
    assert torch.equal(codes, plain_search(chunks, codebooks))
    assert torch.equal(search(chunks.contiguous(), codebooks), codes)


def test_among_equal_entries_the_lowest_index_wins():
    """Whole numbers, whose products are exact; ties inside a group of entries and between groups."""
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randint(-2, 3, (2, 400, 3), generator=generator).float()
    codebooks = torch.randint(-2, 3, (2, 300, 3), generator=generator).float()
    codes, similarities = search(chunks, codebooks), torch.bmm(chunks, codebooks.mT)
    ties = similarities == similarities.amax(-1, keepdim=True)
    assert ties.sum(-1).float().mean() > 5
    # cumsum is 0 before the first of them
    assert torch.equal(codes, (ties.cumsum(-1) == 0).sum(-1))
    assert search(chunks, codebooks[:, :1].expand(-1, 300, -1)).eq(0).all()
    assert search(torch.zeros_like(chunks), codebooks).eq(0).all()


@pytest.mark.parametrize("size", [1, 67, 128, 1000])
def test_nan_and_infinity_give_codes_in_range(size):
    """Training reports a loss that is not finite; an index outside the codebook would end it elsewhere."""
    chunks, codebooks = pair(2, 12, size, 4)
    chunks[0, 3], chunks[1, 0, 2], chunks[0, 5], chunks[1, 7, 0] = math.nan, math.nan, math.inf, -math.inf
    for entries in (codebooks, codebooks.masked_fill(torch.rand(2, size, 1) < 0.1, math.nan)):
        codes = search(chunks, entries)
        assert codes.min() >= 0 and codes.max() < size


def test_no_chunks():
    chunks, codebooks = pair(3, 0, 10, 4)
    assert search(chunks, codebooks).shape == (3, 0)
    assert search_features(torch.zeros(2, 0, 12), codebooks).shape == (3, 0)
    value, *gradients = value_and_gradients(lambda x, e: entropy_loss(x, e, 0.1), chunks, codebooks)
    assert value == 0 and all(gradient.eq(0).all() for gradient in gradients)
    assert usage_counts(torch.zeros(3, 0, dtype=torch.long), 10).eq(0).all()


def test_search_of_features_normalises_and_flattens():
    chunks, codebooks = pair(3, 10, 70, 4)
    features = (chunks * torch.rand(3, 10, 1) * 9).transpose(0, 1).reshape(2, 5, 12)
    assert torch.equal(search_features(features, codebooks), search(chunks, codebooks))
    assert torch.equal(search_features(features.view(10, 12), codebooks), search(chunks, codebooks))
    with pytest.raises(DataError, match=r"13 channels.* 3 \* 4 = 12"):
        search_features(torch.zeros(2, 13), codebooks)


def test_a_backend_that_cannot_run_is_refused():
    chunks, codebooks = pair(1, 4, 8, 4)
    with pytest.raises(ConfigError, match=r'"auto".*"torch".*"triton"'):
        search(chunks, codebooks, backend="numpy")
    with pytest.raises(ConfigError, match='use "auto" or "torch"'):
        search(chunks, codebooks, backend="triton")  # on the CPU, or not installed at all
    with pytest.raises(AssertionError, match=r"chunks \[1, 4, 4\], codebooks \[1, 8, 3\]"):
        search(chunks, codebooks[..., :3])


KERNEL_CASES = """
import torch, torch.nn.functional as F
from unitok.tokenizer.search import search, search_features
generator = torch.Generator().manual_seed(0)
for k, n, v, d in [(3, 37, 100, 5), (2, 5, 4096, 8), (1, 1, 1, 1), (2, 70, 33, 40), (1, 3, 50, 100)]:
    features = 3 * torch.randn(n, k * d, generator=generator)
    codebooks = F.normalize(torch.randn(k, v, d, generator=generator), dim=-1)
    chunks = F.normalize(features.view(n, k, d).transpose(0, 1), dim=-1)
    plain = torch.bmm(chunks, codebooks.mT).argmax(-1)
    for codes in (search(chunks, codebooks, "triton"), search_features(features, codebooks, "triton")):
        assert codes.dtype == torch.int64 and torch.equal(codes, plain), (k, n, v, d)
    assert torch.equal(search(chunks.contiguous(), codebooks.mT.contiguous().mT, "triton"), plain)
    # whole numbers: products are exact, so that equal ones tie, within a block of entries and across blocks
    whole, several = (2 * chunks).round(), (2 * codebooks).round().repeat(1, 300 // v + 2, 1)
    expected = torch.bmm(whole, several.mT).argmax(-1)
    assert expected.max() < v and torch.equal(search(whole, several, "triton"), expected)
    chunks[0, 0], codebooks[-1, v // 2] = torch.nan, torch.nan
    codes = search(chunks, codebooks, "triton")
    assert codes[0, 0] == 0 and codes.min() >= 0 and codes.max() < v
assert search_features(torch.zeros(2, 5, 12), torch.ones(3, 9, 4), "triton").eq(0).all()
assert search(torch.zeros(3, 0, 4), torch.ones(3, 9, 4), "triton").shape == (3, 0)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_equals_product_and_argmax():
    """In triton's interpreter, which must be asked for before triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL_CASES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_kernel_equals_product_and_argmax():
    """Where the two differ, the similarities must be equal to rounding: sums are taken in another order."""
    for sizes in SIZES:
        chunks, codebooks = (tensor.cuda() for tensor in pair(*sizes))
        similarities = torch.bmm(chunks.double(), codebooks.double().mT)
        for backend in ("torch", "triton"):
            codes = search(chunks, codebooks, backend)
            assert (similarities.amax(-1) - similarities.gather(2, codes.unsqueeze(-1)).squeeze(-1)).max() < 1e-6


@pytest.mark.parametrize("temperature", [0.01, 0.3])
@pytest.mark.parametrize("sizes", [(3, 37, 100, 5), (2, 50, 64, 8), (5, 9, 65, 3), (1, 20, 10, 2)], ids=str)
def test_entropy_loss_equals_the_plain_formula(sizes, temperature):
    """In double precision; the blocked loss is as near to it as the plain one in single precision is."""
    chunks, codebooks = pair(*sizes)
    exact = value_and_gradients(lambda x, e: plain_entropy(x, e, temperature), chunks.double(), codebooks.double())
    for block in (None, 1, 4):
        ours = value_and_gradients(lambda x, e, b=block: entropy_loss(x, e, temperature, b), chunks, codebooks)
        assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-5, abs=1e-6)
        assert exact[1].abs().max() > 1e-4
        assert relative(ours[1], exact[1]) < 1e-4 and relative(ours[2], exact[2]) < 1e-4


def test_entropy_loss_of_one_entry_is_nothing():
    value, *gradients = value_and_gradients(lambda x, e: entropy_loss(x, e, 0.1), *pair(1, 1, 1, 1))
    assert value.abs() < 1e-6 and all(gradient.eq(0).all() for gradient in gradients)


def test_entropy_loss_stays_in_fp32_under_autocast():
    chunks, codebooks = pair(3, 37, 100, 5)
    plain = value_and_gradients(lambda x, e: entropy_loss(x, e, 0.05), chunks, codebooks)
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradients(lambda x, e: entropy_loss(x, e, 0.05), chunks, codebooks)
        assert torch.equal(search(chunks, codebooks), plain_search(chunks.double(), codebooks.double()))
    for one, other in zip(cast, plain, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_entropy_loss_takes_the_mean_assignment_of_all_ranks(monkeypatch):
    """Two ranks played in turn: averaged over them, value and gradient are those of one process with all chunks."""
    chunks, codebooks = pair(3, 20, 30, 4)
    halves = chunks[:, :10], chunks[:, 10:]
    means = [(2.0 * torch.bmm(half, codebooks.mT) / 0.1).softmax(-1).mean(1) for half in halves]
    monkeypatch.setattr(module, "world_size", lambda: 2)
    parts = []
    for half, other in zip(halves, reversed(means), strict=True):
        monkeypatch.setattr(module, "all_reduce_sum_", lambda tensor, other=other: tensor.add_(other))
        parts.append(value_and_gradients(lambda x, e: entropy_loss(x, e, 0.1, 3), half, codebooks))
        alone = value_and_gradients(lambda x, e: plain_entropy(x, e, 0.1, sum(means) / 2), half, codebooks)
        for one, expected in zip(parts[-1], alone, strict=True):
            torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-5)
    whole = value_and_gradients(lambda x, e: plain_entropy(x, e, 0.1), chunks, codebooks)
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, whole[0])
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]], 1) / 2, whole[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((parts[0][2] + parts[1][2]) / 2, whole[2], atol=1e-6, rtol=1e-5)


def test_no_pass_holds_all_pairs(monkeypatch):
    """All pairs would take 1 MiB; a block takes 64 KiB, and twice that in the entropy loss."""
    from unitok.scripts.benchmark_quantizer import peak_mib

    monkeypatch.setattr(module, "CPU_ELEMENTS", 1 << 14)
    chunks, codebooks = pair(2, 512, 256, 4)
    assert 0.9 < peak_mib(lambda: plain_search(chunks, codebooks), "cpu") < 1.2
    assert peak_mib(lambda: search(chunks, codebooks), "cpu") < 0.15
    loss = entropy_loss(chunks.requires_grad_(), codebooks, 0.1)
    assert peak_mib(lambda: entropy_loss(chunks, codebooks, 0.1), "cpu") < 0.25
    assert peak_mib(lambda: torch.autograd.grad(loss, chunks), "cpu") < 0.25


def test_usage_counts_every_choice():
    codes = torch.randint(5, (3, 40), generator=torch.Generator().manual_seed(0))
    counts = usage_counts(codes, 7)
    assert counts.dtype == torch.float32
    for k in range(3):
        assert torch.equal(counts[k], torch.bincount(codes[k], minlength=7).float())
