"""The understanding engine: batches, kept conversations and streamed text, each against something plainer."""

import pytest
import torch
from tiny import BOS, EOS, IMAGE, PAD, make_mllm, make_text_tokenizer, random_codes
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from unitok.core.errors import DataError, UserError
from unitok.eval.speed_chat import BASELINE, ChatWork, answer_speed, generated, random_prompts, recomputed, together
from unitok.mllm.backbone_steps import LlamaSteps, check_steps
from unitok.mllm.chat import KeptConversation, Prompt, TextSampling, generate_answers
from unitok.mllm.growing_cache import GrowingLayer
from unitok.mllm.session import answer_text, text_deltas

L, NEW = 6, 9
PICTURE = [IMAGE] * L
TEXTS = [
    [BOS, *PICTURE, 20, 21],
    [BOS, 22, *PICTURE, 23, *PICTURE, 24, 25, EOS, 26],
    [BOS, 27],
    [BOS, 28, 29, 30, 31, *PICTURE],
]
COUNTS = [1, 2, 0, 1]
BACKBONES = {
    "llama": {},
    "llama, own heads": {"text": {"num_key_value_heads": 4, "num_hidden_layers": 3}},
    "qwen2": {"text": {"model_type": "qwen2"}},
    "positions": {"image_position_embedding": True},
    "sliding": {"text": {"model_type": "mistral", "sliding_window": 5}},
}
every_backbone = pytest.mark.parametrize("changes", BACKBONES.values(), ids=BACKBONES)


def make_prompts(model, texts=TEXTS, counts=COUNTS, seed=0):
    codes = random_codes(model.config, sum(counts), L, seed).split(counts)
    return [Prompt(ids, own if len(own) else None) for ids, own in zip(texts, codes, strict=True)]


def fresh(model, prompt, **options):
    return generate_answers(model, [prompt], EOS, PAD, NEW, **options)[0]


def count_fed(model, monkeypatch):
    """Shape `(rows, positions)` of everything that goes through the backbone, whichever way."""
    shapes, original, start, step = [], model.backbone.forward, LlamaSteps.start, LlamaSteps.__call__

    def forward(*args, **kwargs):
        shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        return original(*args, **kwargs)

    def record(original):
        return lambda self, x, *args: (
            shapes.append((len(x), 1 if x.dim() == 2 else x.shape[1])) or original(self, x, *args)
        )

    monkeypatch.setattr(model.backbone, "forward", forward)
    monkeypatch.setattr(LlamaSteps, "start", record(start))
    monkeypatch.setattr(LlamaSteps, "__call__", record(step))
    return shapes


# ---- batches


@every_backbone
def test_answers_are_those_of_generate_and_of_full_passes(changes):
    model = make_mllm(**changes)
    prompts = make_prompts(model)
    batch = together(model, prompts, NEW)
    assert batch == generated(model, prompts, NEW) == recomputed(model, prompts, NEW)
    assert batch == [together(model, [prompt], NEW)[0] for prompt in prompts]
    assert all(len(answer) == NEW for answer in batch)
    assert len({tuple(answer) for answer in batch}) == len(batch) and max(len(set(one)) for one in batch) > 3


def test_every_row_stops_at_its_own_end_and_costs_nothing_after_it(monkeypatch):
    model = make_mllm()
    prompts = make_prompts(model)
    endless = together(model, prompts, NEW)
    end = endless[0][3]
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in endless]
    assert len({len(answer) for answer in expected}) > 1, "the case must hold rows of different lengths"
    shapes = count_fed(model, monkeypatch)
    assert generate_answers(model, prompts, end, PAD, NEW) == expected
    going = [sum(len(answer) > step for answer in expected) for step in range(NEW - 1)]
    assert [rows for rows, _ in shapes[1:]] == [rows for rows in going if rows]
    first = expected[0][0] if expected[0] else end
    assert generate_answers(model, prompts[:1], first, PAD, NEW) == [[]]


