"""`unitok checkpoint`: conversions of training checkpoints."""

import argparse
from pathlib import Path


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `unitok checkpoint`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=type(parser))
    universal = kinds.add_parser(
        "universal",
        help="a copy of a checkpoint that any number of ranks resumes",
        description="All networks, their optimizers and averages. Resume with `unitok train ... resume=OUT`, on any "
        "number of ranks at the same engine.micro_batch_size x ranks; OUT may be moved, it holds all that is needed.",
    )
    universal.add_argument("checkpoint", metavar="CHECKPOINT", help="folder such as RUN/checkpoints/step_1000")
    universal.add_argument("out", metavar="OUT", help="new folder")
    universal.set_defaults(run=("checkpoint", "universal"))


def universal(arguments: argparse.Namespace) -> int:
    """Convert one checkpoint."""
    from unitok.core.universal import make_universal

    out = make_universal(Path(arguments.checkpoint), Path(arguments.out))
    print(f"{out}: resume with `unitok train STAGE --config FILE resume={out}`")
    return 0
