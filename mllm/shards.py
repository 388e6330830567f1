"""Weights of a folder, in one file or in shards, copied into a model shard by shard.

At no time is more than a part of one shard in memory beside the model. Of a model that ZeRO 3 has partitioned, rank 0
reads one tensor at a time, and the others receive their parts of it.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unitok.core.checkpoint import on_main
from unitok.core.distributed import is_distributed
from unitok.core.engine import fill_partitioned_
from unitok.core.errors import CheckpointError
from unitok.tokenizer.weights import check_layout, read_weights

INDEX_SUFFIX = ".index.json"
# In the order in which transformers looks for them
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
MAPPED_BYTES = 2**25  # read of a file before it is opened anew: until then its pages count as this process's memory
RECOMPUTED = ("rotary_emb.inv_freq",)  # endings of keys that old versions of transformers stored
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Place(NamedTuple):
    """Where a stored tensor goes: the model's own tensor, or a part of it, whose numbers follow on one another."""

    name: str
    part: int | slice | tuple[int, slice] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The place itself, a view."""
        return tensor if self.part is None else tensor[self.part]

    def first_of(self, shape: Sequence[int]) -> int:
        """Which number of a tensor of this shape, counted through, is the place's first one."""
        return self.of(torch.empty(shape, device="meta")).storage_offset()


@dataclass
class Shard:
    """One file; `layout` holds its tensors by name, without their values (on the meta device)."""

    path: Path
    layout: dict[str, Tensor]


def open_shards(folder: str | Path) -> list[Shard]:
    """The weight files of a model folder, in the index's order.

    Raises CheckpointError for a damaged index, a file that is missing, damaged or holds code, and unless every file
    holds exactly the keys that the index promises of it.
    """
    folder = Path(folder)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [Shard(folder / name, _layout(folder / name))]
        if (folder / (name + INDEX_SUFFIX)).is_file():
            return _indexed(folder / (name + INDEX_SUFFIX))
    expected = ", ".join(name + end for name in WEIGHT_FILES for end in ("", INDEX_SUFFIX))
    raise CheckpointError(f"{folder}: no weights in it; expected one of {expected}")


def stored_dtype(shards: Sequence[Shard], ignored: Collection[str] = ()) -> torch.dtype:
    """The floating point type that holds every stored number exactly, of keys with none of `ignored` in them."""
    dtype: torch.dtype | None = None
    for shard in shards:
        for key, tensor in shard.layout.items():
            if tensor.is_floating_point() and not any(part in key for part in ignored):
                dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype or torch.float32


@torch.no_grad()
def load_sharded(
    model: nn.Module,
    folder: str | Path,
    places: Mapping[str, Sequence[Place]] | None = None,
    zeros: Collection[str] = (),
    ignored: tuple[str, ...] = (),
) -> None:
    """Copy a folder's weights into `model`, which may be partitioned (then every rank calls).

    Args:
        places: for every key of the files where it goes (None: the model's own names). What is not named stays.
        zeros: keys whose tensors must be zero and have no place in the model.
        ignored: endings of keys that may be there and are not looked at.

    Raises CheckpointError as `open_shards` does, and for missing, unexpected or wrongly shaped keys, which it lists;
    then nothing has been copied.
    """
    shards = open_shards(folder)
    own = model.state_dict(keep_vars=True)
    places = {name: [Place(name)] for name in own} if places is None else places
    layout = {key: t for shard in shards for key, t in shard.layout.items() if not key.endswith(ignored)}
    expected = {key: _shape(own, targets) for key, targets in places.items()}
    expected |= {key: layout[key].shape if key in layout else () for key in zeros}
    check_layout(expected, layout, f"a {type(model).__name__} of the sizes in its config.json", folder)
    is_partitioned = any(hasattr(tensor, "ds_id") for tensor in own.values())
    for shard in shards:
        reader = _Reader(shard.path, zeros, is_partitioned)
        for key in shard.layout:
            if key in zeros or key in places:
                targets = [(place, own[place.name]) for place in places.get(key, ())]
                _put(targets, reader.read(key), shard.layout[key].numel(), is_partitioned)


