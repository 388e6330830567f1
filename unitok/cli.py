"""The `unitok` command: its arguments, and what a user's mistake looks like (one line, exit code 2).

Commands live in `unitok.commands`; heavy libraries are imported only once a command runs.
"""

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from unitok import __version__
from unitok.commands.checkpoint import add_checkpoint_arguments
from unitok.core.errors import UserError
from unitok.core.quiet import quiet_libraries

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a write, which does not say to which file
DEFAULT_MODEL = "runs/demo/model"
DEFAULT_TOKENIZER = "runs/demo/model/visual_tokenizer"


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what the terminal cannot show
        arguments = parse(argv)
        quiet_libraries()
        module, function = arguments.run
        return getattr(importlib.import_module(f"unitok.commands.{module}"), function)(arguments) or 0
    except UserError as error:
        # In one piece: ranks share the terminal.
        sys.stderr.write(f"unitok: error: {' '.join(str(error).split())}\n")
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as with `unitok ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # an output that cannot be written, a disk that is full
        if error.filename is None and error.errno not in _FULL:
            raise
        what = "an output cannot be written" if error.filename is None else error.filename
        print(f"unitok: error: {what}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unitok: interrupted", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed arguments. Optional positional ones may also stand after options, which argparse alone does not manage."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["lm-eval"]:  # another program's command line
        from unitok.commands.lm_eval import lm_eval_namespace

        return lm_eval_namespace(argv[1:])
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    target = getattr(arguments, "positional", None)
    known = getattr(arguments, target) if target else None
    if rest and (target is None or rest[0].startswith("-") or isinstance(known, str)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(known, list):
        setattr(arguments, target, [*known, *rest])
    elif rest:
        setattr(arguments, target, rest[0])
        if len(rest) > 1:
            parser.error(f"unrecognized arguments: {' '.join(rest[1:])}")
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from unitok.commands.lm_eval import add_lm_eval_command

    parser = _Parser(
        prog="unitok",
        description="Train and use unified multimodal models on discrete visual tokens. Start with `unitok demo`.",
    )
    parser.add_argument("--version", action="version", version=f"unitok {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_demo(commands)
    _add_data(commands)
    add_checkpoint_arguments(commands.add_parser("checkpoint", help="convert checkpoints of training"))
    _add_train(commands)
    _add_use(commands)
    _add_serve(commands)
    _add_eval(commands)
    add_lm_eval_command(commands)
    _add_convert(commands)
    _add_plan(commands)
    report = commands.add_parser("report", help="the HTML report of a run folder, or results files side by side")
    report.add_argument("paths", nargs="+", metavar="DIR|FILE", help="folder of a demo run, or results.json files")
    report.add_argument("--html", metavar="OUT", help="results files: also write the tables as a page")
    report.add_argument(
        "--mixed-protocols",
        action="store_true",
        help="allow a column of several protocols, and print how they differ",
    )
    report.set_defaults(run=("evaluate", "report"), positional="paths")
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser("demo", help="train both stages on the shapes world, evaluate, write a report")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="run folder (default: %(default)s)")
    demo.add_argument(
        "--seed", type=int, default=0, help="seed of weights, order, held-out data and sampling (default: %(default)s)"
    )
    demo.add_argument(
        "--quick", action="store_true", help="a few steps only: shows that everything runs, learns nothing"
    )
    demo.add_argument("--recipe", default="shapes", metavar="NAME", help="configurations (default: %(default)s)")
    demo.set_defaults(run=("demo", "demo"))


def _add_data(commands: argparse._SubParsersAction) -> None:
    from unitok.commands.data import add_check_arguments, add_codes_arguments, add_index_arguments

    data = commands.add_parser("data", help="make, encode, check and import data")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_Parser)
    shapes = kinds.add_parser("shapes", help="write the shapes world as webdataset shards (png, txt, json)")
    shapes.add_argument("--out", required=True, metavar="DIR")
    shapes.add_argument("--num", type=positive_int, default=1000, help="number of images (default: %(default)s)")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--split", choices=("train", "val"), default="train", help="splits never share an image")
    shapes.add_argument("--size", type=int, default=64, help="pixels per side (default: %(default)s)")
    shapes.set_defaults(run=("data", "shapes"))
    add_codes_arguments(kinds.add_parser("codes", help="encode the images of a source to code shards, for stage two"))
    add_index_arguments(kinds.add_parser("index", help="read the headers of shards ahead: runs then open at once"))
    check = kinds.add_parser("check", help="read a whole source and say what is in it and what is wrong")
    add_check_arguments(check)
    llava = kinds.add_parser("import-llava", help="turn a LLaVA instruction file into a JSONL source")
    llava.add_argument("json", metavar="JSON")
    llava.add_argument("--images", required=True, metavar="DIR", help="folder that the file's image names refer to")
    llava.add_argument("--out", required=True, metavar="DIR")
    llava.set_defaults(run=("data", "import_llava"))


def _add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="train stage one (tokenizer) or stage two (mllm)",
        description="Train in this process. On several: `deepspeed scripts/train_tokenizer.py --config FILE` or "
        "`torchrun --nproc_per_node N scripts/train_mllm.py --config FILE`, with the same options. Exit codes: 0 done; "
        "75 stopped by SIGTERM or Ctrl-C after saving, or another rank was lost: the same command goes on; 2 something "
        "must be put right first (docs/faults.md).",
    )
    train.add_argument("stage", choices=("tokenizer", "mllm"))
    train.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file, such as configs/tokenizer/shapes.yaml"
    )
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    train.set_defaults(run=("train", "train"), positional="overrides")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    from unitok.commands.plan import add_plan_arguments

    add_plan_arguments(commands.add_parser("plan", help="memory, hours and cost of a run before it is started"))


def _add_use(commands: argparse._SubParsersAction) -> None:
    from unitok.commands.chat import add_chat_arguments
    from unitok.commands.generate import add_generate_arguments
    from unitok.commands.reconstruct import add_reconstruct_arguments

    add_reconstruct_arguments(commands.add_parser("reconstruct", help="images beside their reconstructions, and PSNR"))
    generate = commands.add_parser("generate", help="draw images from text")
    add_generate_arguments(generate)
    _add_precision(generate)
    chat = commands.add_parser("chat", help="ask about images; without a question: a conversation")
    add_chat_arguments(chat)
    _add_precision(chat)


def _add_serve(commands: argparse._SubParsersAction) -> None:
    from unitok.commands.serve import add_serve_arguments
    from unitok.commands.use import small_model

    serve = commands.add_parser("serve", help="chat and pictures over HTTP, in OpenAI's form, and a web page")
    serve.add_argument("--model", default=small_model(), metavar="DIR", help="default: %(default)s")
    add_serve_arguments(serve)
    _add_precision(serve)


def _add_precision(command: argparse.ArgumentParser) -> None:
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    command.add_argument("--weights", choices=("int8", "int4"), help="smaller weights, by torchao (unitok[quantized])")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser("convert", help="between our folders and the released checkpoint layouts")
    kinds = convert.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_Parser)
    tokenizer = kinds.add_parser(
        "tokenizer",
        help="unitok_tokenizer.pth <-> UniTok folder",
        description="A released .pth becomes a UniTok folder, a UniTok folder becomes a .pth in the released layout. "
        "Every key must be accounted for; nothing in a file is executed.",
    )
    tokenizer.add_argument("source", metavar="SOURCE", help="released file (.pth), or UniTok folder")
    tokenizer.add_argument("dest", metavar="DEST", help="folder for a file, file (.pth) for a folder")
    tokenizer.set_defaults(run=("convert", "convert_tokenizer"))
    mllm = kinds.add_parser(
        "mllm",
        help="released folder of the unified model <-> export folder",
        description="A released folder (config.json, weights in one file or in shards, tokenizer.model) becomes an "
        "export folder, an export folder one in the released layout. Without --tokenizer the export of a release takes "
        "and gives codes only. Every key must be accounted for; nothing in a file is executed.",
    )
    mllm.add_argument("source", metavar="SOURCE", help="released folder, or export folder")
    mllm.add_argument("dest", metavar="DEST", help="new folder")
    mllm.add_argument("--tokenizer", metavar="FILE|DIR", help="the visual tokenizer: released .pth or UniTok folder")
    mllm.set_defaults(run=("convert", "convert_mllm"))


def _add_eval(commands: argparse._SubParsersAction) -> None:
    from unitok.commands.lm_eval import add_rescore_arguments
    from unitok.commands.reconstruction import add_reconstruction_arguments
    from unitok.commands.zeroshot import add_zeroshot_arguments

    evaluate = commands.add_parser("eval", help="measure a tokenizer or a model")
    kinds = evaluate.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_Parser)
    for kind, text in (
        ("reconstruction", "PSNR, SSIM, LPIPS, rFID, code usage; several autoencoders side by side"),
        ("retrieval", "which caption belongs to the image?"),
    ):
        one = kinds.add_parser(kind, help=text)
        if kind == "reconstruction":
            add_reconstruction_arguments(one, DEFAULT_TOKENIZER)
        else:
            one.add_argument("--tokenizer", default=DEFAULT_TOKENIZER, metavar="DIR", help="default: %(default)s")
        _add_eval_options(one, kind, "images")
    for kind, text in (("vqa", "accuracy by type of question"), ("geneval", "does the image show what was asked for?")):
        one = kinds.add_parser(kind, help=text)
        one.add_argument("--model", default=DEFAULT_MODEL, metavar="DIR", help="default: %(default)s")
        _add_eval_options(one, kind, "questions" if kind == "vqa" else "prompts")
        if kind == "vqa":
            one.add_argument("--paraphrase", action="store_true", help="ask in other words, as the demo does")
        if kind == "geneval":
            one.add_argument("--prompts", metavar="FILE", help="GenEval metadata (JSONL); default: shapes prompts")
            one.add_argument("--samples", type=positive_int, default=4, help="images per prompt (default: %(default)s)")
            one.add_argument("--images", metavar="DIR", help="keep the images here, in GenEval's folder format")
            one.add_argument("--guidance", type=float, metavar="G")
    zeroshot = kinds.add_parser("zeroshot", help="classification by class names, linear probe; models side by side")
    add_zeroshot_arguments(zeroshot, DEFAULT_TOKENIZER)
    _add_generation_benchmarks(kinds)
    _add_speed(kinds)
    rescore = kinds.add_parser("rescore", help="score the stored answers of a VQA run of lm-eval again")
    add_rescore_arguments(rescore)


def _add_generation_benchmarks(kinds: argparse._SubParsersAction) -> None:
    from unitok.commands.geneval import add_generate_arguments, add_score_arguments
    from unitok.commands.gfid import add_gfid_arguments
    from unitok.commands.t2i import add_t2i_arguments

    add_generate_arguments(kinds.add_parser("geneval-generate", help="GenEval's images"), DEFAULT_MODEL)
    add_score_arguments(kinds.add_parser("geneval-score", help="score a folder in GenEval's layout"))
    add_gfid_arguments(kinds.add_parser("gfid", help="class-conditional images and their FID"), DEFAULT_MODEL)
    add_t2i_arguments(kinds.add_parser("t2i", help="images for DPG-Bench, GenAI-Bench, MJHQ-30K"), DEFAULT_MODEL)


def _add_speed(kinds: argparse._SubParsersAction) -> None:
    from unitok.commands.speed import add_speed_arguments
    from unitok.commands.speed_mllm import add_mllm_arguments

    speed = kinds.add_parser("speed", help="images per second, memory, share of the hardware's peak")
    parts = speed.add_subparsers(dest="part", required=True, metavar="PART", parser_class=_Parser)
    add_speed_arguments(parts.add_parser("tokenizer", help="encode, decode, code search and the training step"))
    add_mllm_arguments(parts.add_parser("mllm", help="sampling beside a plain loop, answers, the training step"))


def _add_eval_options(parser: argparse.ArgumentParser, kind: str, items: str) -> None:
    if kind != "geneval":
        parser.add_argument("--source", default="shapes:val?num=500", help="data to measure on (default: %(default)s)")
    parser.add_argument("--limit", type=positive_int, metavar="N", help=f"use only the first N {items}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive_int, default=32)
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
    parser.set_defaults(run=("evaluate", kind))
