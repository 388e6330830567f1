"""Sequence layouts id by id; prompts are beginnings of training sequences; the processor agrees with the builder."""

import pytest
import torch
from PIL import Image
from tiny import BOI, BOS, EOI, EOS, IMAGE, PAD, make_text_tokenizer, mllm_config

from unitok.core.errors import DataError, UserError
from unitok.data.conversations import Turn
from unitok.mllm import sequence as layouts
from unitok.mllm.processor import UniTokProcessor, load_text_tokenizer, special_ids, split_messages
from unitok.mllm.sequence import IGNORE, SequenceBuilder, chat_template, pad_left, pad_right

L = 6
IMG = [IMAGE] * L


class LetterTokenizer:
    """One id per character, so that every id of a layout can be written down."""

    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, PAD
    bos_token, eos_token = "^", "$"

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens, "layouts place special ids themselves"
        return [EOS if character == self.eos_token else ids for character, ids in zip(text, letters(text), strict=True)]


def letters(text):
    return [100 + ord(character) for character in text]


def builder(**changes):
    texts = {"instruction_suffix": "!", "unconditional_text": "?", "user_prefix": "U:", "assistant_prefix": "A:"}
    return SequenceBuilder(mllm_config(**(texts | changes)), LetterTokenizer())


def unlearnt(ids):
    return [IGNORE] * len(ids)


# ---- layouts


def test_text_to_image_layout():
    sequence = builder().text_to_image("ab")
    head = [BOS, *letters("ab!")]
    assert sequence.ids == [*head, BOI, *IMG, EOI, EOS]
    assert sequence.labels == [*unlearnt(head), BOI, *unlearnt(IMG), EOI, EOS]
    assert sequence.learn_image == [True]


def test_unconditional_text_replaces_caption_and_suffix():
    sequence = builder().text_to_image("ab", unconditional=True)
    assert sequence.ids == [BOS, *letters("?"), BOI, *IMG, EOI, EOS]


def test_only_texts_that_come_again_are_kept(monkeypatch):
    """A run sees millions of captions once; suffixes and common questions it sees all the time."""
    monkeypatch.setattr(layouts, "_KEPT_TEXTS", 3)
    ours, encoded = builder(system_prompt="S"), []
    encode = ours.tokenizer.encode
    ours.tokenizer.encode = lambda text, **options: encoded.append(text) or encode(text, **options)
    for number in range(20):
        caption, common = ours.caption(f"caption {number}"), ours.caption("again")
        assert (
            caption.ids == builder().caption(f"caption {number}").ids and common.ids == builder().caption("again").ids
        )
    assert encoded.count("again") == 1 and len(encoded) == 21 and len(ours._cache) == 3


def test_caption_layout():
    sequence = builder().caption("ab")
    head = [BOS, BOI, *IMG, EOI]
    assert sequence.ids == [*head, *letters("ab"), EOS]
    assert sequence.labels == [*unlearnt(head), *letters("ab"), EOS]
    assert sequence.learn_image == [False]


@pytest.mark.parametrize("marks", [True, False])
def test_chat_layout_masks_everything_but_answers_and_their_end(marks):
    turns = [Turn("user", "<image>q"), Turn("assistant", "r"), Turn("user", "s"), Turn("assistant", "tu")]
    sequence = builder(system_prompt="S", chat_image_marks=marks).chat(turns)
    image = [BOI, *IMG, EOI] if marks else IMG
    first, second = [BOS, *letters("SU:"), *image, *letters("qA:")], letters("U:sA:")
    assert sequence.ids == [*first, *letters("r"), EOS, *second, *letters("tu"), EOS]
    assert sequence.labels == [*unlearnt(first), *letters("r"), EOS, *unlearnt(second), *letters("tu"), EOS]
    assert sequence.learn_image == [False]


def test_chat_with_several_images_and_with_none():
    turns = [Turn("user", "<image>x<image>"), Turn("assistant", "r"), Turn("user", "<image>"), Turn("assistant", "s")]
    sequence = builder().chat(turns)
    assert sequence.ids.count(IMAGE) == 3 * L and sequence.learn_image == [False] * 3
    assert sequence.ids[: 4 + 2 * L] == [BOS, *letters("U:"), *IMG, *letters("x"), *IMG]
    without = builder().chat([Turn("user", "q"), Turn("assistant", "r")])
    assert IMAGE not in without.ids and without.learn_image == []


