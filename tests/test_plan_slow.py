"""`unitok plan` held against what real DeepSpeed engines on two ranks hold in memory, for both stages and ZeRO 0 to 3.

Measured are bytes of tensor storages on rank 0. After a few whole steps: every tensor that Python can reach (weights,
masters, optimizer, average, partitions). During the next: what operations make and what is still there (`LiveBytes`),
at its peak. The allocator's rounding, the interpreter and the reduce bucket, whose pages a CPU never touches, are left
out on both sides.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from stages import make_task, write_configs

from unitok.plan import BUCKET, HARDWARE, Lengths, Plan, memory, plan_mllm, plan_tokenizer, stage_of

pytestmark = pytest.mark.slow
RANKS, MICRO_BATCH = 2, 4
# Larger than the other tests' networks: weights and activations both matter.
SIZES = {
    "tokenizer": [
        "model.width=96", "model.num_heads=4", "model.depth=3", "model.stage_widths=[16, 32]",
        "discriminator.start_step=0", "discriminator.channels=32",
    ],
    "mllm": [
        "backbone.config.hidden_size=128", "backbone.config.intermediate_size=256",
        "backbone.config.num_hidden_layers=4", "data.pack=true",
        "data.mixture={text_to_image: 1, caption: 0, chat: 0}", "data.unconditional=0",
    ],
}  # fmt: skip
WITHIN = 0.15
# The first step also tries whether packing works (`check_packing`): ZeRO 3, which fetches in the order of the step
# before, gathers one layer at a time until it has seen two equal steps; from then on it keeps what is used again.
WARM_UP = 4


def held() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if isinstance(value, torch.Tensor):
            for tensor in (value, value.grad if value.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def measure(stage: str, file: Path, out: Path, options: list[str]) -> tuple[int, int, float]:
    """On one rank: bytes after some steps, the most bytes made in the next one, mean ids of a sample of its batch."""
    from unitok.core.distributed import init_distributed, rank
    from unitok.core.run import set_up
    from unitok.eval.speed import training_step
    from unitok.eval.trace import LiveBytes

    task, config = make_task(stage, file, out, 1, options)
    device = init_distributed("cpu")
    before = held()
    run = set_up(task, config, config, device)
    batch: dict[str, Any] = task.load_batch(list(range(rank() * MICRO_BATCH, (rank() + 1) * MICRO_BATCH)), 0)
    for _ in range(WARM_UP):
        training_step(run, batch)
    standing = held() - before
    with LiveBytes() as live:
        training_step(run, batch)
    ids = float((batch["input_ids"] != task.pad_id).sum()) / MICRO_BATCH if stage == "mllm" else 0.0
    return standing, live.peak, ids


def planned(stage: str, file: Path, options: list[str], ids: float) -> Plan:
    config = stage_of(file, ["output_dir=unset", f"engine.micro_batch_size={MICRO_BATCH}", *options])
    if stage == "tokenizer":
        return plan_tokenizer(config, RANKS, HARDWARE["h100"])
    beside = round(ids) - 4  # an image has 4 positions
    return plan_mllm(config, file, RANKS, HARDWARE["h100"], lengths=Lengths(beside, beside))


CASES = [
    (stage, [f"engine.zero_stage={zero}", *more])
    for stage in SIZES
    for zero in range(4)
    for more in ([], ["engine.accumulation_steps=2"] if zero == 1 else [], ["gradient_checkpointing=true"])
    if more or zero != 1
] + [("mllm", [f"engine.zero_stage={zero}", "engine.precision=bf16"]) for zero in (1, 2, 3)]


def test_memory_is_what_two_ranks_hold(tmp_path: Path) -> None:
    """Totals within 15 %; what stands between two steps within 3 %."""
    files = write_configs(tmp_path)
    unique = list(dict.fromkeys((stage, tuple(options)) for stage, options in CASES))
    measured = {  # first of all: no rank may be forked from a process that has run a backward pass
        case: run_ranks(RANKS, measure, case[0], files[case[0]], tmp_path / "out", [*SIZES[case[0]], *case[1]])[0]
        for case in unique
    }
    wrong = []
    for (stage, options), (standing, peak, ids) in measured.items():
        plan = planned(stage, files[stage], [*SIZES[stage], *options], ids)
        zero, networks = plan.engine.zero_stage, len(plan.networks)
        parts = memory(
            plan.networks, plan.frozen_bytes + plan.contrastive_bytes, plan.engine, RANKS, zero,
            plan.traces[plan.checkpointing], bucket=0,
        )  # fmt: skip
        bucket = BUCKET * (2 if plan.engine.precision == "bf16" and zero == 2 else 4)
        if zero == 3:
            standing -= bucket * networks
        elif zero and not (zero == 1 and plan.engine.precision == "bf16"):
            peak -= bucket * (networks if zero == 1 and plan.engine.accumulation_steps > 1 else 1)
        kept = ["parameters", "master", "optimizer", "ema", "frozen"]
        stands = sum(parts[name] for name in kept) + (parts["gradients"] if zero == 3 else 0)
        if zero == 1 and plan.engine.precision == "bf16":
            stands += 4 * plan.networks["mllm"].trained  # where gradients are added up
        ratios = stands / standing, parts["total"] / (standing + peak)
        print(f"{stage} {' '.join(options)}: between steps {ratios[0]:.3f}, at the peak {ratios[1]:.3f} of measured")
        if abs(ratios[0] - 1) > 0.03 or abs(ratios[1] - 1) > WITHIN:
            wrong.append((stage, options, standing, peak, ratios, parts))
    assert not wrong, "\n".join(map(str, wrong))
