"""Documents of VQA benchmarks from a local folder or the hub, and their pictures.

Local: `<data>/<benchmark>/data.jsonl` (rows with the hub's field names, pictures as paths beside it), or there a
snapshot of the hub's data set (`hf download NAME --repo-type dataset --local-dir <data>/<benchmark>`).
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from unitok.core.errors import DataError
from unitok.eval.benchmarks import Benchmark, Doc, benchmark
from unitok.eval.lazy_pictures import picture_of

DATA_VARIABLE = "UNITOK_DATA"
DATA_FILE = "data.jsonl"
_SHARED = {"textvqa_ocr": "textvqa"}  # benchmarks on the data of another
_NUMBERED = re.compile(r"<image (\d)>")


def data_folder(name: str, data: str | None = None) -> Path | None:
    """The folder where a benchmark's data must be; None where they come from the hub."""
    root = data or os.environ.get(DATA_VARIABLE)
    return Path(root) / _SHARED.get(name, name) if root else None


def missing_data(name: str, data: str | None = None) -> str | None:
    """One line on what is missing and where it comes from; None where a local folder is there."""
    folder, hub = data_folder(name, data), benchmark(name).hub
    if benchmark(name).generated:
        return None
    if folder is None:
        fetch = _fetch(hub, f"DIR/{_SHARED.get(name, name)}")
        return f"from the hub: {hub} (to use local data: {fetch}, and set {DATA_VARIABLE}=DIR)"
    if (folder / DATA_FILE).is_file() or next(folder.rglob("*.parquet"), None):
        return None
    found = f"no {DATA_FILE} and no .parquet file in {folder}" if folder.is_dir() else f"no folder {folder}"
    return f"{found}: {_fetch(hub, folder)}, or put {DATA_FILE} with pictures there"


def _fetch(hub: str, folder: Path | str) -> str:
    return f"hf download {hub} --repo-type dataset --local-dir {folder}"


def load_documents(name: str, data: str | None = None) -> Any:
    """A `datasets.Dataset` of all documents, each with `benchmark` (its name) and, in circular ones, `rotation`.

    Raises:
        DataError: the data are missing, or lack a field or a picture; the message says where they come from.
    """
    rule, folder = benchmark(name), data_folder(name, data)
    if rule.generated and not (folder is not None and folder.is_dir()):
        return _drawn(name, rule)
    if folder is not None and not folder.is_dir():
        raise DataError(f"{name}: {missing_data(name, data)}")
    if folder is not None and (folder / DATA_FILE).is_file():
        documents = _read_jsonl(folder / DATA_FILE, rule)
    else:
        documents = _read_set(name, rule, rule.hub if folder is None else str(folder))
    expected = (*rule.fields, rule.images[0])
    absent = [field for field in expected if field not in documents.column_names]
    if absent:
        where = rule.hub if folder is None else folder
        raise DataError(f"{name}: {where} has no field {absent[0]!r}; expected {', '.join(expected)}")
    keep = rule.keep
    if keep is not None:
        texts = _texts(documents, rule)
        documents = documents.select([index for index, doc in enumerate(texts) if keep(doc)])
    if rule.rotations is not None:
        documents = _rotated(documents, rule)
    _LOADED[name] = documents_hash(name, documents)
    return documents.add_column("benchmark", [name] * len(documents))


_LOADED: dict[str, str] = {}
_NEEDED = ("question", "answer", "answers", "index", "options")  # of a benchmark's fields: null is no value of these


def loaded_documents() -> dict[str, str]:
    """Hash of the documents of every benchmark that this process has read: lm-eval, which reads them, keeps none."""
    return dict(_LOADED)