def test_a_tokenizer_without_a_begin_token():
    tokenizer = LetterTokenizer()
    tokenizer.bos_token_id = None
    assert SequenceBuilder(mllm_config(), tokenizer).caption("a").ids[0] == BOI


@pytest.mark.parametrize("marks", [True, False])
def test_a_prompt_is_exactly_the_beginning_of_its_training_sequence(marks):
    build = builder(system_prompt="S", chat_image_marks=marks)
    turns = [Turn("user", "<image>q"), Turn("assistant", "r"), Turn("user", "s"), Turn("assistant", "t")]
    full = build.chat(turns)
    for asked in (1, 3):
        prompt = build.chat(turns[:asked], prompt=True).ids
        assert full.ids[: len(prompt)] == prompt
        assert full.labels[len(prompt)] == full.ids[len(prompt)] != IGNORE, "the next id is the first of the answer"
    for unconditional in (False, True):
        prompt = build.text_to_image_prompt("ab", unconditional)
        full_ids = build.text_to_image("ab", unconditional).ids
        assert full_ids[: len(prompt)] == prompt and full_ids[len(prompt)] == IMAGE


def test_building_twice_gives_the_same_ids_and_leaves_no_trace():
    """Encoded pieces are cached: what one caller does to its ids must not reach the next."""
    build = builder()
    first = build.caption("ab")
    first.ids.append(1)
    first.labels.append(1)
    assert build.caption("ab").ids == [BOS, BOI, *IMG, EOI, *letters("ab"), EOS]


# ---- refusals


@pytest.mark.parametrize(
    ("roles", "prompt"),
    [
        ([], False),
        (["assistant"], False),
        (["user"], False),
        (["user", "assistant"], True),
        (["user", "user"], True),
        (["user", "user", "assistant"], False),
        (["user", "assistant", "assistant"], False),
        (["system", "user"], True),
    ],
)
def test_wrong_role_orders_are_refused(roles, prompt):
    with pytest.raises(DataError, match="user") as refused:
        builder().chat([Turn(role, "x") for role in roles], prompt=prompt)
    assert "\n" not in str(refused.value)


def test_empty_prompt_is_refused():
    with pytest.raises(UserError, match="empty prompt"):
        builder().text_to_image_prompt("  ")


@pytest.mark.parametrize("name", ["begin_image_id", "end_image_id", "image_token_id"])
def test_missing_special_ids_are_refused(name):
    with pytest.raises(UserError, match=name):
        builder(**{name: None})


@pytest.mark.parametrize("token", "^$")
def test_a_text_cannot_begin_or_end_the_sequence(token):
    """What the tokenizer reads as its own begin or end would, in an answer, be learnt as its end."""
    own, text, other = builder(), f"a{token}b", [Turn("user", "q"), Turn("assistant", "r")]
    for build in (
        lambda: own.text_to_image(text),
        lambda: own.caption(text),
        lambda: own.plain(text),
        lambda: own.text(text, max_length=9),
        lambda: own.chat([other[0], Turn("assistant", text)]),
        lambda: own.chat([Turn("user", text), other[1]]),
    ):
        with pytest.raises(DataError, match=rf"'a\{token}b' holds '\{token}', by which a sequence begins or ends"):
            build()
    layout = builder(user_prefix="$U:").chat(other)  # of what the settings say nothing is refused
    assert layout.ids == [BOS, EOS, *letters("U:qA:r"), EOS]


def test_an_answer_cannot_hold_an_image():
    """Only user turns expand the mark; in an answer it would be learnt as an id that stands for nothing."""
    with pytest.raises(DataError, match="<image>"):
        builder().chat([Turn("user", "q"), Turn("assistant", "see <image>")])


# ---- padding


def test_padding():
    build = builder()
    long, short = build.text_to_image("abcd"), build.caption("z")
    ids, mask, labels = pad_right([long, short], PAD)
    assert ids.shape == mask.shape == labels.shape == (2, len(long.ids))
    count = len(short.ids)
    assert ids[1, :count].tolist() == short.ids and ids[1, count:].eq(PAD).all()
    assert labels[1, :count].tolist() == short.labels and labels[1, count:].eq(IGNORE).all()
    assert mask.sum(1).tolist() == [len(long.ids), count] and mask[1, :count].all()
    ids, mask = pad_left([long.ids, short.ids], PAD)
    assert ids[1, -count:].tolist() == short.ids and ids[1, :-count].eq(PAD).all()
    assert mask.sum(1).tolist() == [len(long.ids), count] and mask[1, -count:].all()


