"""Opens sources of images with words by their names; generated scenes, tar shards and folders of image files.

What a source is stands in `samples`; JSON records, parquet files and mixtures have files of their own.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from unitok.core.errors import DataError
from unitok.core.rng import numpy_rng
from unitok.data.bad import SampleError
from unitok.data.captions import caption, questions, whole_captions
from unitok.data.decoding import IMAGE_EXTENSIONS, MAX_PIXELS, RARE_EXTENSIONS, Decoded, Shrink
from unitok.data.mixtures import MixtureSource, SourceShare, parse_mixture
from unitok.data.parquet import ParquetSource
from unitok.data.paths import file_stamp, files_ending, matching_files, printable, stamp_of, walk
from unitok.data.records import open_records
from unitok.data.samples import Sample, ShrinkOf, Source
from unitok.data.samples import good_samples as good_samples
from unitok.data.shapes import BASE_SIZE, MIN_SIZE, SPLITS, Scene, render, sample_scene
from unitok.data.shards import ShardReader
from unitok.data.urls import is_url, local_files, suffix_of
from unitok.data.words import Words, parse_words

_LOGGER = logging.getLogger(__name__)
_IMAGES = (*IMAGE_EXTENSIONS, *RARE_EXTENSIONS)
_SPLITS = ("train", "val", "valid", "validation", "dev", "test")  # what folders of splits are called
_WORDS = (".txt", ".json")
SHAPES_DEFAULTS = {"num": 16000, "seed": 0, "size": BASE_SIZE}
_KNOWN_FORMS = (
    'expected "shapes:train?num=8000&seed=0", a folder, pattern or URL of .tar shards or .parquet files, a folder of '
    'image files with .txt beside them, a .jsonl or a LLaVA .json file, or "mix:WEIGHT=SOURCE;WEIGHT=SOURCE"'
)


class ShapesSource(Source):
    """Scenes of the shapes world, drawn when they are asked for."""

    def __init__(self, split: str, num: int, seed: int, size: int) -> None:
        super().__init__(f"shapes:{split}?num={num}&seed={seed}&size={size}")
        self.split, self.num, self.seed, self.size = split, num, seed, size

    def __len__(self) -> int:
        return self.num

    def key(self, index: int) -> str:
        return f"{self.split}-{self.seed}-{index:06d}"

    def scene(self, index: int) -> Scene:
        """The `Scene` of a sample."""
        return sample_scene(self.seed, self.split, index, self.size)

    def read(self, index: int, shrink_of: ShrinkOf | None = None) -> Sample:
        scene = self.scene(index)  # once for both
        image = render(scene)
        return Sample(**vars(self._words_of(scene)), key=self.key(index), image=image, full_size=image.size)

    def _read_words(self, index: int) -> Words:
        return self._words_of(self.scene(index))

    @staticmethod
    def _words_of(scene: Scene) -> Words:
        _, text, metadata = caption(scene, numpy_rng("caption of", scene.key))
        captions = [text, *(other for other in whole_captions(scene) if other != text)]
        return Words(captions, questions(scene), [], {"scene": scene, "geneval": metadata})

    def _read_image(self, index: int, shrink: Shrink | None) -> Decoded:
        image = render(self.scene(index))
        return Decoded(image, image.size)


class ShardSource(Source):
    """Tar shards with an image, and optionally a txt (one caption a line) and a json, per sample.

    A shard that is cut off or empty counts for the samples that it should hold by the other shards' sizes.
    """

    def __init__(self, spec: str, max_bad_fraction: float) -> None:
        super().__init__(spec, max_bad_fraction)
        self.reader = ShardReader(local_files(spec) if is_url(spec) else spec, on_bad="skip")
        self._ends = np.cumsum(self.reader.sizes)
        self.broken = frozenset(map(str, self.reader.bad_shards))
        self.report_lost(self.reader.bad_samples, len(self.reader.bad_samples))
        self.report_lost(
            {str(path): f"the shard is broken: {problem}" for path, problem in self.reader.bad_shards.items()},
            self._lost_with_shards(),
        )

    def _lost_with_shards(self) -> int:
        """How many samples broken shards have lost: their lack against whole ones, or else as many as are left."""
        bad, sizes = self.reader.bad_shards, dict(zip(self.reader.paths, self.reader.sizes, strict=True))
        whole = [size for path, size in sizes.items() if path not in bad]
        if not whole:
            return len(self.reader)
        return sum(max(1, round(median(whole)) - sizes[path]) for path in bad)

    def __len__(self) -> int:
        return len(self.reader)

    def key(self, index: int) -> str:
        return self.reader.keys[index]

    def _shard(self, index: int) -> Path:
        return self.reader.paths[int(np.searchsorted(self._ends, index, side="right"))]

    def place(self, index: int) -> str:
        return f"{self._shard(index)}:{self.key(index)}"

    def stamp(self, index: int) -> bytes:
        path, stat = self._shard(index), self.reader.place(index)[0].stat
        return super().stamp(index) + (file_stamp(path) if stat is None else stamp_of(path, *stat))

    def read(self, index: int, shrink_of: ShrinkOf | None = None) -> Sample:
        members = self.reader.read(index, (*_IMAGES, "txt", "json"))  # all in one go
        words, key = self._words_in(members, index), self.key(index)
        image = self._image_in(members, index, shrink_of(key) if shrink_of else None)
        return Sample(**vars(words), key=key, image=image.image, full_size=image.full_size)

    def _read_words(self, index: int) -> Words:
        return self._words_in(self.reader.read(index, ("txt", "json")), index)

    def _read_image(self, index: int, shrink: Shrink | None) -> Decoded:
        return self._image_in(self.reader.read(index, _IMAGES), index, shrink)

    def _words_in(self, members: dict[str, bytes], index: int) -> Words:
        return parse_words(members.get("txt"), members.get("json"), self.place(index))

    def _image_in(self, members: dict[str, bytes], index: int, shrink: Shrink | None) -> Decoded:
        found = [name for name in members if name in _IMAGES]
        if not found:
            message = f"{self.place(index)} has no image; expected one of {', '.join(IMAGE_EXTENSIONS)}"
            raise SampleError(message, "missing image")
        return self._decode(members[min(found, key=lambda name: name in RARE_EXTENSIONS)], index, shrink)


class FolderSource(Source):
    """A folder of NAME.png (or jpg, webp), optionally with NAME.txt and NAME.json (or .TXT); sub-folders are read
    too, also where they are links. What is neither image nor words is counted in `passed_over`, by its ending."""

    def __init__(self, folder: Path, max_bad_fraction: float) -> None:
        super().__init__(str(folder), max_bad_fraction)
        self.folder = folder
        self.files: list[Path] = []
        self._unusual: dict[Path, Path] = {}  # where words are whose ending is not written small: those alone
        others: Counter[str] = Counter()
        elsewhere = ""
        try:
            for path, is_folder in walk(folder):
                suffix = path.suffix.lower()
                if suffix.lstrip(".") in _IMAGES:
                    self.files.append(path)
                elif not is_folder and suffix in _WORDS:
                    if path.suffix != suffix:
                        self._unusual[path.with_suffix(suffix)] = path
                elif not is_folder:
                    if suffix in (".tar", ".parquet"):  # in sub-folders: see open_source
                        elsewhere = elsewhere or f"; {path.parent} has {suffix} files, name that folder"
                    others[printable(suffix) or "no ending"] += 1
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read ({error.strerror}); folders of images must be") from None
        self.files.sort()
        self.passed_over = dict(others.most_common())
        seen = ", ".join(f"{count} x {kind}" for kind, count in self.passed_over.items())
        if not self.files:
            there = f"; it holds {seen}" if seen else ""
            raise DataError(
                f"{folder} holds no image ({', '.join(_IMAGES)}) and no .tar{there}{elsewhere}; {_KNOWN_FORMS}"
            )
        if seen:
            _LOGGER.warning("%s: files passed over, which are neither images nor words: %s", folder, seen)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return printable(self.files[index].relative_to(self.folder).with_suffix("").as_posix())

    def stamp(self, index: int) -> bytes:
        stamps = map(file_stamp, (self.files[index], *self._beside(index)))
        return b"\0".join((super().stamp(index), *stamps))

    def _beside(self, index: int) -> list[Path]:
        """Where a sample's txt and json are, if there are such."""
        beside = [self.files[index].with_suffix(suffix) for suffix in _WORDS]
        return [self._unusual[path] if path in self._unusual and not path.is_file() else path for path in beside]

    def _read_words(self, index: int) -> Words:
        beside = (path.read_bytes() if path.is_file() else None for path in self._beside(index))
        return parse_words(*beside, str(self.files[index]))

    def _read_image(self, index: int, shrink: Shrink | None) -> Decoded:
        return self._load(self.files[index], shrink)


