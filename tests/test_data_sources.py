"""Reading data: shards, sources, conversations, code shards, the check of a source."""

import io
import json
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unitok.core.errors import DataError
from unitok.core.workers import forking
from unitok.data.check import check_source
from unitok.data.codes import CodeSample, CodeSource, write_codes
from unitok.data.conversations import Turn, import_llava, parse_conversations, validate_conversation
from unitok.data.shards import ShardReader, write_shards
from unitok.data.source import open_source
from unitok.data.words import words_to_json

SHAPES = "shapes:val?num=25&seed=4"
TALK = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a square"}]


def write_shapes(folder, max_per_shard=10):
    source = open_source(SHAPES)
    records = (
        {"__key__": s.key, "png": s.image, "txt": s.captions[0], "json": words_to_json(s)}  # captions twice
        for s in (source[index] for index in range(len(source)))
    )
    return write_shards(records, folder, max_per_shard, "shapes")


def png(color="red", size=8):
    stream = io.BytesIO()
    Image.new("RGB", (size, size), color).save(stream, "PNG")
    return stream.getvalue()


def fill_folder(folder, count=10, bad=()):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"im{index}.png").write_bytes(b"broken" if index in bad else png(size=8 + index))
        (folder / f"im{index}.txt").write_text(f"caption {index}\n\nother {index}\n")
    return folder


def test_shards_round_trip_and_random_access(tmp_path):
    paths = write_shapes(tmp_path / "a")
    assert [path.name for path in paths] == ["shapes-00000.tar", "shapes-00001.tar", "shapes-00002.tar"]
    again = write_shapes(tmp_path / "b")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert not [path for path in (tmp_path / "a").iterdir() if path.suffix != ".tar"]
    source = open_source(SHAPES)
    brace = str(tmp_path / "a" / "shapes-{00000..00002}.tar")
    for spec in (tmp_path / "a", brace, str(tmp_path / "a" / "*.tar"), paths):
        reader = ShardReader(spec)
        assert reader.keys == [source.key(index) for index in range(25)]
        assert reader[17]["txt"].decode() == source[17].captions[0]
        assert list(reader.read(17, ["txt"])) == ["txt"]
    assert pickle.loads(pickle.dumps(reader))[24] == reader[24]  # noqa: S301 - our own bytes, as spawn sends them
    with forking():
        loaded = iter(DataLoader(reader, batch_size=None, num_workers=2))
    assert [dict(item) for item in loaded] == [reader[index] for index in range(25)]


def test_shards_refuse_what_is_broken(tmp_path):
    paths = write_shapes(tmp_path / "a")
    with pytest.raises(DataError, match="already holds"):
        write_shapes(tmp_path / "a")
    with pytest.raises(DataError, match="no sample"):
        write_shards([], tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []

    def failing():
        yield {"__key__": "x", "txt": "x"}
        raise RuntimeError("cut short")

    with pytest.raises(RuntimeError, match="cut short"):
        write_shards(failing(), tmp_path / "cut")
    assert list((tmp_path / "cut").iterdir()) == []
    for size in (paths[1].stat().st_size // 3, 700, 100):
        paths[1].write_bytes(paths[0].read_bytes()[:size])
        with pytest.raises(DataError, match=r"shapes-00001\.tar"):
            ShardReader(tmp_path / "a")
    with pytest.raises(DataError, match=r"none-1\.tar does not exist"):
        ShardReader(str(tmp_path / "none-{1..2}.tar"))
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("k.txt"))
    with pytest.raises(DataError, match="twice"):
        ShardReader([tmp_path / "twice.tar"])


def test_all_forms_of_a_source_give_the_same_samples(tmp_path):
    """Shapes scenes in memory, as shards, as a folder and as JSON lines."""
    source = open_source(SHAPES)
    write_shapes(tmp_path / "shards")
    folder, lines = tmp_path / "folder" / "val", []
    folder.mkdir(parents=True)
    for index in range(25):
        sample = source[index]
        sample.image.save(folder / f"{sample.key}.png")
        (folder / f"{sample.key}.json").write_text(json.dumps(words_to_json(sample)))
        lines.append(json.dumps({"image": f"folder/val/{sample.key}.png"} | words_to_json(sample)))
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n")
    others = [tmp_path / "shards", tmp_path / "shards" / "*.tar", folder, tmp_path / "lines.jsonl"]
    for other in [open_source(spec) for spec in others] + [open_source(tmp_path / "folder", split="val")]:
        assert len(other) == 25
        for index in (0, 7, 24):
            expected, got = source[index], other[index]
            assert got.image.mode == "RGB" and got.image.tobytes() == expected.image.tobytes()
            for name in ("captions", "questions", "conversations", "meta"):
                assert getattr(got, name) == getattr(expected, name), (other.name, name)
            assert other.texts(index) == expected.captions
        with pytest.raises(IndexError):
            other[25]
    assert len(open_source(SHAPES, split="train")) == 25
    assert open_source(SHAPES, split="train").key(0) == "train-4-000000"


def test_unknown_sources_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.jsonl").write_text("\n")
    wrong = {
        "shapes:test": "'test'",
        "shapes:train?nmu=3": "nmu=3",
        "shapes:train?num=many": "num=many",
        "shapes:train?num=0": "at least 1",
        str(tmp_path / "nowhere"): "nowhere",
        str(tmp_path / "empty"): "no image",
        str(tmp_path / "x.jsonl"): "no record",
        str(tmp_path / "y.jsonl"): "cannot read",
        str(tmp_path / "*.tar"): "matches no",
    }
    for spec, message in wrong.items():
        with pytest.raises(DataError, match=message) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)