# ---- processor, with a real sentencepiece tokenizer


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    return make_text_tokenizer(tmp_path_factory.mktemp("text"))


@pytest.fixture
def processor(text_tokenizer):
    config = mllm_config(system_prompt="Be brief. ", **special_ids(text_tokenizer))
    return UniTokProcessor(text_tokenizer, config, image_size=32)


def picture(color="red"):
    return Image.new("RGB", (40, 32), color)


def conversation(*texts):
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": [{"type": "text", "text": text}]} for i, text in enumerate(texts)]
    messages[0]["content"].insert(0, {"type": "image", "image": picture()})
    return messages


def test_special_ids_are_single_pieces(text_tokenizer):
    ids = special_ids(text_tokenizer)
    assert len(set(ids.values())) == 3 and text_tokenizer.unk_token_id not in ids.values()
    special = (text_tokenizer.pad_token_id, text_tokenizer.bos_token_id, text_tokenizer.eos_token_id)
    assert special == (0, 2, 3)
    assert text_tokenizer.encode("<boi>", add_special_tokens=False)[-1] == ids["begin_image_id"]


def test_text_survives_the_tokenizer(text_tokenizer):
    text = "a photo of a red circle"
    ids = text_tokenizer.encode(text, add_special_tokens=False)
    assert text_tokenizer.decode(ids).strip() == text
    assert text_tokenizer.batch_decode([[*ids, 3, 0]], skip_special_tokens=True)[0].strip() == text


def test_a_tokenizer_without_marks_is_refused(tmp_path):
    from tiny import TEXTS

    from unitok.data.sentencepieces import train_sentencepiece
    from unitok.mllm.processor import UniTokTextTokenizer

    plain = UniTokTextTokenizer(vocab_file=str(train_sentencepiece(TEXTS, tmp_path / "tokenizer.model", 60)))
    with pytest.raises(UserError, match="<boi>"):
        special_ids(plain)


@pytest.mark.parametrize(
    "texts",
    [
        ("what color is the circle?",),
        ("what color is the circle?", "red", "is there a green triangle?"),
        ("is there a red circle?", "yes", "two", "two", "what color is a circle?"),
    ],
)
@pytest.mark.parametrize("marks", [True, False])
def test_processor_ids_equal_the_builders(text_tokenizer, texts, marks):
    """Whoever uses the chat template must get what the model was trained on."""
    config = mllm_config(system_prompt="Be brief. ", chat_image_marks=marks, **special_ids(text_tokenizer))
    processor = UniTokProcessor(text_tokenizer, config, image_size=32)
    messages = conversation(*texts)
    turns, images = split_messages(messages)
    batch = processor(processor.apply_chat_template(messages), images)
    assert batch["input_ids"][0].tolist() == processor.builder.chat(turns, prompt=True).ids
    assert (processor.chat_prompt(messages)[0], len(images)) == (batch["input_ids"][0].tolist(), 1)
    assert batch["pixels"].shape == (1, 3, 32, 32)


def test_processor_pads_left_and_counts_images(processor):
    longer = conversation("what color is the circle?", "red", "two")
    texts = [processor.apply_chat_template(messages) for messages in (conversation("red"), longer)]
    batch = processor(texts, [picture(), picture("blue")])
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    assert (batch["input_ids"] == processor.config.image_token_id).sum(1).tolist() == [L, L]
    with pytest.raises(DataError, match="2 <image> marks .* 1 images"):
        processor(texts, [picture()])
    assert "pixels" not in processor("red")


def test_split_messages():
    turns, images = split_messages([*conversation("q", "r"), {"role": "user", "content": "s"}])
    assert turns == [Turn("user", "<image>\nq"), Turn("assistant", "r"), Turn("user", "s")] and len(images) == 1
    with pytest.raises(UserError, match="'video'"):
        split_messages([{"role": "user", "content": [{"type": "video"}]}])


def test_template_puts_the_image_where_split_messages_does(processor):
    messages = conversation("q")
    turns, _ = split_messages(messages)
    as_text = [{"role": turn.role, "content": turn.content} for turn in turns]
    assert processor.apply_chat_template(messages) == processor.apply_chat_template(as_text)


def test_template_quotes_what_the_configuration_says(text_tokenizer):
    config = mllm_config(user_prefix="it's \\ \n{{ ", **special_ids(text_tokenizer))
    assert "it's \\ \n{{ q" in UniTokProcessor(text_tokenizer, config, 32).apply_chat_template(
        [{"role": "user", "content": "q"}]
    )
    assert chat_template(config)


