"""Cached generation against the full forward pass, for backbone, embedder and depth transformer together."""

import re

import pytest
import torch
from tiny import BOI, BOS, EOI, EOS, IMAGE, PAD, make_mllm, random_codes

from unitok.core.errors import DataError, UserError
from unitok.mllm.embedder_steps import EmbedderSteps
from unitok.mllm.sampler import CodeSampler, filter_logits
from unitok.mllm.sequence import pad_left

L = 6
PROMPTS = [[BOS, 20, 21, 22, BOI], [BOS, 23, BOI], [BOS, 24, 25, BOI]]
VARIANTS = [
    {},
    {"depth_shared_head": False},
    {"depth_width": 24, "depth_num_heads": 3, "depth_intermediate_size": 20, "depth_shared_head": False},
    {"image_position_embedding": True},
    {"num_codebooks": 1, "code_dim": 6},
]
every_variant = pytest.mark.parametrize("changes", VARIANTS, ids=["plain", "own heads", "narrow", "positions", "one"])


def record_steps(model, monkeypatch):
    """Logits of every depth step, in order: position by position, code by code."""
    steps, original = [], model.depth.step

    def step(index, inputs, cache):
        logits = original(index, inputs, cache)
        steps.append(logits)
        return logits

    monkeypatch.setattr(model.depth, "step", step)
    return steps


@torch.no_grad()
def full_logits(model, prompts, codes):
    """`[rows, L, K, V]`: the finished sequence in one pass without any cache, teacher-forced with its own codes."""
    length = codes.shape[2]
    ids, mask = pad_left([prompt + [IMAGE] * length for prompt in prompts], PAD)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = model.embed(ids, codes)
    hidden = model.backbone(inputs_embeds=inputs, attention_mask=mask, position_ids=positions).last_hidden_state
    before = hidden[:, -length - 1 : -1].reshape(-1, hidden.shape[-1])
    logits = model.depth(before, codes.transpose(1, 2).reshape(-1, codes.shape[1]))
    return logits.view(len(prompts), length, codes.shape[1], -1)


@every_variant
@pytest.mark.parametrize("do_sample", [False, True])
def test_cached_generation_equals_the_full_pass(changes, do_sample, monkeypatch):
    """The released sampler feeds its embedder other inputs than training did; this is the test that shows it."""
    model = make_mllm(**changes)
    steps = record_steps(model, monkeypatch)
    seeds = [5, 6, 7]
    settings = {"do_sample": do_sample, "temperature": 0.8, "top_k": 9, "depth_temperature": 0.3}
    codes = model.generate_codes(*pad_left(PROMPTS, PAD), seeds=seeds, **settings)
    num_codebooks = model.config.num_codebooks
    assert codes.shape == (3, num_codebooks, L) and codes.dtype == torch.int64
    logits = full_logits(model, PROMPTS, codes)
    stepwise = torch.stack(steps).view(L, num_codebooks, 3, -1).permute(2, 0, 1, 3)
    assert stepwise.std() > 0.1, "nearly uniform logits would agree whatever was fed"
    torch.testing.assert_close(stepwise, logits, atol=1e-5, rtol=1e-5)
    sampler = CodeSampler(seeds, top_p=1.0, **settings)
    again = [[sampler(logits[:, place, k], k) for k in range(num_codebooks)] for place in range(L)]
    assert torch.equal(torch.stack([torch.stack(row, -1) for row in again], -1), codes)


@pytest.mark.parametrize("static", [False, True])
def test_steps_of_the_embedder_equal_the_full_pass(static):
    model = make_mllm(image_position_embedding=True)
    codes = random_codes(model.config, 2, L)
    with torch.inference_mode():
        full = model.embed_codes(codes)
        steps = EmbedderSteps(model.embedder, 2, L, alone=False, like=full.new_empty(0))
        for place in range(L):
            vector = steps(codes[:, :, place], torch.tensor([place]), L if static else place + 1)
            torch.testing.assert_close(vector, full[:, place], atol=1e-5, rtol=1e-5)


def test_left_padding_changes_nothing():
    model = make_mllm()
    together = model.generate_codes(*pad_left(PROMPTS, PAD), do_sample=False)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate_codes(torch.tensor([prompt]), do_sample=False)
        padded = model.generate_codes(*pad_left([prompt, [BOS] * 12], PAD), do_sample=False)
        assert torch.equal(alone[0], together[row]) and torch.equal(padded[0], together[row])


