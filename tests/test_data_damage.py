"""Damage and oddities of whole files and folders: names, ends of shards, parquet files, links, mixtures of mixtures."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from bad_inputs import encoded, picture
from test_data_bad import many, write_tar

from unitok.cli import main
from unitok.core.errors import DataError
from unitok.core.rng import derive_seed
from unitok.data.check import check_source
from unitok.data.codes import CodeSample, CodeSource, write_codes
from unitok.data.conversations import import_llava
from unitok.data.images import ImageBatches, ImageDataConfig
from unitok.data.shards import ShardReader, expand_shards, write_shards
from unitok.data.source import open_source
from unitok.data.tar_table import scan

PNG = encoded(picture(), "PNG")
HEADER = {"tokenizer": "abc", "num_codebooks": 2, "codebook_size": 16, "image_size": 64, "num_positions": 3}


class Terminal(io.TextIOWrapper):
    """A standard output that takes nothing but its encoding."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


# ---- names that are not UTF-8


@pytest.fixture
def odd_names(tmp_path):
    """A folder with b"\\xff\\xe9.png" and b"\\xff\\xea.png", the second of which is no image."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, data in ((b"0.png", PNG), (b"1.png", PNG), (b"\xff\xe9.png", PNG), (b"\xff\xea.png", b"nonsense")):
        (folder / name.decode("utf-8", "surrogateescape")).write_bytes(data)
    return folder


@pytest.mark.parametrize("augment", ["none", "crop", "released"])
def test_images_whose_names_are_not_utf8_are_trained_on(odd_names, augment):
    batches = ImageBatches(ImageDataConfig(source=str(odd_names), augment=augment, max_bad_fraction=0.5), 16, seed=0)
    assert batches.load([0, 1, 2, 3], epoch=0)["pixels"].shape == (4, 3, 16, 16)
    assert [batches.source.key(n) for n in range(4)] == ["0", "1", r"\xff\xe9", r"\xff\xea"]
    assert batches.source.bad.keys() == {3}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_not_utf8_are_printed(odd_names, tmp_path, monkeypatch, encoding):
    (odd_names / "1.txt").write_text("ein grüner Kreis \x1b[31m", encoding="utf-8")
    (odd_names / "0.png").unlink()
    monkeypatch.setattr("sys.stdout", out := Terminal(encoding))
    assert main(["data", "check", str(odd_names), "--json", str(tmp_path / "report.json")]) == 1
    assert "bad sample" in out.text() and r"\xea" in out.text() and "\x1b" not in out.text()
    assert ("grüner" in out.text()) == (encoding == "utf-8")
    assert json.loads((tmp_path / "report.json").read_bytes())["num_bad"] == 1


def test_duplicate_ids_and_shards_of_odd_names_are_printed(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)
    lines = [{"image": "a.png", "id": "猫"}] * 2 + [{"image": "a.png", "id": "x\ud800"}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr("sys.stdout", out := Terminal("ascii"))
    assert main(["data", "check", str(tmp_path / "r.jsonl")]) == 1
    assert r"key given twice        \u732b" in out.text()
    folder = tmp_path / b"\xffshards".decode("utf-8", "surrogateescape")
    folder.mkdir()
    write_tar(folder / "0.tar", many(3)).write_bytes(b"")
    write_tar(folder / "1.tar", many(3))
    assert main(["data", "index", str(folder)]) == 1
    assert "bad shard" in out.text() and r"\udcffshards" in out.text()


def test_keys_of_shards_that_are_not_utf8_stay_apart(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in (b"\xe8.png", b"\xe9.png"):
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
    report = check_source(str(tmp_path))
    assert (report.num_samples, report.num_bad, report.example["key"]) == (2, 0, r"\xe8")


def test_a_folder_of_images_may_have_any_name(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"image": "a.png"}')
    for name in ("a+b", "50%25", "x&y=z", "plain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(PNG)
        assert open_source(f"{tmp_path}/r.jsonl?images={tmp_path}/{name}")[0].image.size == (24, 16)
    with pytest.raises(DataError, match="is not understood"):
        open_source(f"{tmp_path}/r.jsonl?pictures={tmp_path}")


def test_a_seed_may_be_of_any_text():
    seeds = {derive_seed("augment", text) for text in ("\udcff", "\ud800", "?", r"\xff", "ÿ")}
    assert len(seeds) == 5 and derive_seed("ÿ") == 5306688458582192022  # as ever


def test_code_shards_hold_any_key_and_say_what_is_wrong_with_their_words(tmp_path):
    codes = torch.zeros(2, 3, dtype=torch.int64)
    wanted = CodeSample("\udcff", codes, ["猫"], [], [], {"id": 1, "deep": [[["ü"]]]})
    source = CodeSource(write_codes([wanted], tmp_path / "a", HEADER))
    assert (source[0].key, source[0].captions, source[0].meta) == (wanted.key, wanted.captions, wanted.meta)
    array = io.BytesIO()
    np.save(array, codes.numpy())
    deep = b'{"key": "a", "words": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
    odd = [b'{"key": "a", "words": []}', b'{"key": 1, "words": {}}', b"[]", b"\xff", b'{"key": ' + b"9" * 5000, deep]
    members = ({"__key__": str(n), "npy": array.getvalue(), "json": data} for n, data in enumerate(odd))
    write_shards(members, tmp_path / "b", prefix="codes")
    header = json.loads((tmp_path / "a" / "header.json").read_text())
    (tmp_path / "b" / "header.json").write_text(json.dumps(header | {"count": len(odd)}))
    source = CodeSource(tmp_path / "b")
    for number in range(len(odd)):
        with pytest.raises(DataError, match=f"sample {number} has no readable words"):
            source[number]
    (tmp_path / "b" / "header.json").write_bytes(b"\xff{}")
    with pytest.raises(DataError, match="header.json: text is not UTF-8"):
        CodeSource(tmp_path / "b")


def test_llava_with_an_odd_id_is_imported(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "猫"}]
    records = [{"id": key, "image": "a.png", "conversations": talk} for key in ("x\ud800", "b")]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    path, kept, _ = import_llava(tmp_path / "llava.json", tmp_path, tmp_path / "out")
    assert kept == 2 and check_source(str(path)).bad_kinds == {"not UTF-8": 1}
    assert open_source(path, max_bad_fraction=1.0)[1].conversations[0][1].content == "猫"


# ---- ends of shards


def ended(record, zeros=0, count=10):
    """A tar that ends in whole records of so many bytes, and more zeros."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for key, members in many(count):
            for name, content in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    whole = data.getvalue()[:end] + bytes(1024)
    return whole + bytes(-len(whole) % record + zeros)