def test_processor_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)  # alone, without a model beside it
    loaded = UniTokProcessor.from_pretrained(tmp_path)
    messages = conversation("what color is the circle?", "red", "is there a green triangle?")
    assert loaded.image_size == 32 and loaded.chat_prompt(messages)[0] == processor.chat_prompt(messages)[0]
    assert loaded.apply_chat_template(messages) == processor.apply_chat_template(messages)
    pixels = [one.pixels([picture()]) for one in (loaded, processor)]
    assert torch.equal(*pixels)
    assert type(load_text_tokenizer(tmp_path)) is type(processor.tokenizer)


def test_a_configuration_that_is_there_stays(processor, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_the_processor_as_transformers_calls_it(processor):
    ids = processor.tokenizer.encode("a photo of a red circle")
    assert processor.decode(ids, skip_special_tokens=True) == "a photo of a red circle"
    assert processor.batch_decode([ids, ids], skip_special_tokens=True) == ["a photo of a red circle"] * 2
    plain = processor("<image>\nwhat color?", [picture()])
    given = processor(text="<image>\nwhat color?", images=picture(), return_tensors="pt")
    assert plain.keys() == given.keys() and all(torch.equal(plain[name], given[name]) for name in plain)
    with pytest.raises(UserError, match=r"return_tensors='np': .*'pt'"):
        processor("a", return_tensors="np")


def test_a_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        UniTokProcessor.from_pretrained(tmp_path)


def test_a_system_message_begins_the_first_user_turn(processor):
    """In a prompt as in training data, and in the template."""
    talk = [{"role": "system", "content": " Be brief. "}, *conversation("what color is the circle?")]
    turns, _ = split_messages(talk)
    assert [turn.role for turn in turns] == ["user"] and turns[0].content.startswith("Be brief.\n")
    rendered = processor.apply_chat_template(talk)
    assert "USER: Be brief.\n" in rendered and rendered.count(processor.tokenizer.eos_token) == 0
    assert processor.apply_chat_template(talk[1:]) == rendered.replace("Be brief.\n", "")
    with pytest.raises(Exception, match="roles are user and assistant"):
        processor.apply_chat_template([*talk[1:], {"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "image", "image": 7}]},
        {"role": "user", "content": [{"type": "image", "image": "/nowhere/x.png"}]},
        {"role": "user", "content": ["text"]},
        "hello",
    ],
)
def test_malformed_messages_are_refused(message):
    with pytest.raises(UserError):
        split_messages([message])


def test_a_space_stands_before_an_answer_whatever_the_tokenizer():
    """Sentencepiece puts it there by itself; a tokenizer that puts none is given it."""

    class Spaceless(LetterTokenizer):
        def encode(self, text, add_special_tokens=True):
            return [1000] + letters(text[1:]) if text.startswith("a") else letters(text)

    turns = [Turn("user", "q"), Turn("assistant", "r")]
    texts = {"user_prefix": "U:", "assistant_prefix": "A:"}
    sequence = SequenceBuilder(mllm_config(**texts), Spaceless()).chat(turns)
    assert sequence.ids == [BOS, *letters("U:qA: r"), EOS] and sequence.labels[-3:] == [*letters(" r"), EOS]
    assert builder().chat(turns).ids == [BOS, *letters("U:qA:r"), EOS]


def test_the_turn_after_an_answer_stands_behind_its_end():
    """A tokenizer that puts a space before a text puts none there."""

    class Prefixing(LetterTokenizer):
        def encode(self, text, add_special_tokens=True):
            ids = [EOS if character == self.eos_token else 100 + ord(character) for character in text]
            return ids if text.startswith(self.eos_token) else [*letters(" "), *ids]

    turns = [Turn("user", "q"), Turn("assistant", "r"), Turn("user", "s")]
    texts = {"user_prefix": "U:", "assistant_prefix": "A:"}
    ids = SequenceBuilder(mllm_config(**texts), Prefixing()).chat(turns, prompt=True).ids
    assert ids == [BOS, *letters(" U:qA: r"), EOS, *letters("U:sA:")]

    class Broken(LetterTokenizer):
        eos_token = "?"

        def encode(self, text, add_special_tokens=True):
            return letters(text)

    with pytest.raises(UserError, match=r"does not read its own end '\?'"):
        SequenceBuilder(mllm_config(**texts), Broken()).chat(turns, prompt=True)
