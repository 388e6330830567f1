"""Answer ids per second, one conversation at a time and in a batch, against transformers' `generate` and a plain loop.

    python scripts/benchmark_chat.py [--model DIR] [--batch 8] [--same-picture] [--repeats 5] [--threads 1] [--out FILE]

Without `--model` the model has random weights and the sizes on which the reference code's speed was recorded.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from unitok.core.pretrained import load_model_folder
from unitok.eval.results import print_table
from unitok.eval.speed_chat import ChatWork, answer_speed, recorded_model
from unitok.mllm import UniTokMLLM

HEADERS = ("way", "batch", "answer ids/s", "decode ids/s", "ratio", "same ids")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 where two ways gave different ids."""
    work = ChatWork()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="an export folder")
    parser.add_argument("--batch", type=int, default=work.batch)
    parser.add_argument("--new-tokens", type=int, default=work.new_tokens)
    parser.add_argument("--same-picture", action="store_true", help="all conversations are about one picture")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=work.seed)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = load_model_folder(UniTokMLLM, arguments.model) if arguments.model else recorded_model(arguments.seed)
    work = ChatWork(
        batch=arguments.batch,
        new_tokens=arguments.new_tokens,
        same_picture=arguments.same_picture,
        seed=arguments.seed,
    )
    rows = answer_speed(model.eval(), work, arguments.repeats)
    print_table(
        [
            (
                row["way"],
                str(row["batch"]),
                f"{row['answer_tokens_per_second']:.0f}",
                f"{row['decode_tokens_per_second']:.0f}",
                f"{row['ratio']:.2f}",
                "yes" if row["same_ids"] else "NO",
            )
            for row in rows
        ],
        HEADERS,
    )
    if arguments.out:
        arguments.out.write_text(json.dumps({"threads": arguments.threads, "rows": rows}, indent=2) + "\n")
    return 0 if all(row["same_ids"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