def test_bad_samples_are_replaced_whatever_was_read_before(tmp_path, caplog):
    folder = fill_folder(tmp_path / "f", bad=(3, 4, 9))
    forward, backward = (open_source(folder, max_bad_fraction=0.3) for _ in range(2))
    orders = [[source[i].key for i in order] for source, order in ((forward, range(10)), (backward, range(9, -1, -1)))]
    assert orders[0] == orders[1][::-1] == ["im0", "im1", "im2", "im5", "im5", "im5", "im6", "im7", "im8", "im0"]
    assert forward.bad.keys() == {3, 4, 9} and "im3" in caplog.text
    assert forward.texts(3) == ["caption 5", "other 5"]  # the words of the replacement, as for its image
    strict = open_source(folder, max_bad_fraction=0.2)
    assert strict[3].key == "im5"
    with pytest.raises(DataError, match="3 of 10.*im9"):
        strict[9]
    fill_folder(tmp_path / "all", count=2, bad=(0, 1))
    with pytest.raises(DataError, match="no readable"):
        open_source(tmp_path / "all", max_bad_fraction=1.0)[0]


@pytest.mark.parametrize(
    "words",
    [
        "[1]",
        "{",
        '{"captions": [3]}',
        '{"caption": 3}',
        '{"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<eoi>"}]}',
        '{"questions": [{"type": "color", "question": "q"}]}',
        '{"questions": 5}',
        '{"conversations": [{"role": "user", "content": "hi"}]}',
        '{"scene": {"objects": [1], "ground": 3}}',
        '{"captions": "one text"}',
        '{"captions": 3, "caption": "a square"}',
        '{"caption": "a photo of <image>"}',
        '{"questions": [{"type": "color", "question": "what is <boi>?", "answer": "x"}]}',
    ],
)
def test_malformed_words_are_bad_samples(tmp_path, words):
    folder = fill_folder(tmp_path / "f", count=2)
    (folder / "im0.json").write_text(words)
    source = open_source(folder, max_bad_fraction=0.5)
    assert source[0].key == "im1" and list(source.bad) == [0]


@pytest.mark.parametrize("words", ['{"caption": null}', '{"caption": ""}', '{"captions": [" ", null]}'])
def test_no_caption_is_no_mistake(tmp_path, words):
    """As with a .txt that is empty or absent."""
    folder = fill_folder(tmp_path / "f", count=2)
    (folder / "im0.txt").write_text("")
    (folder / "im0.json").write_text(words)
    source = open_source(folder)
    assert source[0].key == "im0" and source[0].captions == [] and not source.bad