@pytest.mark.parametrize("record", [512, 10240, 2**14, 2**17, 2**20])
def test_what_tools_end_a_tar_with_is_no_damage(tmp_path, record):
    """Python, GNU tar and bsdtar fill up to 10240 bytes, Go to 512, GNU tar --blocking-factor to any."""
    (tmp_path / "a.tar").write_bytes(ended(record))
    table = scan(tmp_path / "a.tar")
    assert (len(table), table.problem) == (10, "")


SAMPLE = 2048  # bytes of each sample of `many`: two headers, a PNG and a text


@pytest.mark.parametrize(
    ("at", "kept"),
    [
        (SAMPLE * 4, 4),  # between samples
        (SAMPLE * 4 + 512 + 20, 4),  # within an image: its header is whole
        (SAMPLE * 4 + 1024, 4),  # an image without its text, no caption but a loss
        (SAMPLE * 4 + 1536, 4),  # a text of zeros
        (SAMPLE * 4 + 1536 + 3, 4),  # within the text
        (SAMPLE * 4 + 1536 + 5, 5),  # behind it
    ],
    ids=["between", "in an image", "no text", "text of zeros", "in a text", "behind a text"],
)
def test_zeros_in_place_of_samples_are_a_broken_shard(tmp_path, at, kept):
    """As after a crash of the machine that wrote it: the size is right, what had not reached the disk is zeros."""
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", many(10))
    path = tmp_path / "1.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes(len(whole) - at))
    source = open_source(tmp_path, max_bad_fraction=0.5)
    assert len(source) == 20 + kept and source.num_lost == 10 - kept
    assert all(source[n].captions == ["words"] for n in range(len(source))) and not source.bad
    report = check_source(str(tmp_path))
    assert report.bad_kinds == {"broken shard": 1} and "zeros for samples" in report.bad[0][1]
    with pytest.raises(DataError, match=r"samples are bad.*1\.tar"):
        open_source(tmp_path, max_bad_fraction=0)


def test_more_zeros_than_any_record_and_what_stands_behind_the_end(tmp_path):
    (first := tmp_path / "first.tar").write_bytes(ended(10240))
    for name, data in (
        ("far", ended(512, zeros=2**21)),
        ("odd", ended(10240, zeros=10240 + 512)),
        ("two", first.read_bytes() + first.read_bytes()),
        ("text", first.read_bytes() + b"x"),
    ):
        (path := tmp_path / f"{name}.tar").write_bytes(data)
        assert len(scan(path)) == 10 and "more than end a tar" in scan(path).problem, name
        with pytest.raises(DataError, match=f"{name}.tar is not a whole tar file"):
            ShardReader(path)


