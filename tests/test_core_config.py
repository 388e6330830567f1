"""Configuration, schedules, parameter groups: what a user can get wrong is named in one line."""

from pathlib import Path

import pytest
import torch
from torch import nn

from unitok.core.config import Config, config_path, load_config, parse_value, save_config
from unitok.core.engine import EngineConfig, deepspeed_config
from unitok.core.errors import ConfigError
from unitok.core.optim import OptimizerConfig, lr_at, parameter_groups
from unitok.core.run import TrainConfig


class Part(Config):
    width: int = 4
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.9))


class Whole(Config):
    name: str
    part: Part = Part(width=8)
    maybe: Part | None = None
    free: dict[str, object] | None = None


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    """A file that names one field of a part keeps the defaults of the others, those of the enclosing class too."""
    file = tmp_path / "a.yaml"
    file.write_text("name: x\npart: {optimizer: {lr: 1e-3}}\n")
    config = load_config(Whole, file, ["part.optimizer.eps=1e-6", "maybe.width=3", "free.a.b=2"])
    assert config.part.width == 8 and config.part.optimizer.lr == 1e-3
    assert config.part.optimizer.betas == (0.5, 0.9) and config.part.optimizer.eps == 1e-6
    assert config.maybe is not None and config.maybe.width == 3
    assert config.free == {"a": {"b": 2}}
    save_config(config, tmp_path / "b.yaml")
    assert load_config(Whole, tmp_path / "b.yaml") == config
    assert Whole(name="y").part == Part(width=8)  # no default was changed in place


@pytest.mark.parametrize(
    "override,words",
    [
        ("part.widht=3", ["'part.widht'", "'part.width'"]),
        ("part.optimizer.lrr=3", ["'part.optimizer.lrr'", "'part.optimizer.lr'"]),
        ("part={optimizer: {betsa: 1}}", ["'part.optimizer.betsa'", "'part.optimizer.betas'"]),
        ("part.width=wide", ["part.width", "'wide'", "integer"]),
        ("part.optimizer.schedule=steps", ["part.optimizer.schedule", "'steps'", "'cosine'"]),
        ("part.optimizer.lr=-1", ["part.optimizer.lr", "-1", "greater than or equal to 0"]),
        ("part.width.x=1", ["part.width.x", "no keys below"]),
        ("part.width", ["key=value"]),
        ("part.width=[", ["not valid YAML"]),
    ],
)
def test_mistakes_are_named_in_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Whole, None, ["name=x", override])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_missing_key_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name is not set"):
        load_config(Whole)
    with pytest.raises(ConfigError, match="neither a file nor a packaged one"):
        config_path("tokenizer/none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected keys and values"):
        load_config(Whole, tmp_path / "list.yaml")


def test_learning_rate_is_a_function_of_the_step() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, start_step=10, final_lr_ratio=0.1)
    rates = [lr_at(config, step, 34) for step in range(40)]
    assert rates[:10] == [0.0] * 10
    assert rates[10:14] == [0.25, 0.5, 0.75, 1.0]
    assert rates[24] == pytest.approx(0.55) and rates[34] == rates[39] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[13:], rates[14:], strict=False))
    linear = OptimizerConfig(lr=1.0, schedule="linear")
    assert lr_at(linear, 5, 10) == pytest.approx(0.5)
    assert lr_at(OptimizerConfig(lr=1.0, schedule="constant"), 9, 10) == 1.0


def test_parameter_groups_hold_every_parameter_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.embed = nn.Linear(3, 3), nn.LayerNorm(3), nn.Embedding(5, 3)
            self.tied = nn.Linear(3, 5, bias=False)
            self.tied.weight = self.embed.weight
            self.codebooks = nn.Parameter(torch.zeros(2, 3, 4))
            self.logit_scale = nn.Parameter(torch.zeros(1))
            self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)

        def no_weight_decay(self) -> set[str]:
            return {"embed.weight"}

    net = Net()
    decayed, kept = parameter_groups(net, OptimizerConfig(weight_decay=0.1))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(net.codebooks), id(net.linear.weight)]
    together = [id(p) for group in (decayed, kept) for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_clipping_and_communication_are_always_explicit() -> None:
    """DeepSpeed clips at 1.0 when the key is missing, and sends linear layers' gradients in bf16 under autocast."""
    for stage in (0, 1, 2, 3):
        for precision in ("fp32", "autocast", "bf16"):
            if precision == "bf16" and stage == 0:
                with pytest.raises(ConfigError, match="zero_stage"):
                    deepspeed_config(EngineConfig(zero_stage=stage, precision=precision))
                continue
            settings = deepspeed_config(EngineConfig(zero_stage=stage, precision=precision, gradient_clipping=0.0))
            assert settings["gradient_clipping"] == 0.0
            assert settings["communication_data_type"] == "fp32"
            if precision == "autocast":
                assert settings["torch_autocast"]["lower_precision_safe_modules"] == []
                assert "bf16" not in settings


def test_train_config_refuses_bad_values() -> None:
    with pytest.raises(ConfigError, match="engine.zero_stage = 4"):
        load_config(TrainConfig, None, ["output_dir=x", "engine.zero_stage=4"])
    with pytest.raises(ConfigError, match="'steps'"):
        load_config(TrainConfig, None, ["output_dir=x", "setps=3"])


def test_yaml_without_surprises():
    """YAML 1.1 makes a date of 2026-01-31, 64 of 0100 and 3723 of 1:2:3."""
    for text, value in (("2026-01-31", "2026-01-31"), ("2026-13-45", "2026-13-45"), ("0100", 100), ("1:2:3", "1:2:3")):
        assert parse_value(text) == value
    assert [parse_value(text) for text in ("-7", "1_000", "1e-3", "0.5", "true", "null")] == [
        -7,
        1000,
        1e-3,
        0.5,
        True,
        None,
    ]
