"""Weights of networks that are not ours: finding the file, reading it without trust, putting it in place."""

import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unitok.core.errors import CheckpointError, UserError

HUB_PREFIX = "hub:"
MAX_LISTED = 8
# What torch.load and safetensors raise for bytes that are no weights (found by damaging files at random)
READ_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    struct.error,
)


@dataclass(frozen=True)
class Foreign:
    """A network whose weights are published by others."""

    field: str  # where the configuration names the file
    what: str
    hint: str  # where to get the file and how to do without


LPIPS_WEIGHTS = Foreign(
    "loss.lpips_weights",
    "VGG16 and the heads of LPIPS",
    "external/lpips_with_vgg.pth of github.com/FoundationVision/UniTok, or "
    "https://download.pytorch.org/models/vgg16-397923af.pth (the heads come with torchmetrics); "
    "or set loss.lpips=0 to train without",
)
DINO_WEIGHTS = Foreign(
    "discriminator.dino_weights",
    "DINOv2-S",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth; "
    "or set discriminator.kind=patch to train without",
)


def find_weights(name: str, path: str | Path | None, what: str, hint: str) -> Path:
    """The local file that `path` names: a path, or `hub:OWNER/REPOSITORY/FILE` of the Hugging Face hub.

    `name` is the configuration's field. Raises UserError, with `what` is needed and the `hint` where to get it, if
    there is no path, no such file, or the hub does not give it.
    """
    if path is None or not str(path):
        raise UserError(f"{name} is not set, but {what} is needed: get {hint}")
    if str(path).startswith(HUB_PREFIX):
        return _from_hub(name, str(path), hint)
    local = Path(path).expanduser()
    if not local.is_file():
        problem = "is not a file" if local.exists() else "does not exist"
        raise UserError(f"{name}={path} {problem}; expected {what}: get {hint}")
    return local


def read_torch(path: str | Path, allowed: Sequence[type] = (), device: str = "cpu", mmap: bool = False) -> Any:
    """What a `.safetensors` file, or any other as torch's format, holds; on the CPU.

    Of torch's format only: device "meta" gives names and shapes without reading the tensors, and `mmap` reads those
    that are used, when they are used (where the file's format allows it).

    Nothing in the file is executed: besides tensors and plain containers it may hold only instances of the `allowed`
    classes. Raises CheckpointError if it holds more or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(list(allowed)):
            # Without map_location, files written on a GPU cannot be read on a machine that has none
            mmap = mmap and zipfile.is_zipfile(path)  # torch's older format can only be read as a whole
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except (*READ_ERRORS, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {_why_unread(error)}; get the file again") from error


def read_weights(path: str | Path, device: str = "cpu", mmap: bool = False) -> dict[str, Tensor]:
    """Tensors by name, read as `read_torch` does.

    Raises CheckpointError also if the file is no flat dictionary of tensors.
    """
    state = read_torch(path, device=device, mmap=mmap)
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise CheckpointError(f"{path} holds {_describe(state)}; expected a flat dictionary of tensors by name")
    return dict(state)


def check_layout(
    expected: Mapping[str, Sequence[int]], state: Mapping[str, Tensor], what: str, source: str | Path
) -> None:
    """Raise CheckpointError, in one line with the keys, if `state` has not exactly the names and shapes `expected`."""
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in state and list(state[key].shape) != list(shape)
    ]
    problems = [
        ("missing", _listed(key for key in expected if key not in state)),
        ("unexpected", _listed(key for key in state if key not in expected)),
        ("wrong shape", _listed(shapes)),
    ]
    found = "; ".join(f"{problem}: {keys}" for problem, keys in problems if keys)
    if found:
        raise CheckpointError(f"{source} does not fit {what}: {found}")


def load_strict(module: nn.Module, state: Mapping[str, Tensor], what: str, source: str | Path) -> None:
    """Copy `state` into all parameters and persistent buffers of `module`.

    Raises as `check_layout` does; then the module is unchanged.
    """
    check_layout({key: value.shape for key, value in module.state_dict().items()}, state, what, source)
    module.load_state_dict(state)


def _from_hub(name: str, address: str, hint: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError  # of whichever HTTP library the hub uses

    parts = address.removeprefix(HUB_PREFIX).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise UserError(f"{name}={address}: expected {HUB_PREFIX}OWNER/REPOSITORY/FILE")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2]))
    except (HTTPError, EntryNotFoundError, OSError, ValueError) as error:
        raise UserError(f"{name}={address}: the hub does not give it ({_first_line(error)}); get {hint}") from error


def _why_unread(error: BaseException) -> str:
    """In our words where torch's advise to load the file without protection."""
    if not isinstance(error, pickle.UnpicklingError):
        return _first_line(error)
    refused = re.search(r"GLOBAL (\w[\w.]*)", str(error))
    if refused:
        return f"it holds more than tensors ({refused[1]}), which is not loaded from files of others"
    return "it is damaged, or no file of tensors"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _describe(state: object) -> str:
    if isinstance(state, Mapping):
        return f"a dictionary with {_listed(repr(key) for key, v in state.items() if not isinstance(v, Tensor))}"
    return f"a {type(state).__name__}"


def _listed(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
    return ", ".join(keys[:MAX_LISTED]) + more
