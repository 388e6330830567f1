"""`unitok data ...`: make, encode, check and import data."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError


def shapes(arguments: argparse.Namespace) -> int:
    """Write `--num` scenes as webdataset shards."""
    from tqdm import tqdm

    from unitok.data.shards import write_shards
    from unitok.data.source import open_source
    from unitok.data.words import words_to_json

    if arguments.num < 1:
        raise UserError(f"--num {arguments.num}: expected at least 1")
    spec = f"shapes:{arguments.split}?num={arguments.num}&seed={arguments.seed}&size={arguments.size}"
    source = open_source(spec)

    def samples() -> Iterator[dict[str, Any]]:
        for index in tqdm(range(len(source)), desc="shapes", unit="image", disable=None):
            sample = source[index]
            yield {
                "__key__": sample.key,
                "png": sample.image,
                "txt": sample.captions[0],  # the others stand in the json
                "json": words_to_json(sample),
            }

    for path in write_shards(samples(), Path(arguments.out)):
        print(path)
    return 0


def codes(arguments: argparse.Namespace) -> int:
    """Encode a source to code shards."""
    from unitok.core.pretrained import load_model_folder
    from unitok.data.source import open_source
    from unitok.tokenizer import UniTok
    from unitok.tokenizer.extract import extract_codes

    source = open_source(arguments.shards)
    tokenizer = load_model_folder(UniTok, arguments.tokenizer)
    out = extract_codes(tokenizer, source, Path(arguments.out), arguments.batch_size, latents=arguments.latents)
    left_out = f" ({len(source.bad)} bad ones left out)" if source.bad else ""
    print(f"{len(source) - len(source.bad)} images encoded to {out}{left_out}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Read a whole source and print what is in it; exit code 1 when samples are bad."""
    from unitok.data.check import check_source

    report = check_source(arguments.source)
    for name, value in report.to_dict().items():
        if name != "bad":
            print(f"{name:<22} {value}")
    for key, reason in report.bad:
        print(f"bad sample {key}: {reason}")
    return 1 if report.bad else 0


def import_llava(arguments: argparse.Namespace) -> int:
    """Write a JSONL source from a LLaVA instruction file."""
    from unitok.data.conversations import import_llava as convert

    path, kept, dropped = convert(Path(arguments.json), Path(arguments.images), Path(arguments.out))
    print(f"{path}: {kept} records kept, {dropped} left out")
    return 0
