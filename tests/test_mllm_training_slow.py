"""Stage two by its recipes on two ranks that are out of phase, and resumed: one process is equaled, no rank waits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from equal_runs import check_equal, check_weights, run_with_weights
from ranks import run_ranks
from safetensors.torch import load_file
from stages import out_of_phase, run_stage, write_configs

from unitok.mllm import cross_entropy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The configuration file of each stage."""
    return write_configs(tmp_path_factory.mktemp("stages"))


# Ranks that each see one kind alone, documents and pictures at the same time; nobody sees an image in the fourth.
PHASES = [("text", "text_to_image"), ("text_to_image", "chat"), ("chat", "text"), ("text", "text"),
          ("plain", "text_to_image")]  # fmt: skip
WARMUP_PHASES = [("text", "caption"), ("caption", "chat"), ("chat", "text"), ("text", "text"), ("plain", "caption")]
RECIPES = {
    "sft": ["recipe=sft"],
    "sft packed": ["recipe=sft", "data.pack=true", "engine.accumulation_steps=2"],
    "adapters packed": ["recipe=sft", "lora={rank: 4, alpha: 8}", "data.pack=true"],
    "adapters": ["recipe=sft", "lora={rank: 4, alpha: 8}", "engine.accumulation_steps=2"],
    "warmup": ["recipe=warmup", "engine.accumulation_steps=2"],
    "warmup packed": ["recipe=warmup", "data.pack=true"],
}


def _recipe_options(recipe: str, folder: Path) -> tuple[list[str], Any]:
    """Options of a run over every kind, documents among them, and what brings its ranks out of phase."""
    texts = folder / "texts.txt"
    texts.write_text("\n".join(f"a photo of a red circle left of square number {n}, or not" for n in range(9)))
    learns_images = not recipe.startswith("warmup")
    mixture = f"{{text_to_image: {int(learns_images)}, caption: 1, plain: 1, chat: 1, text: 1}}"
    shared = [f"data.mixture={mixture}", f"data.texts=[{texts}]", "data.max_length=160", "ema_decay=null"]
    return [*shared, *RECIPES[recipe]], out_of_phase(PHASES if learns_images else WARMUP_PHASES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_out_of_phase_equal_one_process(
    files: dict[str, Path], tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank waits for another, and losses, gradient norms and weights are those of one process without ZeRO.

    Logits are computed in chunks, whose number differs between the ranks, and layers again in the backward pass.
    """
    options, prepare = _recipe_options(recipe, tmp_path)
    options.append("steps=10")
    arguments = ("mllm", files["mllm"])
    expected, expected_weights = run_ranks(1, run_with_weights, *arguments, tmp_path / "1", 1, options, prepare)[0]
    assert any("image" not in record for record in expected)  # at such a step no rank has a code to learn
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1000)
    for zero in (2, 3):
        more = [*options, f"engine.zero_stage={zero}", "gradient_checkpointing=true"]
        log, weights = run_ranks(2, run_with_weights, *arguments, tmp_path / str(zero), 2, more, prepare)[0]
        assert len(log) == 10
        check_equal(log, expected)
        check_weights(weights, expected_weights)


@pytest.mark.parametrize("recipe", ["adapters", "warmup packed"])
@pytest.mark.parametrize("zero", [2, 3])
def test_frozen_weights_and_adapters_are_resumed(
    files: dict[str, Path], tmp_path: Path, recipe: str, zero: int
) -> None:
    """Killed and resumed equals straight, bit by bit, with the averages and what is not trained."""
    options, _ = _recipe_options(recipe, tmp_path)
    options += ["steps=6", "save_every=2", "ema_decay=0.9", f"engine.zero_stage={zero}"]
    arguments = (2, run_stage, "mllm", files["mllm"])
    straight = run_ranks(*arguments, tmp_path / "straight", 2, options)[0]
    run_ranks(*arguments, tmp_path / "killed", 2, options, (3, 1), may_die=True)
    killed = run_ranks(*arguments, tmp_path / "killed", 2, options)[0]
    assert killed == straight and len(straight) == 6
    weights = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("straight", "killed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
