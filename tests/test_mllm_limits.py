"""Samples longer than the limits: what is cut, what is still learnt, and what is too long for anything."""

import logging
from pathlib import Path

import pytest
import torch
from stages import plain_steps, task_of, write_configs
from test_mllm_sequence import IMG, L, LetterTokenizer, letters, unlearnt
from tiny import BOI, BOS, EOI, EOS, mllm_config

from unitok.core.errors import DataError
from unitok.data.codes import CodeSource, write_codes
from unitok.data.conversations import IMAGE_MARK, Turn
from unitok.mllm.sequence import IGNORE, SequenceBuilder
from unitok.mllm.settings import MllmDataConfig

TEXTS = {"instruction_suffix": "!", "unconditional_text": "?", "user_prefix": "U:", "assistant_prefix": "A:"}


def builder(max_length=None, max_caption=None, **changes):
    return SequenceBuilder(mllm_config(**(TEXTS | changes)), LetterTokenizer(), max_length, max_caption)


# ---- layouts, id by id


def test_a_caption_to_be_drawn_is_cut_before_the_image() -> None:
    """To `max_caption` ids with the begin of text, as the released recipe does: the instruction goes first."""
    head = [BOS, *letters("abc")]
    sequence = builder(max_caption=4).text_to_image("abcdef")
    assert sequence.ids == [*head, BOI, *IMG, EOI, EOS] and sequence.learn_image == [True] and sequence.is_cut
    assert sequence.labels == [*unlearnt(head), BOI, *unlearnt(IMG), EOI, EOS]
    assert builder(max_length=4 + L + 3).text_to_image("abcdef").ids == sequence.ids
    assert builder(max_length=99, max_caption=4).text_to_image("abcdef").ids == sequence.ids
    whole = builder(max_length=8 + L + 3, max_caption=8).text_to_image("abcdef")
    assert whole.ids == builder().text_to_image("abcdef").ids and not whole.is_cut
    assert builder(max_length=2 + L + 3).text_to_image("x", unconditional=True).ids == [BOS, *letters("?"), BOI, *IMG,
                                                                                       EOI, EOS]  # fmt: skip


def test_a_caption_to_be_said_is_cut_at_its_end() -> None:
    """It does not learn to end where it was cut."""
    head = [BOS, BOI, *IMG, EOI]
    sequence = builder(max_length=len(head) + 2, max_caption=2).caption("abc")
    assert sequence.ids == [*head, *letters("ab")] and sequence.labels == [*unlearnt(head), *letters("ab")]
    assert sequence.learn_image == [False] and sequence.is_cut
    whole = builder(max_length=len(head) + 4).caption("abc")
    assert whole.ids[-1] == EOS and not whole.is_cut
    plain = builder(max_length=1 + L + 3).plain("abc")
    assert plain.ids == [BOS, *IMG, *letters("abc")] and plain.labels == [*unlearnt([BOS, *IMG]), *letters("abc")]
    assert plain.is_cut and not builder(max_length=1 + L + 4).plain("abc").is_cut


TURNS = [Turn("user", "<image>q"), Turn("assistant", "rs"), Turn("user", "<image>t"), Turn("assistant", "uv")]


@pytest.mark.parametrize("marks", [True, False])
def test_a_conversation_is_cut_behind_a_whole_answer(marks: bool) -> None:
    """With the images of the turns that go; the answer that stays is learnt with its end."""
    image = [BOI, *IMG, EOI] if marks else IMG
    asked = [BOS, *letters("SU:"), *image, *letters("qA:")]
    first, full = [*asked, *letters("rs"), EOS], builder(system_prompt="S", chat_image_marks=marks).chat(TURNS)
    for length in (len(first), len(first) + 1, len(full.ids) - 1):
        sequence = builder(length, system_prompt="S", chat_image_marks=marks).chat(TURNS)
        assert sequence.ids == first and sequence.labels == [*unlearnt(asked), *letters("rs"), EOS]
        assert sequence.learn_image == [False] and sequence.is_cut
    whole = builder(len(full.ids), system_prompt="S", chat_image_marks=marks).chat(TURNS)
    assert (whole.ids, whole.labels, whole.learn_image) == (full.ids, full.labels, [False] * 2) and not whole.is_cut


def test_only_a_first_answer_is_cut_in_its_middle() -> None:
    asked = [BOS, *letters("U:"), *IMG, *letters("qA:")]
    for kept in ("r", "rs"):
        sequence = builder(len(asked) + len(kept)).chat(TURNS)
        assert sequence.ids == [*asked, *letters(kept)] and sequence.labels == [*unlearnt(asked), *letters(kept)]
        assert sequence.learn_image == [False] and sequence.is_cut


