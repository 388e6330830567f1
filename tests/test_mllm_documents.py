"""Documents without images, in stage two."""

from pathlib import Path

import pytest
import torch
from stages import EVERY_KIND, plain_steps, task_of, write_recipes

from unitok.core.errors import CheckpointError, DataError
from unitok.data.texts import TextOrder, TextSource
from unitok.mllm.settings import KINDS, MllmDataConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipes(tmp_path_factory.mktemp("recipes"))


def test_documents_have_their_turn_evenly() -> None:
    """Every epoch gives equally many places; none comes again before all had their turn; pure in its arguments."""
    order = TextOrder(num_samples=30, share=0.4, num_texts=5, seed=3)
    turns = [order.turn(index, epoch) for epoch in range(4) for index in range(30)]
    for epoch in range(4):
        assert sum(turn is not None for turn in turns[epoch * 30 : epoch * 30 + 30]) == 12
    shown = [turn for turn in turns if turn is not None]
    assert len(set(shown)) == len(shown) == 48
    numbers = [number for number, _ in shown]
    assert {numbers.count(number) for number in range(5)} == {9, 10}
    assert max(before for _, before in shown) == 9
    again = TextOrder(30, 0.4, 5, 3)
    assert [again.turn(index, 2) for index in (7, 3)] == [turns[67], turns[63]]
    assert [TextOrder(30, 0.4, 5, 4).turn(index, 0) for index in range(30)] != turns[:30]


def test_documents_are_read_from_lines(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("first document\n\n  second, with é  \n")
    source = TextSource([folder / "texts.jsonl", tmp_path / "more.txt"])
    assert len(source) == 10 and source[8] == "first document" and source[9] == "second, with é"
    (tmp_path / "bom.jsonl").write_text('{"text": "marked"}\n{"text": "more"}\n', encoding="utf-8-sig")
    assert [TextSource([tmp_path / "bom.jsonl"])[n] for n in range(2)] == ["marked", "more"]
    assert source[1] == "the 1 th red circle is left of a blue square" and source.key(9).endswith("more.txt at byte 16")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"words": "x"}\n', 'at byte 0: the text is None; expected words, as {"text"'),
        ("a.jsonl", "no json\n", "at byte 0 is not JSON"),
        ("a.jsonl", '["x"]\n', "is a JSON list; expected an object"),
        ("a.jsonl", '{"text": "x", "n": ' + "9" * 5000 + "}\n", "is JSON that cannot be read"),
        ("a.jsonl", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "is JSON nested too deeply"),
        ("a.jsonl", '{"text": "a\\ud800b"}\n', "holds half a surrogate pair"),
        ("a.jsonl", '{"text": "a\\u0000b"}\n', "holds a NUL character"),
        ("a.txt", "a\0b\n", "holds a NUL character"),
        ("a.txt", "\udce9\n", "text is not UTF-8"),
        ("a.txt", "\ufeff\n", "no document in it"),
        ("a.jsonl", '{"text": 5}\n', "the text is 5; expected words"),
        ("a.txt", "\n\n", "no document in it"),
        ("a.csv", "x\n", "expected texts as .jsonl or .txt"),
    ],
)
def test_what_is_no_document_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=message) as caught:
        TextSource([tmp_path / name])[0]
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such file of texts"):
        TextSource([tmp_path / "none.txt"])


def test_a_long_document_comes_in_parts(folder: Path, tmp_path: Path) -> None:
    """Together they are the whole document, each behind a `bos`, all of it learnt; `eos` ends the last one alone."""
    task = task_of(folder, tmp_path)
    task.build()
    tokenizer, text = task.text_tokenizer, "a green triangle " * 40
    whole = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    size = 20
    count = -(-len(whole) // (size - 1))
    parts = [task.builder.text(text, size, part) for part in range(count + 1)]
    assert count > 3 and parts[0].ids == parts[count].ids
    assert all(part.labels == part.ids and part.ids[0] == tokenizer.bos_token_id for part in parts)
    assert [index for part in parts[:count] for index in part.ids[1:]] == whole


def test_a_mixture_with_documents(folder: Path, tmp_path: Path) -> None:
    """Shares are kept, batches depend on (seed, epoch, index) alone, and the log counts every kind."""
    options = (EVERY_KIND, f"data.texts=[{folder / 'texts.jsonl'}]", "data.max_length=100")
    task = task_of(folder, tmp_path / "one", *options)
    task.build()
    total = sum(task.load_batch(list(range(48)), epoch)["kinds"] for epoch in range(6))[: len(KINDS)]
    shares = dict(zip(KINDS, (total / total.sum()).tolist(), strict=True))
    assert shares["text"] == pytest.approx(12 / 48)
    for kind, share in {"text_to_image": 0.25, "caption": 0.125, "plain": 0.125, "chat": 0.25}.items():
        assert abs(shares[kind] - share) < 0.08
    other = task_of(folder, tmp_path / "two", *options)
    other.build()
    wanted = other.load_batch([5, 40, 2, 17], 3)
    alone = [task.load_batch([index], 3) for index in (5, 40, 2, 17)]
    for row, one in enumerate(alone):
        assert torch.equal(wanted["input_ids"][row][wanted["attention_mask"][row] == 1], one["input_ids"][0])
    _, log = plain_steps(task_of(folder, tmp_path / "three", *options), size=24)
    for record in log:
        assert sum(record[f"samples_{kind}"] for kind in KINDS) == 24 and record["image_z"] > 0
    assert all(record["samples_text"] > 0 for record in log)


def test_a_run_goes_on_with_the_same_documents_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fewer.txt").write_text("one document\n")
    tasks = [
        task_of(folder, tmp_path, EVERY_KIND, f"data.texts=[{name}]")
        for name in (folder / "texts.jsonl", tmp_path / "fewer.txt")
    ]
    tasks[0].load_extra_state(tasks[0].extra_state())
    with pytest.raises(CheckpointError, match="trained on 8 documents, data.texts now holds 1; resume with the same"):
        tasks[1].load_extra_state(tasks[0].extra_state())


def test_documents_need_files_and_a_share() -> None:
    with pytest.raises(ValueError, match="documents need both"):
        MllmDataConfig(texts=["a.txt"])
    with pytest.raises(ValueError, match="documents need both"):
        MllmDataConfig(mixture={"text": 1.0})