def test_every_copy_of_a_key_counts(tmp_path):
    one = {"png": PNG}
    both = {"png": PNG, "txt": b"words"}
    path = write_tar(tmp_path / "0.tar", [*((key, one) for key in "abababa"), *(("c", both) for _ in range(4))])
    report = check_source(str(path))
    assert (report.num_samples, report.num_bad, report.bad_kinds) == (3, 8, {"duplicate key": 8})
    source = open_source(path, max_bad_fraction=1.0)
    assert source.num_lost == 8 and f"{path}:a #4" in source.lost and f"{path}:c #4" in source.lost
    with pytest.raises(DataError, match="8 of 11 samples are bad"):
        open_source(path, max_bad_fraction=0.7)


def test_more_kinds_of_members_than_an_index_can_name(tmp_path, monkeypatch):
    """Keys end at the first dot: of photo.00001.png, photo.00002.png ... every one is a kind of its own."""
    for module in ("tar_table", "shard_index"):
        monkeypatch.setattr(f"unitok.data.{module}.MOST_EXTENSIONS", 8)
    for shard, count in enumerate((9, 8, 8)):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(count):
                tar.addfile(tarfile.TarInfo(f"photo.{shard}-{number}.png"))
    assert "a key ends at its first dot" in scan(tmp_path / "0.tar").problem and not scan(tmp_path / "1.tar").problem
    with pytest.raises(DataError, match="shards up to 2.tar have more than 8 kinds"):
        ShardReader(tmp_path / "{1,2}.tar")


# ---- folders


def test_all_images_of_a_folder_are_read_and_the_rest_is_told(tmp_path, caplog):
    folder = tmp_path / "f"
    folder.mkdir()
    kinds = {"png": "PNG", "JPEG": "JPEG", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "TIFF": "TIFF", "ppm": "PPM"}
    for number, (name, kind) in enumerate(kinds.items()):
        (folder / f"{number}.{name}").write_bytes(encoded(picture(), kind))
        (folder / f"{number}.txt").write_text("a caption")
    for name in ("a.heic", "b.HEIC", "c.psd", "README", ".hidden.heic"):
        (folder / name).write_bytes(b"x")
    report = check_source(str(folder))
    assert (report.num_samples, report.num_captions, report.num_bad) == (7, 7, 0)
    assert report.passed_over == {".heic": 2, ".psd": 1, "no ending": 1}
    assert "passed over, which are neither images nor words: 2 x .heic, 1 x no ending, 1 x .psd" in caplog.text
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match="holds no image .*1 x .heic"):
        open_source(tmp_path / "g")


def test_folders_that_are_links_are_read_once(tmp_path):
    for name in ("set/real", "elsewhere/deep", "single"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(PNG)
    links = {"a_link": "set/real", "cls": "elsewhere", "again": "elsewhere", "loop": "set", "gone": "nowhere"}
    for name, target in links.items():
        (tmp_path / "set" / name).symlink_to(tmp_path / target)
    (tmp_path / "set" / "self").symlink_to("self")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "single", target_is_directory=True)
    source = open_source(tmp_path / "set")
    assert [source.key(n) for n in range(len(source))] == ["again/back/a", "again/deep/a", "real/a"]


# ---- parquet


def parquet(path, count, captions=None, **columns):
    import pyarrow as pa
    import pyarrow.parquet

    schema = {"image": pa.array([PNG] * count, pa.binary()), **columns}
    if captions is not None:  # the bytes of a text column are taken as they are
        stored = pa.array(captions, pa.binary())
        schema["caption"] = pa.Array.from_buffers(pa.string(), count, stored.buffers())
    with pa.parquet.ParquetWriter(path, pa.table(schema).schema) as writer:
        if count:
            writer.write_table(pa.table(schema))
    return path


def test_captions_of_parquet_that_are_not_utf8_are_bad_samples(tmp_path):
    parquet(tmp_path / "a.parquet", 4, [b"a", b"caf\xe9", b"c", b"d"])
    assert check_source(str(tmp_path)).bad_kinds == {"not UTF-8": 1}
    batches = ImageBatches(ImageDataConfig(source=str(tmp_path), max_bad_fraction=0.5), 16, seed=0)
    assert batches.load([0, 1, 2, 3], 0)["captions"] == ["a", "c", "c", "d"] and batches.source.bad.keys() == {1}


def test_columns_that_json_has_no_form_for(tmp_path):
    import pyarrow as pa

    ids = {"bytes": pa.array([b"\xff\xfe", b"b"]), "years": pa.array([0, 2**45], pa.timestamp("s"))}
    for name, column in ids.items():
        parquet(tmp_path / f"{name}.parquet", 2, id=column)
    report = check_source(str(tmp_path / "bytes.parquet"))
    assert report.num_samples == 2 and open_source(tmp_path / "bytes.parquet")[0].meta == {}
    assert check_source(str(tmp_path / "years.parquet")).bad_kinds == {"wrong type": 1}


