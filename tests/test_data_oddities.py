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
