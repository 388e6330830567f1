"""Shards of the shapes world, and what extraction makes of them."""

from pathlib import Path

from unitok.data.shard_index import INDEX_FILE
from unitok.data.shards import write_shards
from unitok.data.source import open_source
from unitok.data.words import words_to_json

SPEC = "shapes:train?num=23&seed=1&size=32"
SHARDS = 5


def make_shards(folder: Path) -> Path:
    """Five shards of five images (the last of three)."""
    source = open_source(SPEC)
    samples = (source[index] for index in range(len(source)))
    write_shards(({"__key__": s.key, "png": s.image, "json": words_to_json(s)} for s in samples), folder, 5)
    return folder


def made(out: Path) -> dict[str, bytes]:
    """All that extraction leaves but its logs, which tell the time."""
    return {
        path.name: path.read_bytes()
        for path in out.iterdir()
        if path.is_file() and path.suffix != ".jsonl" and path.name != INDEX_FILE
    }
