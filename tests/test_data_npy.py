"""Arrays of code shards: read as numpy reads them, whatever is damaged."""

import io

import numpy as np
import pytest

from unitok.data import npy
from unitok.data.npy import read_npy


def _written(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


ARRAYS = {
    "codes": np.arange(24, dtype=np.int16).reshape(4, 6),
    "wide codes": np.arange(24, dtype=np.int32).reshape(4, 6),
    "latents": np.linspace(0, 1, 12).astype(np.float16).reshape(3, 4),
    "big-endian": np.arange(6, dtype=">i4"),
    "by columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "empty": np.zeros((0, 4), np.int16),
    "one number": np.array(7, np.int16),
}


@pytest.fixture(autouse=True)
def no_known_headers(monkeypatch) -> None:
    monkeypatch.setattr(npy, "_known", {})


@pytest.mark.parametrize("version", [None, (2, 0)])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_read_twice_as_they_were_written(name, version):
    data = _written(ARRAYS[name], version)
    for array in (read_npy(data), read_npy(data)):  # the second time the header is known
        assert array.dtype == ARRAYS[name].dtype and array.shape == ARRAYS[name].shape
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.flags.writeable


def test_another_header_of_the_same_length_is_not_mistaken():
    first, second = np.arange(6).reshape(2, 3), np.arange(6).reshape(3, 2)
    assert len(_written(first)) == len(_written(second))
    assert [read_npy(_written(array)).shape for array in (first, second, first)] == [(2, 3), (3, 2), (2, 3)]


def test_damage_is_told_with_a_known_header_too():
    data = _written(ARRAYS["codes"])
    read_npy(data)
    for damaged in (b"", b"\x93NUM", data[:9], data[:100], data[:-1], b"\0" + data[1:], data[:10] + b"?" + data[11:]):
        with pytest.raises(ValueError):
            read_npy(damaged)
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_npy(objects.getvalue())


def test_any_damaged_byte_is_another_array_or_an_error():
    data = _written(ARRAYS["codes"])
    read_npy(data)
    for place in range(128):
        for byte in (0, 10, 40, 57, 123, 125, 255):
            try:
                array = read_npy(data[:place] + bytes([byte]) + data[place + 1 :])
            except ValueError:
                continue
            assert isinstance(array, np.ndarray)


def test_known_headers_stay_few():
    for width in range(1, 3 * npy._MAX_KNOWN):
        array = np.arange(width)
        np.testing.assert_array_equal(read_npy(_written(array)), array)
    assert len(npy._known) <= npy._MAX_KNOWN
