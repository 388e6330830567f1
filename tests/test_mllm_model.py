"""The unified model: losses against a plain loop, one batch overfits, counts are checked, saving and loading."""

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    BOI,
    BOS,
    EOI,
    EOS,
    IMAGE,
    PAD,
    assert_same_gradients,
    every_mllm_variant,
    gradients,
    make_mllm,
    mllm_config,
    random_codes,
)
from transformers import AutoConfig, AutoModelForCausalLM

from unitok.core.errors import ConfigError, DataError
from unitok.core.pretrained import load_model_folder
from unitok.mllm import UniTokMLLM
from unitok.mllm.losses import split_by_length
from unitok.mllm.sequence import IGNORE, Sequence, pad_left, pad_right

L = 6
IMG = [IMAGE] * L


def text_to_image(text):
    return Sequence().add([BOS, *text]).add([BOI], True).add(IMG).add([EOI, EOS], True)


def answer(question, reply, images=1):
    sequence = Sequence().add([BOS])
    for _ in range(images):
        sequence.add(IMG)
    sequence.learn_image = [False] * images
    return sequence.add(question).add([*reply, EOS], True)


def mixed_batch(config):
    """Two pictures to draw, one to read, a conversation about two pictures, and plain text; lengths all differ."""
    sequences = [
        text_to_image([20, 21, 22]),
        answer([30, 31], [40]),
        text_to_image([23]),
        answer([32], [41, 42, 43], images=2),
        answer([33, 34], [44, 45], images=0),
    ]
    sequences[0].learn_image = sequences[2].learn_image = [True]
    return sequences, random_codes(config, 5, L, seed=3)


def as_inputs(sequences, codes):
    input_ids, mask, labels = pad_right(sequences, PAD)
    learn = torch.tensor([flag for sequence in sequences for flag in sequence.learn_image], dtype=torch.bool)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "codes": codes, "learn_image": learn}


