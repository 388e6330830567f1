"""Which codes are those of what is encoded now: content that changed, images prepared in another way."""

import json
import os
from pathlib import Path

import pytest
import torch
from extraction import made
from test_data_sources import fill_folder
from tiny import make_tokenizer

from unitok.cli import main
from unitok.core.errors import DataError
from unitok.data.bad import SourceError
from unitok.data.codes import CodeSource
from unitok.data.shards import write_shard
from unitok.data.source import open_source
from unitok.data.transforms import eval_transform
from unitok.tokenizer.extract import Share, extract_codes


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def kinds_of_source(root: Path) -> dict[str, Path]:
    """Three images with captions as a folder, as records, as a shard and as parquet."""
    import pyarrow as pa
    import pyarrow.parquet

    folder = fill_folder(root / "folder", count=3)
    for number in range(3):
        (folder / f"im{number}.txt").write_text(f"caption {number}")
    images = [(folder / f"im{number}.png").read_bytes() for number in range(3)]
    lines = ({"image": f"folder/im{number}.png", "caption": f"caption {number}"} for number in range(3))
    (root / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_shard(
        [{"__key__": f"{n}", "png": image, "txt": f"caption {n}"} for n, image in enumerate(images)], root / "a.tar"
    )
    pa.parquet.write_table(pa.table({"image": images, "text": [f"caption {n}" for n in range(3)]}), root / "a.parquet")
    return {"folder": folder, "lines": root / "lines.jsonl", "shard": root / "a.tar", "parquet": root / "a.parquet"}


@pytest.mark.parametrize(
    "kind,changed",
    [
        ("folder", "folder/im1.png"),
        ("folder", "folder/im1.txt"),
        ("folder", "folder/im1.json"),
        ("lines", "lines.jsonl"),
        ("lines", "folder/im1.png"),
        ("shard", "a.tar"),
        ("parquet", "a.parquet"),
    ],
)
def test_codes_of_content_that_has_changed_are_refused(tokenizer, tmp_path, kind, changed):
    """The same names, and all of the same sizes."""
    spec, out = kinds_of_source(tmp_path)[kind], tmp_path / "out"
    extract_codes(tokenizer, open_source(spec), out, 2, progress=False)
    before = made(out)
    extract_codes(tokenizer, open_source(spec), out, 2, progress=False)
    file = tmp_path / changed
    data = file.read_bytes() if file.exists() else b"{}"
    old = file.stat().st_mtime_ns if file.exists() else 0
    file.write_bytes(data.replace(b"caption 1", b"caption X"))
    os.utime(file, ns=(old + 10**9, old + 10**9))
    with pytest.raises(DataError, match="codes-00000.json: input is '.*', this run has '.*'; remove"):
        extract_codes(tokenizer, open_source(spec), out, 2, progress=False)
    assert made(out) == before and len(CodeSource(out)) == 3  # what is there is read as it is


def test_records_with_other_text_are_others_at_equal_times(tokenizer, tmp_path):
    lines = kinds_of_source(tmp_path)["lines"]
    extract_codes(tokenizer, open_source(lines), tmp_path / "out", 2, progress=False)
    stat = lines.stat()
    lines.write_bytes(lines.read_bytes().replace(b"caption 1", b"caption X"))
    os.utime(lines, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="input is"):
        extract_codes(tokenizer, open_source(lines), tmp_path / "out", 2, progress=False)


@pytest.mark.parametrize("kind,changed", [("folder", "folder/im0.txt"), ("shard", "a.tar")])
def test_what_changes_while_it_is_encoded_is_refused(tokenizer, tmp_path, monkeypatch, kind, changed):
    source, encode = open_source(kinds_of_source(tmp_path)[kind]), tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda pixels: (os.utime(tmp_path / changed, (1, 1)), encode(pixels))[1])
    with pytest.raises(SourceError, match="samples 0 to 2 changed while they were encoded"):
        extract_codes(tokenizer, source, tmp_path / "out", 3, progress=False)
    assert not list((tmp_path / "out").glob("*codes-*"))


def test_codes_of_images_prepared_in_another_way_are_refused(tokenizer, tmp_path):
    """A folder that was begun in one way, and codes that are read together; what says nothing was prepared as the
    tokenizer wants it."""
    other = make_tokenizer(preprocess="inference")
    source, out = open_source(fill_folder(tmp_path / "f", count=4)), tmp_path / "out"
    run = {"batch_size": 2, "progress": False, "unit_size": 2}
    extract_codes(tokenizer, source, out, **run, share=Share(0, 2))
    with pytest.raises(DataError, match="preprocess is 'plain', this run has 'inference'"):
        extract_codes(other, source, out, **run)
    extract_codes(tokenizer, source, out, **run)
    extract_codes(other, source, tmp_path / "other", **run)
    with pytest.raises(DataError, match="preprocess is 'plain', in .*other it is 'inference'"):
        CodeSource(f"{tmp_path}/{{other,out}}")
    with pytest.raises(DataError, match="preprocess of the codes is 'plain', the tokenizer in use has 'inference'"):
        CodeSource(out, {"preprocess": other.config.preprocess})
    header = json.loads((out / "header.json").read_text())
    assert header.pop("preprocess") == "plain"
    (out / "header.json").write_text(json.dumps(header))
    assert CodeSource(out).header["preprocess"] is None
    assert CodeSource(out, preprocess="inference").header["preprocess"] == "inference"
    assert CodeSource(f"{tmp_path}/{{other,out}}", preprocess="inference").header["count"] == 8
    for file in out.glob("codes-*.json"):
        said = json.loads(file.read_text())
        assert said.pop("preprocess") == "plain"
        file.write_text(json.dumps(said))
    extract_codes(tokenizer, source, out, **run)  # goes on, nothing is different


def test_images_are_prepared_as_asked(tmp_path):
    tokenizer = make_tokenizer(preprocess="inference")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = open_source(fill_folder(tmp_path / "f", count=3))
    command = ["data", "codes", "--tokenizer", str(tmp_path / "tokenizer"), "--shards", str(tmp_path / "f")]
    for name in ("inference", "padded"):
        out = tmp_path / name
        assert main([*command, "--out", str(out), *([] if name == "inference" else ["--preprocess", name])]) == 0
        codes = CodeSource(out)
        pixels = torch.stack([eval_transform(source[i].image, tokenizer.config.image_size, name) for i in range(3)])
        assert torch.equal(torch.stack([codes[i].codes for i in range(3)]), tokenizer.encode(pixels))
        assert codes.header["preprocess"] == name


def test_codes_with_latents_are_not_gone_on_with_without(tokenizer, tmp_path):
    source = open_source(fill_folder(tmp_path / "f", count=4))
    run = {"batch_size": 2, "progress": False, "unit_size": 2}
    extract_codes(tokenizer, source, tmp_path / "out", **run, latents=True, share=Share(0, 2))
    with pytest.raises(DataError, match="latent_width is [0-9]+, this run has None"):
        extract_codes(tokenizer, source, tmp_path / "out", **run)
