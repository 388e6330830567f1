"""What data sets of others hold that is neither as usual nor damage: endings, records, columns, modes, names."""

import json

import numpy as np
import pytest
from bad_inputs import encoded, picture
from PIL import Image
from test_data_sources import fill_folder

from unitok.cli import main
from unitok.core.errors import DataError
from unitok.data.bad import SampleError
from unitok.data.check import check_source
from unitok.data.decoding import decode_image
from unitok.data.shards import write_shards
from unitok.data.source import open_source

TALK = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "nobody"}]


def test_words_beside_images_may_have_endings_of_any_case(tmp_path, caplog):
    fill_folder(tmp_path, count=3)
    (tmp_path / "im0.txt").rename(tmp_path / "im0.TXT")
    (tmp_path / "im1.TXT").write_text("not this one")
    (tmp_path / "im2.Json").write_text('{"caption": "of the json"}')
    source = open_source(tmp_path)
    assert [source[n].captions[0] for n in range(3)] == ["caption 0", "caption 1", "caption 2"]
    assert source[2].captions[-1] == "of the json" and not source.passed_over and not caplog.text
    before = source.stamp(0)
    (tmp_path / "im0.TXT").write_text("another")
    assert source.stamp(0) != before


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_records_without_image_and_conversations_are_bad_samples(tmp_path, ending):
    """The same in both forms; what stands deeper in a record is meta."""
    fill_folder(tmp_path, count=1)
    records = [
        {"id": 1, "image": "im0.png", "conversations": TALK},
        {"id": 2, "conversations": TALK, "meta": {"image": "x"}},
        {"conversations": TALK, "id": 3, "image": "im0.png"},
        {"id": 4, "caption": "x"},
        {"id": 5, "meta": {"image": "x"}, "conversations": TALK, "image": "im0.png"},
        {"id": 6, "score": -1.5e3, "ok": True, "image": None, "conversations": TALK},
        {"id": 'a "quoted" one', "image": "im0.png", "conversations": TALK},
    ]
    text = json.dumps(records) if ending == "json" else "\n".join(map(json.dumps, records))
    (tmp_path / f"r.{ending}").write_text(text)
    source = open_source(tmp_path / f"r.{ending}", max_bad_fraction=1.0)
    assert [source.key(n) for n in range(7)] == ["1", "3", "4", "5", 'a "quoted" one', "2", "6"]
    assert source.num_text_only == 2 and source.read_words(5).meta["meta"] == {"image": "x"}
    report = check_source(str(tmp_path / f"r.{ending}"))
    assert (report.num_bad, report.bad_kinds, report.num_text_only) == (1, {"missing image": 1}, 2)


def test_captions_of_parquet_that_are_a_list_and_a_text_are_of_a_wrong_type(tmp_path):
    """Not letters."""
    import pyarrow as pa
    import pyarrow.parquet

    columns = {"image": [encoded(picture(), "PNG")] * 2, "caption": [["a", "b"], ["c"]], "captions": ["text", None]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet", max_bad_fraction=1.0)
    with pytest.raises(SampleError, match="captions is 'text'; expected a list") as caught:
        source.read(0)
    assert caught.value.kind == "wrong type" and source.read(1).captions == ["c"]


def test_check_lists_all_bad_samples_and_shows_an_example_without_an_image(tmp_path, capsys):
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"id": n, "conversations": TALK}) for n in range(2)))
    report = check_source(str(tmp_path / "talks.jsonl"))
    assert report.example["key"] == "0" and report.example["conversation"] == ["user: who?", "assistant: nobody"]
    assert "size" not in report.example
    fill_folder(tmp_path, count=1)
    lines = [{"id": "talk", "conversations": TALK}, *({"image": "gone.png"} for _ in range(1200)), {"image": "im0.png"}]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["data", "check", str(tmp_path / "bad.jsonl"), "--json", str(tmp_path / "out.json")]) == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["num_bad"] == len(report["bad"]) == 1200 and report["example"]["size"] == "8x8"
    out = capsys.readouterr().out
    assert "and 1180 more bad ones" in out and out.count("bad sample ") == 20