def test_a_prompt_is_never_cut() -> None:
    assert builder(5).chat([Turn("user", "<image>q")], prompt=True).ids == [BOS, *letters("U:"), *IMG, *letters("qA:")]
    assert builder(5, 2).text_to_image_prompt("abcdef") == [BOS, *letters("abcdef!"), BOI]


def test_what_leaves_nothing_to_be_learnt_is_refused() -> None:
    """Not even the image fits, or nothing of what is said about it. One id more is enough."""
    cases = [
        (L + 4, lambda build: build.text_to_image("abc")),
        (L + 3, lambda build: build.caption("abc")),
        (L + 1, lambda build: build.plain("abc")),
        (L + 6, lambda build: build.chat(TURNS)),
        (6, lambda build: build.chat([Turn("user", "q"), Turn("assistant", "r")])),
    ]
    for length, build in cases:
        with pytest.raises(DataError, match=f"^too long: .* do not fit into data.max_length={length};") as caught:
            build(builder(length))
        assert "\n" not in str(caught.value)
        assert len(build(builder(length + 1)).ids) == length + 1


def test_the_defaults_are_the_released_recipe() -> None:
    assert (MllmDataConfig().max_caption, MllmDataConfig().max_length) == (1750, 2048)
    with pytest.raises(ValueError, match="max_caption"):
        MllmDataConfig(max_caption=1)


# ---- in training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations, and codes of 16 samples of which every second one is long."""
    path = tmp_path_factory.mktemp("long")
    write_configs(path)
    source = CodeSource(path / "codes")
    samples = [source[index] for index in range(16)]
    for sample in samples[::2]:
        sample.captions, sample.questions = [sample.captions[0] + " red" * 300], []
        said = [Turn("user", f"{IMAGE_MARK} what?"), Turn("assistant", "yes"), Turn("user", "and?")]
        sample.conversations = [[*said, Turn("assistant", "no " * 300)]]
    write_codes(samples, path / "mixed", source.header)
    return path


@pytest.mark.parametrize("kind", ["text_to_image", "caption", "plain", "chat"])
def test_cut_samples_are_counted_and_train_packed_as_alone(folder: Path, tmp_path: Path, kind: str) -> None:
    shares = ", ".join(f"{name}: {float(name == kind)}" for name in ("text_to_image", "caption", "plain", "chat"))
    options = [f"data.codes={folder / 'mixed'}", f"data.mixture={{{shares}}}", "data.unconditional=0"]
    options += ["data.max_length=120", "data.max_bad_fraction=0", "recipe=pretrain"]
    task = task_of(folder, tmp_path / "0", *options)
    task.build()
    rows = [task._load(index, 0).sequence for index in range(16)]
    assert [row.is_cut for row in rows] == [True, False] * 8 and max(len(row.ids) for row in rows) <= 120
    assert all(len(row.ids) == 120 for row in rows[::2]) or kind == "chat"
    logs = []
    for pack in ("false", "true"):
        model, log = plain_steps(task_of(folder, tmp_path / pack, *options, f"data.pack={pack}"))
        assert [record["samples_cut"] for record in log] == [4, 4]
        logs.append((log, torch.cat([p.flatten() for p in model.parameters()]).detach()))
    for packed, alone in zip(logs[1][0], logs[0][0], strict=True):
        assert packed == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert (logs[1][1] - logs[0][1]).norm() <= 1e-5 * logs[0][1].norm()


def test_max_caption_holds_for_what_is_drawn(folder: Path, tmp_path: Path) -> None:
    options = [f"data.codes={folder / 'mixed'}", "data.mixture={text_to_image: 1, caption: 0, chat: 0}"]
    task = task_of(folder, tmp_path, *options, "data.max_caption=30", "data.unconditional=0")
    task.build()
    sequence = task._load(0, 0).sequence
    assert sequence.ids.index(task.builder.config.begin_image_id) == 30 and sequence.is_cut
    assert sequence.labels[:30] == [IGNORE] * 30


def test_a_row_without_room_for_its_image_is_bad(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [f"data.codes={folder / 'mixed'}", "data.mixture={text_to_image: 1, caption: 0, chat: 0}"]
    task = task_of(folder, tmp_path, *options, "data.max_length=8")
    task.build()
    said = r"1 of 16 samples are bad.* is too long: .* do not fit"
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match=said):
        task.load_batch([0], 0)
