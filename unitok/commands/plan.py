"""`unitok plan`: what a run needs, before it is started."""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from unitok.core.errors import UserError

HARDWARE_NAMES = ("a100", "a100-40gb", "h100", "h100-pcie", "h200", "l40s", "rtx4090")  # those of unitok.plan.HARDWARE


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration of either stage")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs of the run, one rank each")
    parser.add_argument("--hardware", choices=HARDWARE_NAMES, default="h100", help="default: %(default)s")
    parser.add_argument("--mfu", type=float, metavar="M", help="share of the peak that the run reaches (0 to 1)")
    parser.add_argument("--price", type=float, metavar="P", help="dollars per GPU and hour (default: an assumption)")
    parser.add_argument("--caption-ids", type=int, metavar="N", help="stage two: ids beside an image with a caption")
    parser.add_argument("--chat-ids", type=int, metavar="N", help="stage two: ids beside an image with a conversation")
    parser.add_argument("--document-ids", type=int, metavar="N", help="stage two: ids of a document (max_length)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--explain", action="store_true", help="print the formulas too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.set_defaults(run=("plan", "plan"), positional="overrides")


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan of a configuration."""
    _check(arguments)
    from dataclasses import replace

    from unitok.mllm.settings import MllmTrainConfig
    from unitok.plan import FORMULAS, HARDWARE, Lengths, plan_mllm, plan_tokenizer, stage_of

    start = time.perf_counter()
    config = stage_of(arguments.config, arguments.overrides)
    hardware = HARDWARE[arguments.hardware]
    if arguments.price is not None:
        hardware = replace(hardware, price=arguments.price)
    if isinstance(config, MllmTrainConfig):
        given = {"caption": arguments.caption_ids, "chat": arguments.chat_ids, "document": arguments.document_ids}
        for name, ids in given.items():
            if ids is not None and ids > config.data.max_length:
                raise UserError(
                    f"--{name}-ids {ids}: training takes samples of at most data.max_length={config.data.max_length} "
                    "ids; give no more, or change it too"
                )
        lengths = replace(Lengths(), **{name: ids for name, ids in given.items() if ids is not None})
        found = plan_mllm(config, arguments.config, arguments.gpus, hardware, arguments.mfu, lengths)
    else:
        found = plan_tokenizer(config, arguments.gpus, hardware, arguments.mfu)
    figures = to_dict(found)
    print("\n".join(lines(found, figures)))
    if arguments.explain:
        print("\nformulas")
        print("\n".join(f"  {name:<15} {text}" for name, text in FORMULAS.items()))
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    print(f"planned in {time.perf_counter() - start:.1f} s, on shapes alone")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus}: expected at least 1")
    if arguments.mfu is not None and not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu {arguments.mfu}: expected a share of the peak, above 0 and at most 1")
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise UserError(f"--price {arguments.price}: expected dollars per GPU and hour, a finite number of at least 0")
    for name in ("caption_ids", "chat_ids", "document_ids"):
        value = getattr(arguments, name)
        if value is not None and value < 2:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 2")


def to_dict(plan: Any) -> dict[str, Any]:
    """All figures, in bytes, FLOPs, hours and dollars."""
    from unitok.plan import ZERO_STAGES

    settings = {f"zero{stage}": stage for stage in ZERO_STAGES}
    checkpointing = {"stored": False, "checkpointed": True}
    return {
        "stage": plan.stage,
        "gpus": plan.gpus,
        "gpu": plan.hardware.name,
        "gpu_memory_bytes": plan.hardware.memory,
        "peak_flops": plan.peak,
        "mfu": plan.mfu,
        "dollars_per_gpu_hour": plan.hardware.price,
        "engine": plan.engine.model_dump(),
        "gradient_checkpointing": plan.checkpointing,
        "parameters": plan.parts,
        "memory_bytes": {
            kept: {
                name: plan.memory(stage, flag) | {"fits": plan.fits(stage, flag)} for name, stage in settings.items()
            }
            for kept, flag in checkpointing.items()
        },
        "per_step": plan.per_step,
        "steps": plan.steps,
        "flops_per_step": plan.flops_per_step,
        "flops_of_run": plan.flops_of_run,
        "hours": plan.hours,
        "dollars": plan.cost,
        "notes": plan.notes,
    }


def lines(plan: Any, figures: dict[str, Any]) -> list[str]:
    """The printed form."""
    engine, gpu = plan.engine, plan.hardware
    found = [
        f"stage {plan.stage}: {plan.gpus} x {gpu.name}, engine.zero_stage={engine.zero_stage}, "
        f"precision={engine.precision}, micro-batch {engine.micro_batch_size} x accumulation "
        f"{engine.accumulation_steps}, gradient checkpointing {'on' if plan.checkpointing else 'off'}",
        "",
        f"{'parameters, millions':<26}{'trained':>12}{'frozen':>12}",
    ]
    found += [f"  {name:<24}{c['trained'] / 1e6:>12.3f}{c['frozen'] / 1e6:>12.3f}" for name, c in plan.parts.items()]
    for kept, stages in figures["memory_bytes"].items():
        names = [name for name in stages["zero0"] if name not in ("total", "fits")]
        found += ["", f"memory of one GPU, GB, activations {kept}" + "".join(f"{name:>9}" for name in stages)]
        found += [_memory_line(name, stages) for name in [*names, "total"] if any(s[name] for s in stages.values())]
        found.append(f"  {'fits into ' + format(gpu.memory / 1e9, '.0f') + ' GB less 2':<36}" + "".join(
            f"{'yes' if stage['fits'] else 'no':>9}" for stage in stages.values()
        ))  # fmt: skip
    held = ", ".join(f"{value:,.0f} {name}" for name, value in plan.per_step.items())
    found += [
        "",
        f"a step of all GPUs       {held}; {plan.flops_per_step:.4g} FLOPs",
        f"the run                  {plan.steps:,} steps, {plan.flops_of_run:.4g} FLOPs",
        f"hours                    {plan.hours:.3g} = {plan.flops_of_run:.4g} / ({plan.mfu:g} x {plan.peak:.4g} x "
        f"{plan.gpus} x 3600), the share {plan.mfu:g} of the peak being an assumption (--mfu)",
        f"cost                     {plan.cost:,.2f} dollars at {gpu.price:g} per GPU and hour, an assumption (--price)",
    ]
    return found + [f"note: {text}" for text in plan.notes]


def _memory_line(name: str, stages: dict[str, dict[str, float]]) -> str:
    return f"  {name:<36}" + "".join(f"{stage[name] / 1e9:>9.2f}" for stage in stages.values())
