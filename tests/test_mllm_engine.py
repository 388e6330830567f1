"""The sampling engine against the plain loop on the same modules, its two ways through the backbone, static steps."""

import logging

import pytest
import torch
from reference import numbers, tensors
from tiny import BOI, BOS, PAD, make_mllm
from torch import nn

from unitok.core.errors import DataError, UserError
from unitok.core.rng import torch_rng
from unitok.eval.plain_sampling import plain_codes
from unitok.mllm import UniTokMLLM, UniTokMLLMConfig
from unitok.mllm import backbone_steps as backbone_module
from unitok.mllm.backbone_steps import GenericSteps, LlamaSteps, backbone_steps, why_generic
from unitok.mllm.decoder_steps import rotation
from unitok.mllm.depth import rope_angles, rotate
from unitok.mllm.linears import joined, joined_after_norm, linear_map
from unitok.mllm.precision import cast_weights
from unitok.mllm.sampler import CodeSampler, draw, filter_logits
from unitok.mllm.sequence import pad_left
from unitok.mllm.stepper import PositionStepper

PROMPTS = [[BOS, 20, 21, 22, BOI], [BOS, 23, BOI], [BOS, 24, 25, BOI]]
SAME_LENGTH = [[BOS, 20, 21, BOI], [BOS, 23, 26, BOI], [BOS, 24, 25, BOI]]
UNCONDITIONAL = [[BOS, 30, BOI]] * 3
SETTINGS = [
    {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "depth_temperature": 0.5},
    {"do_sample": True, "temperature": 1.1, "top_k": 9, "top_p": 0.9},
]
SHAPES = {
    "plain": {},
    "shared keys": {"depth_num_key_value_heads": 2},
    "own heads, narrow": {
        "depth_width": 24,
        "depth_num_heads": 6,
        "depth_num_key_value_heads": 3,
        "depth_intermediate_size": 20,
        "depth_shared_head": False,
    },
    "positions": {"image_position_embedding": True},
    "one code": {"num_codebooks": 1, "code_dim": 6, "depth_shared_head": False},
    "residual": {"quantizer": "residual", "code_dim": 12, "num_codebooks": 4, "codebook_size": 10},
    "all heads": {"text": {"num_key_value_heads": 4, "attention_bias": True}},
}
FAMILIES = {
    "llama": {},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 2.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "mistral, short window": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4},
    "gpt_neo, short window": {
        "model_type": "gpt_neo", "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}},
}  # fmt: skip
FAST = {"llama", "llama3 rope", "mistral", "qwen2", "qwen3"}


def compare(model, prompts, guidance_scale, settings, embedder_cache, seeds=(5, 6, 7)):
    """Codes of the engine, which must be the plain loop's."""
    rows = prompts + (UNCONDITIONAL if guidance_scale > 1 else [])
    ids, mask = pad_left(rows, PAD)
    plain = plain_codes(model, ids, mask, CodeSampler(seeds, **settings), guidance_scale, embedder_cache=embedder_cache)
    codes = model.generate_codes(ids, mask, guidance_scale, seeds=seeds, embedder_cache=embedder_cache, **settings)
    assert torch.equal(codes, plain)
    return codes


@pytest.mark.parametrize("shape", SHAPES)
def test_engine_equals_the_plain_loop(shape):
    model = make_mllm(**SHAPES[shape])
    found = set()
    for guidance_scale in (1.0, 3.0):
        for settings in SETTINGS:
            for cache in ("consistent", "released"):
                for prompts in (PROMPTS, SAME_LENGTH):
                    codes = compare(model, prompts, guidance_scale, settings, cache)
                    found.add(tuple(codes.flatten().tolist()))
    assert len(found) > 12, "nearly equal results whatever is asked would hide differences"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_plain_loop(family, caplog):
    """Fast steps where the layers are Llama's, else the backbone's own forward pass, which the log says."""
    model = make_mllm(text=FAMILIES[family], num_image_positions=10, depth_intermediate_size=40)
    with caplog.at_level(logging.INFO, "unitok"):
        for settings in SETTINGS[:2]:
            compare(model, PROMPTS, 3.0, settings, "consistent")
    assert ("backbone's own forward pass" not in caplog.text) == (family in FAST)
    assert (why_generic(model.backbone, 16) is None) == (family in FAST)


