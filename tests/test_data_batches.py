"""Batches of pictures: one transform at a time and all at once, and the benchmark of both."""

import io
import json

import numpy as np
import pytest
import torch
from bad_inputs import encoded
from PIL import Image
from test_data_bad import write_tar

from unitok.core.rng import numpy_rng
from unitok.data.images import ImageBatches, ImageDataConfig
from unitok.data.transforms import as_pixels, eval_transform, random_crop, released_train_transform, train_transform


@pytest.mark.parametrize("augment", ["none", "crop", "released"])
def test_batches_equal_single_transforms(tmp_path, augment):
    """Bytes stacked and made floats at once are the floats of the transform, bit for bit."""
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (64, 64), (33, 90), (16, 16)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    write_tar(tmp_path / "a.tar", [(f"k{n}", {"png": encoded(image, "PNG")}) for n, image in enumerate(images)])
    batches = ImageBatches(ImageDataConfig(source=str(tmp_path), augment=augment), 16, seed=5)
    for epoch in (0, 3):
        got = as_pixels(batches.load([2, 0, 3, 1], epoch)["pixels"])
        assert got.dtype == torch.float32 and got.is_contiguous()
        for row, index in enumerate([2, 0, 3, 1]):
            draw = numpy_rng("augment", 5, epoch, f"k{index}")
            wanted = {
                "none": lambda image, _: eval_transform(image, 16),
                "crop": lambda image, draw: train_transform(image, 16, draw),
                "released": lambda image, draw: released_train_transform(image, 16, draw),
            }[augment](images[index], draw)
            assert torch.equal(got[row], wanted), (epoch, index)
    floats = torch.rand(2, 3, 4, 4)
    assert as_pixels(floats) is floats


def test_draft_shows_nearly_the_same_crop(tmp_path):
    """Of large JPEG files; small ones and other formats are not touched."""
    y, x = np.mgrid[0:300, 0:400]
    waves = np.stack([np.sin(x / 9), np.sin(y / 7), np.sin((x + y) / 15)], -1)
    large = Image.fromarray(((waves + 1) * 127).astype(np.uint8))
    samples = [
        ("large", {"jpg": encoded(large, "JPEG")}),
        ("small", {"jpg": encoded(large.resize((40, 30)), "JPEG")}),
        ("png", {"png": encoded(large, "PNG")}),
    ]
    write_tar(tmp_path / "a.tar", samples)
    with_draft, without = (
        ImageBatches(ImageDataConfig(source=str(tmp_path), augment="crop", draft=draft), 32, seed=0)
        for draft in (True, False)
    )
    for epoch in range(8):
        ours, exact = (batches.load([0, 1, 2], epoch)["pixels"].float() for batches in (with_draft, without))
        assert torch.equal(ours[1:], exact[1:])
        difference = (ours[0] - exact[0]).abs()
        assert 0 < difference.mean() < 4, epoch
    shrunk = with_draft.source.read(0, lambda key: lambda width, height: 4)
    assert shrunk.image.size == (100, 75) and shrunk.full_size == (400, 300)
    assert random_crop(shrunk.image, 32, numpy_rng(0), full_size=shrunk.full_size).size == (32, 32)


def test_input_benchmark_runs(tmp_path, capsys, monkeypatch):
    from unitok.scripts import benchmark_input

    monkeypatch.setattr(benchmark_input, "SIZES", ((96, 64),))
    out = tmp_path / "figures.json"
    assert (
        benchmark_input.main(["--images", "6", "--repeats", "1", "--size", "32", "--batch", "4", "--out", str(out)])
        == 0
    )
    row = json.loads(out.read_text())["rows"][0]
    assert row["ratio"][benchmark_input.PLAIN] == 1.0 and len(row["images_per_second"]) == 5
    assert "webdataset + torchvision" in capsys.readouterr().out
    photo = Image.open(io.BytesIO(benchmark_input.photo(96, 64, numpy_rng(0))))
    assert photo.size == (96, 64) and photo.format == "JPEG"