def test_check_source_reports_counts_and_bad_samples(tmp_path):
    fill_folder(tmp_path / "f", bad=(2,))
    (tmp_path / "f" / "im5.txt").unlink()
    report = check_source(str(tmp_path / "f"))
    assert (report.num_samples, report.num_captions, report.num_without_words) == (9, 16, 1)
    assert [key for key, _ in report.bad] == ["im2"] and "not a readable image" in report.bad[0][1]
    assert check_source(str(tmp_path / "f"), limit=2).image_sizes == {"8x8": 1, "9x9": 1}
    shapes = check_source(SHAPES).to_dict()
    assert shapes["num_captions"] >= shapes["num_samples"] == 25 and set(shapes["question_types"]) > {"count"}


def test_conversations_of_both_forms_become_turns():
    expected = [Turn("user", "<image>\nwhat is it?"), Turn("assistant", "a square")]
    chat = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a square"}]
    assert parse_conversations(TALK, "x") == parse_conversations(chat, "x") == [expected]
    assert parse_conversations([TALK, chat], "x") == [expected, expected]
    system = parse_conversations([{"role": "system", "content": "be short"}, *chat], "x")
    assert system[0][0].content == "<image>\nbe short\nwhat is it?"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "roles"),
        ([("user", "a")], "roles"),
        ([("assistant", "a"), ("user", "b")], "roles"),
        ([("user", "a"), ("user", "b")], "roles"),
        ([("user", "<image> a"), ("assistant", " ")], "empty"),
        ([("user", " "), ("assistant", "b")], "empty"),
        ([("user", "a"), ("assistant", "<image>")], "empty|answer"),
        ([("user", "a"), ("assistant", "see <image>")], "answer"),
        ([("user", "<image><image> a"), ("assistant", "b")], "2 x <image>"),
        ([("user", "a"), ("assistant", "b")], "0 x <image>"),
    ],
)
def test_conversations_that_cannot_be_learnt_are_refused(turns, message):
    with pytest.raises(DataError, match=f"^where.*({message})"):
        validate_conversation([Turn(*turn) for turn in turns], 1, "where")