def test_what_stands_in_the_padding_does_not_matter():
    model = make_mllm()
    ids, mask = pad_left(PROMPTS, PAD)
    other = ids.masked_fill(mask == 0, 33)
    assert torch.equal(*(model.generate_codes(one, mask, do_sample=False) for one in (ids, other)))


# ---- guidance


def test_guidance_of_one_is_no_guidance():
    model = make_mllm()
    ids, mask = pad_left(PROMPTS, PAD)
    plain = model.generate_codes(ids, mask, seeds=[1, 2, 3])
    assert torch.equal(model.generate_codes(ids, mask, guidance_scale=1.0, seeds=[1, 2, 3]), plain)


@pytest.mark.parametrize("do_sample", [False, True])
def test_guidance_towards_the_same_prompt_is_no_guidance(do_sample):
    model = make_mllm()
    plain = model.generate_codes(*pad_left(PROMPTS, PAD), do_sample=do_sample)
    guided = model.generate_codes(*pad_left(PROMPTS + PROMPTS, PAD), do_sample=do_sample, guidance_scale=4.0)
    assert torch.equal(guided, plain)


def test_guidance_mixes_the_logits_of_both_rows(monkeypatch):
    """`uncond + scale * (cond - uncond)`, and both rows go on with the same code."""
    model = make_mllm()
    steps = record_steps(model, monkeypatch)
    unconditional = [[BOS, 30, BOI]] * 3
    codes = model.generate_codes(*pad_left(PROMPTS + unconditional, PAD), do_sample=False, guidance_scale=3.0)
    assert codes.shape == (3, 3, L)
    logits = full_logits(model, PROMPTS + unconditional, torch.cat([codes, codes]))
    stepwise = torch.stack(steps).view(L, 3, 6, -1).permute(2, 0, 1, 3)
    torch.testing.assert_close(stepwise, logits, atol=1e-5, rtol=1e-5)
    conditional, other = logits.chunk(2)
    mixed = other + 3.0 * (conditional - other)
    assert torch.equal(mixed.argmax(-1).transpose(1, 2), codes)
    assert not torch.equal(conditional.argmax(-1).transpose(1, 2), codes)


def test_guidance_needs_pairs_of_rows():
    with pytest.raises(DataError, match="3 rows"):
        make_mllm().generate_codes(*pad_left(PROMPTS, PAD), guidance_scale=2.0)
    with pytest.raises(DataError, match="no prompts"):
        make_mllm().generate_codes(torch.zeros(0, 4, dtype=torch.long))


# ---- seeds


def test_a_seed_gives_the_same_image_alone_and_in_a_batch():
    model = make_mllm()
    together = model.generate_codes(*pad_left(PROMPTS, PAD), seeds=[11, 12, 13])
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(model.generate_codes(torch.tensor([prompt]), seeds=[11 + row])[0], together[row])
    guided = model.generate_codes(*pad_left(PROMPTS + PROMPTS[::-1], PAD), guidance_scale=2.0, seeds=[11, 12, 13])
    alone = model.generate_codes(*pad_left([PROMPTS[1], PROMPTS[1]], PAD), guidance_scale=2.0, seeds=[12])
    assert torch.equal(guided[1], alone[0])


def test_seeds_differ_and_do_not_depend_on_the_global_state():
    model = make_mllm()
    same = [[BOS, 20, BOI]] * 8
    torch.manual_seed(1)
    first = model.generate_codes(*pad_left(same, PAD))
    torch.manual_seed(2)
    assert torch.equal(model.generate_codes(*pad_left(same, PAD)), first)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 8
    assert torch.equal(model.generate_codes(*pad_left(same[:1], PAD), seeds=[3])[0], first[3])
    with pytest.raises(UserError, match="2 seeds for 8 images"):
        model.generate_codes(*pad_left(same, PAD), seeds=[1, 2])


def test_samples_follow_the_probabilities():
    """One position, one codebook, many seeds: chi-square against the model's own distribution."""
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0, 0.5]])
    count = 3000
    sampler = CodeSampler(range(count), True, 1.0, 0, 1.0, depth_temperature=0.5)
    for index, temperature in ((0, 1.0), (1, 0.5), (7, 0.5)):
        expected = (logits / temperature).softmax(-1)[0]
        observed = torch.bincount(sampler(logits.expand(count, -1), index), minlength=5).float()
        chi_square = ((observed - count * expected) ** 2 / (count * expected)).sum()
        assert chi_square < 18.5  # 4 degrees of freedom: 0.1 %


