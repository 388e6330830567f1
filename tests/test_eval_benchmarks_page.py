"""docs/benchmarks.md: its paper column is that of eval/paper.py, and its commands are ours."""

import re
import shlex
from pathlib import Path

from unitok.cli import parse
from unitok.eval.benchmark_data import benchmark
from unitok.eval.paper import PAPER

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def rows():
    """(first cell, command, world, paper, needed) of the first table."""
    lines = PAGE.read_text(encoding="utf-8").split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert all(len(row) == 5 for row in cells)
    return cells


def commands(text):
    return [shlex.split(found) for found in re.findall(r"`(unitok [^`]+)`", text)]


def test_the_papers_column_is_the_papers():
    """UniTok's best row of each benchmark, in the form of `unitok report`; every figure of ours has its row."""
    seen = set()
    for name, _, _, shown, _ in rows():
        key, _, metric = name.replace("`", "").partition(": ")
        if not metric:
            assert shown == "-"
            continue
        printed = [
            row.metrics[metric] for row in PAPER.get(key, ()) if metric in row.metrics and "UniTok" in row.system
        ]
        best = (min if metric in ("rfid", "fid") else max)(printed, default=None)
        assert shown == ("-" if best is None else f"{best:g}"), (key, metric)
        seen.add(key)
    assert set(PAPER) <= seen


def test_every_command_is_one_that_the_command_line_takes():
    found = [argv for argv in commands(PAGE.read_text(encoding="utf-8")) if len(argv) > 3]
    assert len(found) > 20
    for argv in found:
        parse(argv[1:])
        tasks = argv[argv.index("--tasks") + 1].split(",") if "--tasks" in argv else []
        for task in tasks:
            if task.startswith("unitok_") and task != "unitok_shapes_text":
                benchmark(task.removeprefix("unitok_"))


def test_every_need_is_explained():
    page = PAGE.read_text(encoding="utf-8")
    named = {line.split("|")[1].strip() for line in page.split("## What is needed")[1].splitlines() if "|" in line}
    for *_, needed in rows():
        for one in needed.replace(";", ",").split(", "):
            word = one.split()[0]
            assert word in named or word in ("nothing", "a", "lm-eval"), one
