"""Texts and layouts of the released model, id for id as its code made them."""

import json

import pytest
from PIL import Image
from reference import fixture, numbers, tensors

from unitok.data.conversations import Turn, parse_conversations
from unitok.mllm import UniTokMLLMConfig
from unitok.mllm.configuration import IGNORE
from unitok.mllm.official import RELEASED_LAYOUT
from unitok.mllm.processor import UniTokProcessor, load_text_tokenizer
from unitok.mllm.sequence import SequenceBuilder, pad_left

PLACEHOLDER = RELEASED_LAYOUT["image_token_id"]


@pytest.fixture(scope="module")
def text_tokenizer():
    return load_text_tokenizer(fixture("mllm/tokenizer"))


@pytest.fixture(scope="module")
def builder(text_tokenizer):
    return make_builder(text_tokenizer, 7)


def make_builder(text_tokenizer, length):
    text = {"vocab_size": len(text_tokenizer)}
    return SequenceBuilder(
        UniTokMLLMConfig(text_config=text, num_image_positions=length, **RELEASED_LAYOUT), text_tokenizer
    )


def expanded(ids, length):
    """Every placeholder of a row repeated for all positions of its image."""
    return [x for index in ids for x in ([index] * length if index == PLACEHOLDER else [index])]


def test_texts_are_tokenized_as_recorded(text_tokenizer, tmp_path):
    """Leading spaces included, with the begin token, and the same after saving; `legacy` as the folder says."""
    texts = numbers("mllm/tokenization.json")["texts"]
    text_tokenizer.save_pretrained(tmp_path)
    for tokenizer in (text_tokenizer, load_text_tokenizer(tmp_path)):
        for text, ids in texts.items():
            assert tokenizer.encode(text) == ids["slow_legacy_false"], repr(text)
            assert tokenizer.encode(text, add_special_tokens=False) == ids["slow_legacy_false"][1:], repr(text)
    said = text_tokenizer.decode(text_tokenizer.encode("line\nbreak é中 42", add_special_tokens=False))
    assert said == "line\nbreak é中 42", "bytes are put together again"


def test_text_to_image_prompts(builder):
    """The left-padded batch of both texts and of unconditional rows; the NUL that ends them is the mark itself."""
    batch = numbers("mllm/tokenization.json")["t2i_batch_fast_left_padded"]
    suffix = builder.config.instruction_suffix + "\0"
    rows = [
        builder.text_to_image_prompt(text.removesuffix(suffix), unconditional=text.startswith("<unconditional>"))
        for text in batch["texts"]
    ]
    ids, mask = pad_left(rows, builder.tokenizer.pad_token_id)
    assert ids.tolist() == batch["input_ids"]
    assert mask.tolist() == batch["attention_mask"]


def test_chat_prompts(builder, text_tokenizer):
    """One turn, and two: behind an answer's end the next turn begins without a space of its own."""
    notes = numbers("mllm/tokenization.json")
    length = builder.config.num_image_positions
    question = "<image>\nWhat color is the cat?\nAnswer the question using a single word or phrase."
    recorded = expanded(notes["tokenizer_image_token(prompt_single_turn, slow)"], length)
    processor = UniTokProcessor(text_tokenizer, builder.config, image_size=32)
    image, text = {"type": "image", "image": Image.new("RGB", (9, 9))}, {"type": "text", "text": question[8:]}
    messages = [{"role": "user", "content": [image, text]}]
    assert processor.chat_prompt(messages)[0] == recorded
    prompt = processor.apply_chat_template(messages)
    assert prompt == "<s>" + notes["vicuna_v1_prompt_single_turn"]
    assert processor(prompt, [image["image"]])["input_ids"].tolist() == [recorded]
    turns = [("human", "<image>\nWhat is this?"), ("gpt", "A cat."), ("human", "What color?"), ("gpt", "Red.")]
    (conversation,) = parse_conversations([{"from": who, "value": text} for who, text in turns], "test")
    recorded = expanded(notes["tokenizer_image_token(prompt_two_turns, slow)"], length)
    assert builder.chat(conversation).ids == recorded


@pytest.mark.parametrize("folder", ["mllm/tiny", "mllm/official_codebooks"])
def test_training_sequences(text_tokenizer, folder):
    """Every recorded row, id for id and label for label, but for how two kinds end.

    The released code ends the caption of a plain conversation with its chat's separator, a space, where ours has the
    new line that it is with LLaVA; and a text with nothing, where ours has the end token, so that documents can be told
    apart. Whether a row's first id is a label makes no difference: nothing stands before it.
    """
    io, notes = tensors(f"{folder}/io.safetensors"), numbers(f"{folder}/train_batches.json")
    length, seen = io["embed.indices"].shape[2], set()
    builder = make_builder(text_tokenizer, length)
    for name, members in notes["batches"].items():
        ids, labels, mask = (io[f"batch.{name}.{part}"] for part in ("input_ids", "labels", "attention_mask"))
        for member, row, row_labels, real in zip(members, ids, labels, mask.bool(), strict=True):
            kind, sequence = _sequence(builder, notes["instances"][member])
            pairs = list(zip(row[real].tolist(), row_labels[real].tolist(), strict=True))
            image = [(PLACEHOLDER, IGNORE)] * length  # whatever its label is before it is expanded
            recorded = [one for pair in pairs for one in (image if pair[0] == PLACEHOLDER else [pair])]
            ours = list(zip(sequence.ids, sequence.labels, strict=True))
            if kind == "mllm_pretrain":
                space, line = (text_tokenizer.encode(text, add_special_tokens=False)[-1] for text in (" ", "\n"))
                assert recorded.pop() == (space, space) and ours.pop() == (line, line)
            if kind == "text":
                assert ours.pop() == (text_tokenizer.eos_token_id,) * 2
            assert ours[0][0] == recorded[0][0] and ours[1:] == recorded[1:], member
            seen.add(kind)
    assert seen == {"T2I", "I2T", "mllm_pretrain", "mllm_finetune", "text"}


def _sequence(builder, instance):
    """What our builder makes of a recorded sample, and its kind."""
    kind, none = instance["data_type"], "no"
    captions = [instance[key] for key in ("InVL_caption", "text") if instance.get(key, none) != none]
    if kind == "T2I":
        return kind, builder.text_to_image("".join(captions[:1]), unconditional=not captions)
    if kind == "I2T":
        return kind, builder.caption(captions[0])
    if kind == "text":
        return kind, builder.text(instance["text"], max_length=1000)
    roles = {"human": "user", "gpt": "assistant"}
    turns = [Turn(roles[turn["from"]], turn["value"]) for turn in json.loads(instance["text"])]
    return kind, builder.plain(turns[1].content) if kind == "mllm_pretrain" else builder.chat(turns)
