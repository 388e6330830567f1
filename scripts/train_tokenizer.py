"""Staged launch of the tokenizer: `deepspeed scripts/train_tokenizer.py --config FILE [key=value ...]`, or torchrun."""

import sys

from unitok.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "tokenizer", *sys.argv[1:]]))