@pytest.mark.parametrize("family", sorted(FAST))
def test_both_ways_through_the_backbone_agree(family):
    model = make_mllm(text=FAMILIES[family])
    ids, mask = pad_left(PROMPTS, PAD)
    slots, length = ids.shape[1] + 4, ids.shape[1]
    ways = (LlamaSteps(model.backbone, 3, slots, torch.empty(0)), GenericSteps(model.backbone, slots))
    with torch.no_grad():
        inputs = model.embed(ids, None)
        torch.testing.assert_close(*(way.start(inputs, mask) for way in ways))
        for place in range(length, slots):
            x, slot = torch.randn(3, 32), torch.tensor([place])
            for end in (place + 1, slots):  # growing, and static with a mask
                ours = ways[0](x, slot, end)
            torch.testing.assert_close(ours, ways[1](x, slot, end), atol=1e-5, rtol=1e-5)
            assert ours.std() > 0.1


@pytest.mark.parametrize("family", sorted(FAST))
def test_prompts_read_in_groups_and_parts_are_those_read_at_once(family, monkeypatch):
    """Two rows at a time, the last positions afterwards, rows named twice; a step behind them against a full pass."""
    model = make_mllm(text=FAMILIES[family])
    ids, mask = pad_left(PROMPTS, PAD)
    rows, slots = torch.tensor([2, 0, 2]), ids.shape[1] + 3
    with torch.no_grad():
        inputs, new = model.embed(ids, None), torch.randn(3, 32)
        whole = model.backbone(
            inputs_embeds=inputs, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        )
        more = model.backbone(
            inputs_embeds=torch.cat([inputs[rows], new[:, None]], 1),
            attention_mask=torch.cat([mask[rows], mask.new_ones(3, 1)], 1),
            position_ids=(torch.cat([mask[rows], mask.new_ones(3, 1)], 1).cumsum(1) - 1).clamp(min=0),
        )
        monkeypatch.setattr(backbone_module, "POSITIONS_AT_ONCE", 2 * ids.shape[1])
        for cut in (0, 1, ids.shape[1] - 1):
            steps = LlamaSteps(model.backbone, 3, slots, torch.empty(0))
            if cut:
                steps.start(inputs[:, :cut], mask[:, :cut])
            found = steps.start(inputs[:, cut:], mask)
            torch.testing.assert_close(found, whole.last_hidden_state[:, -1], atol=1e-5, rtol=1e-5)
            steps.select(rows)
            found = steps(new, ids.shape[1], ids.shape[1] + 1)
            torch.testing.assert_close(found, more.last_hidden_state[:, -1], atol=1e-5, rtol=1e-5)


def test_hooks_on_the_backbone_are_run():
    model = make_mllm()
    calls = []
    model.backbone.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert isinstance(backbone_steps(model.backbone, 3, 12, torch.empty(0)), GenericSteps)
    model.generate_codes(*pad_left(PROMPTS, PAD), do_sample=False)
    assert len(calls) == model.config.num_image_positions


def test_changed_weights_count_at_the_next_call():
    """The prepared copies belong to one call: weights set through `.data` leave no trace that they have changed."""
    model, prompts = make_mllm(), pad_left(PROMPTS, PAD)
    before = model.generate_codes(*prompts, do_sample=False)
    for module in (model.depth.layers[0].down_proj, model.backbone.layers[1].self_attn.o_proj, model.embedder.mlp[3]):
        module.weight.data.mul_(-1.5)
        after = model.generate_codes(*prompts, do_sample=False)
        assert not torch.equal(after, before)
        before = after
    compare(model, PROMPTS, 1.0, SETTINGS[0], "consistent")


