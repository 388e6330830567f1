"""Sources of images with words, all read the same way: `source[i] -> Sample`, in any order, from any process.

`open_source` knows generated shapes scenes, folders of tar shards, folders of image files, and JSON lines.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from unitok.core.errors import DataError
from unitok.core.rng import numpy_rng
from unitok.data.bad import BadSamples
from unitok.data.captions import caption, questions, whole_captions
from unitok.data.shapes import BASE_SIZE, MIN_SIZE, SPLITS, Scene, render, sample_scene
from unitok.data.shards import ShardReader
from unitok.data.transforms import IMAGE_EXTENSIONS, decode_image, load_image
from unitok.data.words import Words, load_json_object, parse_words, words_from_json

SHAPES_DEFAULTS = {"num": 16000, "seed": 0, "size": BASE_SIZE}
_KNOWN_FORMS = (
    'expected "shapes:train?num=8000&seed=0", a folder of .tar shards or a pattern of them, a folder of image files '
    "with .txt beside them, or a .jsonl file"
)


@dataclass(kw_only=True)
class Sample(Words):
    """An RGB image and what is said about it; `key` names it within its source."""

    key: str
    image: Image.Image


class Source(BadSamples, ABC):
    """Map-style source that survives bad samples (unreadable image, malformed text)."""

    @abstractmethod
    def _read_words(self, index: int) -> Words:
        """Captions, questions, conversations and meta of a sample; UserError when malformed."""

    @abstractmethod
    def _read_image(self, index: int) -> Image.Image:
        """The image of a sample; UserError when unreadable."""

    def read(self, index: int) -> Sample:
        """Sample `index` itself; UserError or OSError when it is bad."""
        return Sample(**vars(self._read_words(index)), key=self.key(index), image=self._read_image(index))

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        return self.first_good(index, self.read)

    def words(self, index: int) -> Words:
        """Like `source[index]` without its image. A bad image is not noticed here."""
        return self.first_good(index, self._read_words)

    def texts(self, index: int) -> list[str]:
        """The captions of a sample, read without its image."""
        return self.words(index).captions


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

    def _read_words(self, index: int) -> Words:
        scene = self.scene(index)
        _, text, metadata = caption(scene, numpy_rng("caption of", scene.key))
        captions = [text, *(other for other in whole_captions(scene) if other != text)]
        return Words(captions, questions(scene), [], {"scene": scene, "geneval": metadata})

    def _read_image(self, index: int) -> Image.Image:
        return render(self.scene(index))


class ShardSource(Source):
    """Tar shards with an image, and optionally a txt (one caption a line) and a json, per sample."""

    def __init__(self, spec: str, max_bad_fraction: float) -> None:
        super().__init__(spec, max_bad_fraction)
        self.reader = ShardReader(spec)

    def __len__(self) -> int:
        return len(self.reader)

    def key(self, index: int) -> str:
        return self.reader.keys[index]

    def _read_words(self, index: int) -> Words:
        members = self.reader.read(index, ("txt", "json"))
        return parse_words(members.get("txt"), members.get("json"), self.key(index))

    def _read_image(self, index: int) -> Image.Image:
        members = self.reader.read(index, IMAGE_EXTENSIONS)
        if not members:
            raise DataError(f"{self.key(index)} has no image; expected one of {', '.join(IMAGE_EXTENSIONS)}")
        return decode_image(next(iter(members.values())), self.key(index))


def _is_image(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)  # such as macOS's ._NAME.png, which is no image
    return not hidden and path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


class FolderSource(Source):
    """A folder of NAME.png (or jpg, webp), optionally with NAME.txt and NAME.json; sub-folders are read too."""

    def __init__(self, folder: Path, max_bad_fraction: float) -> None:
        super().__init__(str(folder), max_bad_fraction)
        self.folder = folder
        self.files = sorted(path for path in folder.rglob("*") if _is_image(path.relative_to(folder)))
        if not self.files:
            raise DataError(f"{folder} holds no image ({', '.join(IMAGE_EXTENSIONS)}) and no .tar; {_KNOWN_FORMS}")

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return self.files[index].relative_to(self.folder).with_suffix("").as_posix()

    def _read_words(self, index: int) -> Words:
        beside = [self.files[index].with_suffix(suffix) for suffix in (".txt", ".json")]
        return parse_words(*(path.read_bytes() if path.is_file() else None for path in beside), str(self.files[index]))

    def _read_image(self, index: int) -> Image.Image:
        return load_image(self.files[index])


class JsonlSource(Source):
    """JSON lines {"image", "id"?, "caption"?, "captions"?, "questions"?, "conversations"?}; image paths are relative
    to the file."""

    def __init__(self, path: Path, max_bad_fraction: float) -> None:
        super().__init__(str(path), max_bad_fraction)
        self.path = path
        try:
            self.lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path} ({type(error).__name__}); expected JSON lines in UTF-8") from None
        if not self.lines:
            raise DataError(f"{path} holds no record; expected one JSON object a line with image and caption")

    def __len__(self) -> int:
        return len(self.lines)

    def key(self, index: int) -> str:
        try:
            name = self._record(index).get("id")
        except DataError:
            name = None
        return str(name) if isinstance(name, str | int) else f"{self.path.stem}-{index:06d}"

    def _record(self, index: int) -> dict[str, Any]:
        return load_json_object(self.lines[index], f"{self.path}: record {index}")

    def _read_words(self, index: int) -> Words:
        return words_from_json(self._record(index), f"{self.path}: record {index}")

    def _read_image(self, index: int) -> Image.Image:
        name = self._record(index).get("image")
        if not isinstance(name, str):
            raise DataError(f"{self.path}: record {index} has no image path; expected a string under image")
        return load_image(self.path.parent / name)


def good_samples(source: Any, limit: int | None = None) -> Iterator[tuple[int, Any]]:
    """(index, sample) of the readable ones of the first `limit` samples: no stand-in for a bad one."""
    for index in range(len(source) if limit is None else min(limit, len(source))):
        sample = source[index]
        if index not in getattr(source, "bad", {}):
            yield index, sample


def open_source(spec: str | Path, split: str | None = None, max_bad_fraction: float = 0.01) -> Source:
    """Opens a source by its name.

    Args:
        spec: "shapes:SPLIT?num=&seed=&size=" for generated scenes; a folder, glob or brace pattern of .tar shards; a
            folder of images; or a .jsonl file.
        split: "train" or "val" in place of the one in a shapes spec; for folders the sub-folder of that name, if any.
        max_bad_fraction: share of unreadable samples above which reading stops.

    Raises:
        DataError: the spec is of no known form or nothing is there.
    """
    text = str(spec)
    if text.startswith("shapes:") or text == "shapes":
        return _open_shapes(text, split)
    path = Path(text)
    if split is not None and (path / split).is_dir():
        path = path / split
    if path.suffix == ".jsonl":
        return JsonlSource(path, max_bad_fraction)
    if path.is_dir():
        if next(path.glob("*.tar"), None) is not None:
            return ShardSource(str(path), max_bad_fraction)
        if not any(item.is_file() for item in path.iterdir()) and (path / "train").is_dir():
            raise DataError(f"{path} holds splits; name one, such as {path / 'train'}")
        return FolderSource(path, max_bad_fraction)
    if path.suffix == ".tar":
        return ShardSource(text, max_bad_fraction)
    raise DataError(f"data source {text!r} does not exist or is of no known form; {_KNOWN_FORMS}")


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
