"""Reading weights shard by shard: refusals, and (slow) into a model in parts, in little memory."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from backbones import make_folder
from equal_runs import differences
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from stages import run_stage, write_configs
from tiny import make_mllm, mllm_config
from torch import nn
from transformers.initialization import no_init_weights

from unitok.core.distributed import init_distributed, is_main, rank, shutdown_distributed
from unitok.core.engine import EngineConfig, partitioned, whole_on_main, whole_parameters
from unitok.core.errors import CheckpointError
from unitok.mllm import UniTokMLLM
from unitok.mllm.backbone import empty_model, load_model
from unitok.mllm.shards import INDEX_SUFFIX, Place, load_sharded, open_shards, save_shards, stored_dtype

INDEX = "model.safetensors" + INDEX_SUFFIX
ZERO3 = EngineConfig(zero_stage=3, zero3_persistence=0)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    torch.manual_seed(0)
    save_shards(Pair().state_dict(), tmp_path, max_shard_size=70)
    assert len(open_shards(tmp_path)) == 2
    return tmp_path


def edit_index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def test_shards_and_their_parts(folder):
    """What was written comes back, into parts of a tensor as well."""
    torch.manual_seed(0)
    wanted, model = Pair(), Pair()
    load_sharded(model, folder)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in wanted.state_dict().items())
    wide = nn.Linear(3, 9)
    before = wide.weight.detach().clone()
    places = {
        "first.weight": [Place("weight", slice(2, 6))],
        "first.bias": [Place("bias", slice(0, 4)), Place("bias", slice(5, 9))],
    }
    load_sharded(wide, folder, places, ignored=("second.weight", "second.bias"))
    assert torch.equal(wide.weight[2:6], wanted.first.weight)
    assert torch.equal(wide.weight[[0, 1, 6, 7, 8]], before[[0, 1, 6, 7, 8]]), "what is not named stays"
    assert torch.equal(wide.bias[:4], wanted.first.bias) and torch.equal(wide.bias[5:], wanted.first.bias)


def test_a_place_knows_its_first_number():
    """Of an expert's second half, say: ZeRO 3 has the tensor in parts, and counts."""
    numbers = torch.arange(24).view(2, 4, 3)
    for part in (None, 1, slice(1, 2), (1, slice(2, 4))):
        place = Place("weight", part)
        assert place.first_of(numbers.shape) == int(place.of(numbers).flatten()[0])


def test_the_stored_type_holds_every_number(folder, tmp_path):
    assert stored_dtype(open_shards(folder)) == torch.float32
    (tmp_path / "half").mkdir()
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "half" / "model.safetensors")
    assert stored_dtype(open_shards(tmp_path / "half")) == torch.bfloat16


def _missing_file(folder):
    next(folder.glob("*-00002-*")).unlink()


def test_from_pretrained_names_a_truncated_shard(tmp_path):
    make_mllm().save_pretrained(tmp_path, max_shard_size="40KB")
    assert torch.is_tensor(UniTokMLLM.from_pretrained(tmp_path).lm_head.weight)
    _truncated(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))}.*-00002-.*: damaged"):
        UniTokMLLM.from_pretrained(tmp_path)


def _truncated(folder):
    file = next(folder.glob("*-00002-*"))
    file.write_bytes(file.read_bytes()[:-8])


def _index_text(folder):
    (folder / INDEX).write_text('{"weight_map": {')


def _twice(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"first.bias":', '"first.bias": "x", "first.bias":'))


def _in_two_files(folder):
    file = next(folder.glob("*-00002-*"))
    save_file({"first.bias": torch.zeros(4), **load_file(file)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing_file, r"00002-of-00002.safetensors: missing, but model.safetensors.index.json has"),
        (_truncated, r"00002-of-00002.safetensors: damaged"),
        (_index_text, r"index.json: damaged index \(Expecting"),
        (_twice, r"index.json: damaged index \(first.bias stands in it 2 times"),
        (_in_two_files, r"holds, against the index, 1 keys, such as first.bias"),
        (lambda f: edit_index(f, lambda m: m.update(ghost=m["first.bias"])), r"lacks 1 keys, such as ghost"),
        (lambda f: edit_index(f, lambda m: m.update(ghost="../x")), r"names the file '../x'"),
        (lambda f: edit_index(f, lambda m: m.clear()), r"no weight_map of keys to files"),
    ],
)
def test_damaged_shards_are_refused_in_one_line(folder, damage, message):
    damage(folder)
    model = Pair()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as refused:
        load_sharded(model, folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_every_odd_key_is_listed(folder):
    with pytest.raises(CheckpointError, match=r"missing: weight, bias; unexpected: first.*, second.weight"):
        load_sharded(nn.Linear(3, 4), folder)
    with pytest.raises(CheckpointError, match=r"second.bias is not zero"):
        load_sharded(nn.Linear(3, 4), folder, {"first.weight": [Place("weight")], "first.bias": [Place("bias")]},
                     zeros=("second.bias",), ignored=("second.weight",))  # fmt: skip


def test_an_export_is_read_without_transformers_loader(tmp_path):
    """`load_model` of an own export: the same weights, in fp32, from as many shards as there are."""
    model = make_mllm()
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = load_model(tmp_path)
    assert len(open_shards(tmp_path)) > 2
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value.float()) for name, value in model.state_dict().items())
    assert {value.dtype for value in state.values()} == {torch.float32}


