"""Code shards: images as the tokenizer's codes, with their words. What stage two trains on.

A folder holds `codes-00000.tar`, ... (per sample KEY.npy, the codes [K, L] as small integers, and KEY.json, the words;
on demand KEY.latents.npy, fp16 [L, C], the vectors before quantization) and `header.json`, written last, which says
whose codes these are. A conversation without an image is a KEY.json alone, with "image": false; the header's
"text_only", where there are such, counts them ("count" counts all samples). What extraction writes beside them is told
in `code_units`.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unitok.core.errors import DataError
from unitok.data.bad import BadSamples
from unitok.data.captions import QA
from unitok.data.conversations import Conversation
from unitok.data.npy import read_npy
from unitok.data.paths import expand_braces
from unitok.data.shards import ShardReader, expand_shards, temporary_name, write_shards
from unitok.data.words import Words, load_json_object, text_of, words_from_json, words_to_json

FORMAT_VERSION = 1
HEADER_FILE = "header.json"
HEADER_FIELDS = ("tokenizer", "num_codebooks", "codebook_size", "image_size", "num_positions")
LATENT_WIDTH = "latent_width"  # a further field of shards with latents: their C
PREPROCESS = "preprocess"  # how images became pixels
UNSAID = {PREPROCESS: None, LATENT_WIDTH: None}  # what a header need not say; the first is then the tokenizer's own
TEXT_ONLY = "text_only"  # of a folder with conversations without an image: how many
LATENTS = "latents.npy"


@dataclass
class CodeSample:
    """Codes int64 [K, L] of one image and what is said about it; fp16 `latents` [L, C] where they were asked for.

    Without `has_image` it is conversations alone, and `codes` is empty.
    """

    key: str
    codes: torch.Tensor
    captions: list[str]
    questions: list[QA]
    conversations: list[Conversation]
    meta: dict[str, Any]
    latents: torch.Tensor | None = None
    has_image: bool = True


def write_codes(
    samples: Iterable[CodeSample],
    out: Path | str,
    header: Mapping[str, Any],
    max_per_shard: int = 10000,
) -> Path:
    """Writes code shards and their header into the folder `out`, and returns it.

    Args:
        header: HEADER_FIELDS: "tokenizer" (fingerprint of the weights), "num_codebooks", "codebook_size",
            "image_size", "num_positions"; with latents also LATENT_WIDTH; PREPROCESS where it is not the tokenizer's
            own way.

    Raises:
        DataError: the header is incomplete, codes do not fit it, or the folder holds code shards already.
    """
    out = Path(out)
    fields = header_fields(header)
    count = text_only = 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal count, text_only
        for sample in samples:
            yield code_record(sample, header, count)
            count += 1
            text_only += not sample.has_image

    write_shards(records(), out, max_per_shard, prefix="codes")
    write_json(out / HEADER_FILE, {**fields, "count": count, **text_only_field(text_only)})
    return out


def text_only_field(count: int) -> dict[str, int]:
    """What says how many samples of a folder or shard have no image: nothing, where all have one."""
    return {TEXT_ONLY: count} if count else {}


def header_fields(header: Mapping[str, Any]) -> dict[str, Any]:
    """What says whose codes these are, with the format's version; DataError where a field is missing."""
    missing = [name for name in HEADER_FIELDS if name not in header]
    if missing:
        raise DataError(f"the header of code shards lacks {', '.join(missing)}; expected {', '.join(HEADER_FIELDS)}")
    names = [*HEADER_FIELDS, *(name for name in UNSAID if name in header)]
    return {"format_version": FORMAT_VERSION, **{name: header[name] for name in names}}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a small file of the folder, which appears when it is complete."""
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="ascii") as file:  # names of files need not be Unicode
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or a power failure may leave the name with nothing in it
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def code_record(sample: CodeSample, header: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A sample as members of a shard; DataError where it does not fit the header."""
    words = words_to_json(Words(sample.captions, sample.questions, sample.conversations, sample.meta))
    told: dict[str, Any] = {"key": sample.key, "words": words} | ({} if sample.has_image else {"image": False})
    # Keys of other sources may hold dots or repeat; the number keeps members apart, the key itself travels inside.
    record = {"__key__": f"{number:09d}", "json": json.dumps(told).encode("ascii")}
    return (_code_members(sample, header) if sample.has_image else {}) | record


def _code_members(sample: CodeSample, header: Mapping[str, Any]) -> dict[str, bytes]:
    codes = np.asarray(sample.codes)
    _check_codes(codes, header, sample.key)
    codes = codes.astype(np.int16 if header["codebook_size"] <= 2**15 else np.int32)
    latents = {}
    if LATENT_WIDTH in header:
        array = np.zeros(0, np.float16) if sample.latents is None else np.asarray(sample.latents, dtype=np.float16)
        _check_latents(array, header, sample.key)
        latents[LATENTS] = _npy(array)
    return {"npy": _npy(codes), **latents}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _check_latents(latents: np.ndarray, header: Mapping[str, Any], key: str) -> None:
    expected = (header["num_positions"], header[LATENT_WIDTH])
    if latents.shape != expected or latents.dtype != np.float16 or not np.isfinite(latents).all():
        raise DataError(
            f"latents of {key} are {latents.dtype} {latents.shape}; expected finite float16 [L, C] = {expected}"
        )