def open_source(
    spec: "str | Path | Sequence[SourceShare]",
    split: str | None = None,
    max_bad_fraction: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    seed: int = 0,
    text_only: bool = False,
) -> Source:
    """Opens a source by its name; `docs/data.md` shows all forms.

    Args:
        spec: "shapes:SPLIT?num=&seed=&size=" for generated scenes; a folder, glob, brace pattern or URL of .tar shards
            or of .parquet files; a folder of images; a .jsonl file or LLaVA's .json (FILE?images=DIR); "mix:..." or a
            list for a mixture.
        split: "train" or "val" in place of the one in a shapes spec; for folders the sub-folder of that name, if any.
        max_bad_fraction: share of unreadable samples above which reading stops.
        max_pixels: images of more are bad samples.
        seed: of a mixture's order.
        text_only: conversations without a single image are a source too (of length 0, see `Source.num_text_only`).

    Raises:
        DataError: the spec is of no known form or nothing is there.
    """
    open_one = partial(_open_one, split=split, max_bad_fraction=max_bad_fraction)
    return _open(spec, open_one, max_pixels, text_only, seed, ())


def has_split(spec: "str | Path", split: str) -> bool:
    """Whether `open_source` finds a split of this name: in a mixture, in any member. Those of shapes have their own
    check."""
    shares = parse_mixture(spec)
    if shares is not None:
        return any(has_split(share.source, split) for share in shares)
    path = Path(spec)
    if _is_shapes(str(spec)) or os.path.isdir(path / split):
        return True
    return os.path.isdir(path) and bool(_of_split(files_ending(path, ".parquet"), split))