@pytest.mark.parametrize("backbone", ["llama", "qwen2", "sliding"])
def test_questions_about_one_picture_share_it(backbone, monkeypatch):
    """Three questions about one picture, one about two, one about another picture, two about none."""
    model = make_mllm(**BACKBONES[backbone])
    one, other, more = random_codes(model.config, 4, L).split([1, 1, 2])
    texts = [[BOS, *PICTURE, *rest] for rest in ([20], [21, 22, 23], [24, 25])]
    prompts = [Prompt(ids, one) for ids in texts] + [Prompt(texts[0], other), Prompt(TEXTS[1], more)]
    prompts += [Prompt([BOS, 27]), Prompt([BOS, 28, 29, 30])]
    expected = generated(model, prompts, NEW)
    assert len({tuple(answer) for answer in expected}) == len(prompts)
    shapes = count_fed(model, monkeypatch)
    assert together(model, prompts, NEW) == expected
    if backbone == "sliding":  # padding within a row would shorten its window
        assert shapes[0] == (7, len(TEXTS[1]))
    else:
        assert shapes[:2] == [(4, len(TEXTS[1]) - 4), (7, 4)]
    # the same ids around other pictures are no shared beginning, and what ends with a picture stays whole
    apart = [Prompt(texts[0], one), Prompt(texts[0], other), Prompt([BOS, *PICTURE], one)]
    assert together(model, apart, NEW) == generated(model, apart, NEW)


@every_backbone
@pytest.mark.parametrize("same_picture", [True, False])
def test_a_system_prompt_goes_through_once(changes, same_picture, monkeypatch):
    """Conversations of different lengths about different pictures, or about one, or about none."""
    model = make_mllm(**changes)
    system = [BOS, *range(20, 45), *range(20, 40)]
    rests = ([*PICTURE, 20], [21, *PICTURE, 22, 23, 24], [25, 26, *PICTURE, 27], [*PICTURE, 28, 29], [45])
    prompts = make_prompts(model, [[*system, *rest] for rest in rests], [1, 1, 1, 1, 0])
    if same_picture:
        prompts = [Prompt([*system, *PICTURE, *rest], prompts[0].codes) for rest in ([20], [21, 22], [23, 24, 25])]
        prompts += make_prompts(model, [[*system, *PICTURE, 26]] * 3, [1, 1, 1], seed=5)
    expected = generated(model, prompts, NEW)
    assert len({tuple(answer) for answer in expected}) > 2
    shapes = count_fed(model, monkeypatch)
    assert together(model, prompts, NEW) == expected
    rows = 4 if same_picture else 5
    if "sliding_window" in changes.get("text", {}):
        assert shapes[0][0] == len(prompts)
    else:
        assert shapes[0] == (1, len(system)) and shapes[1] == (rows, L if same_picture else L + 4)
        shapes.clear()
        assert together(model, prompts[:2], NEW) == expected[:2]
        assert shapes[0] != (1, len(system)), "a pass of its own must save something"


SLOT_COUNTERS = {
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
}


@pytest.mark.parametrize("family", SLOT_COUNTERS)
def test_no_padding_behind_what_is_shared_where_slots_are_counted(family, monkeypatch):
    """Distances of these come from slots: beginnings are shared by questions of one length alone."""
    model = make_mllm(text={"model_type": family} | SLOT_COUNTERS[family], depth_intermediate_size=40)
    check_steps(model.backbone)  # once; not to be counted
    codes = random_codes(model.config, 1, L)
    begin = [BOS, *range(20, 45), *range(20, 45), *PICTURE]
    odd = [Prompt(begin + rest, codes) for rest in ([20], [21, 22, 23, 24], [25, 26])]
    odd += [Prompt(begin[:-L] + rest) for rest in ([27], [28, 29, 30])]
    even = [Prompt(begin + rest, codes) for rest in ([20, 21], [22, 23], [24, 25])]
    for prompts, first in ((odd, (5, len(begin) + 4)), (even, (1, len(begin)))):
        expected = recomputed(model, prompts, NEW)
        assert len({tuple(answer) for answer in expected}) > 2
        with monkeypatch.context() as patch:
            shapes = count_fed(model, patch)
            assert together(model, prompts, NEW) == expected
        assert shapes[0] == first


