"""Quantized weights: what is replaced, how close it stays, and what is refused."""

import builtins

import pytest
import torch
from tiny import BOI, BOS, PAD, make_mllm, random_codes
from torch import nn

from unitok.core.errors import UserError
from unitok.eval.plain_sampling import plain_codes
from unitok.mllm.backbone_steps import why_generic
from unitok.mllm.quantize import quantize_weights, stored_bytes, weight_bytes
from unitok.mllm.sampler import CodeSampler
from unitok.mllm.sequence import pad_left

PROMPTS = [[BOS, 20, 21, 22, BOI], [BOS, 23, BOI], [BOS, 30, BOI], [BOS, 30, BOI]]
BIG = {"text": {"hidden_size": 64, "intermediate_size": 96}, "depth_num_layers": 3}


def test_int8_is_smaller_and_close():
    plain, model = make_mllm(**BIG), make_mllm(**BIG)
    assert quantize_weights(model, "int8") is model
    layers = [module for module in (*model.backbone.modules(), *model.depth.modules()) if isinstance(module, nn.Linear)]
    assert len(layers) == 7 * (2 + 3)
    for layer in layers:
        assert stored_bytes(layer.weight) < 0.4 * 4 * layer.weight.numel()
    assert weight_bytes(model.backbone.layers) + weight_bytes(model.depth.layers) < 0.4 * (
        weight_bytes(plain.backbone.layers) + weight_bytes(plain.depth.layers)
    )
    for name in ("embedder", "lm_head", "depth.head", "depth.code_embeddings"):
        ours, theirs = model.get_submodule(name).state_dict(), plain.get_submodule(name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ids, codes = torch.tensor([[BOS, 20, 21]]), random_codes(model.config, 5, 1)[:, :, 0]
    with torch.no_grad():
        text, quantized_text = plain(input_ids=ids).logits, model(input_ids=ids).logits
        hidden = torch.randn(5, 64)
        image, quantized_image = plain.depth(hidden, codes), model.depth(hidden, codes)
    for exact, close in ((text, quantized_text), (image, quantized_image)):
        error = (close - exact).norm() / exact.norm()
        assert 1e-5 < error < 0.05, error


def test_quantized_model_samples_as_its_plain_loop_does():
    model = quantize_weights(make_mllm(**BIG), "int8")
    assert why_generic(model.backbone, 20) is None, "quantized layers take the fast steps as well"
    ids, mask = pad_left(PROMPTS, PAD)
    expected = plain_codes(model, ids, mask, CodeSampler([0, 1], False, 1.0, 0, 1.0), 3.0)
    assert torch.equal(model.generate_codes(ids, mask, 3.0, do_sample=False), expected)


def test_errors(monkeypatch):
    model = make_mllm()
    with pytest.raises(UserError, match="weights='int3': expected one of int8, int4"):
        quantize_weights(model, "int3")
    with pytest.raises(UserError, match="weights='int4' needs a model in bf16 on a GPU, this one is in torch.float32"):
        quantize_weights(model, "int4")
    with pytest.raises(UserError, match="quantized already"):
        quantize_weights(quantize_weights(make_mllm(), "int8"), "int8")
    original = builtins.__import__

    def without_torchao(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torchao)
    with pytest.raises(UserError, match=r"needs torchao; install the extra unitok\[quantized\]"):
        quantize_weights(model, "int8")


def test_fewer_bits_are_not_saved(tmp_path):
    """In one line, with nothing written, instead of torch's complaint about storage."""
    model = quantize_weights(make_mllm(), "int8")
    with pytest.raises(UserError, match=r"this model has int8 weights, which cannot be saved; .*weights='int8'"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
