"""Pixels: transforms between PIL and tensors, and the digits export that feeds an image folder."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unitok.core.errors import UserError
from unitok.core.rng import numpy_rng
from unitok.data.source import open_source
from unitok.data.transforms import decode_image, eval_transform, load_image, to_pil, to_rgb, train_transform


def gradient(width, height):
    """Red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8))


def test_pixels_round_trip_and_range():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    pixels = eval_transform(image, 16)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 16, 16)
    assert to_pil(pixels).tobytes() == image.tobytes()
    ends = eval_transform(Image.fromarray(np.asarray([[[0, 255, 0]]], dtype=np.uint8)), 1)
    assert ends.flatten().tolist() == [-1, 1, -1]
    assert to_pil(torch.full((3, 2, 2), 7.0)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 2\)"):
        to_pil(torch.zeros(1, 3, 2, 2))


def test_eval_transform_takes_the_centre():
    for width, height in ((90, 30), (30, 90), (31, 64)):
        pixels = eval_transform(gradient(width, height), 20)
        assert pixels.shape == (3, 20, 20)
        ramp = (pixels[0].mean(0), pixels[1].mean(1))
        for values, length in zip(ramp, (width, height), strict=True):
            covered = min(width, height) / length
            assert values.mean() == pytest.approx(0, abs=0.03)
            assert values[-1] - values[0] == pytest.approx(2 * covered, abs=0.15)


def test_train_transform_is_a_function_of_its_generator():
    image = gradient(60, 40)
    crops = [train_transform(image, 24, numpy_rng(seed)) for seed in range(20)]
    assert torch.equal(crops[3], train_transform(image, 24, numpy_rng(3)))
    assert all(crop.shape == (3, 24, 24) and crop.abs().max() <= 1 for crop in crops)
    slopes = [(crop[0, :, -1] - crop[0, :, 0]).mean().item() for crop in crops]
    assert 3 <= sum(slope < 0 for slope in slopes) <= 17  # mirrored about half of the time
    assert min(abs(slope) for slope in slopes) > 0.8  # at least half of the image
    kept = [train_transform(image, 24, numpy_rng(seed), flip=False) for seed in range(20)]
    assert all((crop[0, :, -1] > crop[0, :, 0]).all() for crop in kept)
    assert len({crop.sum().item() for crop in kept}) == 20


def test_images_of_other_modes_and_broken_files(tmp_path):
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    clear.putpixel((1, 0), (255, 0, 0, 0))
    assert [to_rgb(clear).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    assert to_rgb(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)
    turned = gradient(8, 4)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").size == (4, 8)
    data = (tmp_path / "turned.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("hello")
    for name in ("half.png", "text.png", "missing.png"):
        with pytest.raises(UserError, match=name) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="^upload"):
        decode_image(b"", "upload")


@pytest.fixture(scope="module")
def digits_script():
    path = Path(__file__).parents[1] / "scripts" / "export_digits.py"
    spec = importlib.util.spec_from_file_location("export_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_export(tmp_path, digits_script, capsys):
    from sklearn.datasets import load_digits

    assert digits_script.main([str(tmp_path / "a")]) == 0
    assert "1438 train, 359 val" in capsys.readouterr().out
    train, val = (open_source(tmp_path / "a", split=split) for split in ("train", "val"))
    keys = [{source.key(index) for index in range(len(source))} for source in (train, val)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 1797
    digits = load_digits()
    labels = np.asarray([val.words(index).meta["digit"] for index in range(len(val))])
    shares = np.bincount(labels, minlength=10) / np.bincount(digits.target, minlength=10)
    assert (abs(shares - 0.2) < 0.01).all()
    for index in (0, 100, 358):
        sample = val[index]
        number = int(sample.key.removeprefix("digit-"))
        digit, word = digits.target[number], digits_script.WORDS[digits.target[number]]
        assert sample.image.size == (32, 32) and sample.meta == {"digit": digit}
        assert any(word in text for text in sample.captions) and any(str(digit) in text for text in sample.captions)
        small = 255 - np.asarray(sample.image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), digits.images[number].ravel())[0, 1] > 0.95
        by_type = {}
        for kind, question, answer in sample.questions:
            by_type.setdefault(kind, []).append((question, answer))
        assert by_type["digit"][0][1] == word and by_type["parity"][0][1] == ("odd" if digit % 2 else "even")
        (yes, yes_answer), (no, no_answer) = by_type["exists"]
        assert (yes_answer, no_answer) == ("yes", "no") and word in yes and word not in no
    assert digits_script.main([str(tmp_path / "a")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_sixteen_bits_become_eight(tmp_path):
    """Scans are often stored so; cutting at 255 would make them white."""
    levels = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "scan.png")
    read = np.asarray(load_image(tmp_path / "scan.png"), dtype=float)
    np.testing.assert_allclose(read[..., 0], levels / 257, atol=0.51)
    assert (read == read[..., :1]).all()
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="float.tiff"):
        load_image(tmp_path / "float.tiff")


def test_a_path_with_a_null_byte_is_a_users_mistake():
    with pytest.raises(UserError, match="null byte"):
        load_image("a\0b.png")
