"""`unitok demo`."""

import argparse
from pathlib import Path


def demo(arguments: argparse.Namespace) -> int:
    """Run the whole demo into `--out`."""
    from unitok.demo import run_demo

    run_demo(Path(arguments.out), arguments.seed, arguments.quick, arguments.recipe)
    return 0