# ---- on two ranks


@pytest.mark.slow
def test_training_a_pretrained_backbone_in_parts_equals_whole(tmp_path):
    """ZeRO 3 on two ranks, built in parts and read from shards, logs what one process logs with the whole model."""
    files, folder = write_configs(tmp_path), make_folder("llama3", tmp_path / "backbone")
    options = [f"backbone.path={folder}", "backbone.config={}", "steps=3"]
    alone = run_ranks(1, run_stage, "mllm", files["mllm"], tmp_path / "one", 1, options)[0]
    parts = run_ranks(2, run_stage, "mllm", files["mllm"], tmp_path / "two", 2, [*options, "engine.zero_stage=3"])[0]
    worst = differences(alone, parts)
    assert max(worst.values()) < 2e-4, worst


def _load_partitioned(folder, out):
    init_distributed("cpu")
    try:
        model = load_model(folder, ZERO3)
        assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
        with whole_on_main(model):
            main = {name: value.detach().clone() for name, value in model.state_dict().items()}
        assert not any(parameter.numel() for parameter in model.parameters()), "parts again"
        with whole_parameters(model):
            whole = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if is_main():
            assert all(torch.equal(main[name], value) for name, value in whole.items())
        else:
            assert not any(main[name].numel() for name, _ in model.named_parameters()), "only rank 0 holds it all"
        return whole
    finally:
        shutdown_distributed()


@pytest.mark.slow
@pytest.mark.parametrize("text", [{}, {"model_type": "mixtral", "num_local_experts": 3}], ids=["llama", "mixtral"])
def test_an_export_in_parts_is_the_export(text, tmp_path):
    """Buffers too, on every rank; of experts, which are stored one by one, their parts."""
    model = make_mllm(text=text)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    for state in run_ranks(2, _load_partitioned, tmp_path, tmp_path):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def _damaged_on_one_rank(folder):
    init_distributed("cpu")
    try:
        with pytest.raises(CheckpointError, match="is not zero|cannot read"):
            load_sharded(empty_model(mllm_config(), ZERO3), folder, zeros=("odd",))
        return True
    finally:
        shutdown_distributed()


@pytest.mark.slow
def test_what_rank_0_finds_all_ranks_raise(tmp_path):
    model = make_mllm()
    save_shards(model.state_dict() | {"odd": torch.ones(3)}, tmp_path)
    assert run_ranks(2, _damaged_on_one_rank, tmp_path, timeout=60) == [True, True]


def _peak(function):
    """Growth of this process's resident memory during a call, at its highest, in bytes (files in memory included)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = function()
    return result, _status("VmHWM") - before


def _status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


class Stack(nn.Module):
    """16 layers of 36 MiB: glibc gives blocks above 32 MiB back to the system as soon as they are free."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3072, 3072, bias=False) for _ in range(16))


def _load_stack(folder, engine):
    """Peak growth of building and loading on this rank, and the sum of all weights."""
    init_distributed("cpu")
    try:

        def build():
            with partitioned(engine), no_init_weights():
                model = Stack()
            load_sharded(model, folder)
            return model

        with partitioned(engine), no_init_weights():
            nn.Linear(8, 8)  # what DeepSpeed sets up at its first use is no matter of the model's size
        model, peak = _peak(build)
        total = 0.0
        for layer in model.layers:
            with whole_parameters(layer):
                total += float(layer.weight.double().sum())
        return rank(), peak, total
    finally:
        shutdown_distributed()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_memory_stays_under_one_shard_and_one_part(tmp_path):
    """576 MiB in 8 shards on two ranks: under one shard and a rank's part. Read as a whole, each rank would hold all of
    it."""
    torch.manual_seed(0)
    model = Stack()
    state = model.state_dict()
    size = sum(value.nbytes for value in state.values())
    wanted = float(sum(value.double().sum() for value in state.values()))
    shard = size // 8
    save_shards(state, tmp_path, max_shard_size=shard)
    assert len(open_shards(tmp_path)) == 8
    del model, state
    for number, peak, total in run_ranks(2, _load_stack, tmp_path, ZERO3):
        print(f"rank {number}: {peak / 2**20:.0f} MiB of {size / 2**20:.0f}")
        assert total == pytest.approx(wanted, rel=1e-9)
        assert peak < shard + size // 2, number
    for _, peak, _ in run_ranks(2, _load_stack, tmp_path, EngineConfig()):
        print(f"whole: {peak / 2**20:.0f} MiB")
        assert peak >= size, "the measurement sees the model"
