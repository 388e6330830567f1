"""Index files of tar shards, and what the reader does about broken shards."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from unitok.core.errors import DataError
from unitok.data import shard_index
from unitok.data.bad import SourceError
from unitok.data.shard_index import INDEX_FILE, index_shards
from unitok.data.shards import ShardReader, write_shards
from unitok.data.tar_table import scan


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, first: int = 0) -> list[dict]:
    return [
        {"__key__": f"s{i:05d}", "txt": f"text {i}", "jpg": bytes([i % 256]) * (i % 700)}
        for i in range(first, first + count)
    ]


def contents(reader: ShardReader) -> list[tuple[str, dict[str, bytes]]]:
    return [(reader.keys[i], reader[i]) for i in range(len(reader))]


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    scanned: list[str] = []

    def counting(path: Path):
        scanned.append(path.name)
        return scan(path)

    monkeypatch.setattr(shard_index, "scan", counting)
    return scanned


def test_an_index_is_used_and_only_changed_shards_are_read_again(tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    paths = write_shards(samples(25), folder, 10)
    scanned = count_scans(monkeypatch)
    fresh = contents(ShardReader(folder))
    assert len(scanned) == 3 and (folder / INDEX_FILE).is_file()
    assert fresh == [(s["__key__"], {"txt": s["txt"].encode(), "jpg": s["jpg"]}) for s in samples(25)]
    assert contents(ShardReader(folder)) == fresh and len(scanned) == 3
    # one changed, one new, one gone: each entry counts by itself
    stat = paths[1].stat()
    write_tar(paths[1], [("other.txt", b"new")])
    os.utime(paths[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # only the size tells
    write_tar(folder / "shard-00009.tar", [("deep/er/nine.x.TXT", b"9")])
    paths[0].unlink()
    reader = ShardReader(folder)
    assert scanned[3:] == ["shard-00001.tar", "shard-00009.tar"]
    assert contents(reader) == [("other", {"txt": b"new"}), *fresh[20:], ("deep/er/nine", {"x.txt": b"9"})]
    assert reader.sizes == [1, 5, 1]
    stat = paths[2].stat()
    os.utime(paths[2], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # only the time tells
    assert len(ShardReader(folder)) == 7 and scanned[5:] == ["shard-00002.tar"]


def test_a_part_of_a_folder_keeps_the_entries_of_the_rest(tmp_path, monkeypatch):
    paths = write_shards(samples(40), tmp_path / "a", 10)
    others = write_shards(samples(10, 90), tmp_path / "b", 10)
    scanned = count_scans(monkeypatch)
    assert ShardReader([paths[2], others[0], paths[0], paths[2]]).keys[20:22] == ["s00000", "s00001"]
    assert len(scanned) == 3
    assert ShardReader(tmp_path / "a").keys[35] == "s00035" and len(scanned) == 5
    assert ShardReader(tmp_path / "b").keys[-1] == "s00099" and len(scanned) == 5


def test_shards_that_nobody_asks_for_may_be_links_to_nothing(tmp_path):
    a, b, c = write_shards(samples(30), tmp_path / "real", 10)
    folder = tmp_path / "links"
    folder.mkdir()
    for path in (a, b):
        (folder / path.name).symlink_to(path)
    assert len(ShardReader(folder)) == 20
    a.unlink()
    (folder / c.name).symlink_to(c)
    assert ShardReader([folder / b.name, folder / c.name]).keys[0] == "s00010"
    with pytest.raises(DataError, match=f"{a.name} does not exist"):
        ShardReader([folder / a.name])


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "version"])
def test_a_broken_index_is_made_again(tmp_path, damage):
    write_shards(samples(12), tmp_path / "a", 5)
    expected = contents(ShardReader(tmp_path / "a"))
    file = tmp_path / "a" / INDEX_FILE
    data = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": data[:-7], "foreign": b"x" * 100, "version": data[:-3] + b"999"}[damage])
    assert contents(ShardReader(tmp_path / "a")) == expected
    assert file.read_bytes() == data


def test_where_the_folder_cannot_be_written_the_cache_is_used(tmp_path, monkeypatch, cache, caplog):
    """As root may write everywhere, the refusal is played."""
    write_shards(samples(12), tmp_path / "a", 5)
    make, refused = shard_index.tempfile.mkstemp, [tmp_path / "a"]

    def mkstemp(**options):
        if options["dir"] in refused:
            raise PermissionError(13, "Permission denied")
        return make(**options)

    monkeypatch.setattr(shard_index.tempfile, "mkstemp", mkstemp)
    scanned = count_scans(monkeypatch)
    expected = contents(ShardReader(tmp_path / "a"))
    assert len(scanned) == 3 and not (tmp_path / "a" / INDEX_FILE).exists()
    (file,) = (cache / "unitok" / "shards").iterdir()
    assert contents(ShardReader(tmp_path / "a")) == expected and len(scanned) == 3
    file.unlink()
    refused.append(file.parent)
    assert contents(ShardReader(tmp_path / "a")) == expected and "can be written" in caplog.text


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    write_shards(samples(12), tmp_path / "a", 5)

    def full(stream, entries):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_index, "_write_tables", full)
    with pytest.raises(DataError, match="No space left"):
        ShardReader(tmp_path / "a")
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".tar"}


def test_processes_and_a_killed_builder_give_the_same_index(tmp_path):
    write_shards(samples(64), tmp_path / "a", 4)
    paths = sorted((tmp_path / "a").glob("*.tar"))
    index_shards(paths, processes=2)
    file = tmp_path / "a" / INDEX_FILE
    data = file.read_bytes()
    file.unlink()
    code = (
        "import os, sys, unitok.data.shard_index as index\n"
        "from pathlib import Path\n"
        "index.os.replace = lambda *names: os.kill(os.getpid(), 9)\n"
        "index.index_shards(sorted(Path(sys.argv[1]).glob('*.tar')))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert ended.returncode == -9 and not file.exists()
    ShardReader(tmp_path / "a")
    assert file.read_bytes() == data


def broken_folder(folder: Path) -> dict[str, Path]:
    whole = write_shards(samples(10), folder, 10)[0].rename(folder / "a-whole.tar")
    data = whole.read_bytes()
    (folder / "b-empty.tar").write_bytes(b"")
    (folder / "c-text.tar").write_bytes(b"no tar at all " * 100)
    (folder / "d-cut-in-member.tar").write_bytes(data[: scan_offset(whole, 7, "jpg") + 3])
    (folder / "e-cut-at-member.tar").write_bytes(data[: scan_offset(whole, 7, "txt") - 512])
    (folder / "f-no-end.tar").write_bytes(data[: scan_offset(whole, 9, "txt") + 512])
    write_tar(
        folder / "g-twice.tar",
        [("k.txt", b"1"), ("k.jpg", b"1"), ("l.txt", b"2"), ("k.txt", b"3"), ("m.txt", b"4"), ("m.txt", b"5")],
    )
    return {path.stem[:1]: path for path in folder.glob("*.tar")}


def scan_offset(path: Path, index: int, name: str) -> int:
    return next(offset for found, offset, _ in scan(path).members_of(index) if found == name)


def test_broken_shards_are_skipped_and_named(tmp_path):
    shards = broken_folder(tmp_path / "a")
    for _ in range(2):  # scanned, and from the index
        reader = ShardReader(tmp_path / "a", on_bad="skip")
        assert {path.name[0]: problem for path, problem in reader.bad_shards.items()} == {
            "b": "it is empty",
            "c": reader.bad_shards[shards["c"]],
            "d": "it ends inside s00007.jpg",
            "e": "its end is missing",
            "f": "its end is missing",
        }
        assert dict(zip("abcdefg", reader.sizes, strict=True)) == dict(a=10, b=0, c=0, d=7, e=7, f=10, g=3)
        expected = {f"{shards['g']}:{key}" for key in ("k", "m")}
        assert reader.bad_samples.keys() == expected and all("twice" in why for why in reader.bad_samples.values())
        found = contents(reader)
        assert found[10:17] == found[17:24] == found[:7] and found[24:34] == found[:10]
        assert found[34:] == [("k", {"txt": b"1", "jpg": b"1"}), ("l", {"txt": b"2"}), ("m", {"txt": b"4"})]


@pytest.mark.parametrize("letter", "bcdefg")
def test_each_broken_shard_is_refused_by_default(tmp_path, letter):
    shard = broken_folder(tmp_path / "a")[letter]
    with pytest.raises(DataError, match=shard.name) as caught:
        ShardReader([shard, tmp_path / "a" / "a-whole.tar"])
    assert "\n" not in str(caught.value)


def test_nothing_readable_is_an_error_in_any_case(tmp_path):
    shards = broken_folder(tmp_path / "a")
    with pytest.raises(DataError, match="no sample.*it is empty"):
        ShardReader([shards["b"], shards["c"]], on_bad="skip")


def test_a_shard_cut_after_opening_is_an_error(tmp_path):
    (path,) = write_shards(samples(10), tmp_path / "a", 10)
    reader = ShardReader(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SourceError, match="has changed since it was indexed .2000 bytes, it had 30720"):
        reader[9]
    with pytest.raises(IndexError):
        reader[10]