def test_llava_import(tmp_path):
    fill_folder(tmp_path / "images", count=1)
    records = [
        {"id": "7", "image": "im0.png", "conversations": TALK},
        {"id": "8", "image": "gone.png", "conversations": TALK},
        {"id": "9", "conversations": TALK},
        {"id": "10", "image": "im0.png", "conversations": TALK[:1]},
        {"id": "11", "image": "../images/im0.png", "conversations": TALK},  # out of the folder, as `?images=` has it
        {"id": "12", "image": str(tmp_path / "images" / "im0.png"), "conversations": TALK},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    path, kept, dropped = import_llava(tmp_path / "llava.json", tmp_path / "images", tmp_path / "out")
    assert (kept, dropped) == (1, 5)
    with pytest.raises(DataError, match="train.jsonl exists already"):
        import_llava(tmp_path / "llava.json", tmp_path / "images", tmp_path / "out")
    with pytest.raises(DataError, match="nowhere: is no folder"):
        import_llava(tmp_path / "llava.json", tmp_path / "nowhere", tmp_path / "out3")
    assert not (tmp_path / "out3").exists()
    source = open_source(path)
    assert source[0].conversations == parse_conversations(TALK, "") and source[0].meta == {"id": "7"}
    (tmp_path / "bad.json").write_text(json.dumps(records[1:]))
    for name, message in (("bad.json", "none of 5"), ("gone.json", "cannot be read")):
        with pytest.raises(DataError, match=message):
            import_llava(tmp_path / name, tmp_path / "images", tmp_path / "out2")


HEADER = {"tokenizer": "abc", "num_codebooks": 2, "codebook_size": 40000, "image_size": 64, "num_positions": 3}


def code_samples(count=5, size=40000):
    source = open_source(SHAPES)
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        s = source[index]
        codes = torch.randint(size, (2, 3), generator=generator)
        talks = parse_conversations(TALK, "x")
        yield CodeSample(s.key + ".v1", codes, s.captions, s.questions, talks, s.meta)


@pytest.mark.parametrize("size", [40000, 2**15, 16])
def test_code_shards_round_trip(tmp_path, size):
    header = HEADER | {"codebook_size": size}
    folder = write_codes(code_samples(size=size), tmp_path, header, max_per_shard=2)
    source = CodeSource(folder, expect=header)
    assert len(source) == 5 and source.header["count"] == 5
    for index, expected in enumerate(code_samples(size=size)):
        got = source[index]
        assert got.codes.dtype == torch.int64 and torch.equal(got.codes, expected.codes)
        words = source.text(index)
        assert words.codes.numel() == 0
        for name in ("key", "captions", "questions", "conversations", "meta"):
            assert getattr(got, name) == getattr(expected, name) == getattr(words, name)
    stored = np.load(io.BytesIO(source.reader[0]["npy"]))
    assert stored.dtype == (np.int32 if size == 40000 else np.int16)


def test_code_shards_refuse_what_does_not_fit(tmp_path):
    write_codes(code_samples(), tmp_path / "a", HEADER)
    for name, value in (("tokenizer", "xyz"), ("num_positions", 4)):
        with pytest.raises(DataError, match=f"{name}.*{HEADER[name]}.*{value}"):
            CodeSource(tmp_path / "a", expect=HEADER | {name: value})
    for name, value in (("codebook_size", 100), ("num_positions", 4), ("num_codebooks", 1)):
        with pytest.raises(DataError, match="expected"):
            write_codes(code_samples(), tmp_path / name, HEADER | {name: value})
        with pytest.raises(DataError, match="cut short"):
            CodeSource(tmp_path / name)
    with pytest.raises(DataError, match="lacks image_size"):
        write_codes(code_samples(), tmp_path / "b", {k: v for k, v in HEADER.items() if k != "image_size"})
    header = json.loads((tmp_path / "a" / "header.json").read_text())
    for change, message in (({"count": 6}, "5 samples"), ({"format_version": 9}, "format_version 9")):
        (tmp_path / "a" / "header.json").write_text(json.dumps(header | change))
        with pytest.raises(DataError, match=message):
            CodeSource(tmp_path / "a")


def test_code_shards_of_several_folders_are_read_together(tmp_path):
    for name, count in (("a", 3), ("b", 5)):
        write_codes(code_samples(count), tmp_path / name, HEADER, max_per_shard=2)
    source, alone = CodeSource(tmp_path / "{b,a}", expect=HEADER), CodeSource(tmp_path / "b")
    assert len(source) == source.header["count"] == 8
    assert [source[i].key for i in range(8)] == [alone[i].key for i in (0, 1, 2, 3, 4, 0, 1, 2)]
    write_codes(code_samples(3), tmp_path / "c", HEADER | {"tokenizer": "xyz"})
    with pytest.raises(DataError, match="c: tokenizer is 'xyz', in .*a it is 'abc'"):
        CodeSource(tmp_path / "{a,c}")
    with pytest.raises(DataError, match="d has no header"):
        CodeSource(tmp_path / "{a,d}")


def test_the_world_needs_no_torch():
    """Scenes and detector serve in small processes (data workers, judges), where torch costs seconds."""
    code = "import sys, unitok.data.captions, unitok.data.detector, unitok.data.shards; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_byte_order_marks_are_no_text(tmp_path):
    folder = fill_folder(tmp_path / "f", count=2)
    (folder / "im0.txt").write_text("a caption", encoding="utf-8-sig")
    assert open_source(folder)[0].captions[0] == "a caption"
    lines = [json.dumps({"image": str(folder / f"im{i}.png"), "caption": "one", "id": f"name-{i}"}) for i in range(2)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    source = open_source(tmp_path / "x.jsonl")
    assert source[0].captions == ["one"] and [source[i].key for i in range(2)] == ["name-0", "name-1"]


def test_sub_folders_are_read_and_hidden_files_are_not(tmp_path):
    folder = fill_folder(tmp_path / "f", count=2)
    fill_folder(folder / "more", count=1)
    (folder / "._im0.png").write_bytes(b"resource fork")
    source = open_source(folder)
    assert [source[i].key for i in range(len(source))] == ["im0", "im1", "more/im0"] and not source.bad


def test_deeply_nested_json_is_a_bad_sample(tmp_path):
    folder = fill_folder(tmp_path / "f", count=2)
    (folder / "im0.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    source = open_source(folder, max_bad_fraction=0.5)
    assert source[0].key == "im1" and "nested" in source.bad[0]
