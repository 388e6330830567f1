"""`unitok data ...`: make, encode, check and import data."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError

_PRINTED = 20  # lines of a kind; --json has more


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


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `unitok data check`, and the command itself (`run`)."""
    from unitok.cli import positive_int

    parser.add_argument(
        "source",
        metavar="SOURCE",
        help='shards, image folder, .jsonl, LLaVA .json, .parquet, "mix:0.7=SOURCE;0.3=SOURCE" (docs/data.md has all)',
    )
    parser.add_argument("--split", metavar="NAME", help="sub-folder, or split of a shapes spec: train or val")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="read the first N samples only")
    parser.add_argument("--max-pixels", type=positive_int, metavar="N", help="as data.max_pixels in training")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.set_defaults(run=("data", "check"))


def check(arguments: argparse.Namespace) -> int:
    """Read a whole source and print what is in it; exit code 1 when samples are bad."""
    from unitok.data.check import check_opened
    from unitok.data.decoding import MAX_PIXELS
    from unitok.data.source import open_source

    pixels = arguments.max_pixels or MAX_PIXELS
    source = open_source(arguments.source, arguments.split, max_bad_fraction=1.0, max_pixels=pixels)
    report = check_opened(source, arguments.limit)
    values = report.to_dict()
    for name, value in values.items():
        if name not in ("bad", "duplicate_keys", "example", "parts") and value != {} and value != "":
            print(f"{name:<22} {value}")
    for part in report.parts:
        print(f"part                   {part['name']}: {part['num_samples']} samples, {part['of_an_epoch']} an epoch")
    for name, value in report.example.items():
        print(f"example {name:<14} {_one_line(value)}")
    for key in report.duplicate_keys[:_PRINTED]:
        print(f"key given twice        {_one_line(key)}")
    for place, reason in report.bad[:_PRINTED]:
        print("bad sample", _one_line(reason if reason.startswith(place) else f"{place}: {reason}"))
    if report.num_bad > _PRINTED:
        print(
            f"... and {report.num_bad - _PRINTED} more bad ones{'' if arguments.json else ' (--json FILE lists them)'}"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(values, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
    return 1 if report.num_bad else 0


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def import_llava(arguments: argparse.Namespace) -> int:
    """Write a JSONL source from a LLaVA instruction file."""
    from unitok.data.conversations import import_llava as convert

    path, kept, dropped = convert(Path(arguments.json), Path(arguments.images), Path(arguments.out))
    print(f"{path}: {kept} records kept, {dropped} left out")
    return 0
