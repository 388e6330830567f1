"""How stage two computes a step: chunked cross-entropy, packing, the z-term, checkpointing, attention."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import relative
from tiny import BOS, EOS, IMAGE, PAD, assert_same_gradients, gradients, make_mllm, mllm_config, random_codes, roughen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from unitok.core.errors import ConfigError, DataError
from unitok.data.packing import first_fit_decreasing
from unitok.mllm import cross_entropy
from unitok.mllm.cross_entropy import TextHead, choose_method, summed_losses
from unitok.mllm.depth import CodeHead
from unitok.mllm.model import UniTokMLLM
from unitok.mllm.packing import check_packing
from unitok.mllm.sequence import IGNORE, Sequence, pack_right, pad_right
from unitok.mllm.start import set_attention

L = 6
IMG = [IMAGE] * L
LENGTHS = [5, 9, 30, 2, 17, 11]


# ---- cross-entropy in chunks


@pytest.fixture()
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 100 logits at a time."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 100)


def heads() -> Iterator[tuple[torch.nn.Module, torch.Tensor, torch.Tensor, dict[str, str]]]:
    """Each kind of head with features, targets and the name of its argument for these."""
    torch.manual_seed(0)
    text = TextHead(8, 23, bias=False)
    yield text, torch.randn(41, 8), torch.randint(23, (41,)), "targets"
    for own in (1, 3):
        code = CodeHead(own, 13, 8)
        torch.nn.init.normal_(code.weight)
        torch.nn.init.normal_(code.bias)
        yield code, torch.randn(41, 3, 8), torch.randint(13, (41, 3)), "targets_Nk"


@pytest.mark.parametrize("which", range(3), ids=["text", "one code head", "a head per code"])
@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_equal_the_whole_in_value_and_gradient(small_chunks: None, which: int, autocast: bool) -> None:
    """Loss, right guesses, z-term; gradients of weights, bias and features, the two losses weighed differently."""
    head, features, targets, name = list(heads())[which]
    features.requires_grad_(True)
    found = {}
    for method in ("formula", "plain", "chunked"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if method == "formula":
                logits = head(features).float()
                loss = -logits.log_softmax(-1).gather(-1, targets[..., None]).sum()
                sums = (loss, (logits.argmax(-1) == targets).float().sum(0), (logits.max(-1).values ** 2).sum())
            else:
                sums = head(features, **{name: targets, "method": method})
        loss = sums[0] + 0.3 * sums[2]
        parameters = [features, *head.parameters()]
        found[method] = (*sums, *torch.autograd.grad(loss, parameters))
    # in bf16 each product is rounded, and chunks round their parts of the weights' gradients one by one
    tolerance = 5e-3 if autocast else 1e-6
    for method in ("plain", "chunked"):
        assert torch.equal(found[method][1], found["formula"][1])
        for ours, expected in zip(found[method], found["formula"], strict=True):
            assert ours.dtype == torch.float32 and relative(ours, expected.detach()) < tolerance


class _Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("which", range(3), ids=["text", "one code head", "a head per code"])
def test_logits_of_all_tokens_are_never_in_memory(small_chunks: None, which: int) -> None:
    """Neither forward nor backward returns a tensor larger than the features, the weights or a chunk."""
    head, features, targets, name = list(heads())[which]
    features.requires_grad_(True)
    largest = {}
    for method in ("plain", "chunked"):
        with _Largest() as seen:
            loss, _, squared = head(features, **{name: targets, "method": method})
            (loss + squared).backward()
        largest[method] = seen.elements
    bound = max(100, features.numel(), *(p.numel() for p in head.parameters()))
    logits = targets.numel() * (23 if which == 0 else 13)
    assert largest["chunked"] <= bound < logits <= largest["plain"]


def test_no_tokens_and_few_tokens_need_no_chunks(small_chunks: None) -> None:
    head = TextHead(4, 23, bias=False)
    for count in (0, 1):
        loss, correct, squared = head(torch.randn(count, 4), torch.zeros(count, dtype=torch.long))
        assert (float(loss.detach()) > 0) == (float(squared.detach()) > 0) == bool(count) and 0 <= correct <= count
    calls = []
    summed_losses(lambda x: calls.append(len(x)) or head(x), torch.randn(9, 4), torch.zeros(9).long(), 23, "chunked")
    assert calls == [4, 4, 1]


def test_liger_asked_for_in_vain_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"liger needs a CUDA GPU \(the run is on cpu\).*unitok\[liger\]"):
        choose_method("liger", torch.device("cpu"))
    assert choose_method("auto", torch.device("cpu")) == "chunked"


INTERPRETED = """
import torch
from unitok.mllm.cross_entropy import TextHead
torch.manual_seed(0)
head = TextHead(16, 40, bias=False)
features, targets = torch.randn(13, 16, requires_grad=True), torch.randint(40, (13,))
for autocast, tolerance in ((False, 1e-5), (True, 3e-2)):
    found = {}
    for method in ("plain", "liger"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, correct, _ = head(features, targets, method)
        found[method] = (loss, correct, *torch.autograd.grad(0.3 * loss, (features, head.weight)))
    for ours, expected in zip(found["liger"], found["plain"]):
        assert (ours - expected).norm() <= tolerance * expected.norm(), (autocast, ours, expected)
    assert all(gradient.dtype == torch.float32 for gradient in found["liger"][2:])
loss, correct, _ = head(features[:0], targets[:0], "liger")
assert loss == 0 and correct == 0 and loss.requires_grad
print("equal")
"""


@pytest.mark.slow
def test_liger_equals_plain_in_tritons_interpreter() -> None:
    """The fused kernel is for GPUs; Triton interprets it here, in a process of its own."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (unitok[liger])")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-2000:]


