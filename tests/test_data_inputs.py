"""Where samples come from: img2dataset shards, LLaVA JSON, parquet, URLs."""

import functools
import http.server
import importlib.util
import json
import pickle
import re
import threading

import pytest
from bad_inputs import encoded, picture
from PIL import Image
from test_data_bad import many, write_tar

from unitok.cli import main
from unitok.core.errors import DataError, UserError
from unitok.data.check import check_source
from unitok.data.decoding import load_image
from unitok.data.source import open_source

PNG, JPEG = encoded(picture(), "PNG"), encoded(picture(), "JPEG")


def test_img2dataset_shards(tmp_path):
    """jpg, txt and json with its own fields; its notes beside the shards are no samples."""
    for shard in range(2):
        samples = []
        for number in range(3):
            fields = {
                "caption": None if number == 2 else f"number {number}",
                "url": "https://example.org/a.jpg",
                "key": f"{shard:05d}{number:04d}",
                "status": "success",
                "error_message": None,
                "width": 24,
                "height": 16,
                "original_width": 800,
                "original_height": 533,
                "exif": '{"Image Orientation": "Horizontal"}',
                "sha256": "0" * 64,
                "uid": "abc",
                "similarity": 0.3,
            }
            text = (fields["caption"] or "").encode()
            samples.append((fields["key"], {"jpg": JPEG, "json": json.dumps(fields).encode(), "txt": text}))
        write_tar(tmp_path / f"{shard:05d}.tar", samples)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"columns")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    source = open_source(tmp_path, max_bad_fraction=0)
    assert [source[n].captions for n in range(6)] == 2 * [["number 0"], ["number 1"], []]
    assert source[4].meta["url"] == "https://example.org/a.jpg" and source[4].key == "000010001"
    report = check_source(str(tmp_path))
    assert (report.num_samples, report.num_bad, report.num_captions, report.num_without_words) == (6, 0, 4, 2)
    assert report.example["place"] == f"{tmp_path / '00000.tar'}:000000000" and report.image_sizes == {"24x16": 6}


TALK = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a square"}]


def test_llava_json_is_a_source(tmp_path, caplog):
    (tmp_path / "coco" / "train").mkdir(parents=True)
    (tmp_path / "coco" / "train" / "1.jpg").write_bytes(JPEG)
    records = [
        {"id": "a", "image": "train/1.jpg", "conversations": TALK},
        {"id": "text only", "conversations": TALK},
        {"id": "nothing"},
        {"id": 7, "image": "train/gone.jpg", "conversations": TALK},
        {"id": "c", "image": "/etc/hostname", "conversations": TALK},
        {"id": "d", "image": "train/1.jpg", "conversations": TALK[:1]},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    source = open_source(f"{tmp_path}/llava.json?images={tmp_path}/coco", max_bad_fraction=1.0)
    assert len(source) == 5 and source.num_text_only == 1 and source.place(5).endswith("record 1")
    assert [source.key(n) for n in range(5)] == ["a", "nothing", "7", "c", "d"]
    assert source[0].conversations[0][1].content == "a square" and source[0].meta == {"id": "a"}
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes, as spawn sends them
    assert [source[n].key for n in (1, 2, 3, 4)] == ["a"] * 4 and len(again) == 5
    assert "record 2 has no image path" in source.bad[1]
    beside = [{"image": "coco/train/1.jpg", "conversations": TALK}]
    (tmp_path / "beside.json").write_text(json.dumps(beside))
    assert open_source(tmp_path / "beside.json")[0].image.size == (24, 16)
    wrong = {
        "llava.json?image=x": "expected [?]images=FOLDER",
        "llava.json?images=": "expected [?]images=FOLDER",
        "llava.json?images=nowhere": "no folder",
        "none.json": "cannot be read",
    }
    for name, message in wrong.items():
        with pytest.raises(DataError, match=message):
            open_source(f"{tmp_path}/{name}")
    for content, message in (("{}", "JSON dict"), ("[]", "none of 0"), ("[{}]", "none of 1"), ("[", "cannot be read")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match=message):
            open_source(tmp_path / "bad.json")


def test_parquet_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [encoded(Image.new("RGB", (8 + n, 8), (n, 0, 0)), "PNG") for n in range(12)],
        "text": [f"number {n}" if n else None for n in range(12)],
        "label": list(range(12)),
    }
    rows["image"][5] = b"broken"
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    table = datasets.Dataset.from_dict(
        {**rows, "image": [{"bytes": data, "path": None} for data in rows["image"]]}, features=features
    )
    for part in range(2):
        path = tmp_path / f"train-0000{part}-of-00002.parquet"
        table.select(range(6 * part, 6 * part + 6)).to_parquet(path, batch_size=4)
    table.select(range(1)).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    source = open_source(tmp_path, split="train", max_bad_fraction=0.2)
    assert len(source) == 12 and len(open_source(tmp_path / "train-*.parquet")) == 12
    order = [11, 0, 7, 3, 1, 10, 6, 5]
    assert [source[n].image.size[0] - 8 for n in order] == [11, 0, 7, 3, 1, 10, 6, 6]
    assert (
        source[0].captions == []
        and source[7].captions == ["number 7"]
        and source[7].key == "train-00001-of-00002-000001"
    )
    assert "row 1 of group 1" in source.bad[5] and len(source._kept) == 4
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes, as spawn sends them
    assert not again._kept and again[3].captions == ["number 3"]
    assert check_source(str(tmp_path / "t*.parquet")).num_samples == 12  # 13 rows, one broken
    with pytest.raises(DataError, match="holds the splits test, train; name one"):
        open_source(tmp_path)