def save_shards(state: Mapping[str, Tensor], folder: Path, max_shard_size: str = "5GB") -> None:
    """Write `state` as transformers does: model.safetensors, or shards of at most `max_shard_size` with their index."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(dict(state), max_shard_size=max_shard_size)
    for file, keys in split.filename_to_tensors.items():
        # copies: a file must not hold the whole storage that a view belongs to
        save_file({key: state[key].detach().cpu().clone() for key in keys}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / (WEIGHT_FILES[0] + INDEX_SUFFIX)).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


class _Reader:
    """A file's tensors one after the other: on every rank, or on rank 0 alone, whose errors are then those of all."""

    def __init__(self, path: Path, zeros: Collection[str], on_rank_0: bool) -> None:
        self.path, self.zeros, self.on_rank_0 = path, zeros, on_rank_0
        self._tensors: dict[str, Tensor] = {}
        self._read = 0

    def read(self, key: str) -> Tensor | None:
        """The tensor (None elsewhere than on rank 0); CheckpointError where it must be zero and is not. Those before
        should not be held any more: as long as one is, so is the file."""
        found: list[Tensor] = []
        if self.on_rank_0:
            on_main(lambda: found.append(self._tensor(key)))
        else:
            found.append(self._tensor(key))
        return found[0] if found else None

    def _tensor(self, key: str) -> Tensor:
        if not self._tensors or self._read >= MAPPED_BYTES:
            self._tensors = {}
            self._tensors, self._read = read_weights(self.path, mmap=True), 0
        tensor = self._tensors[key]
        self._read += tensor.nbytes
        if key in self.zeros and bool(tensor.any()):
            raise CheckpointError(f"{self.path}: {key} is not zero; this model has no place for it")
        return tensor


def _put(targets: Sequence[tuple[Place, Tensor]], tensor: Tensor | None, count: int, is_partitioned: bool) -> None:
    """Copy the `count` numbers of a tensor on this rank; into a partitioned model from rank 0, which alone has them (of
    parameters each rank its part, of buffers the whole)."""
    for place, target in targets:
        if hasattr(target, "ds_id"):
            fill_partitioned_(target, place.first_of(target.ds_shape), count, tensor)
            continue
        if tensor is not None:
            place.of(target.data).copy_(tensor)
        if is_partitioned and is_distributed():
            torch.distributed.broadcast(target.data, 0)


def _shape(own: Mapping[str, Tensor], targets: Sequence[Place]) -> torch.Size:
    """Shape that fits all `targets`; a partitioned parameter remembers its whole shape."""
    shapes = set()
    for place in targets:
        tensor = own[place.name]
        whole = torch.empty(getattr(tensor, "ds_shape", tensor.shape), device="meta")
        shapes.add(tuple(place.of(whole).shape))
    assert len(shapes) == 1, f"{targets} want tensors of different shapes {shapes}"
    return torch.Size(shapes.pop())


def _layout(path: Path) -> dict[str, Tensor]:
    """Names, shapes and types in a file."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return read_weights(path, device="meta")
    layout = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                part = file.get_slice(key)
                layout[key] = torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")
    except (SafetensorError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{path}: damaged, or of an unknown number type ({reason}); get it again") from error
    return layout


def _indexed(index: Path) -> list[Shard]:
    weight_map = _read_index(index)
    promised: dict[str, set[str]] = {}
    for key, file in weight_map.items():
        promised.setdefault(file, set()).add(key)
    shards = []
    for file, keys in promised.items():
        path = index.parent / file
        if Path(file).name != file:
            raise CheckpointError(f"{index}: names the file {file!r}; expected files beside the index")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but {index.name} has {len(keys)} keys in it; copy it there")
        layout = _layout(path)
        problems = [("lacks", keys - layout.keys()), ("holds, against the index,", layout.keys() - keys)]
        for what, names in problems:
            if names:
                raise CheckpointError(f"{path} {what} {len(names)} keys, such as {sorted(names)[0]}; get it again")
        shards.append(Shard(path, layout))
    return shards


def _read_index(index: Path) -> dict[str, str]:
    """`weight_map` of an index: key -> file."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
        if count > 1:
            raise ValueError(f"{name} stands in it {count} times")
        return dict(pairs)

    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=once)
    except ValueError as error:  # JSON and UTF-8 errors are its kinds
        raise CheckpointError(f"{index}: damaged index ({str(error).splitlines()[0]}); get it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: damaged index (no weight_map of keys to files); get it again")
    return weight_map