def naive_losses(model, sequences, codes):
    """One sequence after the other without padding, one position after the other, one code after the other."""
    text = image = 0.0
    num_text = num_image = next_image = 0
    for sequence in sequences:
        vectors, places, own = [], [], []
        for learn in sequence.learn_image:
            own.append((codes[next_image : next_image + 1], learn))
            next_image += 1
        embedded = [model.embed_codes(one)[0] for one, _ in own]
        seen = 0
        for place, token in enumerate(sequence.ids):
            if token == IMAGE:
                vectors.append(embedded[seen // L][seen % L])
                places.append((place, seen // L, seen % L))
                seen += 1
            else:
                vectors.append(model.get_input_embeddings().weight[token])
        hidden = model.backbone(inputs_embeds=torch.stack(vectors).unsqueeze(0)).last_hidden_state[0]
        for place in range(1, len(sequence.ids)):
            if sequence.labels[place] != IGNORE:
                logits = model.lm_head.weight @ hidden[place - 1]
                text = text - logits.log_softmax(-1)[sequence.labels[place]]
                num_text += 1
        for place, index, position in places:
            one, learn = own[index]
            if not learn:
                continue
            cache = model.depth.new_cache(1, like=hidden)
            inputs = hidden[place - 1].unsqueeze(0)
            for k in range(one.shape[1]):
                code = one[:, k, position]
                logits = model.depth.step(k, inputs, cache)
                image = image - logits[0].log_softmax(-1)[code[0]]
                num_image += 1
                inputs = code
    return text, image, num_text, num_image


def naive_image_loss_with_gradient(model, sequences, codes):
    """As above with teacher forcing through `depth.forward`, whose gradient can be taken (the cache is in place)."""
    total = 0.0
    next_image = 0
    for sequence in sequences:
        count = len(sequence.learn_image)
        own, next_image = codes[next_image : next_image + count], next_image + count
        if not any(sequence.learn_image):
            continue
        hidden = model.backbone(inputs_embeds=model.embed(torch.tensor([sequence.ids]), own)).last_hidden_state[0]
        first = sequence.ids.index(IMAGE)
        for position in range(L):
            target = own[0, :, position]
            logits = model.depth(hidden[first - 1 + position].unsqueeze(0), target.unsqueeze(0))[0]
            total = total + F.cross_entropy(logits, target, reduction="sum")
    return total


@every_mllm_variant
def test_losses_equal_a_plain_loop(changes):
    model = make_mllm(**changes)
    sequences, codes = mixed_batch(model.config)
    sums = model.losses(**as_inputs(sequences, codes))
    with torch.no_grad():
        text, image, num_text, num_image = naive_losses(model, sequences, codes)
    assert (int(sums.num_text), int(sums.num_image)) == (num_text, num_image)
    assert num_image == 2 * L * model.config.num_codebooks and num_text == 3 + 2 + 3 + 4 + 3
    assert sums.text.item() == pytest.approx(text.item(), rel=1e-5)
    assert sums.image.item() == pytest.approx(image.item(), rel=1e-5)


@every_mllm_variant
def test_gradients_equal_those_without_padding_and_batching(changes):
    model = make_mllm(**changes)
    sequences, codes = mixed_batch(model.config)
    sums = model.losses(**as_inputs(sequences, codes))
    ours = gradients(sums.text + sums.image, model)
    text = 0.0
    next_image = 0
    for sequence in sequences:
        count = len(sequence.learn_image)
        own, next_image = codes[next_image : next_image + count] if count else None, next_image + count
        hidden = model.backbone(inputs_embeds=model.embed(torch.tensor([sequence.ids]), own)).last_hidden_state[0]
        labels = torch.tensor(sequence.labels[1:])
        text = text + F.cross_entropy(model.lm_head(hidden[:-1]), labels, ignore_index=IGNORE, reduction="sum")
    expected = gradients(text + naive_image_loss_with_gradient(model, sequences, codes), model)
    assert any(name.startswith("depth.") for name in ours) and any(name.startswith("embedder.") for name in ours)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert_same_gradients(ours, expected, atol=2e-6 * scale, rtol=1e-3)


def test_padding_and_batching_do_not_change_the_sums():
    model = make_mllm()
    sequences, codes = mixed_batch(model.config)
    whole = model.losses(**as_inputs(sequences, codes))
    counts = [len(sequence.learn_image) for sequence in sequences]
    parts = [
        model.losses(**as_inputs([sequence], own if count else None))
        for sequence, own, count in zip(sequences, codes.split(counts), counts, strict=True)
    ]
    for name in ("text", "image", "num_text", "num_image", "text_correct", "image_correct"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], atol=1e-4, rtol=1e-5)


def test_correct_counts_are_those_of_the_likeliest():
    model = make_mllm()
    sequences, codes = mixed_batch(model.config)
    sums = model.losses(**as_inputs(sequences, codes))
    assert sums.image_correct.shape == (3,) and 0 <= sums.image_correct.sum() <= sums.num_image
    logits = model(
        **{k: v for k, v in as_inputs(sequences, codes).items() if k not in ("labels", "learn_image")}
    ).logits
    labels = as_inputs(sequences, codes)["labels"][:, 1:]
    assert sums.text_correct == ((logits[:, :-1].argmax(-1) == labels) & (labels != IGNORE)).sum()


def test_a_batch_without_images_to_learn_still_connects_the_depth_transformer():
    """Under ZeRO-3 all ranks must gather the same parameters, whatever their batch holds."""
    model = make_mllm()
    for images in (1, 0):
        sequences = [answer([30, 31], [40], images)]
        sums = model.losses(**as_inputs(sequences, random_codes(model.config, images, L) if images else None))
        assert sums.image.item() == 0 and sums.num_image == 0 and sums.image_correct.sum() == 0
        found = gradients(sums.image + sums.text, model)
        depth = {name for name, _ in model.named_parameters() if name.startswith("depth.")}
        assert depth <= found.keys() and all(found[name].abs().sum() == 0 for name in depth)


def test_a_batch_without_text_to_learn():
    model = make_mllm()
    sequence = text_to_image([20])
    sequence.labels, sequence.learn_image = [IGNORE] * len(sequence.ids), [True]
    sums = model.losses(**as_inputs([sequence], random_codes(model.config, 1, L)))
    assert sums.text.item() == 0 and sums.num_text == 0 and sums.num_image == 3 * L
    assert gradients(sums.text + sums.image, model)["lm_head.weight"].abs().sum() == 0


def test_a_sequence_must_not_begin_with_an_image_to_learn():
    model = make_mllm()
    sequence = Sequence().add(IMG).add([EOS], True)
    sequence.learn_image = [True]
    with pytest.raises(DataError, match="begins with an image"):
        model.losses(**as_inputs([sequence], random_codes(model.config, 1, L)))


# ---- learning


def test_one_batch_overfits_and_generation_reproduces_it():
    """End to end: layout, losses, caches and both heads must agree, or greedy generation cannot give the batch back."""
    model = UniTokMLLM(mllm_config(depth_shared_head=False)).train()
    sequences, codes = mixed_batch(model.config)
    batch = as_inputs(sequences, codes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(90):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 10) * (1 - step / 90)
        sums = model.losses(**batch)
        loss = (sums.text + sums.image) / (sums.num_text + sums.num_image)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(((sums.text / sums.num_text).item(), (sums.image / sums.num_image).item()))
    (first_text, first_image), (last_text, last_image) = losses[0], losses[-1]
    assert last_text < first_text / 10 and last_image < first_image / 10, losses[::30]
    model.eval()
    prompts = [sequence.ids[: sequence.ids.index(BOI) + 1] for sequence in (sequences[0], sequences[2])]
    generated = model.generate_codes(*pad_left(prompts, PAD), do_sample=False)
    assert torch.equal(generated, codes[[0, 2]])
    asked = [sequences[1], sequences[3], sequences[4]]
    starts = [next(i for i, label in enumerate(s.labels) if label != IGNORE) for s in asked]
    ids, mask = pad_left([s.ids[:start] for s, start in zip(asked, starts, strict=True)], PAD)
    out = model.generate(
        input_ids=ids, attention_mask=mask, codes=codes[[1, 3, 4]], max_new_tokens=4, do_sample=False,
        eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    for row, sequence, start in zip(out[:, ids.shape[1] :].tolist(), asked, starts, strict=True):
        assert row[: len(sequence.ids) - start] == sequence.ids[start:]


def test_gradient_checkpointing_changes_nothing():
    model = make_mllm().train()
    sequences, codes = mixed_batch(model.config)

    def loss_and_gradients():
        sums = model.losses(**as_inputs(sequences, codes))
        return sums.text + sums.image, gradients(sums.text + sums.image, model)

    loss, plain = loss_and_gradients()
    model.gradient_checkpointing_enable()
    assert model.backbone.is_gradient_checkpointing
    again, checkpointed = loss_and_gradients()
    assert torch.equal(loss, again)
    assert_same_gradients(checkpointed, plain, atol=1e-3, rtol=1e-4)


# ---- saving, loading, configuration


@every_mllm_variant
def test_save_and_load_gives_the_same_bits(changes, tmp_path):
    model = make_mllm(**changes)
    model.save_pretrained(tmp_path)
    sequences, codes = mixed_batch(model.config)
    expected = model.losses(**as_inputs(sequences, codes))
    loads = (
        UniTokMLLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        lambda folder: load_model_folder(UniTokMLLM, folder),
    )
    for load in loads:
        loaded = load(tmp_path).eval()
        assert type(loaded) is UniTokMLLM
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        sums = loaded.losses(**as_inputs(sequences, codes))
        assert torch.equal(sums.text, expected.text) and torch.equal(sums.image, expected.image)


def test_configuration_survives_json(tmp_path):
    config = mllm_config(depth_width=24, embedder_cache="released", text={"rope_theta": 500.0})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert UniTokMLLM(loaded).depth.rope_theta == 500.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codebooks": 0}, "num_codebooks=0"),
        ({"visual_num_heads": 5}, "visual_width=24 .* visual_num_heads=5"),
        ({"embedder_cache": "fast"}, "embedder_cache='fast'"),
        ({"depth_width": 30, "depth_num_heads": 4}, "depth_width=30 .* depth_num_heads=4"),
        ({"depth_width": 20, "depth_num_heads": 4}, "even"),
        ({"visual_num_heads": 0}, "visual_num_heads=0"),
        ({"visual_mlp_ratio": 0.0}, "visual_mlp_ratio=0.0"),
        ({"depth_width": -16}, "depth_width=-16"),
        ({"depth_intermediate_size": 0}, "depth_intermediate_size=0"),
        ({"visual_width": 6, "visual_num_heads": 1}, "visual_width=6 .*=12"),
    ],
)
def test_contradicting_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as refused:
        mllm_config(**changes)
    assert "\n" not in str(refused.value)


def test_no_weight_decay_names_exist():
    model = make_mllm(image_position_embedding=True)
    names = model.no_weight_decay()
    assert names <= dict(model.named_parameters()).keys()
    assert {"backbone.embed_tokens.weight", "embedder.positions", "depth.code_embeddings.0.weight"} <= names
    assert "depth.head.bias" in names and "depth.head.weight" not in names and "lm_head.weight" not in names


@pytest.mark.parametrize(
    ("family", "tables"),
    [
        ("gpt_neox", {"backbone.embed_in.weight"}),
        ("gpt2", {"backbone.wte.weight", "backbone.wpe.weight"}),
        ("opt", {"backbone.decoder.embed_tokens.weight", "backbone.decoder.embed_positions.weight"}),
    ],
)
def test_embeddings_of_every_family_are_not_decayed(family, tables):
    model = UniTokMLLM(mllm_config(text={"model_type": family, "num_hidden_layers": 1}, depth_intermediate_size=40))
    names = model.no_weight_decay()
    assert tables <= names <= {"embedder.positions", *dict(model.named_parameters())}
    assert not {name for name in names if name.endswith("proj.weight")}


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([5], [[0]]),
        ([5, 5], [[0, 1]]),
        ([5, 5, 6], [[0, 1], [2]]),
        ([9, 3, 8, 2], [[3, 1], [2, 0]]),
        ([2, 30, 2, 2], [[0, 2, 3], [1]]),
    ],
)
def test_rows_are_split_where_padding_is_cheapest(lengths, parts):
    """In one part where nothing is saved; where ranks must make the same calls, their lengths decide nothing."""
    assert split_by_length(lengths) == parts
    assert len(split_by_length(lengths, always=True)) == min(2, len(lengths))
    assert len(parts) == 1 or split_by_length(lengths, always=True) == parts


