"""Files of pretrained LPIPS and DINO weights: missing, damaged, of another shape, or holding code."""

import argparse
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unitok.core.errors import CheckpointError, UserError
from unitok.tokenizer.dino import FrozenDino
from unitok.tokenizer.lpips import LPIPS
from unitok.tokenizer.weights import find_weights, load_strict, read_torch, read_weights

FIXTURES = Path(__file__).resolve().parent / "fixtures"
LOSSES = FIXTURES / "losses"


def test_weights_that_are_not_given_or_not_there(tmp_path):
    with pytest.raises(UserError, match=r"loss\.lpips_weights is not set.*lpips_with_vgg\.pth.*or set loss\.lpips=0"):
        LPIPS.from_file(None)
    with pytest.raises(UserError, match=r"dinov2_vits14_pretrain\.pth.*or set discriminator\.kind=patch"):
        FrozenDino.from_file("")
    with pytest.raises(UserError, match=r"missing\.pth does not exist; expected DINOv2-S: get https://"):
        FrozenDino.from_file(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="is not a file"):
        FrozenDino.from_file(tmp_path)


def test_weights_of_the_hub(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repository, file):
        asked.append((repository, file))
        if file == "none":
            raise LocalEntryNotFoundError("no network\nlong story")
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
        return str(tmp_path / "a.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_weights(find_weights("w", "hub:owner/repository/folder/a.safetensors", "it", "x"))["a"] == 1
    assert asked == [("owner/repository", "folder/a.safetensors")]
    with pytest.raises(UserError, match="the hub does not give it .*no network.*; get it there") as caught:
        find_weights("w", "hub:owner/repository/none", "it", "it there")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="expected hub:OWNER/REPOSITORY/FILE"):
        find_weights("w", "hub:owner/file.pth", "it", "it there")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_files_that_are_damaged_or_hold_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.ones(64, 64)}
    torch.save(state, tmp_path / "good.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "good.safetensors")
    for name in ("good.pth", "old.pth", "good.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["a"], state["a"])
        data = (tmp_path / name).read_bytes()
        for length in (0, 1, 9, 100, len(data) // 2):
            cut = tmp_path / f"cut-{name}"
            cut.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match="cannot read weights from .*get the file again") as caught:
                read_weights(cut)
            assert "\n" not in str(caught.value)
    for bad, message in (
        (Evil(), r"more than tensors \(\w+\.system\)"),
        ({"a": torch.ones(1), "b": 3}, "dictionary with 'b'"),
    ):
        torch.save(bad, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path / "bad.pth")
    torch.save([torch.ones(1)], tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="holds a list; expected a flat dictionary"):
        read_weights(tmp_path / "bad.pth")
    (tmp_path / "page.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="page.pth: it is damaged, or no file of tensors; get the file again"):
        read_weights(tmp_path / "page.pth")
    stream = io.BytesIO()
    pickle.dump(Evil(), stream, protocol=2)
    (tmp_path / "bad.pth").write_bytes(stream.getvalue())
    with pytest.raises(CheckpointError, match=r"more than tensors \(\w+\.system\)"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


def test_other_classes_are_read_only_if_allowed(tmp_path):
    torch.save({"args": argparse.Namespace(size=3)}, tmp_path / "args.pth")
    assert read_torch(tmp_path / "args.pth", allowed=[argparse.Namespace])["args"].size == 3
    with pytest.raises(CheckpointError, match=r"more than tensors \(argparse\.Namespace\)"):
        read_torch(tmp_path / "args.pth")


def test_weights_that_do_not_fit_are_listed_in_one_line():
    module = torch.nn.Linear(2, 3)
    before = module.weight.clone()
    state = {"weight": torch.zeros(3, 3)} | {f"extra{i:02}": torch.zeros(1) for i in range(10)}
    with pytest.raises(CheckpointError) as caught:
        load_strict(module, state, "a layer", "file.pth")
    extra = ", ".join(f"extra{i:02}" for i in range(8))
    assert str(caught.value) == (
        f"file.pth does not fit a layer: missing: bias; unexpected: {extra} and 2 more; "
        "wrong shape: weight [3, 3] instead of [3, 2]"
    )
    assert torch.equal(module.weight, before)