# ---- the z-term


def test_the_z_term_is_the_squared_largest_logit_of_every_code() -> None:
    model = make_mllm()
    sequences, codes = mixed_batch(model.config)
    sums = model.losses(**padded(sequences, codes))
    ours = gradients(sums.image_z, model)
    total = torch.zeros(())
    for sequence, own in ((sequences[0], codes[:1]), (sequences[2], codes[2:3])):
        hidden = model.backbone(inputs_embeds=model.embed(torch.tensor([sequence.ids]), own)).last_hidden_state[0]
        first = sequence.ids.index(IMAGE)
        logits = model.depth(hidden[first - 1 : first - 1 + L], own[0].T)
        assert logits.shape == (L, 3, 16)
        total = total + (logits.max(dim=-1).values ** 2).sum()
    torch.testing.assert_close(sums.image_z, total, rtol=1e-5, atol=1e-5)
    expected = gradients(total, model)
    assert "lm_head.weight" not in expected
    close(ours, expected)


# ---- packing


def mixed_batch(config: Any) -> tuple[list[Sequence], torch.Tensor]:
    """Pictures to draw and to read, conversations with two images and without, and a document; one fits no gap."""
    draw = [Sequence().add([BOS, *text]).add([5], True).add(IMG).add([6, EOS], True) for text in ([20, 21, 22], [23])]
    read = Sequence().add([BOS, *IMG, 30, 31]).add([40, EOS], True)
    two = Sequence().add([BOS, *IMG, 32, *IMG, 33]).add([41, 42, EOS], True)
    chat = Sequence().add([BOS, 33, 34]).add([44, EOS], True).add([35]).add([45, 46, EOS], True)
    document = Sequence().add([BOS, *range(20, 45), EOS], True)
    sequences = [draw[0], read, draw[1], two, chat, document]
    for sequence, flags in zip(sequences, ([True], [False], [True], [False] * 2, [], []), strict=True):
        sequence.learn_image = flags
    return sequences, random_codes(config, 5, L, seed=3)


def padded(sequences: list[Sequence], codes: torch.Tensor) -> dict[str, torch.Tensor]:
    input_ids, mask, labels = pad_right(sequences, PAD)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels} | images(sequences, codes)


def packed(sequences: list[Sequence], codes: torch.Tensor, capacity: int) -> dict[str, torch.Tensor]:
    rows = first_fit_decreasing([len(one.ids) for one in sequences], capacity)
    order = [number for row in rows for number in row]
    own = dict(enumerate(codes.split([len(one.learn_image) for one in sequences])))
    input_ids, position_ids, labels = pack_right(sequences, rows, PAD)
    batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    return batch | images([sequences[number] for number in order], torch.cat([own[number] for number in order]))


def images(sequences: list[Sequence], codes: torch.Tensor) -> dict[str, torch.Tensor]:
    flags = [flag for sequence in sequences for flag in sequence.learn_image]
    return {"codes": codes, "learn_image": torch.tensor(flags, dtype=torch.bool)}