@pytest.mark.parametrize("cache", ["consistent", "released"])
@pytest.mark.parametrize("settings", SETTINGS[::2], ids=["greedy", "sampled"])
def test_static_steps_equal_growing_ones(settings, cache):
    """What a GPU runs: the same shapes at every position, more slots than needed, traced as one graph."""
    model = make_mllm(image_position_embedding=True)
    ids, mask = pad_left(PROMPTS + UNCONDITIONAL, PAD)
    length, seeds = model.config.num_image_positions, (5, 6, 7)
    expected = model.generate_codes(ids, mask, 3.0, seeds=seeds, embedder_cache=cache, **settings)
    sizes = {"rows": 6, "slots": 64, "length": length, "guided": True, "alone": cache == "released"}
    with torch.no_grad():
        stepper = PositionStepper(model, static=True, **sizes)
        step = torch.compile(stepper.step, fullgraph=True, dynamic=False, backend="aot_eager")
        for _ in range(2):  # a kept stepper serves the next call as well
            columns = [stepper.start(model.embed(ids, None), mask, CodeSampler(seeds, **settings), 3.0)]
            for _ in range(length - 1):
                stepper.roll()
                columns.append(step(columns[-1], length, 64))
            assert torch.equal(torch.stack(columns, dim=-1), expected)


def test_a_kept_stepper_takes_the_settings_of_the_next_call():
    model = make_mllm()
    ids, mask = pad_left(PROMPTS, PAD)
    stepper = PositionStepper(model, rows=3, slots=32, length=6, guided=False, alone=False, static=True)
    for options in (SETTINGS[2], SETTINGS[2] | {"temperature": 0.1, "top_k": 3, "depth_temperature": 3.0}):
        for seeds in ((1, 2, 3), (4, 5, 6)):
            expected = model.generate_codes(ids, mask, seeds=seeds, **options)
            with torch.no_grad():
                columns = [stepper.start(model.embed(ids, None), mask, CodeSampler(seeds, **options), 1.0)]
                for position in range(5):
                    columns.append(stepper.next(columns[-1], position))
            assert torch.equal(torch.stack(columns, dim=-1), expected)


def test_guidance_of_a_model_in_bf16_is_not_rounded():
    stepper = PositionStepper(make_mllm().bfloat16(), rows=2, slots=8, length=2, guided=True, alone=False, static=False)
    stepper.guidance.fill_(7.3)
    assert stepper.guidance.item() == torch.tensor(7.3).item()
    ids, settings = torch.tensor([[BOS, 20, BOI], [BOS, 30, BOI]]), SETTINGS[0]
    model = cast_weights(make_mllm(), torch.bfloat16)
    plain = plain_codes(model, ids, torch.ones_like(ids), CodeSampler([0], **settings), 7.3)
    assert torch.equal(model.generate_codes(ids, None, 7.3, **settings), plain)


def test_the_result_can_be_trained_on():
    """Sampling runs in inference mode, whose tensors autograd refuses; what it returns is an ordinary tensor."""
    model = make_mllm()
    codes = model.generate_codes(*pad_left(PROMPTS, PAD))
    model.embed_codes(codes).sum().backward()
    assert model.embedder.mlp[3].weight.grad.abs().sum() > 0


# ---- progress and errors


def test_progress_counts_positions():
    model, seen = make_mllm(), []
    codes = model.generate_codes(*pad_left(PROMPTS, PAD), on_position=lambda *where: seen.append(where))
    assert seen == [(done, 6) for done in range(1, 7)]
    assert torch.equal(codes, model.generate_codes(*pad_left(PROMPTS, PAD)))


def test_errors():
    model, prompts = make_mllm(image_position_embedding=True), pad_left(PROMPTS, PAD)
    for options, kind, message in (
        ({"num_positions": 8}, DataError, "7 image positions: this model has embeddings for 6"),
        ({"graph": True}, UserError, "graph=True needs a CUDA device"),
        ({"temperature": [1.0, 2.0]}, UserError, "temperature: 2 values for 3 images"),
        ({"temperature": [1.0, 2.0, -1.0]}, UserError, "temperature=-1"),
        ({"top_k": [0, 1, 1.5]}, UserError, "top_k=1.5"),
    ):
        with pytest.raises(kind, match=message):
            model.generate_codes(*prompts, **options)
    model.generate_codes(*prompts, num_positions=7)  # the last position's codes are read by nobody


# ---- the sampler


