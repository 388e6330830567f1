"""Runs that start from a named checkpoint (`resume=CHECKPOINT`)."""

import shutil
from pathlib import Path

import pytest
import torch
from core_toys import ToyTask, run_toy

from unitok.core.errors import CheckpointError, ConfigError


def test_resume_from_a_named_checkpoint(tmp_path: Path) -> None:
    """In another folder it gives the straight run; in its own it would mix two runs where newer checkpoints lie."""
    straight = run_toy(ToyTask(), tmp_path / "straight", steps=6, save_every=2, keep_last=3)
    old = tmp_path / "straight" / "checkpoints" / "step_2"
    branch = run_toy(ToyTask(), tmp_path / "branch", steps=6, save_every=2, resume=str(old))
    assert branch == straight[2:]
    weights = [torch.load(tmp_path / name / "export" / "net.pt", weights_only=True) for name in ("straight", "branch")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(ConfigError, match=r"step_2 is of step 2, but .*step_6 is newer; take another output_dir"):
        run_toy(ToyTask(), tmp_path / "straight", steps=6, resume=str(old))
    assert old.is_dir() and (old.parent / "step_6").is_dir()


def test_a_run_from_a_named_checkpoint_survives_preemption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command goes on from what it has saved, also where its start has been deleted; no other command does."""
    straight = run_toy(ToyTask(), tmp_path / "straight", steps=8, save_every=2, keep_last=4)
    start, other = (tmp_path / "straight" / "checkpoints" / f"step_{step}" for step in (2, 4))
    out, settings = tmp_path / "branch", {"steps": 8, "save_every": 6, "resume": str(start)}
    for step in (4, 6):
        with pytest.raises(SystemExit) as stopped:
            run_toy(ToyTask(event=("term", step, 0)), out, **settings)
        assert stopped.value.code == 75 and f"stopped at step {step + 1}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"step_4 is of step 4, but .*step_7 is newer"):
        run_toy(ToyTask(), out, **settings | {"resume": str(other)})
    shutil.rmtree(start)
    assert run_toy(ToyTask(), out, **settings) == straight[2:]
    assert f"resuming toy from {out / 'checkpoints' / 'step_7'} (step 7)" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        run_toy(ToyTask(), tmp_path / "new", **settings)


def test_a_run_from_a_named_checkpoint_may_begin_there_again(tmp_path: Path) -> None:
    """Where all that it has saved is corrupt, and it may fall back; the start may lie elsewhere by then."""
    straight = run_toy(ToyTask(), tmp_path / "straight", steps=6, save_every=2, keep_last=3)
    start, moved = tmp_path / "straight" / "checkpoints" / "step_2", tmp_path / "moved"
    out, settings = tmp_path / "branch", {"steps": 6, "save_every": 2, "resume": str(moved)}
    run_toy(ToyTask(), out, **settings | {"resume": str(start)})
    shutil.copytree(start, moved)
    for folder in (out / "checkpoints").iterdir():
        (folder / "net.ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step_6 is corrupt: .*or set resume_fallback=true"):
        run_toy(ToyTask(), out, **settings)
    assert run_toy(ToyTask(), out, **settings, resume_fallback=True) == straight[2:]


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_run_from_a_named_checkpoint_falls_back_where_the_newest_state_is_damaged(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = run_toy(ToyTask(), tmp_path / "straight", steps=8, save_every=2, keep_last=4)
    start, out = tmp_path / "straight" / "checkpoints" / "step_2", tmp_path / "branch"
    settings = {"steps": 8, "save_every": 2, "keep_last": 4, "resume": str(start)}
    run_toy(ToyTask(), out, **settings)
    state = out / "checkpoints" / "step_8" / "state.json"
    if damage == "gone":
        state.unlink()
    else:
        state.write_text("[]" if damage == "other" else state.read_text()[:40])
    with pytest.raises(CheckpointError, match=r"step_8 is corrupt: .*or set resume_fallback=true"):
        run_toy(ToyTask(), out, **settings)
    capsys.readouterr()
    assert run_toy(ToyTask(), out, **settings, resume_fallback=True) == straight[2:]
    assert "step_6 (step 6)" in capsys.readouterr().out
