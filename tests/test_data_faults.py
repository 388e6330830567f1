"""Faults of disks, and files that change while they are read: they end a run, and are nobody's bad sample."""

import errno
import os
from pathlib import Path

import pytest
from test_data_sources import fill_folder
from tiny import make_tokenizer

from unitok.cli import main
from unitok.core.errors import DataError
from unitok.data import bad, decoding, shard_index
from unitok.data.bad import SourceError
from unitok.data.check import check_source
from unitok.data.shards import write_shard, write_shards
from unitok.data.source import open_source
from unitok.tokenizer.extract import extract_codes


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(bad, "_PAUSES", (0, 0, 0))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of 4 images, JSON lines that name them, and a shard with the same."""
    root = tmp_path_factory.mktemp("sources")
    fill_folder(root / "folder", count=4)
    (root / "lines.jsonl").write_text("\n".join(f'{{"image": "folder/im{n}.png", "id": "im{n}"}}' for n in range(4)))
    images = ((root / "folder" / f"im{n}.png").read_bytes() for n in range(4))
    write_shards([{"__key__": f"im{n}", "png": image} for n, image in enumerate(images)], root / "shards")
    return root


def failing(monkeypatch, times, number=errno.EIO):
    """Reading fails, `times` times from the third on."""
    calls = 0

    def fail(function):
        def call(*given):
            nonlocal calls
            calls += 1
            if 3 <= calls < 3 + times:
                raise OSError(number, os.strerror(number))
            return function(*given)

        return call

    monkeypatch.setattr(os, "pread", fail(os.pread))
    monkeypatch.setattr(decoding.Path, "read_bytes", fail(decoding.Path.read_bytes))


@pytest.mark.parametrize("name", ["folder", "lines.jsonl", "shards"])
def test_a_fault_that_passes_changes_nothing(sources, tokenizer, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patched:
        failing(patched, 3, errno.ESTALE)
        source = open_source(sources / name)
        assert [source[n].key for n in range(4)] == [f"im{n}" for n in range(4)] and not source.bad
    with monkeypatch.context() as patched:
        failing(patched, 3)
        assert check_source(str(sources / name)).num_bad == 0
    extract_codes(tokenizer, open_source(sources / name), tmp_path / "whole", 2, progress=False)
    with monkeypatch.context() as patched:
        failing(patched, 3)
        extract_codes(tokenizer, open_source(sources / name), tmp_path / "out", 2, progress=False)
    for file in ("codes-00000.tar", "codes-00000.json", "header.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("name", ["folder", "lines.jsonl", "shards"])
def test_a_fault_that_stays_ends_the_run(sources, tokenizer, tmp_path, monkeypatch, name):
    source = open_source(sources / name, max_bad_fraction=1.0)
    for read in (
        lambda: [source[n] for n in range(4)],
        lambda: check_source(str(sources / name)),
        lambda: extract_codes(tokenizer, source, tmp_path / "out", 2, progress=False),
        lambda: extract_codes(tokenizer, source, tmp_path / "out", 2, progress=False, num_workers=1),
    ):
        with monkeypatch.context() as patched:
            failing(patched, 99)
            with pytest.raises(SourceError, match=r"(im|record )[0-3](\.png)?: .*\(errno 5\), 4 times; ") as caught:
                read()
            assert "\n" not in str(caught.value)
    assert not source.bad and not list((tmp_path / "out").glob("codes-*"))


def test_what_is_wrong_with_a_file_is_a_bad_sample(sources, monkeypatch):
    for number in (errno.ENOENT, errno.EACCES):
        with monkeypatch.context() as patched:
            failing(patched, 1, number)
            source = open_source(sources / "lines.jsonl", max_bad_fraction=1.0)
            assert source[0].key == "im0" and source[1].key == "im1" and source[2].key == "im3"
            assert list(source.bad) == [2]


def test_a_parquet_file_that_cannot_be_read_now_is_not_broken(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet

    from unitok.data import parquet

    fill_folder(tmp_path, count=1)
    pa.parquet.write_table(pa.table({"image": [(tmp_path / "im0.png").read_bytes()] * 2}), tmp_path / "a.parquet")
    opened, left = parquet._open, 0

    def fail(file):
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return opened(file)

    monkeypatch.setattr(parquet, "_open", fail)
    left = 2
    source = open_source(tmp_path / "a.parquet", max_bad_fraction=1.0)
    left = 2
    assert source[0].key == "a-000000" and not source.bad and not source.lost
    left = 99
    with pytest.raises(DataError, match=r"a.parquet: .*errno 5"):
        open_source(tmp_path / "a.parquet", max_bad_fraction=1.0)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_changes_while_it_is_open_ends_the_run(tokenizer, tmp_path, monkeypatch, indexed):
    """At its old places it holds pieces of other captions."""
    if not indexed:  # neither beside the shards nor in the cache folder
        monkeypatch.setattr(shard_index, "_writable_file", lambda folder: None)
    fill_folder(tmp_path / "images", count=1)
    image = (tmp_path / "images" / "im0.png").read_bytes()
    lines = [{"__key__": f"{n}", "png": image, "txt": f"caption of number {n}"} for n in range(3)]
    (shard,) = write_shards(lines, tmp_path / "shards")
    source = open_source(shard, max_bad_fraction=1.0)
    assert source[0].captions == ["caption of number 0"]
    write_shard([line | {"__key__": f"x{n}", "png": image + b"more"} for n, line in enumerate(lines)], shard)
    for read in (
        lambda: source[1],
        lambda: source.words(1),
        lambda: extract_codes(tokenizer, source, tmp_path / "out", 2, progress=False),
    ):
        with pytest.raises(SourceError, match=r"shard-00000.tar has changed since it was indexed .*; leave"):
            read()
    assert not source.bad and not list((tmp_path / "out").glob("codes-*"))
    again = open_source(shard)
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # only the time tells
    with pytest.raises(SourceError, match="has changed"):
        again.words(0)
    assert open_source(shard).words(0).captions == ["caption of number 0"]


@pytest.mark.parametrize("full,left", [("header.json", {"extract-rank0.jsonl"}), ("extract-rank0.jsonl", set())])
def test_a_disk_that_fills_at_the_log_or_the_header_is_told_in_one_line(
    sources, tokenizer, tmp_path, monkeypatch, full, left
):
    """Half of what is written still finds room; the same command goes on."""
    opened = Path.open

    def opening(path, mode="r", *given, **named):
        stream = opened(path, mode, *given, **named)
        if full not in path.name or "r" in mode:
            return stream
        write = stream.write

        def fill(text):
            write(text[: len(text) // 2])
            stream.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                stream.close()

            def write(self, text):
                return fill(text)

        return Full()

    source, out = open_source(sources / "folder"), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opening)
        with pytest.raises(DataError, match=rf"{full} cannot be written \(No space left on device\); what is complete"):
            extract_codes(tokenizer, source, out, 2, progress=False)
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert {name for name, size in files.items() if size} == {"codes-00000.tar", "codes-00000.json", *left}
    assert files.keys() <= {"codes-00000.tar", "codes-00000.json", "extract-rank0.jsonl"}
    extract_codes(tokenizer, source, out, 2, progress=False)
    assert (out / "header.json").is_file()


def test_a_single_picture_is_tried_again_too(sources, monkeypatch):
    """As `unitok chat` reads them: one line, not a traceback."""
    with monkeypatch.context() as patched:
        failing(patched, 3)
        assert [decoding.load_image(sources / "folder" / f"im{n}.png").width for n in range(4)] == [8, 9, 10, 11]
    failing(monkeypatch, 99)
    with pytest.raises(SourceError, match="errno 5"):
        [decoding.load_image(sources / "folder" / f"im{n}.png") for n in range(4)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here: only Linux has it")
def test_a_full_disk_under_a_report_is_one_line(tmp_path, capsys):
    assert main(["data", "check", "shapes:train?num=3&seed=1&size=32", "--json", "/dev/full"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("unitok: error: an output cannot be written: No space left on device\n")
