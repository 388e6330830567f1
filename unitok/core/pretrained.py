"""Loading of model folders (config.json + model.safetensors) with one clear error for everything that can be wrong."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from unitok.core.errors import CheckpointError

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; CheckpointError when there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: damaged, not JSON ({error}); copy it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds a {type(data).__name__}, expected an object; copy it again")
    return data


def check_model_folder(folder: Path, model_type: str) -> None:
    """CheckpointError unless `folder` is a model folder of that type."""
    config_file = folder / "config.json"
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: is a file, expected a model folder (`unitok convert` makes one of a released checkpoint)"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such model folder; give another, or make one: `unitok demo` trains runs/demo/model, "
            "`unitok convert` makes one of a released checkpoint"
        )
    if not config_file.is_file():
        raise CheckpointError(f"{folder}: not a model folder (it has no config.json)")
    for file in sorted(folder.glob("*.json")):
        read_json(file)  # transformers gives a traceback for a damaged one
    found = read_json(config_file).get("model_type")
    if found != model_type:
        raise CheckpointError(f"{folder}: holds a model of type {found!r}, expected {model_type!r}")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: has no *.safetensors file, so there are no weights to load")


def load_model_folder(cls: type[ModelT], folder: Path | str, **options: Any) -> ModelT:
    """`cls.from_pretrained`, refusing missing, unexpected or wrongly shaped weights and damaged files."""
    folder = Path(folder)
    transformers_logging.disable_progress_bar()  # what is loaded here loads at once
    check_model_folder(folder, cls.config_class.model_type)
    return checked(lambda: cls.from_pretrained(folder, output_loading_info=True, **options), folder)[0]


@contextmanager
def readable_weights(folder: Path | str) -> Iterator[None]:
    """CheckpointError for a file of weights that is cut off or otherwise damaged."""
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: damaged weights file ({error}); copy it again") from error


def checked(load: Callable[[], tuple[ModelT, dict[str, Any]]], folder: Path | str) -> tuple[ModelT, dict[str, Any]]:
    """What `load` gives (model and loading information) if every weight found its place; else CheckpointError."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of keys would stand before our one line
    try:
        with readable_weights(folder):
            model, info = load()
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: weights do not fit config.json ({_one_line(error)})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise CheckpointError(
                f"{folder}: {len(info[kind])} {kind.replace('_', ' ')} in the weights, such as {names}; the file "
                f"belongs to another configuration"
            )
    return model, info


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "..."
