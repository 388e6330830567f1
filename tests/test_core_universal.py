"""Universal checkpoints and the copies that another number of ranks reads."""

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_toys import ToyTask, run_toy, spoil

from unitok import cli
from unitok.core import reshard


def test_universal_needs_a_whole_checkpoint_and_a_new_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ZeRO: a plain copy, which resumes as the checkpoint itself."""
    straight = run_toy(ToyTask(), tmp_path / "run", steps=6, save_every=2, keep_last=3)
    source, out = tmp_path / "run" / "checkpoints" / "step_4", tmp_path / "universal"
    assert cli.main(["checkpoint", "universal", str(source), str(out)]) == 0
    assert run_toy(ToyTask(), tmp_path / "branch", steps=6, save_every=2, resume=str(out)) == straight[4:]
    assert cli.main(["checkpoint", "universal", str(source), str(out)]) == 2
    assert "exists already; give a new folder" in capsys.readouterr().err
    spoil(source)
    assert cli.main(["checkpoint", "universal", str(source), str(tmp_path / "another")]) == 2
    assert "step_4 is corrupt" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "universal", "branch"}


def test_a_universal_checkpoint_holds_nothing_that_happens_to_lie_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Copies that a killed process left in the checkpoint are no networks; of folders above only a run's is taken."""
    run_toy(ToyTask(), tmp_path / "run", steps=2)
    source = tmp_path / "run" / "checkpoints" / "step_2"
    (source / ".universal_x" / "state").mkdir(parents=True)
    (tmp_path / "run" / "toy.model").write_text("of the run")
    assert cli.main(["checkpoint", "universal", str(source), str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "net", "net.ema.safetensors", "state.json", "COMPLETE.json", "run"
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "out" / "run").iterdir()} == {"toy.model", "config.yaml"}
    for place in ("moved/ck", "moved/checkpoints"):  # a folder of a run has its config.yaml
        moved = tmp_path / place / "step_2"
        shutil.copytree(source, moved)
        (tmp_path / "moved" / "other.bin").write_bytes(b"x")
        assert cli.main(["checkpoint", "universal", str(moved), str(tmp_path / place / "out")]) == 0
        assert not list((tmp_path / place / "out" / "run").iterdir())
        assert f"{moved} is not in RUN/checkpoints: a text model that its run made is not copied" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: [enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598",
        "OSError: [Errno 28] No space left on device",
    ],
)
def test_a_full_disk_while_converting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    def converter(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", f"Traceback\n  more\n{line}\n")

    monkeypatch.setattr(reshard.subprocess, "run", converter)
    said = reshard.convert(tmp_path, tmp_path / "copy", lambda *_: None)
    assert re.fullmatch(rf"writing .*copy failed, \d+ MiB are free there \(.*full\?\): {re.escape(line)}", said)
    line = "KeyError: 'x'"
    assert reshard.convert(tmp_path, tmp_path / "copy", lambda *_: None) == line


def test_copies_of_killed_processes_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next process that converts the checkpoint; one that another process reads at the moment stays."""
    monkeypatch.setattr(reshard, "convert", lambda *_: "")
    for name in (".universal_left", ".universal_right"):
        (tmp_path / name / "state").mkdir(parents=True)
    with reshard.universal_copy(tmp_path / "net" / "state", lambda *_: None) as copy:
        assert [path.name for path in tmp_path.iterdir()] == [copy.name]
        with reshard.universal_copy(tmp_path / "net" / "state", lambda *_: None) as other:
            assert {path.name for path in tmp_path.iterdir()} == {copy.name, other.name}
    assert not list(tmp_path.iterdir())


def test_counters_of_steps_are_where_their_parameters_are() -> None:
    """DeepSpeed reads them to the CPU, one for all parameters under ZeRO 3; a fused optimizer on a GPU takes them only
    there, and each advances its own. "meta" stands for the GPU."""
    parameters, step = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)], torch.tensor(7.0)
    optimizer = SimpleNamespace(
        param_groups=[{"params": parameters, "lr": 0.5}], state={parameter: {"step": step} for parameter in parameters}
    )
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(optimizer=optimizer),
        module=torch.nn.Identity(),
        _config=SimpleNamespace(),
        load_checkpoint=lambda folder, tag: (folder, tag),
        checkpoint_engine=SimpleNamespace(load=lambda *_: {}),
    )
    assert reshard.load_universal(engine, Path("folder"), "tag") == ("folder", "tag")
    steps = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert [one.device.type for one in steps] == ["meta"] * 2 and steps[0] is not steps[1]