@pytest.mark.parametrize("partitioned", [False, True])
def test_equal_rows_run_together_unless_the_model_is_partitioned(partitioned, monkeypatch):
    model, calls = make_mllm(), []
    if partitioned:  # as ZeRO 3 marks parameters
        next(model.backbone.parameters()).ds_id = 0
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[BOS, 20, 21], [BOS, 22, 23], [BOS, 24, 25]])
    sums = model.losses(ids, ids, None, torch.zeros(0, dtype=torch.bool), torch.ones_like(ids))
    assert len(calls) == 1 + partitioned and int(sums.num_text) == 6


def test_forward_keeps_transformers_promises():
    """`labels` give the shifted loss, hidden states come when asked for."""
    model = make_mllm()
    ids = torch.tensor([[BOS, 20, 21, 22, 23]])
    labels = ids.masked_fill(torch.tensor([[True, True, False, False, False]]), -100)
    out = model(ids, labels=labels, output_hidden_states=True)
    expected = F.cross_entropy(out.logits[0, 1:4], ids[0, 2:])
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0 and len(out.hidden_states) == 3
    assert model(ids).loss is None
    with pytest.raises(DataError, match="logits_to_keep"):
        model(ids, labels=labels, logits_to_keep=1)


def test_a_model_without_a_placeholder_id_reads_and_draws():
    model = make_mllm(image_token_id=None)
    ids = torch.tensor([[BOS, 20, BOI]])
    assert model(ids).logits.shape[:2] == (1, 3)
    assert model.generate_codes(ids, do_sample=False).shape == (1, 3, 6)
    with pytest.raises(DataError, match="placeholders"):
        model(ids, codes=random_codes(model.config, 1, 6))


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_read_written_and_learnt(tied, tmp_path):
    """transformers makes a plain head of its own then; ours also gives losses. Saved and loaded it is the same."""
    model = make_mllm(text={"tie_word_embeddings": tied})
    ids = torch.tensor([[BOS, 20, 21, EOS]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    model.resize_token_embeddings(61)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == 61
    # a head of another width may be multiplied by another kernel, which rounds otherwise
    torch.testing.assert_close(model(input_ids=ids).logits[..., :50], before, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([[BOS, 20, 60, EOS]])
    sums = model.losses(ids, ids, None, torch.zeros(0, dtype=torch.bool), torch.ones_like(ids))
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(sums.text, F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
    sums.text.backward()
    assert bool(model.lm_head.weight.grad[60].any()) and bool(model.get_input_embeddings().weight.grad[60].any())
    model.save_pretrained(tmp_path)
    assert torch.equal(UniTokMLLM.from_pretrained(tmp_path)(input_ids=ids).logits, logits)
