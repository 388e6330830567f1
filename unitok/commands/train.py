"""`unitok train`: one stage, in this process or as one rank of several."""

import argparse

from unitok.core.config import load_config


def train(arguments: argparse.Namespace) -> int:
    """Train a stage from its configuration file and overrides."""
    config, task = build(arguments.stage, arguments.config, arguments.overrides)
    run(task, config)
    return 0


def build(stage: str, config_file: str, overrides: list[str]):
    """The checked configuration of a stage and its task."""
    if stage == "tokenizer":
        from unitok.tokenizer.task import TokenizerTask, TokenizerTrainConfig

        config = load_config(TokenizerTrainConfig, config_file, overrides)
        return config, TokenizerTask(config)
    from unitok.mllm.task import MllmTask, MllmTrainConfig

    config = load_config(MllmTrainConfig, config_file, overrides)
    return config, MllmTask(config)


def run(task, config) -> dict[str, float]:
    """Train `task` with the loop; returns the last metrics."""
    from unitok.core.loop import train as train_loop

    return train_loop(task, config, config)