def test_answers_never_hold_an_image_mark():
    model = make_mllm()
    with torch.no_grad():
        for mark in model.suppressed_ids():
            model.lm_head.weight[mark] = model.lm_head.weight[20] * 3
    assert IMAGE in model.suppressed_ids()
    answers = generate_answers(model, make_prompts(model), EOS, PAD, NEW, TextSampling(do_sample=True))
    assert not {*model.suppressed_ids()} & {new for answer in answers for new in answer}


def test_a_placeholder_outside_the_vocabulary_suppresses_nothing():
    """Released models count it from the end, so -3 would be a word."""
    model = make_mllm(image_token_id=-3, begin_image_id=None, end_image_id=None)
    assert model.suppressed_ids() == []


def test_pictures_and_placeholders_must_agree():
    model = make_mllm()
    with pytest.raises(DataError, match="6 image placeholders"):
        generate_answers(model, [Prompt(TEXTS[0])], EOS, PAD)
    with pytest.raises(DataError, match="6 image placeholders"):
        list(KeptConversation(model).answer(Prompt(TEXTS[0]), EOS))
    with pytest.raises(UserError, match="1 seeds for 2"):
        generate_answers(model, [Prompt(TEXTS[2])] * 2, EOS, PAD, seeds=[1])


def test_growing_layers_hold_what_transformers_hold():
    """Appending, growing over the room, dropping rows and cutting, against concatenation."""
    layer, rng = GrowingLayer(room=3), torch.Generator().manual_seed(0)
    keys, values = torch.zeros(3, 2, 0, 4), torch.zeros(3, 2, 0, 5)
    for length in (5, 1, 1, 1, 1, 2):
        new = [torch.randn(len(keys), 2, length, width, generator=rng) for width in (4, 5)]
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        held = layer.update(*new)
        assert torch.equal(held[0], keys) and torch.equal(held[1], values) and layer.get_seq_length() == keys.shape[2]
        if length == 5:
            layer.batch_select_indices(torch.tensor([2, 0]))
            keys, values = keys[[2, 0]], values[[2, 0]]
        if keys.shape[2] == 8:
            layer.cut(6)
            keys, values = keys[:, :, :6], values[:, :, :6]


# ---- drawing


def test_a_drawn_answer_depends_on_its_own_prompt_and_seed_alone():
    model = make_mllm()
    prompts, seeds = make_prompts(model), [7, 8, 9, 7]
    rule = TextSampling(do_sample=True, temperature=3.0, top_k=20, top_p=0.95)
    batch = generate_answers(model, prompts, EOS, PAD, NEW, rule, seeds)
    for prompt, seed, answer in zip(prompts, seeds, batch, strict=True):
        assert fresh(model, prompt, sampling=rule, seeds=[seed]) == answer
        assert list(KeptConversation(model).answer(prompt, EOS, NEW, rule, seed)) == answer
    assert fresh(model, prompts[0], sampling=rule, seeds=[6]) != batch[0]
    endless = generate_answers(model, prompts, None, PAD, NEW, rule, seeds)
    end = endless[0][2]  # rows that have ended take nobody's random stream along
    shorter = [answer[: answer.index(end)] if end in answer else answer for answer in endless]
    assert len(shorter[0]) < max(map(len, shorter))
    assert generate_answers(model, prompts, end, PAD, NEW, rule, seeds) == shorter
    cold = TextSampling(do_sample=True, temperature=1e-4)
    assert generate_answers(model, prompts, EOS, PAD, NEW, cold) == generate_answers(model, prompts, EOS, PAD, NEW)