def _is_shapes(text: str) -> bool:
    return text == "shapes" or text.startswith("shapes:")


def _of_split(tables: list[Path], split: str) -> list[Path]:
    """The datasets library names its files SPLIT-00000-of-00002.parquet."""
    return [file for file in tables if file.name.startswith(f"{split}-")]


def is_read_from(spec: "str | Path", folder: Path) -> bool:
    """Whether what is written into `folder` would become part of this source, or hide it."""
    shares = parse_mixture(spec)
    if shares is not None:
        return any(is_read_from(share.source, folder) for share in shares)
    text = str(spec)
    if not folder.is_dir() or is_url(text) or _is_shapes(text):
        return False
    if os.path.isdir(text):
        return folder.samefile(text)
    tars = [file for file in matching_files(text) if suffix_of(file.name) == ".tar"]
    return any(folder.samefile(file.parent) for file in tars if file.is_file())


def _open(
    spec: Any, open_one: Callable[[str], Source], max_pixels: int, text_only: bool, seed: int, outer: tuple
) -> Source:
    """outer: the names of the mixtures that this one is a member of."""
    shares = parse_mixture(spec)
    if shares is not None:
        if spec in outer:
            raise DataError(f"{spec} is a mixture that has itself as a member; take it out")
        inside = (*outer, spec)
        members = [_open(share.source, open_one, max_pixels, False, 0, inside) for share in shares]
        return MixtureSource(members, shares, seed)
    assert isinstance(spec, str | Path)
    source = open_one(str(spec))
    source.max_pixels = max_pixels
    if len(source) == 0 and not text_only:
        raise DataError(
            f"{source.name}: {source.num_text_only} conversations and no image; only stage two learns from such, after "
            "unitok data codes"
        )
    return source


