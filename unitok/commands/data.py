"""`unitok data ...`: make, encode, check and import data."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError
from unitok.data.preprocess import PREPROCESS

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
        _say(path)
    return 0


def codes(arguments: argparse.Namespace) -> int:
    """Encode a source to code shards; of several processes each does its part."""
    from unitok.core.distributed import inference_device
    from unitok.core.pretrained import load_model_folder
    from unitok.core.signals import stopped_by_sigterm
    from unitok.data.code_units import UNIT_SIZE
    from unitok.data.shards import reader_of
    from unitok.data.source import is_read_from, open_source
    from unitok.tokenizer import UniTok
    from unitok.tokenizer.extract import Share, extract_codes

    if arguments.workers < 0 or not 0 <= arguments.max_bad_fraction <= 1:
        raise UserError(
            f"--workers {arguments.workers} --max-bad-fraction {arguments.max_bad_fraction}: expected at least 0 and "
            "a share from 0 to 1"
        )
    stopped = f"extraction to {arguments.out} was stopped; complete shards stay, the same command goes on"
    with stopped_by_sigterm(stopped):
        share = Share.of_launcher(arguments.rank, arguments.world_size)
        if is_read_from(arguments.shards, Path(arguments.out)):
            raise UserError(f"--out {arguments.out}: is the folder of the source; give one of its own")
        source = open_source(arguments.shards, max_bad_fraction=arguments.max_bad_fraction, text_only=True)
        if arguments.unit_size is not None and reader_of(source) is not None:
            raise UserError(
                f"--unit-size {arguments.unit_size}: {arguments.shards} has shards, each of which gives one of codes; "
                "leave the option out"
            )
        out = extract_codes(
            load_model_folder(UniTok, arguments.tokenizer).to(inference_device()),
            source,
            Path(arguments.out),
            arguments.batch_size,
            latents=arguments.latents,
            share=share,
            num_workers=arguments.workers,
            unit_size=arguments.unit_size or UNIT_SIZE,
            preprocess=arguments.preprocess,
        )
    header = out / "header.json"
    if not header.is_file():
        print(f"rank {share.rank} of {share.world_size} is done; the header is written by the last one to finish")
        return 0
    said = json.loads(header.read_text(encoding="utf-8"))
    left_out = f" ({said['failed']} bad ones left out)" if said["failed"] else ""
    text_only = said.get("text_only", 0)
    beside = f", {text_only} conversations without an image beside them" if text_only else ""
    _say(f"{said['count'] - text_only} images encoded to {out}{beside}{left_out}")
    return 0


def add_codes_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `unitok data codes`."""
    from unitok.cli import positive_int

    parser.description = (
        "Encode the images of a source to code shards, one for each shard of the source. Given again, the command goes "
        "on where it was stopped. Several processes share the work under torchrun, deepspeed or srun, or with --rank "
        "and --world-size; the last one to finish writes header.json."
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder of a trained tokenizer")
    parser.add_argument("--shards", required=True, metavar="SOURCE", help="shards, image folder or JSONL file")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument(
        "--latents", action="store_true", help="also the vectors before quantization, for visual_input: continuous"
    )
    parser.add_argument(
        "--preprocess",
        choices=PREPROCESS,
        help='how images become squares (default: as the tokenizer says); "padded" is what the released model and '
        "LLaVA's recipe read",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images ahead")
    parser.add_argument(
        "--unit-size",
        type=positive_int,
        metavar="N",
        help="images of a shard of codes where the source has no shards (default: 10000); ranks share out shards",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="this process, from 0 (default: the launcher's)")
    parser.add_argument("--world-size", type=int, metavar="W", help="number of processes (default: the launcher's)")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, metavar="F", help="default: %(default)s")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.set_defaults(run=("data", "codes"))


def index(arguments: argparse.Namespace) -> int:
    """Read the headers of all shards ahead, in parallel, into the index files beside them."""
    from unitok.data.shard_index import index_shards
    from unitok.data.shards import ShardReader, expand_shards
    from unitok.data.urls import is_url

    if is_url(arguments.shards):
        raise UserError(
            f"{arguments.shards}: shards of URLs are indexed when they are fetched; there is nothing to do ahead"
        )
    index_shards(expand_shards(arguments.shards), arguments.workers)
    reader = ShardReader(arguments.shards, on_bad="skip")
    print(f"{len(reader)} samples in {len(reader.paths)} shards")
    for path, problem in reader.bad_shards.items():
        _say(f"bad shard {path}: {problem}")
    for name, reason in reader.bad_samples.items():
        _say(f"bad sample {name}: {reason}")
    return 1 if reader.bad_shards or reader.bad_samples else 0


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `unitok data index`."""
    from unitok.cli import positive_int

    parser.add_argument("shards", metavar="SHARDS", help="folder, glob or brace pattern of .tar shards")
    parser.add_argument(
        "--workers", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="default: all cores"
    )
    parser.set_defaults(run=("data", "index"))


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
    from unitok.data.source import has_split, open_source

    if arguments.split is not None and not has_split(arguments.source, arguments.split):
        raise UserError(f"--split {arguments.split}: {arguments.source} has no folder or .parquet files of that name")
    if arguments.json:  # before a source is read that may take hours
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    pixels = arguments.max_pixels or MAX_PIXELS
    source = open_source(arguments.source, arguments.split, max_bad_fraction=1.0, max_pixels=pixels, text_only=True)
    report = check_opened(source, arguments.limit)
    values = report.to_dict()
    for name, value in values.items():
        if name not in ("bad", "duplicate_keys", "example", "parts") and value != {} and value != "":
            _say(f"{name:<22} {value}")
    for part in report.parts:
        _say(f"part                   {part['name']}: {part['num_samples']} samples, {part['of_an_epoch']} an epoch")
    for name, value in report.example.items():
        _say(f"example {name:<14} {_one_line(value)}")
    for key in report.duplicate_keys[:_PRINTED]:
        _say(f"key given twice        {_one_line(key)}")
    for place, reason in report.bad[:_PRINTED]:
        _say("bad sample " + _one_line(reason if reason.startswith(place) else f"{place}: {reason}"))
    if report.num_bad > _PRINTED:
        print(
            f"... and {report.num_bad - _PRINTED} more bad ones{'' if arguments.json else ' (--json FILE lists them)'}"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(values, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
    return 1 if report.num_bad else 0


def _say(value: Any) -> None:
    """Prints names and texts of strangers: on one line, and with escapes for what the terminal's encoding lacks."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def import_llava(arguments: argparse.Namespace) -> int:
    """Write a JSONL source from a LLaVA instruction file."""
    from unitok.data.conversations import import_llava as convert

    path, kept, dropped = convert(Path(arguments.json), Path(arguments.images), Path(arguments.out))
    _say(f"{path}: {kept} records kept, {dropped} left out")
    return 0
