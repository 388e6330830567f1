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