def test_a_parquet_file_that_is_cut_counts_for_what_it_lost(tmp_path, caplog):
    for name in "abcd":
        parquet(tmp_path / f"{name}.parquet", 5)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(b"")
    report = check_source(str(tmp_path))
    assert report.num_samples == 10 and report.bad_kinds == {"broken shard": 2}
    assert [place for place, _ in report.bad] == [str(tmp_path / f"{name}.parquet") for name in "ac"]
    source = open_source(tmp_path, max_bad_fraction=0.5)
    assert source.num_lost == 10 and source.key(0) == "b-000000" and "a.parquet: is not a whole" in caplog.text
    with pytest.raises(DataError, match="10 of 20 samples are bad"):
        open_source(tmp_path, max_bad_fraction=0.4)
    (tmp_path / "d.parquet").unlink()  # gone between opening and reading
    with pytest.raises(DataError, match=r"d\.parquet: row 0 .*cannot be read"):
        source.read(5)


def test_keys_after_a_parquet_file_without_rows(tmp_path):
    for name, count in (("a", 0), ("b", 3), ("c", 0), ("d", 2)):
        parquet(tmp_path / f"{name}.parquet", count)
    source = open_source(tmp_path)
    assert [source.key(n) for n in range(5)] == ["b-000000", "b-000001", "b-000002", "d-000000", "d-000001"]


# ---- names with brackets and braces


def test_paths_with_brackets_and_braces(tmp_path):
    (folder := tmp_path / "pq[1]").mkdir()
    parquet(folder / "b.parquet", 2)
    parquet(folder / "c.parquet", 2)
    for spec, size in (
        (folder, 4),
        (folder / "b.parquet", 2),
        (folder / "*.parquet", 4),
        (folder / "{b,c}.parquet", 4),
    ):
        assert len(open_source(spec)) == size, spec
    assert len(open_source(folder, split="c")) == 4
    for name in ("a[1].tar", "a{b}.tar", "a{1,2}.tar", "x1.tar", "x2.tar", "{y.tar"):
        write_tar(tmp_path / name, many(2))
        assert len(open_source(tmp_path / name)) == 2, name
    assert [path.name for path in expand_shards(tmp_path / "x{1..2}.tar")] == ["x1.tar", "x2.tar"]
    assert [path.name for path in expand_shards(tmp_path / "x[12].tar")] == ["x1.tar", "x2.tar"]
    assert len(expand_shards(f"{tmp_path}/{{{','.join(['x1'] * 200)}}}.tar")) == 200  # longer than a name may be
    for ending in ("tar", "parquet"):
        with pytest.raises(DataError, match="a brace has no partner"):
            open_source(tmp_path / f"z{{1..2.{ending}")


def test_a_folder_named_as_a_file(tmp_path):
    """Spark writes DATA.parquet/part-00000.parquet."""
    (folder := tmp_path / "data.parquet").mkdir()
    parquet(folder / "part-00000.parquet", 3)
    assert len(open_source(folder)) == 3


# ---- mixtures


def test_mixtures_of_mixtures_are_checked_to_their_leaves(tmp_path):
    broken = write_tar(tmp_path / "a.tar", [*many(6), ("0000", {"png": PNG}), ("z", {"png": b"x"})])
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(PNG)
    (tmp_path / "f" / "a.psd").write_bytes(PNG)
    inner, outer = tmp_path / "inner.yaml", tmp_path / "outer.yaml"
    shapes = {"source": "shapes:train?num=40&seed=2&size=32", "weight": 9}
    inner.write_text(
        json.dumps([{"source": str(broken), "weight": 1}, shapes, {"source": str(tmp_path / "f"), "weight": 1}])
    )
    outer.write_text(json.dumps([{"source": str(inner)}, {"source": "shapes:train?num=5&size=32"}]))
    one, both = check_source(str(inner)), check_source(str(outer))
    assert one.bad_kinds == both.bad_kinds == {"duplicate key": 1, "unreadable image": 1}
    assert (one.num_samples, both.num_samples, both.passed_over) == (47, 52, {".psd": 1})
    assert [part["num_samples"] for part in both.parts] == [48, 5]
    config = ImageDataConfig(source=str(outer), max_bad_fraction=0.5)
    assert ImageBatches(config, 16, seed=0).all_captions().count("words") == 6


def test_a_mixture_of_itself_is_refused(tmp_path):
    for name, member in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(json.dumps([{"source": str(tmp_path / f"{member}.yaml")}]))
    with pytest.raises(DataError, match="has itself as a member"):
        open_source(str(tmp_path / "a.yaml"))
    (tmp_path / "deep.yaml").write_text("[" * 2000)
    with pytest.raises(DataError, match="cannot be read as YAML"):
        open_source(str(tmp_path / "deep.yaml"))
