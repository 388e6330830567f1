"""`unitok train`: one stage, in this process or as one rank of several."""

import argparse
from collections.abc import Sequence

from unitok.core.config import load_config
from unitok.core.run import TrainConfig


def train(arguments: argparse.Namespace) -> int:
    """Train a stage from its configuration file and overrides."""
    from unitok.core.launch import follow_parent
    from unitok.core.loop import train as run

    follow_parent()

    config = stage_config(arguments.stage, arguments.config, arguments.overrides)
    if arguments.stage == "tokenizer":
        from unitok.tokenizer.task import TokenizerTask as StageTask
    else:
        from unitok.mllm.task import MllmTask as StageTask
    run(StageTask(config), config)
    return 0


def stage_config(stage: str, file: str, overrides: Sequence[str]) -> TrainConfig:
    """The checked configuration of a stage."""
    if stage == "tokenizer":
        from unitok.tokenizer.task import TokenizerTrainConfig as StageConfig
    else:
        from unitok.mllm.task import MllmTrainConfig as StageConfig
    return load_config(StageConfig, file, overrides)