def test_depth_temperature_is_the_temperature_unless_given():
    model, prompts = make_mllm(), pad_left(PROMPTS, PAD)
    one, both, cold = (
        model.generate_codes(*prompts, seeds=[1, 2, 3], temperature=0.7, **options)
        for options in ({}, {"depth_temperature": 0.7}, {"depth_temperature": 0.01})
    )
    assert torch.equal(one, both)
    assert torch.equal(one[:, 0, 0], cold[:, 0, 0]) and not torch.equal(one, cold)


# ---- filtering


def test_filters_by_hand():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    kept = lambda **options: torch.isfinite(  # noqa: E731
        filter_logits(logits, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options))
    )[0].tolist()
    assert kept() == [True] * 5
    assert kept(top_k=2) == [True, True, False, False, False]
    assert kept(top_k=99) == [True] * 5
    assert kept(top_p=0.6) == [True, True, False, False, False], "the entry that crosses the share is kept"
    assert kept(top_p=0.01) == [True, False, False, False, False], "never nothing"
    assert kept(top_k=3, top_p=0.8) == [True, True, False, False, False], "the share is that of what top-k left"
    torch.testing.assert_close(filter_logits(logits, 2.0, 0, 1.0), logits / 2)


def test_top_k_keeps_ties_and_one_means_greedy():
    tied = filter_logits(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), 1.0, 2, 1.0)
    assert torch.isfinite(tied)[0].tolist() == [True, True, True, False]
    model = make_mllm()
    greedy = model.generate_codes(*pad_left(PROMPTS, PAD), do_sample=False)
    assert torch.equal(model.generate_codes(*pad_left(PROMPTS, PAD), top_k=1), greedy)


def test_settings_taken_over_are_not_rounded_to_the_type_of_the_first_ones():
    """A recorded step keeps its tensors, which the settings of each call are copied into."""
    kept = CodeSampler([0], True, 1, 5, 1, 2)
    taken = kept.take(CodeSampler([0], True, 0.75, 7, 0.875, 0.5))
    assert taken.temperatures.flatten().tolist() == [0.75, 0.5]
    assert taken.top_p.item() == 0.875 and taken.top_k.item() == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0.0}, "temperature=0"), ({"top_p": 0.0}, "top_p=0"), ({"top_p": 1.5}, "top_p=1.5"),
     ({"top_k": -1}, "top_k=-1"), ({"embedder_cache": "fast"}, "embedder_cache='fast'"),
     ({"num_positions": -2}, "num_positions=-2"), ({"depth_temperature": -1.0}, "depth_temperature=-1")],
)  # fmt: skip
def test_sampler_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make_mllm().generate_codes(*pad_left(PROMPTS, PAD), **options)


def test_prompts_padded_on_the_right_are_refused():
    """Their last id would be padding, from which nothing is to be drawn."""
    ids, mask = pad_left(PROMPTS, PAD)
    shorter = [row for row in range(len(ids)) if mask[row, 0] == 0]
    assert shorter
    with pytest.raises(DataError, match=re.escape(f"ends in 0 in rows {shorter}: expected left-padded")):
        make_mllm().generate_codes(ids.flip(1), mask.flip(1))


def test_prompts_of_no_shape_are_refused():
    ids, mask = pad_left(PROMPTS, PAD)
    model = make_mllm()
    for given in ((ids[0], None), (ids[:, :0], None), (ids, mask[:, 1:]), (ids, mask[:1]), (ids[:1], mask)):
        with pytest.raises(DataError, match=r"input_ids of .* attention_mask of .*: expected \[rows, T\] of both"):
            model.generate_codes(*given)
    with pytest.raises(UserError, match="guidance_scale="):
        model.generate_codes(ids, mask, [3.0])
    codes = model.generate_codes(ids, mask)
    beyond = codes + model.config.codebook_size
    for wrong, message in ((beyond, "codes from"), (codes.float(), "expected whole numbers")):
        with pytest.raises(DataError, match=message):
            model.embed_codes(wrong)


def test_number_of_positions():
    model = make_mllm()
    codes = model.generate_codes(*pad_left(PROMPTS, PAD), do_sample=False, num_positions=3)
    assert codes.shape == (3, 3, 3)
    assert torch.equal(model.generate_codes(*pad_left(PROMPTS, PAD), do_sample=False)[:, :, :3], codes)


# ---- the released sampler's embedder