def test_draws_follow_the_filtered_probabilities():
    logits, count = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5]), 3000
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    drawn = TextSampling(True, temperature=0.5, top_k=4).choose(logits.expand(count, -1), generators)
    expected = (logits / 0.5).softmax(-1)
    expected[3] = 0
    expected = count * expected / expected.sum()
    observed = torch.bincount(drawn, minlength=5).float()
    assert observed[3] == 0
    chi_square = ((observed - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: 0.1 %


@pytest.mark.parametrize(
    ("options", "message"),
    [({"do_sample": True, "temperature": 0.0}, "temperature=0"), ({"top_p": 0.0}, "top_p=0"),
     ({"top_p": 1.5}, "top_p=1.5"), ({"top_k": -1}, "top_k=-1")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        TextSampling(**options)


# ---- kept conversations


def turns_of(model):
    """Three prompts of one conversation, each the one before, an answer to it, and more; a picture in turns 1 and 3."""
    codes = random_codes(model.config, 2, L, seed=3)
    ids, prompts = [BOS, 20, *PICTURE, 21], []
    for more in ([EOS, 30, 31], [EOS, *PICTURE, 32], []):
        prompts.append(Prompt(list(ids), codes[: ids.count(IMAGE) // L]))
        ids += fresh(model, prompts[-1]) + more
    return prompts


@every_backbone
def test_a_kept_conversation_answers_as_a_fresh_one(changes, monkeypatch):
    model = make_mllm(**changes)
    prompts = turns_of(model)
    expected = [fresh(model, prompt) for prompt in prompts]
    shapes, kept = count_fed(model, monkeypatch), KeptConversation(model)
    assert [list(kept.answer(prompt, EOS, NEW)) for prompt in prompts] == expected
    assert kept.positions_fed == sum(length for _, length in shapes)
    # Every id is fed once; only the last answer's last id, or the end after it, has not been.
    last = len(expected[-1]) - (len(expected[-1]) == NEW)
    assert kept.positions_fed == len(prompts[-1].ids) + last


def test_what_changes_is_fed_again_and_nothing_before_it(monkeypatch):
    model = make_mllm()
    long = Prompt([BOS, 20, *PICTURE, 21, 22, *PICTURE, 23, 24], random_codes(model.config, 2, L, seed=3))
    other = random_codes(model.config, 2, L, seed=4)
    changed = {
        "nothing": (long, 1),
        "the last word": (Prompt([*long.ids[:-1], 40], long.codes), 1),
        "a word between the pictures": (Prompt([*long.ids[:8], 40, *long.ids[9:]], long.codes), len(long.ids) - 8),
        "the second picture": (Prompt(long.ids, torch.stack([long.codes[0], other[1]])), L + 2),
        "the first picture": (Prompt(long.ids, torch.stack([other[0], long.codes[1]])), len(long.ids) - 2),
        "the end of a picture": (Prompt(long.ids[:-2], long.codes), L),
        "everything": (Prompt([40, *long.ids[1:]], long.codes), len(long.ids)),
    }
    for name, (prompt, fed) in changed.items():
        kept = KeptConversation(model)
        list(kept.answer(long, EOS, NEW))
        shapes = count_fed(model, monkeypatch)
        assert list(kept.answer(prompt, EOS, NEW)) == fresh(model, prompt), name
        assert shapes[0] == (1, fed), name


def test_layers_without_a_way_back_start_again(monkeypatch):
    model = make_mllm(**BACKBONES["sliding"])
    long = Prompt([BOS, *range(20, 32)])
    kept = KeptConversation(model)
    list(kept.answer(long, EOS, NEW))
    shapes = count_fed(model, monkeypatch)
    changed = Prompt([*long.ids[:-1], 40, 41])
    assert list(kept.answer(changed, EOS, NEW)) == fresh(model, changed)
    assert shapes[0] == (1, len(changed.ids))


@pytest.mark.parametrize("changes", [BACKBONES["llama"], BACKBONES["sliding"]], ids=["llama", "sliding"])
@pytest.mark.parametrize("step", [0, 3])
def test_an_interrupted_pass_leaves_no_trace(changes, step, monkeypatch):
    """Ctrl-C in the second layer: the first one already holds the new positions."""
    model = make_mllm(**changes)
    prompt, kept = make_prompts(model)[1], KeptConversation(model)
    layer, passes = model.backbone.layers[1], []
    original = layer.forward

    def forward(*args, **kwargs):
        passes.append(1)
        if len(passes) == step + 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        list(kept.answer(prompt, EOS, NEW))
    assert list(kept.answer(prompt, EOS, NEW)) == fresh(model, prompt)


# ---- text that comes in pieces


class Bytes:
    """A tokenizer whose ids are bytes of UTF-8; 0 is a special id."""

    all_special_ids = (0,)

    def convert_ids_to_tokens(self, index):
        return chr(index)

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(one for one in ids if one).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["a word", "  two  words \n", "naïve 🙂🙂 日本", "", " \n ", "🙂"])
def test_pieces_hold_whole_characters_and_give_the_text(text):
    ids = [0, *text.encode(), 0]
    pieces = list(text_deltas(Bytes(), ids))
    assert "".join(pieces) == text.strip() == answer_text(Bytes(), ids)
    assert all(piece and "\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len("".join(text.split())), "each character as soon as it is complete"


def test_an_answer_that_ends_within_a_character_says_so():
    assert "".join(text_deltas(Bytes(), "ok 🙂".encode()[:-1])) == "ok \ufffd"


def test_pieces_come_as_soon_as_their_ids():
    fed = []

    def ids():
        for one in b"ab c":
            fed.append(one)
            yield one

    assert [(piece, len(fed)) for piece in text_deltas(Bytes(), ids())] == [("a", 1), ("b", 2), (" c", 4)]


def test_runs_of_byte_pieces_come_as_a_whole():
    """Fast tokenizers with byte fallback: one byte that fits nowhere makes the whole run unreadable."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "b"]
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    a, b = 259, 260
    emoji = [3 + byte for byte in "🙂".encode()]
    assert list(text_deltas(tokenizer, [a, *emoji, b, b])) == ["a", "🙂b", "b"]
    assert list(text_deltas(tokenizer, [a, 3 + 0x41, 2, 3 + 0xFF, b])) == ["a", "\ufffd\ufffdb"]
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(len(pieces), (12,), generator=rng).tolist()
        ids = [one if number % 3 else a for number, one in enumerate(ids)]
        assert "".join(text_deltas(tokenizer, ids)) == answer_text(tokenizer, ids)


def test_pieces_of_sentencepieces_keep_their_spaces(tmp_path):
    tokenizer = make_text_tokenizer(tmp_path)
    ids = tokenizer.encode("is there a green triangle?", add_special_tokens=False)
    assert "".join(text_deltas(tokenizer, ids)) == "is there a green triangle?"
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(len(tokenizer), (30,), generator=rng).tolist()
        assert "".join(text_deltas(tokenizer, ids)) == answer_text(tokenizer, ids)


# ---- speed


def test_speed_compares_equal_answers():
    model = make_mllm()
    work = ChatWork(batch_size=3, text_length=5, text_before_image=2, new_tokens=4, plain_tokens=2)
    rows = answer_speed(model, work, repeats=1)
    assert [row["batch"] for row in rows] == [1, 1, 3, 1] and rows[0]["way"] == BASELINE and rows[0]["ratio"] == 1
    assert all(row["same_ids"] for row in rows)
    for row in rows:
        assert 0 < row["answer_tokens_per_second"] and row["seconds"] > 0
    prompts = random_prompts(model.config, ChatWork(batch_size=3, same_picture=True))
    assert torch.equal(prompts[0].codes, prompts[2].codes) and prompts[0].ids != prompts[2].ids
    with pytest.raises(UserError, match="reads 256"):
        answer_speed(model, ChatWork(text_length=250))
    with pytest.raises(ValueError, match="new_tokens"):
        ChatWork(new_tokens=1)
