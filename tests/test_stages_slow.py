"""Both training stages over ranks, ZeRO stages, precisions, kills and launchers. The tasks are the real ones."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from equal_runs import check_equal, check_weights, differences, run_with_weights
from ranks import run_ranks
from safetensors.torch import load_file
from stages import (
    EVERYTHING,
    GLOBAL_BATCH,
    STAGES,
    START,
    STEPS,
    make_task,
    mix_by_rank,
    run_stage,
    write_configs,
)
from torch import Tensor, nn

from unitok.core.checkpoint import latest_complete
from unitok.core.engine import whole_parameters
from unitok.core.loop import train
from unitok.core.runlog import read_log
from unitok.core.sampling import SampleOrder
from unitok.data.conversations import IMAGE_MARK, Turn
from unitok.mllm import UniTokMLLM
from unitok.mllm.task import MllmTask
from unitok.tokenizer import UniTok

# Held to 5e-3, for rounding is amplified on the way: the consistency is a small difference of logits and their mean
# nearly cancels (measured up to 5e-4), a random VGG is a rough function (LPIPS: 1.8e-4), and revived entries lie on the
# very vectors that they code (vq: 3.4e-4 of 0.003). The adversarial weight, a ratio with the norm of a gradient that
# nearly cancels, is held to 5e-2 (1.2e-2). The other losses, and the weights after the last step, are held to 1e-4.
EVERYTHING_LOOSE = ("adversarial", "consistency", "lpips", "vq")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The configuration file of each stage."""
    return write_configs(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def references(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple]:
    """Log and weights of one process without ZeRO for each stage and accumulation."""
    out = tmp_path_factory.mktemp("one")
    logs = {}
    for stage in STAGES:
        for accumulation in (1, 2):
            options = ["ema_decay=null", f"engine.accumulation_steps={accumulation}"]
            arguments = (stage, files[stage], out / f"{stage}{accumulation}", 1, options, mix_by_rank)
            logs[stage, accumulation] = run_ranks(1, run_with_weights, *arguments)[0]
    return logs


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_log_what_one_process_logs(
    files: dict[str, Path], references: dict, tmp_path: Path, stage: str, zero: int, accumulation: int
) -> None:
    """Equal samples in equal order, so every metric of both networks is equal at every step, and their weights."""
    expected, expected_weights = references[stage, accumulation]
    options = ["ema_decay=null", f"engine.accumulation_steps={accumulation}"]
    options.append(f"engine.zero_stage={zero}")
    arguments = (stage, files[stage], tmp_path, 2, options, mix_by_rank)
    log, weights = run_ranks(2, run_with_weights, *arguments, timeout=300)[0]
    assert len(log) == STEPS
    check_equal(log, expected)
    check_weights(weights, expected_weights)
    if stage == "tokenizer":
        present = [{"adversarial", "adversarial_weight", "discriminator"} <= record.keys() for record in log]
        assert present == [False] * START + [True] * (STEPS - START)
        assert {"contrastive", "entropy", "vq", "reconstruction", "grad_norm_discriminator"} <= log[-1].keys()


@pytest.fixture(scope="module")
def everything(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list]:
    """The log of one process with every loss of stage one, by accumulation."""
    out, found = tmp_path_factory.mktemp("everything"), {}
    for accumulation in (1, 2):
        options = [*EVERYTHING, f"engine.accumulation_steps={accumulation}"]
        found[accumulation] = run_ranks(
            1, run_with_weights, "tokenizer", files["tokenizer"], out / str(accumulation), 1, options
        )[0]
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_ranks_equal_one_process_with_every_loss(
    files: dict[str, Path], everything: dict, tmp_path: Path, zero: int, accumulation: int
) -> None:
    """Released discriminator, perceptual and distillation loss, augmentations, stochastic depth, revived codes."""
    options = [*EVERYTHING, f"engine.accumulation_steps={accumulation}", f"engine.zero_stage={zero}"]
    log, weights = run_ranks(2, run_with_weights, "tokenizer", files["tokenizer"], tmp_path, 2, options, timeout=500)[0]
    expected_log, expected = everything[accumulation]
    assert len(log) == STEPS
    assert {"lpips", "distill", "consistency", "accuracy_fake", "adversarial_weight"} <= log[-1].keys()
    found = differences(log, expected_log)
    print(found)
    for name in ("accuracy_real", "accuracy_fake"):  # shares of logits by their sign, which may be rounding
        del found[name]
    assert found.pop("adversarial_weight") < 5e-2
    loose = {name: found.pop(name) for name in list(found) if name.startswith("grad_norm") or name in EVERYTHING_LOOSE}
    assert max(found.values()) < 1e-4, found
    assert max(loose.values()) < 5e-3, loose
    check_weights(weights, expected, of_the_way=5e-2)  # the discriminator hardly moves at its low rate


@pytest.mark.parametrize("zero", [2, 3])
def test_ranks_with_missing_captions(files: dict[str, Path], tmp_path: Path, zero: int) -> None:
    """Pairs without a caption are left out over all ranks; at some steps one rank has no caption at all."""
    options = ["steps=6", "loss.contrastive=1.0"]
    one = run_ranks(1, run_stage, "tokenizer", files["tokenizer"], tmp_path / "one", 1, options, None, _drop_captions)
    options.append(f"engine.zero_stage={zero}")
    two = run_ranks(2, run_stage, "tokenizer", files["tokenizer"], tmp_path / "two", 2, options, None, _drop_captions)
    check_equal(two[0], one[0])
    assert len({record["contrastive"] for record in one[0]}) == 6 and min(r["contrastive"] for r in one[0]) > 0


def _drop_captions(task: Any) -> None:
    """Of each micro-batch of four: the first two, or the first and the last, in turn."""
    load, order = task.load_batch, SampleOrder(task.num_samples, task.config.seed)
    position = {order.index(p): p for p in range(task.num_samples)}

    def load_batch(indices: list[int], epoch: int) -> dict[str, Any]:
        batch = load(indices, epoch)
        for row, index in enumerate(indices):
            turn, place = divmod(position[index], GLOBAL_BATCH)
            if place in ((0, 1), (0, 3))[turn % 2]:
                batch["captions"][row] = ""
        return batch

    task.load_batch = load_batch


def test_the_compared_batches_are_mixed(files: dict[str, Path], tmp_path: Path) -> None:
    """Guards the comparison above: ranks with chat alone meet ranks with text to image alone, both ways round."""
    task, config = make_task("mllm", files["mllm"], tmp_path, 2)
    task.build()
    mix_by_rank(task)
    kinds = _record_kinds(task)
    order, seen = SampleOrder(task.num_samples, config.seed), []
    for start in range(0, STEPS * GLOBAL_BATCH, GLOBAL_BATCH):
        both = []
        for rank in range(2):
            kinds.clear()
            task.load_batch(*order.micro_batch(start, GLOBAL_BATCH // 2, rank))
            both.append(frozenset(kinds))
        seen.append(tuple(both))
    images = {"text_to_image", "unconditional"}
    for turn, (first, second) in enumerate(seen):
        if turn % 3 < 2:
            chat, image = (first, second)[:: 1 - 2 * (turn % 3)]
            assert chat == {"chat"} and image <= images
    assert set().union(*(both[0] | both[1] for both in seen)) == images | {"chat", "caption"}


def _record_kinds(task: MllmTask) -> list[str]:
    """What the task's sequences are made for, from now on."""
    kinds: list[str] = []
    for name in ("chat", "caption", "text_to_image"):
        original = getattr(task.builder, name)

        def build(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            kinds.append("unconditional" if options.get("unconditional") else name)
            return original(*args, **options)

        setattr(task.builder, name, build)
    return kinds


@pytest.mark.parametrize("zero", [2, 3])
def test_a_rank_without_images(files: dict[str, Path], tmp_path: Path, zero: int) -> None:
    """Conversations may name no image: a rank then has no code at all, and two ranks still equal one process."""
    options = ["steps=4"]
    one = run_ranks(1, run_stage, "mllm", files["mllm"], tmp_path / "one", 1, options, None, _drop_images)[0]
    options.append(f"engine.zero_stage={zero}")
    two = run_ranks(2, run_stage, "mllm", files["mllm"], tmp_path / "two", 2, options, None, _drop_images)[0]
    assert max(differences(two, one).values()) < 1e-4


def _drop_images(task: MllmTask) -> None:
    mix_by_rank(task)
    conversation = task._conversation

    def without(sample: Any, rng: Any) -> list[Turn]:
        return [Turn(turn.role, turn.content.replace(IMAGE_MARK, "")) for turn in conversation(sample, rng)]

    task._conversation = without


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_autocast_is_bf16_products_only(files: dict[str, Path], tmp_path: Path, stage: str, zero: int) -> None:
    """Parameters, codebooks, code search, optimizer states and what is sent stay fp32; encoder products are bf16."""
    for found in run_ranks(2, _autocast_dtypes, stage, files[stage], tmp_path, zero):
        assert found["products"] == {torch.bfloat16}
        for name in ("codebooks", "parameters", "masters", "states", "quantized"):
            assert found[name] == {torch.float32}, name
        assert torch.float32 in found["sent"] and not {torch.bfloat16, torch.float16} & found["sent"]


def _autocast_dtypes(stage: str, file: Path, out: Path, zero: int) -> dict[str, set[torch.dtype]]:
    import deepspeed.comm as comm

    names = ("products", "codebooks", "parameters", "masters", "states", "quantized", "sent")
    found: dict[str, set[torch.dtype]] = {name: set() for name in names}
    for name in ("all_reduce", "reduce_scatter_fn", "reduce_scatter_tensor", "all_gather_into_tensor", "reduce"):
        if hasattr(comm, name):
            setattr(comm, name, _recording(getattr(comm, name), found["sent"]))

    def prepare(task: Any) -> None:
        original = task.micro_step

        def micro_step(engines: dict[str, Any], batch: Any, micro_index: int, step: int) -> dict[str, Tensor]:
            if step == 0:
                _watch(stage, engines, found)
            metrics = original(engines, batch, micro_index, step)
            for engine in engines.values():
                _look_at_engine(engine, zero, found)
            return metrics

        task.micro_step = micro_step

    options = ["steps=3", f"engine.zero_stage={zero}", "engine.precision=autocast"]
    if stage == "tokenizer":
        options.append("discriminator.start_step=0")
    run_stage(stage, file, out, 2, options, prepare=prepare)
    return found


def _watch(stage: str, engines: dict[str, Any], found: dict[str, set[torch.dtype]]) -> None:
    module = engines[stage].module
    encoder = module.encoder if stage == "tokenizer" else module.model.backbone
    for part in encoder.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda _m, _i, output: found["products"].add(output.dtype))
    if stage == "tokenizer":
        module.quantizer.register_forward_hook(lambda _m, _i, out: found["quantized"].add(out.quantized.dtype))
    else:  # the codes' own vectors, before the projection casts them
        found["quantized"].add(module.model.embedder.codebooks.dtype)


def _look_at_engine(engine: Any, zero: int, found: dict[str, set[torch.dtype]]) -> None:
    found["codebooks"] |= {b.dtype for name, b in engine.module.named_buffers() if "codebook" in name}
    for name, parameter in engine.module.named_parameters():
        dtype = parameter.ds_tensor.dtype if zero == 3 else parameter.dtype
        found["parameters"].add(dtype)
        if "codebook" in name:
            found["codebooks"].add(dtype)
    inner = engine.optimizer.optimizer if zero else engine.optimizer
    masters = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
    masters[3] = "fp32_partitioned_groups_flat"
    found["masters"] |= {
        p.dtype for p in (getattr(engine.optimizer, masters[zero]) if zero else engine.module.parameters())
    }
    found["states"] |= {v.dtype for state in inner.state.values() for v in state.values() if torch.is_tensor(v)}


def _recording(function: Any, sent: set[torch.dtype]) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        tensors = [a for a in (*args, *options.values()) if torch.is_tensor(a) and a.is_floating_point()]
        sent.update(tensor.dtype for tensor in tensors if tensor.numel() > 2)
        return function(*args, **options)

    return call


@pytest.mark.parametrize("world,zero", [(1, 0), (2, 1), (2, 2), (2, 3)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_straight(
    files: dict[str, Path], tmp_path: Path, stage: str, world: int, zero: int
) -> None:
    """SIGKILL between checkpoints, once before and once after the discriminator's start: same log, same weights."""
    every = 4
    options = [f"save_every={every}", f"engine.zero_stage={zero}", "engine.accumulation_steps=2", "steps=14"]
    arguments = (world, run_stage, stage, files[stage])
    straight = run_ranks(*arguments, tmp_path / "straight", world, options)[0]
    seed = random.SystemRandom().randrange(10**6)
    print(f"kill points of seed {seed}")  # shown when the test fails
    draw = random.Random(seed)
    for choices in ((1, 2, 5, 6, 7), (9, 10, 11, 13)):
        step = draw.choice(choices)
        kill = (step, draw.randrange(world))
        run_ranks(*arguments, tmp_path / "killed", world, options, kill, may_die=True)
        latest = latest_complete(tmp_path / "killed" / "checkpoints")
        assert (0 if latest is None else int(latest.name[5:])) == step - step % every
    killed = run_ranks(*arguments, tmp_path / "killed", world, options)[0]
    assert killed == straight and len(straight) == 14
    weights = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("straight", "killed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_exported(files: dict[str, Path], tmp_path: Path, stage: str) -> None:
    """The export holds e <- d e + (1 - d) w with d = min(decay, (1 + t) / (10 + t)) over the weights of each step."""
    for world, zero in ((1, 0), (2, 3)):
        out = tmp_path / f"{world}{zero}"
        options = ["steps=5", "ema_decay=0.3", f"engine.zero_stage={zero}"]
        history = run_ranks(world, _weights_of_steps, stage, files[stage], out, world, options)[0]
        average = history[0]
        for t, weights in enumerate(history[1:]):
            decay = min(0.3, (1 + t) / (10 + t))
            average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
        model = (UniTok if stage == "tokenizer" else UniTokMLLM).from_pretrained(out / "export")
        exported = dict(model.named_parameters())
        assert len(history) == 6 and exported.keys() == average.keys()
        for name, value in exported.items():
            torch.testing.assert_close(value.detach(), average[name], rtol=1e-5, atol=1e-6)
        moved = sum(float((value - history[-1][name]).abs().max() > 1e-5) for name, value in exported.items())
        assert moved > 0.8 * len(exported)


def _weights_of_steps(stage: str, file: Path, out: Path, world: int, options: list[str]) -> list[dict[str, Tensor]]:
    """Whole weights before the first step and after every step."""
    task, config = make_task(stage, file, out, world, options)
    build, after_step, history = task.build, task.after_step, []

    def remember(module: nn.Module) -> None:
        with whole_parameters(module):
            named = module.named_parameters()
            history.append({name.removeprefix("model."): p.detach().clone() for name, p in named})

    def building() -> dict[str, Any]:
        networks = build()
        remember(networks[stage].module)
        return networks

    def after(modules: dict[str, nn.Module], step: int) -> None:
        after_step(modules, step)
        remember(modules[stage])

    task.build, task.after_step = building, after
    train(task, config)
    return history


LAUNCHERS = {"deepspeed": ["--num_gpus", "2", "--master_port"], "torchrun": ["--nproc_per_node", "2", "--master_port"]}


@pytest.mark.parametrize("tool,zero", [("deepspeed", 2), ("torchrun", 3)])
@pytest.mark.parametrize("stage", STAGES)
def test_launchers(files: dict[str, Path], tmp_path: Path, stage: str, tool: str, zero: int) -> None:
    """The documented commands, ended by exit code 0, log over 20 steps what one process logs."""
    from unitok.core.distributed import free_port

    alone = run_ranks(1, run_stage, stage, files[stage], tmp_path / "one", 1, ["ema_decay=null"])[0]
    launched = [str(Path(sys.executable).parent / tool), *LAUNCHERS[tool], str(free_port())]
    script = [f"scripts/train_{stage}.py", "--config", str(files[stage]), "ema_decay=null"]
    own = [f"output_dir={tmp_path / 'two'}", "engine.micro_batch_size=2", f"engine.zero_stage={zero}", "num_workers=1"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launched, *script, *own], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    log = read_log(tmp_path / "two" / "log.jsonl")
    assert len(log) == STEPS
    check_equal(log, alone)