def test_a_clear_grey_of_16_bits_is_the_background(tmp_path):
    """As of 8 bits, where PIL does it."""
    values = np.array([[4660, 40000]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "clear.png", transparency=4660)
    Image.fromarray(values).save(tmp_path / "plain.png")
    pixels = [np.asarray(decode_image((tmp_path / f"{n}.png").read_bytes(), n))[0, :, 0] for n in ("clear", "plain")]
    assert pixels[0].tolist() == [255, 156] and pixels[1].tolist() == [18, 156]


def test_tiff_of_32_bits_has_no_range():
    grey = Image.fromarray(np.full((2, 2), 200, dtype=np.int32))
    with pytest.raises(SampleError, match="not a readable image"):
        decode_image(encoded(grey, "TIFF"), "a.tif")
    wide = Image.fromarray(np.full((2, 2), 200 * 257, dtype=np.uint16))
    for form in ("TIFF", "PPM", "PNG"):
        assert np.asarray(decode_image(encoded(wide, form), "a")).tolist() == [[[200] * 3] * 2] * 2


def test_a_class_may_be_called_train(tmp_path):
    for name in ("apple", "bus", "train"):
        fill_folder(tmp_path / "classes" / name, count=1)
        fill_folder(tmp_path / "splits" / {"apple": "val", "bus": "test"}.get(name, name), count=1)
    assert open_source(tmp_path / "classes").key(2) == "train/im0"
    (tmp_path / "splits" / ".cache").mkdir()
    with pytest.raises(DataError, match="holds splits; name one, such as .*train"):
        open_source(tmp_path / "splits")
    assert len(open_source(tmp_path / "splits", split="val")) == 1


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "0", "-1e-3"])
def test_weights_that_are_no_shares_are_refused(weight):
    with pytest.raises(DataError, match="mix:.*: weight: Input should be .*; expected {source, weight}"):
        open_source(f"mix:{weight}=shapes:train;1=shapes:val")


def test_weights_may_be_any_positive_number_and_names_hold_an_equals_sign(tmp_path):
    fill_folder(tmp_path / "a=b", count=4)
    source = open_source(f"mix:1e0={tmp_path}/a=b; +3={tmp_path}/a=b")
    assert source.counts == [2, 6]
    assert len(open_source(f"mix:{tmp_path}/a=b;{tmp_path}/a=b")) == 8


def test_shards_with_endings_of_any_case_and_shards_in_a_sub_folder(tmp_path):
    (shard,) = write_shards([{"__key__": "x", "png": encoded(picture(), "PNG")}], tmp_path / "deep" / "shards")
    with pytest.raises(DataError, match="1 x .tar; .*deep/shards has .tar files, name that folder") as caught:
        open_source(tmp_path / "deep")
    assert "\n" not in str(caught.value)
    shard.rename(shard.with_name("A.TAR"))
    for spec in (shard.parent, shard.with_name("A.TAR")):
        assert open_source(spec).key(0) == "x"


def test_a_split_that_is_not_there_is_told(tmp_path, capsys):
    fill_folder(tmp_path / "images" / "val", count=2)
    fill_folder(tmp_path / "images", count=1)
    report = tmp_path / "new" / "report.json"
    assert main(["data", "check", str(tmp_path / "images"), "--split", "val", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["num_samples"] == 2
    assert main(["data", "check", "shapes:train?num=3", "--split", "val"]) == 0
    mixture = f"mix:1={tmp_path / 'images'};1=shapes:train?num=3"
    assert main(["data", "check", mixture, "--split", "val"]) == 0
    capsys.readouterr()
    for source in (str(tmp_path / "images"), "shapes:train?num=3"):
        assert main(["data", "check", source, "--split", "vla"]) == 2
        assert "vla" in capsys.readouterr().err
