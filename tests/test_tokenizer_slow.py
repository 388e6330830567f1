"""Stage one at real sizes and with its options, through the real loop on one rank (slow)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from stages import EVERYTHING, run_stage, write_configs

from unitok.core.checkpoint import latest_complete
from unitok.core.config import load_config
from unitok.core.loop import train
from unitok.core.runlog import read_log
from unitok.tokenizer import UniTok
from unitok.tokenizer.task import TokenizerTask, TokenizerTrainConfig

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_configs(tmp_path_factory.mktemp("configs"))


def _train_file(name: str, options: list[str]) -> list[dict[str, Any]]:
    config = load_config(TokenizerTrainConfig, ROOT / "configs" / "tokenizer" / name, options)
    train(TokenizerTask(config), config)
    return read_log(Path(config.output_dir) / "log.jsonl")


def test_vitamin_b_steps_with_every_loss(tmp_path: Path) -> None:
    """The packaged configuration at 256 px, with random weights in the frozen networks, on a CPU."""
    options = [
        f"output_dir={tmp_path}",
        "steps=2",
        "log_every=1",
        "num_workers=0",
        "data.source=shapes:train?num=8&size=256",
        "engine={micro_batch_size: 2, accumulation_steps: 1, precision: fp32, zero_stage: 0}",
        "loss.lpips_weights=random",
        "loss.entropy=0.1",
        "discriminator.dino_weights=random",
        "discriminator.start_step=0",
        "optimizer.warmup_steps=0",
        "ema_decay=null",
    ]
    log = run_ranks(1, _train_file, "vitamin_b.yaml", options, timeout=900)[0]
    assert len(log) == 2
    expected = {"lpips", "adversarial", "discriminator", "consistency", "contrastive", "entropy", "vq", "usage_7"}
    assert expected <= log[-1].keys()
    assert log[-1]["grad_norm"] > 0 and log[-1]["grad_norm_discriminator"] > 0
    assert UniTok.from_pretrained(tmp_path / "export").config.width == 768


def read_extra(folder: Path) -> dict[str, Any]:
    """The task's own state in the newest checkpoint."""
    newest = latest_complete(folder / "checkpoints")
    assert newest is not None
    return next(
        content["extra_state"]
        for content in (json.loads(file.read_text()) for file in newest.glob("*.json"))
        if "extra_state" in content
    )


def _export(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 2)])
def test_decoder_only_fine_tuning_keeps_the_codes(
    files: dict[str, Path], tmp_path: Path, world: int, zero: int
) -> None:
    """Encoder, codebooks and their running usage's meaning stay to the bit; the decoder moves."""
    run_ranks(1, run_stage, "tokenizer", files["tokenizer"], tmp_path / "first", 1, ["steps=3", "ema_decay=null"])
    options = [
        "steps=4",
        "ema_decay=null",
        "trainable=decoder",
        f"init_from={tmp_path / 'first' / 'export'}",
        "loss.contrastive=0",
        "loss.entropy=0",
        "discriminator.start_step=1",
        f"engine.zero_stage={zero}",
    ]
    run_ranks(world, run_stage, "tokenizer", files["tokenizer"], tmp_path / "second", world, options)
    assert read_extra(tmp_path / "second") == {"preprocess": "plain", "mixture": None}
    report = json.loads((tmp_path / "second" / "initial_weights.json").read_text())
    assert "quantizer.codebooks" in report["loaded"] and not report["not_loaded"] and not report["unused"]
    before, after = _export(tmp_path / "first"), _export(tmp_path / "second")
    assert before.keys() == after.keys()
    for name in before:
        if not name.startswith("quantizer.usage"):
            assert torch.equal(before[name], after[name]) == (not name.startswith("decoder.")), name
    tokenizers = [UniTok.from_pretrained(tmp_path / name / "export").eval() for name in ("first", "second")]
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = [tokenizer.encode(pixels) for tokenizer in tokenizers]
    assert torch.equal(*codes) and not torch.equal(*(t.decode(codes[0]) for t in tokenizers))


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 3)])
def test_everything_resumes_to_the_bit(files: dict[str, Path], tmp_path: Path, world: int, zero: int) -> None:
    """Running usage, revived codes, stochastic depth and augmentations go on where they were."""
    options = [*EVERYTHING, "steps=12", "save_every=5", f"engine.zero_stage={zero}"]
    arguments = (world, run_stage, "tokenizer", files["tokenizer"])
    straight = run_ranks(*arguments, tmp_path / "straight", world, options, timeout=400)[0]
    run_ranks(*arguments, tmp_path / "killed", world, options, (8, 0), may_die=True, timeout=400)
    killed = run_ranks(*arguments, tmp_path / "killed", world, options, timeout=400)[0]
    assert killed == straight
    first, second = _export(tmp_path / "straight"), _export(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert int(first["quantizer.usage_updates"]) == 12 and float(first["quantizer.usage_average"].max()) > 0


def test_compiled_blocks_train_alike(files: dict[str, Path], tmp_path: Path) -> None:
    """torch.compile changes the order of sums only."""
    options = ["steps=3", "ema_decay=null", "loss.l1=0", "model.drop_path=0.3", "gradient_checkpointing=true"]
    logs = [
        run_ranks(1, run_stage, "tokenizer", files["tokenizer"], tmp_path / str(on), 1, [*options, f"compile={on}"],
                  timeout=600)[0]
        for on in ("false", "true")
    ]  # fmt: skip
    for plain, compiled in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "vq"):
            assert compiled[name] == pytest.approx(plain[name], rel=1e-4), (plain["step"], name)