def test_parquet_of_other_columns_and_damage(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "a.png").write_bytes(PNG)
    columns = {
        "jpg": [JPEG, None],
        "captions": [["a", "b"], ["c"]],
        "conversations": [TALK, None],
        "questions": [None, [{"type": "t", "question": "q?", "answer": "a"}]],
    }
    pa.parquet.write_table(pa.table(columns), tmp_path / "bytes.parquet")
    source = open_source(tmp_path / "bytes.parquet", max_bad_fraction=0.5)
    assert source[0].captions == ["a", "b"] and source[0].conversations[0][1].content == "a square"
    assert source.words(1).questions[0].answer == "a" and source[1].captions == ["a", "b"]
    paths = {"image": [{"bytes": None, "path": "a.png"}], "caption": ["x"]}
    pa.parquet.write_table(pa.table(paths), tmp_path / "paths.parquet")
    assert open_source(tmp_path / "paths.parquet")[0].image.size == (24, 16)
    pa.parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "texts.parquet")
    pa.parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    whole = (tmp_path / "bytes.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "zeros.parquet").write_bytes(whole[:4] + bytes(200) + whole[204:])
    wrong = {"texts": "columns text; expected images", "none": "no row", "cut": "not a whole", "gone": "does not exist"}
    for name, message in wrong.items():
        with pytest.raises(DataError, match=message) as caught:
            open_source(tmp_path / f"{name}.parquet")
        assert "\n" not in str(caught.value)
    assert check_source(str(tmp_path / "zeros.parquet")).num_samples < 2


# ---- URLs


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNITOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class _Server(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []
    short = False

    def do_GET(self):  # noqa: N802
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "remote"
    folder.mkdir()
    _Server.asked = []
    handler = functools.partial(_Server, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_shards_by_url_are_fetched_once(server, cache):
    folder, url = server
    for number in range(3):
        write_tar(folder / f"part-{number}.tar", many(4, 10 * number))
    source = open_source(f"{url}/part-{{0..2}}.tar")
    assert [source[n].key for n in (0, 4, 11)] == ["0000", "0010", "0023"]
    asked = len(_Server.asked)
    assert len(open_source(f"{url}/part-{{0..1}}.tar")) == 8 and len(_Server.asked) == asked
    kept = sorted(cache.rglob("*.tar"))
    assert [path.read_bytes() for path in kept] == [(folder / f"part-{n}.tar").read_bytes() for n in range(3)]
    assert not [path for path in cache.rglob("*.tmp")]
    for name in ("part-9.tar", "part-{0..9}.tar"):
        with pytest.raises(DataError, match="does not exist"):
            open_source(f"{url}/{name}")
    local = open_source(f"{folder.as_uri()}/part-*.tar")
    assert len(local) == 12 and local[11].key == "0023"


def test_a_table_by_url_names_no_file_of_this_machine(server, cache, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet

    folder, url = server
    (folder / "a.png").write_bytes(PNG)
    for name, column in {"texts": ["a.png"], "rows": [{"bytes": None, "path": "a.png"}]}.items():
        pa.parquet.write_table(pa.table({"image": column, "caption": ["x"]}), folder / f"{name}.parquet")
        assert open_source(folder / f"{name}.parquet")[0].captions == ["x"]
        report = check_source(f"{url}/{name}.parquet")
        assert report.bad_kinds == {"missing image": 1} and "which a URL does not bring" in report.bad[0][1]
    assert main(["data", "index", f"{url}/part-0.tar"]) == 2
    assert "indexed when they are fetched" in capsys.readouterr().err
    with pytest.raises(UserError, match="http://x/a.png: images are read from files; fetch it first"):
        load_image("http://x/a.png")


def test_urls_that_cannot_be_read(server, cache, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    folder, url = server
    write_tar(folder / "a.tar", many(2))
    get = LocalFileSystem.get_file

    def cut(self, source, target, **options):
        get(self, source, target, **options)
        with open(target, "rb+") as stream:
            stream.truncate(100)

    monkeypatch.setattr(LocalFileSystem, "get_file", cut)
    port = url.rsplit(":", 1)[1]
    wrong = {
        f"{folder.as_uri()}/a.tar": "got 100 of",
        "nosuch://bucket/a.tar": "no protocol",
        "smb://host/a.tar": "smb.* is not installed",
        f"http://127.0.0.1:{1 if port != '1' else 2}/a.tar": "cannot be fetched",
        f"{url}/a.jsonl": "URLs are read of .tar and .parquet",
        f"{folder.as_uri()}/z*.tar": "matches no file",
    }
    for spec, message in wrong.items():
        with pytest.raises(DataError, match=message) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.suffix in (".tar", ".tmp")]


def test_urls_of_object_stores(cache, monkeypatch, capsys):
    """Braces and stars over a store that has no folders and no server, and what is said where one cannot be reached."""
    import fsspec
    from huggingface_hub import constants

    store = fsspec.filesystem("memory")
    for number in range(3):
        write_tar(cache.parent / "part.tar", many(4, 10 * number))
        store.pipe(f"/bucket/train/part-{number}.tar", (cache.parent / "part.tar").read_bytes())
    for spec in ("memory://bucket/train/part-{0..2}.tar", "memory://bucket/train/*.tar"):
        source = open_source(spec)
        assert len(source) == 12 and [source[n].key for n in (0, 4, 11)] == ["0000", "0010", "0023"]
    mixed = open_source("mix:3=memory://bucket/train/part-0.tar;1=memory://bucket/train/part-{1..2}.tar")
    assert mixed.counts == [9, 3]
    store.rm("/bucket", recursive=True)
    assert len(open_source("memory://bucket/train/part-{0..2}.tar")) == 12  # from the cache
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    wrong = {"memory://bucket/train/part-3.tar": "does not exist", "hf://datasets/a/b/x.tar": "cannot be fetched"}
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        if importlib.util.find_spec(package) is None:
            wrong[f"{protocol}://bucket/a.tar"] = f"nstall {package} to access .*{protocol}:// is not installed"
    for spec, message in wrong.items():
        assert main(["data", "check", spec]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and re.search(message, said[0]), said