def _open_one(text: str, split: str | None, max_bad_fraction: float) -> Source:
    if _is_shapes(text):
        return _open_shapes(text, split)
    suffix = suffix_of(text)
    if is_url(text) and suffix not in (".tar", ".parquet"):
        raise DataError(f"data source {text!r}: URLs are read of .tar and .parquet files; fetch others yourself")
    path = Path(text)
    if split is not None and os.path.isdir(path / split):
        path = path / split
    if os.path.isdir(path):  # also DATA.parquet, as Spark names its folders
        return _open_folder(path, split, max_bad_fraction)
    if suffix in (".json", ".jsonl"):
        return open_records(text, max_bad_fraction)
    if suffix == ".parquet":
        return ParquetSource(text, max_bad_fraction)
    if suffix == ".tar":
        return ShardSource(text, max_bad_fraction)
    raise DataError(f"data source {text!r} does not exist or is of no known form; {_KNOWN_FORMS}")


def _open_folder(path: Path, split: str | None, max_bad_fraction: float) -> Source:
    tars = files_ending(path, ".tar")
    if tars and all(tar.name.startswith("codes-") and tar.with_suffix(".json").is_file() for tar in tars):
        raise DataError(f"{path} holds codes, which stage two reads (data.codes); name the images they come from")
    if tars:  # img2dataset writes notes in .parquet beside them
        return ShardSource(str(path), max_bad_fraction)
    tables = files_ending(path, ".parquet")
    if tables:
        of_split = _of_split(tables, split) if split else []
        splits = {name for name in _SPLITS for file in tables if file.name.startswith((f"{name}-", f"{name}."))}
        if len(splits) > 1 and not of_split:
            raise DataError(
                f"{path} holds the splits {', '.join(sorted(splits))}; name one, such as {path}/train-*.parquet"
            )
        wanted = f"{split}-*.parquet" if of_split else "*.parquet"
        return ParquetSource(str(path / wanted), max_bad_fraction, of_split or tables)
    shown = (item for item in path.iterdir() if not item.name.startswith("."))
    if (path / "train").is_dir() and all(item.name in _SPLITS and item.is_dir() for item in shown):
        raise DataError(f"{path} holds splits; name one, such as {path / 'train'}")
    return FolderSource(path, max_bad_fraction)


def _open_shapes(spec: str, split: str | None) -> ShapesSource:
    name, _, query = spec.removeprefix("shapes").removeprefix(":").partition("?")
    chosen = split or name or "train"
    if chosen not in SPLITS:
        raise DataError(f"{spec!r}: split {chosen!r} is unknown; expected one of {', '.join(SPLITS)}")
    settings = dict(SHAPES_DEFAULTS)
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in settings or not value.isdecimal():
            raise DataError(f"{spec!r}: {key}={value} is not understood; expected {', '.join(settings)} with numbers")
        settings[key] = int(value)
    if settings["size"] < MIN_SIZE:
        raise DataError(f"{spec!r}: size is {settings['size']}; expected at least {MIN_SIZE}, to tell shapes apart")
    if settings["num"] < 1:
        raise DataError(f"{spec!r}: num is {settings['num']}; expected at least 1")
    return ShapesSource(chosen, **settings)