def test_released_embedder_cache_feeds_the_newest_token_alone(monkeypatch):
    """At position 0 both see one token, so the first difference can be in the codes of position 2."""
    model = make_mllm(image_position_embedding=True)
    fed, step, original = [], EmbedderSteps.__call__, model.embedder.forward

    def recorded(self, codes_BK, place, end):
        fed.append(step(self, codes_BK, place, end).unsqueeze(1))
        return fed[-1][:, 0]

    monkeypatch.setattr(EmbedderSteps, "__call__", recorded)
    prompts = pad_left(PROMPTS, PAD)
    consistent = model.generate_codes(*prompts, do_sample=False, embedder_cache="consistent")
    consistent_vectors, fed[:] = torch.cat(fed, dim=1), []
    released = model.generate_codes(*prompts, do_sample=False, embedder_cache="released")
    released_vectors = torch.cat(fed, dim=1)
    assert torch.equal(released[:, :, :2], consistent[:, :, :2])
    torch.testing.assert_close(released_vectors[:, 0], consistent_vectors[:, 0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(released_vectors[:, 1], consistent_vectors[:, 1], atol=1e-3)
    for place in range(L - 1):
        alone = original(released[:, :, place : place + 1])[:, 0] - model.embedder.positions[0]
        torch.testing.assert_close(
            released_vectors[:, place], alone + model.embedder.positions[place], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(consistent_vectors, original(consistent)[:, :-1], atol=1e-5, rtol=1e-5)


def test_embedder_cache_comes_from_the_configuration():
    prompts = pad_left(PROMPTS, PAD)
    released = make_mllm(embedder_cache="released")
    assert torch.equal(
        released.generate_codes(*prompts, do_sample=False),
        make_mllm().generate_codes(*prompts, do_sample=False, embedder_cache="released"),
    )


# ---- text


TEXT_PROMPTS = [
    [BOS, *([IMAGE] * L), 20, 21],
    [BOS, 22, *([IMAGE] * L), 23, *([IMAGE] * L), 24, 25, EOS, 26],
    [BOS, 27],
]


@pytest.fixture(scope="module")
def text_case():
    model = make_mllm()
    return model, random_codes(model.config, 3, L), [1, 2, 0]


def generate(model, prompts, codes, **options):
    ids, mask = pad_left(prompts, PAD)
    settings = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD} | options
    return model.generate(input_ids=ids, attention_mask=mask, codes=codes, **settings)[:, ids.shape[1] :]


def test_text_in_a_batch_equals_text_alone(text_case):
    model, codes, counts = text_case
    together = generate(model, TEXT_PROMPTS, codes)
    for row, (prompt, own) in enumerate(zip(TEXT_PROMPTS, codes.split(counts), strict=True)):
        alone = generate(model, [prompt], own if len(own) else None)[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == PAD).all()
    assert len({tuple(row.tolist()) for row in together}) == 3


def test_cached_text_equals_full_passes(text_case):
    model, codes, _ = text_case
    ids = TEXT_PROMPTS[1]
    tensor = torch.tensor([ids])
    out = model.generate(
        input_ids=tensor, attention_mask=torch.ones_like(tensor), codes=codes[1:3], max_new_tokens=6, do_sample=False,
        eos_token_id=49, pad_token_id=PAD, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    full = model(input_ids=out.sequences, codes=codes[1:3]).logits[0, len(ids) - 1 : -1]
    torch.testing.assert_close(torch.cat(out.logits), full, atol=1e-5, rtol=1e-5)


def test_images_matter_to_the_text(text_case):
    model, codes, _ = text_case
    ids = torch.tensor([TEXT_PROMPTS[0]])
    first, second = (model(input_ids=ids, codes=one).logits[0, -1] for one in (codes[:1], codes[1:2]))
    assert not torch.allclose(first, second, atol=1e-2)


def test_several_answers_to_one_prompt_see_its_own_images(text_case):
    """transformers repeats inputs row by row; a row's two pictures must stay together and in order."""
    model, codes, counts = text_case
    beams = generate(model, TEXT_PROMPTS, codes, num_beams=3)
    for row, (prompt, own) in enumerate(zip(TEXT_PROMPTS, codes.split(counts), strict=True)):
        alone = generate(model, [prompt], own if len(own) else None, num_beams=3)[0]
        assert torch.equal(beams[row, : len(alone)], alone)


@pytest.mark.parametrize("mark", [IMAGE, BOI, EOI])
def test_text_never_contains_an_image_mark(mark):
    """The placeholder's vector would be asked of codes that do not exist; the others are refused in the next turn."""
    model = make_mllm()
    with torch.no_grad():
        model.lm_head.weight[mark] = model.lm_head.weight[20] * 3
        model.lm_head.weight[20] *= 2
    for seed in range(3):
        torch.manual_seed(seed)
        out = generate(model, TEXT_PROMPTS, random_codes(model.config, 3, L), do_sample=True, max_new_tokens=12)
        assert not (out == mark).any()