def test_settings_of_each_image_are_its_own():
    model, prompts, seeds = make_mllm(), pad_left(PROMPTS, PAD), [1, 2, 3]
    options = {"temperature": [0.5, 1.5, 1.0], "top_k": [0, 3, 5], "top_p": torch.tensor([1.0, 0.9, 0.6])}
    options["depth_temperature"] = [2.0, 0.3, 1.0]
    together = model.generate_codes(*prompts, seeds=seeds, **options)
    for row in range(3):
        own = {name: float(values[row]) for name, values in options.items()}
        alone = model.generate_codes(torch.tensor([PROMPTS[row]]), seeds=[seeds[row]], **own)
        assert torch.equal(alone[0], together[row])


def test_draws_of_an_image_do_not_depend_on_how_many_are_taken_at_once():
    options = (True, 1.0, 0, 1.0)
    one, other = CodeSampler([3, 4], *options), CodeSampler([4], *options)
    whole, parts = torch.empty(2, 3000), [torch.empty(1, count) for count in (1, 999, 2000)]
    one.fill_(whole)
    for part in parts:
        other.fill_(part)
    assert torch.equal(torch.cat(parts, dim=1), whole[1:])
    assert 0 <= whole.min() and whole.max() < 1 and abs(whole.mean() - 0.5) < 0.02


def test_entries_are_drawn_as_often_as_their_probabilities_say():
    logits = torch.randn(37, generator=torch_rng("logits")).where(torch.arange(37) % 5 != 0, -torch.inf)
    uniform = torch.rand(40000, 37, generator=torch_rng("uniform"))
    uniform[0], uniform[1, 1] = 0.0, 1 - 2.0**-24  # the ends of what `rand` gives
    counts = draw(logits.expand(40000, -1), uniform).bincount(minlength=37)
    expected = 40000 * logits.softmax(dim=-1)
    assert counts[::5].sum() == 0
    assert ((counts - expected).square() / expected.clamp(min=1e-9))[expected > 0].sum() < 66  # 28 free: p > 1e-4


def test_a_draw_does_not_depend_on_rounding():
    """Of 4096 entries, with differences as large as other orders of summing make them after guidance."""
    generator = torch_rng("rounding")
    logits, uniform = (make(500, 4096, generator=generator) for make in (torch.randn, torch.rand))
    other = logits + 3e-6 * torch.randn(500, 4096, generator=generator)
    assert (draw(logits, uniform) != draw(other, uniform)).sum() == 0


def test_nothing_is_filtered_beside_a_filtered_row():
    logits = 5 * torch.randn(2, 4096, generator=torch_rng("beside"))
    filtered = filter_logits(logits, 1.0, torch.tensor([[0], [7]]), torch.tensor([[1.0], [0.5]]))
    assert torch.equal(filtered[0], logits[0]) and filtered[1].isfinite().sum() < 8


def test_filters_do_not_depend_on_the_order_of_entries():
    generator = torch.Generator().manual_seed(0)
    logits, order = torch.randn(4, 50, generator=generator), torch.randperm(50, generator=generator)
    for top_k, top_p in ((7, 1.0), (0, 0.8), (20, 0.7), (torch.tensor([[0], [1], [9], [60]]), 0.9)):
        filtered = filter_logits(logits, 0.9, top_k, top_p)
        assert torch.equal(filter_logits(logits[:, order], 0.9, top_k, top_p), filtered[:, order])
        assert 0 < torch.isfinite(filtered).float().mean() < 0.9


# ---- parts


