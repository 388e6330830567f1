"""Multi-codebook quantizer against one plain loop over codebooks, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from tiny import random_codes

from unitok.core.errors import ConfigError, DataError
from unitok.tokenizer.quantizer import MultiCodebookQuantizer, entropy_loss, residual_lookup, usage_statistics

K, V, D = 3, 16, 4
BETA = 0.4


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    quantizer = MultiCodebookQuantizer(K, V, D, commitment_weight=BETA, entropy_temperature=0.3)
    torch.nn.init.normal_(quantizer.codebooks)  # independent of the initial length, which is a matter of tuning
    return quantizer


@pytest.fixture
def features():
    return torch.randn(2, 7, K * D, generator=torch.Generator().manual_seed(1), requires_grad=True)


def reference(features, codebooks):
    """Every step written out: distances instead of products, one codebook after the other."""
    codes, quantized, losses = [], [], []
    for k in range(codebooks.shape[0]):
        chunk = features[..., k * D : (k + 1) * D]
        chunk = chunk / chunk.norm(dim=-1, keepdim=True)
        entries = codebooks[k] / codebooks[k].norm(dim=-1, keepdim=True)
        distances = ((chunk.unsqueeze(2) - entries) ** 2).sum(dim=-1)
        code = distances.argmin(dim=-1)
        chosen = entries[code]
        losses.append(BETA * ((chunk - chosen.detach()) ** 2).mean() + ((chosen - chunk.detach()) ** 2).mean())
        quantized.append(chunk + (chosen - chunk).detach())
        codes.append(code)
    return torch.cat(quantized, dim=-1), torch.stack(codes, dim=1), torch.stack(losses).mean()


def test_equals_a_loop_over_codebooks(quantizer, features):
    out = quantizer(features)
    quantized, codes, vq_loss = reference(features, quantizer.codebooks)
    assert torch.equal(out.codes, codes) and out.codes.dtype == torch.int64
    assert out.codes.unique().numel() > 5  # else the comparison would say little
    torch.testing.assert_close(out.quantized, quantized, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.vq_loss, vq_loss, atol=1e-6, rtol=0)
    mix = torch.randn(quantized.shape, generator=torch.Generator().manual_seed(2))
    leaves = [features, quantizer.codebooks]
    ours = torch.autograd.grad((out.quantized * mix).sum() + out.vq_loss, leaves)
    theirs = torch.autograd.grad((quantized * mix).sum() + vq_loss, leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_lookup_gives_the_quantized_vectors(quantizer, features):
    out = quantizer(features)
    torch.testing.assert_close(quantizer.lookup(out.codes), out.quantized, atol=1e-6, rtol=0)


def test_lookup_takes_the_right_entry_of_the_right_codebook(quantizer):
    codes = random_codes(quantizer, 2, 5)
    vectors = quantizer.lookup(codes).view(2, 5, K, D)
    for b in range(2):
        for k in range(K):
            for position in range(5):
                entry = quantizer.codebooks[k, codes[b, k, position]]
                torch.testing.assert_close(vectors[b, position, k], entry / entry.norm(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_entropy_loss_equals_the_naive_formula(quantizer, features, temperature):
    """Softmax over negative squared distances, entropies summed entry by entry in double precision."""
    raw = features.detach().view(-1, K, D).transpose(0, 1).requires_grad_()
    chunks, codebooks = F.normalize(raw, dim=-1), quantizer.entries()
    ours = entropy_loss(chunks, codebooks, temperature)
    total = 0.0
    for k in range(K):
        distances = ((chunks[k].double().unsqueeze(1) - codebooks[k].double()) ** 2).sum(-1)
        weights = torch.exp(-distances / temperature)
        probs = weights / weights.sum(dim=-1, keepdim=True)
        per_sample = -(probs * probs.clamp(min=1e-300).log()).sum(-1).mean()
        mean = probs.mean(dim=0)
        total = total + (per_sample + (mean * (mean + 1e-7).log()).sum()) / K
    assert ours.item() == pytest.approx(total.item(), abs=1e-5)
    leaves = [raw, quantizer.codebooks]
    for one, other in zip(
        torch.autograd.grad(ours, leaves, retain_graph=True), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_entropy_loss_is_computed_only_when_asked_for(quantizer, features):
    assert quantizer(features).entropy_loss is None
    assert quantizer(features, with_entropy=True).entropy_loss.requires_grad


def test_usage_counts_every_choice(quantizer, features):
    out = quantizer(features)
    for k in range(K):
        counted = torch.bincount(out.codes[:, k].flatten(), minlength=V).float()
        assert torch.equal(out.usage[k], counted)
    assert out.usage.sum() == 2 * 7 * K


def test_usage_statistics_by_hand():
    statistics = usage_statistics(torch.tensor([[5.0, 5.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert statistics["usage"].tolist() == [0.5, 0.25, 0.0]
    assert statistics["dead"].tolist() == [2, 3, 4]
    assert statistics["perplexity"].tolist() == pytest.approx([2.0, 1.0, 1.0])


def test_scale_of_features_and_entries_does_not_matter(quantizer, features):
    before = quantizer(features)
    with torch.no_grad():
        quantizer.codebooks.mul_(7.0)
    after = quantizer(features * 0.01)
    assert torch.equal(after.codes, before.codes)
    torch.testing.assert_close(after.vq_loss, before.vq_loss, atol=1e-6, rtol=0)


def test_stays_in_fp32_under_autocast(quantizer, features):
    plain = quantizer(features)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(features)
    assert cast.quantized.dtype == torch.float32
    assert torch.equal(cast.codes, plain.codes) and torch.equal(cast.quantized, plain.quantized)


def test_wrong_channels_are_refused(quantizer):
    with pytest.raises(DataError, match=r"13 channels.* 3 \* 4 = 12"):
        quantizer(torch.zeros(1, 2, 13))
    with pytest.raises(DataError, match="13 channels"):
        quantizer.encode(torch.zeros(1, 2, 13))


@pytest.mark.parametrize("shape", [(1, 2, 5), (3, 5), (1, 5, 3)])
def test_codes_of_the_wrong_shape_are_refused(quantizer, shape):
    with pytest.raises(DataError, match=r"expected \[B, K=3, L\]"):
        quantizer.lookup(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("code", [-1, V])
def test_codes_outside_the_codebook_are_refused(quantizer, code):
    """In one flattened table such a code would silently be an entry of the neighbouring codebook."""
    codes = torch.zeros(1, K, 2, dtype=torch.long)
    codes[0, 1, 1] = code
    with pytest.raises(DataError, match=rf"{code}.*expected 0 to {V - 1}"):
        quantizer.lookup(codes)


def test_empty_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"\(0, 16, 4\)"):
        MultiCodebookQuantizer(0, V, D)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_fresh_entries_point_in_all_directions(kind):
    """Of whatever length: only the direction is used."""
    torch.manual_seed(0)
    directions = MultiCodebookQuantizer(4, 64, 8, codebook_init=kind).entries()
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(4, 64))
    assert directions.mean(dim=1).norm(dim=-1).max() < 3 * 64**-0.5


@pytest.mark.parametrize("shape", [(0, K, 5), (2, K, 0)])
def test_no_codes_give_no_vectors(quantizer, shape):
    """A batch of conversations may show no image."""
    assert quantizer.lookup(torch.zeros(shape, dtype=torch.long)).shape == (shape[0], shape[2], K * D)
    assert residual_lookup(torch.zeros(shape, dtype=torch.long), quantizer.codebooks).shape == (shape[0], shape[2], D)
