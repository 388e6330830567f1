"""Staged launch of the mllm: `deepspeed scripts/train_mllm.py --config FILE [key=value ...]`, or torchrun."""

import sys

from unitok.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "mllm", *sys.argv[1:]]))