@pytest.mark.parametrize("bias", [True, False])
def test_prepared_linear_layers_equal_the_modules(bias):
    torch.manual_seed(0)
    modules, x = [nn.Linear(24, width, bias=bias) for width in (40, 8, 16)], torch.randn(5, 24)
    with torch.no_grad():
        expected = torch.cat([module(x) for module in modules], dim=-1)
        torch.testing.assert_close(joined(modules, 5)(x), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(joined(modules, 3)(x), expected, atol=1e-6, rtol=1e-5)
        one = linear_map(modules[0].weight, modules[0].bias, 5, owner=modules[0].weight)
        torch.testing.assert_close(one(x), expected[:, :40], atol=1e-6, rtol=1e-5)
        other = [nn.Sequential(module) for module in modules]  # not plain layers: called as they are
        assert torch.equal(joined(other, 5)(x), expected)
        assert torch.equal(joined([modules[0].bfloat16()], 5)(x.bfloat16()), modules[0](x.bfloat16()))


def test_rotation_is_llamas():
    cos, sin = rope_angles(5, 8, 100.0, torch.device("cpu"))
    x = torch.randn(5, 8)
    turned = rotation(cos, sin)
    torch.testing.assert_close(x * turned[0] + x.roll(4, -1) * turned[1], rotate(x, cos, sin))


# ---- the released model's recordings


def released(name):
    """The recorded model of released layout in ours: names as in the tokenizer, the projector and the depth head."""
    sizes, text = numbers(f"mllm/{name}/sizes.json"), numbers(f"mllm/{name}/config.json")
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")  # fmt: skip
    state = tensors(f"mllm/{name}/model.safetensors")
    books = [state[f"model.multi_embedder.quantizer.codebooks.{k}.codebook.weight"] for k in range(sizes["K"])]
    config = UniTokMLLMConfig(
        text_config={"model_type": "llama"} | {key: text[key] for key in kept},
        num_codebooks=sizes["K"],
        codebook_size=sizes["vocab"] // sizes["K"],
        code_dim=sizes["width"] // sizes["K"],
        visual_width=sizes["embed"],
        visual_num_heads=sizes["embed"] // sizes["width"],
        depth_num_layers=1 + max(int(key.split(".")[2]) for key in state if key.startswith("ar_head.layers.")),
    )
    model, ours = UniTokMLLM(config).eval(), {"embedder.codebooks": torch.stack(books)}
    renamed = (
        ("model.multi_embedder.attn_projection.", "embedder.projection."),
        ("model.multi_embedder.mm_projector.", "embedder.mlp."),
        ("ar_head.codebooks.", "depth.code_embeddings."),
        ("ar_head.", "depth."),
        ("model.", "backbone."),
    )
    for key, value in state.items():
        if ".quantizer." in key or key.endswith("zero_k_bias"):
            continue
        if key.startswith("ar_head.linear_head."):
            ours[f"depth.head.{key.split('.')[-1]}"] = value.unsqueeze(0)
            continue
        old, new = next(((old, new) for old, new in renamed if key.startswith(old)), ("", ""))
        new = new + key[len(old) :]
        ours[new.replace(".mlp.", ".") if new.startswith("depth.") else new] = value
    model.load_state_dict(ours)
    return model


@pytest.mark.parametrize("name", ["tiny", "official_codebooks"])
@pytest.mark.parametrize("guidance_scale", [1, 5])
def test_recorded_codes(name, guidance_scale):
    """Greedy codes of the reference in both modes, by the engine and by the plain loop."""
    model, io = released(name), tensors(f"mllm/{name}/io.safetensors")
    case = f"t2i.cfg{guidance_scale}"
    for cache, recorded in (("released", "indices"), ("consistent", "nocache_whole_prefix_embedding.indices")):
        expected = io[f"{case}.{recorded}"]
        ids, mask = io[f"{case}.input_ids"], io[f"{case}.attention_mask"].long()
        options = {"num_positions": expected.shape[-1], "embedder_cache": cache}
        codes = model.generate_codes(ids, mask, float(guidance_scale), do_sample=False, **options)
        assert torch.equal(codes, expected)
        sampler = CodeSampler([0] * len(expected), **SETTINGS[0])
        assert torch.equal(plain_codes(model, ids, mask, sampler, float(guidance_scale), **options), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_in_the_weights_is_the_norm_before_them(bias):
    torch.manual_seed(0)
    layers, x = [torch.nn.Linear(48, width, bias=bias) for width in (32, 16)], torch.randn(3, 48) * 5
    weight, eps = torch.randn(48), 1e-3
    with torch.inference_mode():
        found = joined_after_norm((weight, eps), layers, rows=3)(x)
        normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        assert torch.allclose(found, torch.cat([layer(normed) for layer in layers], dim=-1), rtol=1e-5, atol=1e-5)