def documents_hash(name: str, documents: Iterable[Doc]) -> str:
    """SHA-256 over questions as they are asked and the fields that a benchmark needs, without pictures (which may be
    many GiB) and fields that nothing reads: the same for a local file and the hub's data set."""
    rule, digest = benchmark(name), hashlib.sha256()
    for doc in _texts(documents, rule) if hasattr(documents, "remove_columns") else documents:
        needed = {field: doc.get(field) for field in (*rule.fields, "rotation")}
        digest.update(json.dumps([rule.ask(doc), needed], sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _texts(documents: Any, rule: Benchmark) -> Any:
    """The documents without their pictures."""
    return documents.remove_columns([field for field in rule.images if field in documents.column_names])


def _drawn(name: str, rule: Benchmark) -> Any:
    """The questions of `unitok eval vqa` on a generated source, in their order."""
    from datasets import Dataset

    from unitok.data.source import open_source
    from unitok.eval.vqa import choose_questions

    source = open_source(rule.hub)
    asked = choose_questions(source)
    encoded = {index: _png(source[index].image) for index in {one.index for one in asked}}
    rows = [
        {"question": one.text, "answer": one.answer, "type": one.type, "image": {"bytes": encoded[one.index]}}
        for one in asked
    ]
    return Dataset.from_list(rows).add_column("benchmark", [name] * len(rows))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _rotated(documents: Any, rule: Benchmark) -> Any:
    """Every document as often as it has options, numbered by `rotation`."""
    texts = _texts(documents, rule)
    turns = [(index, turn) for index, doc in enumerate(texts) for turn in range(rule.rotations(doc))]
    if lost := set(range(len(texts))) - {index for index, _ in turns}:
        raise DataError(f"question {texts[min(lost)].get('index')!r} has no options: expected texts under A, B, C, D")
    return documents.select([index for index, _ in turns]).add_column("rotation", [turn for _, turn in turns])


def _read_jsonl(path: Path, rule: Benchmark) -> Any:
    import pyarrow as pa
    from datasets import Dataset

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise DataError(f"{path}, line {number}: {line[:60]!r} is not JSON") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object with {', '.join(rule.fields)}")
        if empty := [name for name in rule.fields if name in _NEEDED and name in row and row[name] is None]:
            raise DataError(f"{path}, line {number}: {empty[0]} is null; give it a value, or leave the line out")
        for field in rule.images:
            if field in row:
                row[field] = _beside(row[field], path.parent)
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: holds no documents")
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: a field is of one kind in one line and of another elsewhere ({reason})") from None


def _beside(picture: Any, folder: Path) -> Any:
    """Paths of pictures are relative to the file that names them."""
    if isinstance(picture, list):
        return [_beside(one, folder) for one in picture]
    return str(folder / picture) if isinstance(picture, str) and picture else None


def _read_set(name: str, rule: Benchmark, where: str) -> Any:
    """A data set of the hub, or a snapshot of it in a folder; pictures stay encoded until they are asked for."""
    documents = _undecoded(_load_set(name, where, rule.config, rule.split))
    if rule.image_config is None:
        return documents
    config, field = rule.image_config
    pictures = _undecoded(_load_set(name, where, config, rule.split))
    places = {key: index for index, key in enumerate(pictures["id"])}
    missing = next((key for key in documents[field] if key not in places), None)
    if missing is not None:
        raise DataError(f"{name}: {where} has no picture {missing!r} in its configuration {config}")
    from datasets import concatenate_datasets

    own = pictures.select([places[key] for key in documents[field]]).select_columns(["image"])
    return concatenate_datasets([documents, own], axis=1)


def _load_set(name: str, where: str, config: str | None, split: str) -> Any:
    from datasets.exceptions import DatasetNotFoundError

    try:
        return _rows(where, config, split)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise DataError(
            f"{name}: cannot read {where} (configuration {config}, split {split}): {reason}; download it with `hf "
            f"download {benchmark(name).hub} --repo-type dataset --local-dir FOLDER/{_SHARED.get(name, name)}` and set "
            f"{DATA_VARIABLE}=FOLDER"
        ) from error


def _rows(where: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset, load_dataset_builder

    if not Path(where).is_dir():
        return load_dataset(where, config, split=split)
    # Of a folder `datasets` remembers the name alone, and would give what once lay in another of that name; of files
    # it remembers place and time.
    files = [str(file) for file in (load_dataset_builder(where, config).config.data_files or {}).get(split, [])]
    if not files or not all(file.endswith(".parquet") for file in files):
        raise ValueError(f"expected .parquet files of this split, found {files[:1] or 'none'}")
    return load_dataset("parquet", data_files={split: files}, split=split)


def _undecoded(documents: Any) -> Any:
    from datasets import Image as ImageFeature

    for field, feature in documents.features.items():
        if isinstance(feature, ImageFeature):
            documents = documents.cast_column(field, ImageFeature(decode=False))
    return documents


# ---- What lm-eval asks of a document


def question(doc: Doc) -> str:
    """The whole question with the benchmark's wording; "<image>" where a picture stands inside the text."""
    return _NUMBERED.sub("<image>", benchmark(doc["benchmark"]).ask(doc))


def pictures(doc: Doc) -> list[Image.Image]:
    """The document's pictures in the order in which its question needs them."""
    rule = benchmark(doc["benchmark"])
    numbers = _NUMBERED.findall(rule.ask(doc))
    fields = [f"image_{number}" for number in numbers] if numbers else rule.images
    found = []
    for field in fields:
        value = doc.get(field)
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                found.append(picture_of(one, f"{doc['benchmark']} {field}"))
            elif numbers:
                raise DataError(f"{doc['benchmark']}: the question names <{field.replace('_', ' ')}>, which is missing")
    if not found and not rule.without_pictures:
        asked = doc["question"][:60]
        raise DataError(f"{doc['benchmark']}: no picture in {rule.images[0]!r} of {asked!r}; expected one")
    return found