def _check_codes(codes: np.ndarray, header: Mapping[str, Any], key: str) -> None:
    expected = (header["num_codebooks"], header["num_positions"])
    if codes.shape != expected or not np.issubdtype(codes.dtype, np.integer):
        raise DataError(f"codes of {key} are {codes.dtype} {codes.shape}; expected integers [K, L] = {expected}")
    if codes.size and not (0 <= codes.min() and codes.max() < header["codebook_size"]):
        raise DataError(
            f"codes of {key} lie in [{codes.min()}, {codes.max()}]; expected [0, {header['codebook_size']})"
        )


class CodeSource(BadSamples):
    """Map-style reader of folders of code shards. `source[i]` raises for a bad sample; `first_good` goes on.

    Args:
        folder: what `write_codes` or extraction made; or a brace pattern of several, "codes/{a,b}", read one after the
            other.
        expect: header fields that must hold, such as the tokenizer's fingerprint and sizes.
        max_bad_fraction: share of bad samples above which `first_good` stops.
        preprocess: the tokenizer's way of making pixels, for headers that do not say which it was.

    Raises:
        DataError: a folder is incomplete, of another format, or differs from `expect` or from the others; names the
            field and both values.
    """

    def __init__(
        self,
        folder: Path | str,
        expect: Mapping[str, Any] | None = None,
        max_bad_fraction: float = 0.01,
        preprocess: str | None = None,
    ) -> None:
        super().__init__(str(folder), max_bad_fraction)
        self.folder = Path(folder)
        folders = _folders(str(folder))
        headers = [{PREPROCESS: preprocess, **_load_header(one)} for one in folders]
        text_only = sum(header.get(TEXT_ONLY, 0) for header in headers)
        self.header = headers[0] | {"count": sum(header["count"] for header in headers), TEXT_ONLY: text_only}
        for name, value in (expect or {}).items():
            if self.header.get(name) != value:
                raise DataError(
                    f"{self.folder}: {name} of the codes is {self.header.get(name)!r}, the tokenizer in use has "
                    f"{value!r}; encode the images again with it (unitok data codes)"
                )
        for one, header in zip(folders, headers, strict=True):
            for name in (*HEADER_FIELDS, *UNSAID):
                if header.get(name) != headers[0].get(name):
                    raise DataError(
                        f"{one}: {name} is {header.get(name)!r}, in {folders[0]} it is {headers[0].get(name)!r}; codes "
                        "that are read together come from one tokenizer"
                    )
        self.with_latents = False
        self.reader = ShardReader([path for one in folders for path in expand_shards(one)])
        if len(self.reader) != self.header["count"]:
            raise DataError(
                f"{self.folder} holds {len(self.reader)} samples, its header says {self.header['count']}; a shard is "
                "missing or foreign: encode the images again"
            )

    def read_latents(self) -> None:
        """From now on samples come with their latents; DataError where the shards hold none."""
        if LATENT_WIDTH not in self.header:
            raise DataError(
                f"{self.folder} holds codes without latents; encode the images again with unitok data codes --latents"
            )
        self.with_latents = True

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def parts(self) -> "list[CodeSource]":
        """What is read one after the other for all its words: itself (see `code_mixtures` for several)."""
        return [self]

    def turn(self, index: int, epoch: int) -> "tuple[CodeSource, int]":
        """The source and its sample that place `index` of an epoch takes."""
        return self, index

    def key(self, index: int) -> str:
        return self.reader.keys[index]

    def __getitem__(self, index: int) -> CodeSample:
        members = self.reader.read(index, ("json", "npy", *([LATENTS] if self.with_latents else [])))
        sample = self._sample(index, members)
        if not sample.has_image:
            return sample
        codes = self._array(members, "npy", sample.key)
        _check_codes(codes, self.header, sample.key)
        sample.codes = torch.from_numpy(codes.astype(np.int64))
        if self.with_latents:
            latents = self._array(members, LATENTS, sample.key)
            _check_latents(latents, self.header, sample.key)
            sample.latents = torch.from_numpy(latents)
        return sample

    def _array(self, members: Mapping[str, bytes], name: str, key: str) -> np.ndarray:
        try:
            return read_npy(members[name])
        except (KeyError, ValueError) as error:
            what = "latents" if name == LATENTS else "codes"
            raise DataError(f"{self.folder}: {what} of {key} cannot be read ({type(error).__name__})") from None

    def text(self, index: int) -> CodeSample:
        """The sample with its words only: `codes` is empty."""
        return self._sample(index, self.reader.read(index, ("json",)))

    def _sample(self, index: int, members: Mapping[str, bytes]) -> CodeSample:
        where = f"{self.folder}: sample {index}"
        try:
            record = json.loads(members["json"])
            key, words, has_image = record["key"], record["words"], record.get("image") is not False
            if not isinstance(key, str) or not isinstance(words, dict):
                raise TypeError("a key and words")
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{where} has no readable words ({type(error).__name__}); encode the images again"
            ) from None
        parsed = words_from_json(words, f"{where} ({key})", has_image, written=True)
        said = (parsed.captions, parsed.questions, parsed.conversations, parsed.meta)
        return CodeSample(key, torch.zeros(0, dtype=torch.int64), *said, has_image=has_image)


def _folders(pattern: str) -> list[Path]:
    return [Path(pattern)] if Path(pattern).is_dir() else [Path(one) for one in expand_braces(pattern)]


def _load_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} has no {HEADER_FILE}: no code shards, or writing them was cut short; make them again"
        )
    header = load_json_object(text_of(path.read_bytes(), str(path)), str(path))
    missing = [name for name in (*HEADER_FIELDS, "count") if name not in header]
    if missing or header.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version {header.get('format_version')!r}, missing {missing}; this version reads "
            f"{FORMAT_VERSION}: encode the images again"
        )
    return header