def close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the largest gradient of all."""
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert_same_gradients(ours, expected, atol=1e-5 * scale, rtol=1e-4)


BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "phi": {"model_type": "phi"},
}


# settings, and whether positions that begin anew keep samples apart
PACKING: dict[str, tuple[dict[str, Any], bool]] = {name: (text, True) for name, text in BACKBONES.items()} | {
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 40}, False),
    "falcon": ({}, False),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, False),
    "bloom": ({"n_layer": 2, "n_head": 4}, False),
    "biogpt": ({}, False),
    "mamba": ({}, False),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 8, "sliding_window": 7}, False),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 7}, True),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, True),
    "mixtral": ({"num_local_experts": 4}, True),
}


@pytest.mark.parametrize("capacity", [30, 45, 200], ids=["four rows", "three rows", "one row"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_packed_equals_padded(backbone: str, capacity: int) -> None:
    """Loss and gradients of images, chat and text; a sliding window counts positions of one sequence."""
    model = make_mllm(image_position_embedding=True, text=BACKBONES[backbone])
    sequences, codes = mixed_batch(model.config)
    batch = packed(sequences, codes, capacity)
    found = [model.losses(**batch), model.losses(**padded(sequences, codes))]
    assert batch["input_ids"].shape[0] < len(sequences)
    for name in ("text", "image", "image_z", "num_text", "num_image", "text_correct", "image_correct"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-5)
    ours, expected = (gradients(sums.text + sums.image + sums.image_z, model) for sums in found)
    close(ours, expected)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("scale", [1.0, 6.0], ids=["new", "trained"])
def test_backbones_that_do_not_keep_packed_samples_apart_are_refused(scale: float, precision: torch.dtype) -> None:
    """By what they compute, with weights as they are at first and larger ones."""
    for name, (text, keeps) in PACKING.items():
        torch.manual_seed(0)
        model = roughen(UniTokMLLM(mllm_config(text={"model_type": name} | text)), scale).train()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            if keeps:
                check_packing(model)
            else:
                with pytest.raises(ConfigError, match=f"data.pack=true: .*model_type={name} .*set data.pack=false"):
                    check_packing(model)
        assert model.backbone.training


def test_packed_rows_would_leak_without_their_positions() -> None:
    """Guards the test above: seen as one long sequence, the losses are others."""
    model = make_mllm()
    sequences, codes = mixed_batch(model.config)
    batch = packed(sequences, codes, 200)
    one = batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    assert abs((model.losses(**batch).text - model.losses(**one).text).item()) > 0.1


def test_flash_attention_gets_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels take sequences of different lengths in a single row; the numbers are the same."""
    model = make_mllm()
    sequences, codes = mixed_batch(model.config)
    batch, shapes = packed(sequences, codes, 45), []
    expected = model.losses(**batch)
    forward = model.backbone.forward

    def watched(**inputs: Any) -> Any:
        shapes.append(inputs["inputs_embeds"].shape[:2])
        (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(inputs["position_ids"])
        given = [inputs[f"{name}_{end}"] for name in ("cu_seq_lens", "max_length") for end in "qk"]
        assert all(torch.equal(one, ends) and one.dtype == torch.int32 for one in given[:2])
        assert given[2:] == [longest] * 2 and type(given[2]) is int
        model.backbone.config._attn_implementation = "sdpa"
        return forward(**inputs)

    monkeypatch.setattr(model.backbone, "forward", watched)
    monkeypatch.setattr(model.backbone.config, "_attn_implementation_internal", "flash_attention_2")
    sums = model.losses(**batch)
    assert shapes == [(1, batch["input_ids"].numel())]
    torch.testing.assert_close(sums.text + sums.image, expected.text + expected.image, rtol=1e-5, atol=1e-5)


def test_an_image_to_learn_must_not_begin_a_packed_sequence() -> None:
    model = make_mllm()
    sequences = [Sequence().add([BOS, 20, EOS], True), Sequence().add(IMG).add([EOS], True)]
    sequences[1].learn_image = [True]
    with pytest.raises(DataError, match="begins with an image"):
        model.losses(**packed(sequences, random_codes(model.config, 1, L), 20))


def test_pack_right_writes_every_sequence_once() -> None:
    sequences = [Sequence().add([BOS, 7, 8], True), Sequence().add([BOS, 9]), Sequence().add([BOS, 1, 1, 1, EOS], True)]
    ids, positions, labels = pack_right(sequences, [[2], [0, 1]], PAD)
    assert ids.tolist() == [[BOS, 1, 1, 1, EOS], [BOS, 7, 8, BOS, 9]]
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert labels.tolist() == [[IGNORE, 1, 1, 1, EOS], [IGNORE, 7, 8, IGNORE, IGNORE]]
    assert pack_right(sequences[:2], [[0], [1]], PAD)[1].tolist() == [[0, 1, 2], [0, 1, 0]]


def test_first_fit_decreasing() -> None:
    assert first_fit_decreasing(LENGTHS, 30) == [[2], [3, 4, 5], [0, 1]]
    assert first_fit_decreasing([3, 3, 3], 3) == [[0], [1], [2]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 50, (20,), generator=generator).tolist()
        rows = first_fit_decreasing(lengths, 60)
        assert sorted(number for row in rows for number in row) == list(range(20))
        assert max(sum(lengths[number] for number in row) for row in rows) <= 60
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // 60) + 4
    with pytest.raises(DataError, match="61 does not fit a row of 60"):
        first_fit_decreasing([61], 60)


# ---- checkpointing and attention


@pytest.mark.parametrize("pack", [False, True])
def test_checkpointing_computes_both_transformers_again_and_changes_nothing(pack: bool) -> None:
    model = make_mllm().train()
    sequences, codes = mixed_batch(model.config)
    batch = packed(sequences, codes, 45) if pack else padded(sequences, codes)
    calls = {"backbone": 0, "depth": 0}
    for name, layers in (("backbone", model.backbone.layers), ("depth", model.depth.layers)):
        layers[0].self_attn.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    results, counts = [], []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sums = model.losses(**batch)
        results.append((sums.text + sums.image, gradients(sums.text + sums.image, model)))
        counts.append(dict(calls))
    once = 1 if pack else 2  # short and long rows apart
    assert counts == [{"backbone": once, "depth": 1}, {"backbone": 3 * once, "depth": 3}]
    assert torch.equal(results[0][0], results[1][0])
    close(results[1][1], results[0][1])


def test_attention_that_is_not_there_is_refused() -> None:
    model = make_mllm()
    with pytest.raises(ConfigError, match=r"attention=flash needs a CUDA GPU \(the run is on cpu\).*unitok\[flash\]"):
        set_attention(model, "flash", torch.device("cpu"))
    with pytest.raises(ConfigError, match="attention=flex needs a CUDA GPU"):
        set_attention(model, "flex", torch.device("cpu"))
    for setting in ("auto", "sdpa"):
        set_attention(model, setting, torch.device("cpu"))
        assert model.backbone.config._attn_implementation == "sdpa"
    set_attention(model, "flex", torch.device("cuda"))
    assert model.backbone.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize("setting", ["sdpa", "flex"])
def test_attention_that_a_family_does_not_take_is_refused(setting: str) -> None:
    """transformers would stay with what it had, without an error."""
    model = make_mllm(text={"model_type": "bloom", "n_layer": 2, "n_head": 4})
    with pytest.raises(ConfigError, match=f"attention={setting}: not for a backbone of model_type=bloom.*eager"):
        set_attention(model, setting, torch.device("cuda"))


def test_flash_attention_is_for_lower_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels know no fp32: "auto" stays with sdpa there, and for families that have no flash."""
    monkeypatch.setattr("unitok.mllm.start.find_spec", lambda name: name)
    cuda, wanted = torch.device("cuda"), []
    model = make_mllm()

    def take(name: str) -> None:
        wanted.append(name)
        model.backbone.config._attn_implementation_internal = name

    monkeypatch.setattr(model.backbone, "set_attn_implementation", take)
    set_attention(model, "auto", cuda, "fp32")
    with pytest.raises(ConfigError, match="attention=flash computes in bf16.*engine.precision=autocast"):
        set_attention(model, "flash", cuda, "fp32")
    assert wanted == []
    for setting, precision in (("auto", "autocast"), ("auto", "bf16"), ("flash", "bf16")):
        set_attention(model, setting, cuda, precision)
    assert wanted == ["flash_attention_2"] * 3
    other = make_mllm(text={"model_type": "bloom", "n_layer": 2, "n_head": 4})
    set_attention(other, "auto", cuda, "bf16")
    assert other.backbone.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_masks_packed_rows_as_sdpa_does() -> None:
    """Forward alone, and not compiled: it has no backward pass on a CPU."""
    model = make_mllm()
    sequences, codes = mixed_batch(model.config)
    batch = packed(sequences, codes, 45)
    expected = model.losses(**batch)
    set_attention(model, "flex", torch.device("cuda"))
    with torch.compiler.set_stance("force_eager"):
        sums = model.losses(**batch)
    torch.testing.assert_close(sums.text + sums.image, expected.text + expected.image, rtol=1e-5, atol=1e-5)
