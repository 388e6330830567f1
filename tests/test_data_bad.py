"""The corpus of bad input: every row of `bad_inputs` has its promised outcome, through `data check` and in training."""

import io
import json
import logging
import os
import random
import tarfile

import numpy as np
import pytest
import torch
from bad_inputs import SAMPLES, TOLERANCE, encoded, picture, turned_jpeg
from PIL import Image

from unitok.cli import main
from unitok.core.errors import DataError, UserError
from unitok.data.check import check_source
from unitok.data.decoding import decode
from unitok.data.images import ImageBatches, ImageDataConfig
from unitok.data.source import open_source

PNG = encoded(picture(), "PNG")


def write_tar(path, samples):
    """samples: (key, members)."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for name, data in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus-00000.tar"
    return write_tar(path, ((f"{number:05d}", row.members) for number, row in enumerate(SAMPLES)))


@pytest.fixture(scope="module")
def report(shard):
    return check_source(str(shard))


def number_of(name):
    return next(number for number, row in enumerate(SAMPLES) if row.name == name)


def test_the_corpus_is_large():
    assert len(SAMPLES) >= 70 and len({row.name for row in SAMPLES}) == len(SAMPLES)


@pytest.mark.parametrize("row", SAMPLES, ids=lambda row: row.name)
def test_outcome_of_a_sample(shard, report, row):
    number = number_of(row.name)
    reasons = {place: reason for place, reason in report.bad if place == f"{shard}:{number:05d}"}
    if row.bad:
        assert len(reasons) == 1 and report.bad_kinds[row.bad] == sum(other.bad == row.bad for other in SAMPLES)
        assert "\n" not in next(iter(reasons.values()))
        return
    assert not reasons
    sample = open_source(shard, max_bad_fraction=0)[number]
    assert sample.key == f"{number:05d}" and sample.image.mode == "RGB"
    if row.image is not None:
        assert sample.image.size == row.image.size == sample.full_size
        ours, wanted = (np.asarray(image, dtype=int) for image in (sample.image, row.image))
        assert abs(ours - wanted).max() <= TOLERANCE
    if row.captions is not None:
        assert sample.captions == row.captions


def test_check_counts_them_and_says_so(shard, report, tmp_path, capsys):
    bad = sum(bool(row.bad) for row in SAMPLES)
    assert (report.num_bad, report.num_samples) == (bad, len(SAMPLES) - bad)
    assert main(["data", "check", str(shard), "--json", str(tmp_path / "report.json")]) == 1
    out = capsys.readouterr().out
    assert f"num_bad                {bad}" in out and "example key" in out and f"and {bad - 20} more bad ones" in out
    stored = json.loads((tmp_path / "report.json").read_text())
    assert len(stored["bad"]) == bad and stored["bad_kinds"] == report.bad_kinds
    assert stored["smallest"] == "1x1" and stored["largest"] == "20000x1"
    good = number_of("png named jpg")
    assert main(["data", "check", str(write_tar(tmp_path / "good.tar", [("a", SAMPLES[good].members)]))]) == 0


@pytest.mark.parametrize("augment", ["none", "crop", "released"])
def test_batches_of_the_corpus(shard, augment, caplog):
    """Every bad sample is replaced by the next good one and logged with shard, key and reason."""
    config = ImageDataConfig(source=str(shard), augment=augment, max_bad_fraction=1.0)
    batches = ImageBatches(config, 16, seed=0)
    indices = list(range(len(SAMPLES)))
    batch = batches.load(indices, epoch=0)
    assert batch["pixels"].dtype == torch.uint8 and batch["pixels"].shape == (len(indices), 3, 16, 16)
    bad = {number for number, row in enumerate(SAMPLES) if row.bad}
    assert batches.source.bad.keys() == bad
    for number in bad:
        assert f"{shard}:{number:05d} left out" in caplog.text
    for number in bad - {len(SAMPLES) - 1}:
        stand_in = next((n for n in range(number, len(SAMPLES)) if n not in bad), min(set(indices) - bad))
        assert batches.source[number].key == f"{stand_in:05d}"
    with pytest.raises(DataError, match=f"of {len(SAMPLES)} samples are bad, more than max_bad_fraction=0.3"):
        ImageBatches(config.model_copy(update={"max_bad_fraction": 0.3}), 16, seed=0).load(indices, epoch=0)


def test_an_image_too_long_for_the_released_crop_is_a_bad_sample(shard):
    """At 288 pixels of its shorter side it would have 1.7 thousand million."""
    config = ImageDataConfig(source=str(shard), augment="released", max_bad_fraction=1.0)
    batches = ImageBatches(config, 256, seed=0)
    number = number_of("20000 x 1")
    assert batches.load([number], 0)["pixels"].shape == (1, 3, 256, 256)
    assert "20000x1" in batches.source.bad[number]


def test_training_on_the_corpus(shard, tmp_path, capsys, caplog):
    """A whole epoch of stage one by the command line; above the limit it ends with one line."""
    import yaml
    from stages import COMMON, tokenizer_values

    from unitok.core.runlog import read_log

    values = {**COMMON, **tokenizer_values(), "output_dir": str(tmp_path / "run"), "steps": -(-len(SAMPLES) // 4)}
    values["data"] = {"source": str(shard), "max_bad_fraction": 1.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    options = [
        "model.text_tower=null",
        "loss.contrastive=0",
        "loss.adversarial=0",
        "discriminator.enabled=false",
        "engine.micro_batch_size=4",
    ]
    command = ["train", "tokenizer", "--config", str(tmp_path / "config.yaml"), *options, "log_every=1"]
    assert main(command) == 0, capsys.readouterr().err
    assert all(np.isfinite(record["loss"]) for record in read_log(tmp_path / "run" / "log.jsonl"))
    for number, row in enumerate(SAMPLES):
        assert (f"{shard}:{number:05d} left out" in caplog.text) == bool(row.bad), row.name
    assert main([*command, "data.max_bad_fraction=0.05", f"output_dir={tmp_path / 'strict'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "more than max_bad_fraction=0.05" in error and str(shard) in error


# ---- tar files


def many(count, start=0):
    return [(f"{number:04d}", {"png": PNG, "txt": b"words"}) for number in range(start, start + count)]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda data: b"", 0),
        (lambda data: b"no tar at all" * 100, 0),
        (lambda data: data[: 2048 * 4 + 700], 4),  # within a header
        (lambda data: data[: 2048 * 4 + 512 + 20], 4),  # within an image
        (lambda data: data[: 2048 * 4 + 1024], 4),  # after an image, before its text
        (lambda data: data[: 2048 * 4], 4),  # between samples
        (lambda data: data[: 2048 * 10], 10),  # the end alone is missing
    ],
    ids=["empty", "text", "in a header", "in an image", "in a sample", "between samples", "no end"],
)
def test_broken_shards_count_for_what_they_lost(tmp_path, caplog, damage, kept):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", many(10))
    assert tarfile.open(tmp_path / "0.tar").getmembers()[2].offset == 2048
    broken = tmp_path / "1.tar"
    broken.write_bytes(damage(broken.read_bytes()))
    source = open_source(tmp_path, max_bad_fraction=0.35)
    assert len(source) == 20 + kept and source.num_lost == max(1, 10 - kept)
    assert f"{broken}: the shard is broken" in caplog.text
    assert [source[index].key for index in range(10, 10 + kept)] == [f"{n:04d}" for n in range(kept)]
    report = check_source(str(tmp_path))
    assert report.bad_kinds == {"broken shard": 1} and report.num_duplicate_keys == 10
    with pytest.raises(DataError, match=r"samples are bad.*1\.tar"):
        open_source(tmp_path, max_bad_fraction=0.01)


def test_a_single_broken_shard_has_nothing_to_compare_with(tmp_path):
    path = write_tar(tmp_path / "0.tar", many(10))
    path.write_bytes(path.read_bytes()[: 2048 * 10])
    with pytest.raises(DataError, match="10 of 20 samples are bad"):
        open_source(path, max_bad_fraction=0.4)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="holds no sample"):
        open_source(path, max_bad_fraction=1.0)


def test_keys_given_twice(tmp_path):
    """In one shard the later sample is bad; in two shards both are samples."""
    write_tar(tmp_path / "0.tar", [*many(10), ("0003", {"png": PNG}), *many(3, 20)])
    write_tar(tmp_path / "1.tar", many(2))
    report = check_source(str(tmp_path))
    assert report.bad_kinds == {"duplicate key": 1} and report.duplicate_keys == ["0000", "0001"]
    assert report.num_samples == 15
    with pytest.raises(DataError, match="1 of 16 samples are bad.*0003"):
        open_source(tmp_path, max_bad_fraction=0.01)


def test_members_of_odd_kinds_and_names(tmp_path):
    """Links hold no image, and nothing is ever written under a member's name."""
    path = write_tar(tmp_path / "0.tar", [("/etc/absolute", {"png": PNG}), ("../../up", {"png": PNG}), *many(1)])
    with tarfile.open(path, "a") as tar:
        kinds = {"link.png": tarfile.SYMTYPE, "pipe.png": tarfile.FIFOTYPE, "folder.png": tarfile.DIRTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("README", "._0000.png", "link.txt"):
            tar.addfile(tarfile.TarInfo(name))
    report = check_source(str(path))
    assert report.num_samples == 3 and report.bad_kinds == {"missing image": 1}
    assert report.bad[0][0].endswith(":link")


# ---- folders and records


def test_a_folder_of_odd_files(tmp_path):
    folder = tmp_path / "folder"
    (folder / "n01440764").mkdir(parents=True)
    (folder / "n01440764" / "n01440764_1.JPEG").write_bytes(encoded(picture(), "JPEG"))
    (folder / "good.png").write_bytes(PNG)
    (folder / "link.png").symlink_to("good.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "directory.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "notes.txt").write_bytes(b"\xff")
    report = check_source(str(folder))
    assert report.num_samples == 3 and report.bad_kinds == {"missing image": 3}
    assert {os.path.basename(place) for place, _ in report.bad} == {"dangling", "directory", "pipe"}


RECORDS = [
    ('{"image": "a.png", "caption": "fine"}', ""),
    ('{"image": "{folder}/a.png"}', "path outside"),
    ('{"image": "../images/a.png"}', "path outside"),
    ('{"image": "gone.png"}', "missing image"),
    ('{"image": "a\\u0000.png"}', "missing image"),
    ('{"image": "."}', "missing image"),
    ('{"image": 3}', "missing image"),
    ('{"image": ""}', "missing image"),
    ('{"caption": "no image"}', "missing image"),
    ('{"image": "a\\ud800.png"}', "missing image"),
    ('{"image": "a.png", "caption": 3}', "wrong type"),
    ('"text"', "wrong type"),
    ('{"image": "a.png"', "not JSON"),
    ("\udcff", "not UTF-8"),
    ('{"image": "a.png", "id": "x\\ud800"}', "not UTF-8"),
    ('{"image": "a.png", "url": "\\ud800"}', "not UTF-8"),
    ('{"image": "a.png", "questions": [{"type": "\\ud800", "question": "q", "answer": "a"}]}', "not UTF-8"),
    ('{"image": "a.png", "n": ' + "9" * 5000 + "}", "not JSON"),
    ('{"image": "a.png", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    ('{"image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}', "conversation"),
]


@pytest.mark.parametrize("confined", [True, False])
def test_records(tmp_path, confined):
    """Paths that lead out of the folder are used as they are, unless the folder was named."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNG)
    lines = [text.replace("{folder}", str(tmp_path / "images")) for text, _ in RECORDS]
    folder = tmp_path if confined else tmp_path / "images"
    path = folder / "records.jsonl"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    spec = f"{path}?images={tmp_path / 'images'}" if confined else str(path)
    source = open_source(spec, max_bad_fraction=1.0)
    assert len(source) == len(RECORDS)
    found = {place: reason for place, reason in check_source(spec).bad}
    wanted = {n: kind for n, (_, kind) in enumerate(RECORDS) if kind and (confined or kind != "path outside")}
    assert found.keys() == {f"{path}: record {n}" for n in wanted}
    for n, kind in wanted.items():
        with pytest.raises(UserError) as caught:
            source.read(n)
        assert caught.value.kind == kind, n
    assert source[0].captions == ["fine"] and source[len(RECORDS) - 1].key == "records-000000"
    assert all(source.key(n) == f"records-{n:06d}" for n in range(len(RECORDS)))  # also where an id is no text


# ---- pixels


def test_shrunk_decoding_shows_the_same(tmp_path):
    """Upright sizes, the promised number of pixels, and no other format is touched."""
    large = picture().resize((240, 160), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(large, "JPEG", exif=exif)
    for factor in (1, 2, 4, 8):
        seen = []
        found = decode(data, "x", shrink=lambda *size, factor=factor, seen=seen: seen.append(size) or factor)
        assert seen == [(160, 240)] and found.full_size == (160, 240)
        assert found.image.size == (160 // factor, 240 // factor)
        wanted = large.transpose(Image.Transpose.ROTATE_270).reduce(factor)
        assert abs(np.asarray(found.image, dtype=int) - np.asarray(wanted, dtype=int)).mean() < 4
    for size in ((7, 5), (9, 1), (1, 1), (1023, 17)):
        odd = encoded(picture().resize(size), "JPEG")
        for factor in (1, 2, 4, 8):
            found = decode(odd, "x", shrink=lambda *_, factor=factor: factor).image.size
            assert found[0] >= size[0] / factor and found[1] >= size[1] / factor
    assert decode(encoded(large, "PNG"), "x", shrink=lambda *_: 8).image.size == large.size
    assert decode(turned_jpeg(6), "x").full_size == (16, 24)


def test_damaged_bytes_are_images_or_bad_samples():
    """Whatever is cut or changed: no other exception, and never more pixels than allowed."""
    rng, kinds = random.Random(0), ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    outcomes = set()
    for data in (encoded(picture(), kind) for kind in kinds):
        for _ in range(60):
            changed = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
            for _ in range(rng.choice((1, 4, 16)) if changed else 0):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            try:
                width, height = decode(bytes(changed), "x", max_pixels=10_000).image.size
                outcomes.add(width * height <= 10_000)
            except UserError:
                outcomes.add("bad")
    assert outcomes == {True, "bad"}


def test_the_limit_of_pixels_is_exact_and_pils_own_stays(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    assert decode(PNG, "x", max_pixels=24 * 16).image.size == (24, 16)
    with pytest.raises(DataError, match="^x has 24x16 pixels, more than max_pixels=383") as caught:
        decode(PNG, "x", max_pixels=383)
    assert "\n" not in str(caught.value) and before == Image.MAX_IMAGE_PIXELS
    assert main(["data", "check", str(write_tar(tmp_path / "a.tar", many(1))), "--max-pixels", "383"]) == 1


@pytest.mark.slow
def test_20000_by_20000_is_decoded_where_the_limit_allows_it():
    """As a training crop, an eighth of the size is enough."""
    large = Image.new("L", (20000, 20000), 200)
    large.paste(50, (0, 0, 10000, 20000))
    data = encoded(large, "JPEG", quality=75)
    with pytest.raises(DataError, match="20000x20000"):
        decode(data, "x")
    found = decode(data, "x", max_pixels=4 * 10**8, shrink=lambda *_: 8)
    assert found.image.size == (2500, 2500) and found.full_size == (20000, 20000)
    assert [found.image.getpixel((x, 1000))[0] for x in (100, 2400)] == pytest.approx([50, 200], abs=2)


def test_many_bad_ones_end_it_though_few_of_all_were_read(caplog):
    """A process reads a small part of a billion samples: their share among those read counts, too."""
    from unitok.data.bad import BadSamples, SampleError

    class Endless(BadSamples):
        def __len__(self):
            return 10**9

        def key(self, index):
            return str(index)

    def run(every, count=20_000):
        source = Endless("endless", 0.01)

        def read(index):
            if index % every == 0:
                raise SampleError("x")

        for index in range(count):
            source.first_good(index, read)
        return source

    caplog.set_level(logging.ERROR, "unitok.data")
    assert len(run(every=100).bad) == 200  # as many as allowed
    with pytest.raises(DataError, match=r"of 10\d\d samples are bad, more than max_bad_fraction=0.01"):
        run(every=20)
