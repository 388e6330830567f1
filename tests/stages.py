"""Both training stages on tiny models: their configuration files, runs on any number of ranks, and interruptions."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import PlainEngine, make_tokenizer, text_tower
from torch import Tensor

from unitok.core.config import load_config
from unitok.core.distributed import rank
from unitok.core.loop import train
from unitok.core.optim import parameter_groups
from unitok.core.run import TrainConfig
from unitok.core.runlog import read_log
from unitok.core.sampling import SampleOrder
from unitok.core.task import Task
from unitok.data.sentencepieces import load_sentencepiece, train_sentencepiece
from unitok.data.source import open_source
from unitok.mllm import UniTokMLLM
from unitok.mllm.settings import KINDS, Kind, MixtureConfig
from unitok.mllm.task import Loaded, MllmTask, MllmTrainConfig
from unitok.tokenizer.extract import extract_codes
from unitok.tokenizer.task import TokenizerTask, TokenizerTrainConfig

SOURCE = "shapes:train?num=48&size=32"
STEPS, START, GLOBAL_BATCH = 20, 8, 4
STAGES = {"tokenizer": (TokenizerTask, TokenizerTrainConfig), "mllm": (MllmTask, MllmTrainConfig)}
COMMON: dict[str, Any] = {
    "steps": STEPS,
    "ema_decay": 0.9,
    # nothing is clipped and no parameter stays whole: every difference between ZeRO stages would show
    "engine": {"gradient_clipping": 0.0, "zero3_persistence": 0},
}


# Stage one with everything that there is: the released discriminator and its augmentations, perceptual loss,
# distillation, stochastic depth, revival of codes. No L1 and no hinge, whose gradients jump, and low rates, so that
# rounding is not amplified from step to step; a wrong gradient would show in the norms, which every step logs.
EVERYTHING = [
    "loss.l1=0",
    "loss.lpips=0.5",
    "loss.lpips_weights=random",
    "discriminator.kind=dino",
    "discriminator.dino_weights=random",
    "discriminator.augment_probability=0.7",
    "discriminator.blur_steps=8",
    "discriminator.consistency=4",
    "discriminator.loss=softplus",
    "discriminator.optimizer.lr=2e-6",
    "optimizer.lr=2e-4",
    "distill.model=test_vit",
    "distill.weights=random",
    "model.drop_path=0.3",
    "revive.every=6",
    "revive.below=0.5",
    "optimizer.lr_multipliers={encoder.: 0.5, text_encoder.: 0.1}",
]


def write_configs(folder: Path) -> dict[str, Path]:
    """A configuration file for each stage; the codes of stage two come from a random tokenizer."""
    files = {}
    for stage, values in {"tokenizer": tokenizer_values(), "mllm": mllm_values(folder)}.items():
        files[stage] = folder / f"{stage}.yaml"
        files[stage].write_text(yaml.safe_dump({**COMMON, **values, "output_dir": "unset"}))
    return files


def tokenizer_values() -> dict[str, Any]:
    """Stage one with everything on: contrastive and entropy loss, discriminator from step START, adaptive weight."""
    return {
        "model": {
            "image_size": 32,
            "stem_width": 8,
            "stage_widths": [8, 16],
            "stage_depths": [1, 1],
            "width": 24,
            "depth": 1,
            "num_heads": 2,
            "mlp_ratio": 1.25,
            "projection_mlp_ratio": 1.5,
            "decoder_stage_depths": [1, 1],
            "num_codebooks": 3,
            "codebook_size": 16,
            "code_dim": 4,
            "entropy_temperature": 0.1,
            "embed_dim": 20,
            "text_tower": text_tower(vocab_size=90),
        },
        "data": {"source": SOURCE},
        "loss": {"l1": 1.0, "contrastive": 0.5, "entropy": 0.1, "adversarial": 0.4},
        "optimizer": {"lr": 1e-3, "warmup_steps": 4},
        "discriminator": {
            "start_step": START,
            "warmup_steps": 3,
            "channels": 8,
            "num_layers": 2,
            # slow: logits that cross the hinge's corner at +-1 would turn rounding into differences of 1e-3
            "optimizer": {"lr": 2e-4, "weight_decay": 0.0},
        },
    }


def mllm_values(folder: Path) -> dict[str, Any]:
    """Stage two on the codes of a random tokenizer, both of which this writes into `folder`."""
    source = open_source(SOURCE)
    captions = [text for index in range(len(source)) for text in source.texts(index)]
    text_file = train_sentencepiece(captions, folder / "captions.model", 88)
    tower = text_tower(vocab_size=load_sentencepiece(text_file).get_piece_size() + 2)
    tokenizer = make_tokenizer(text_tower=tower)
    tokenizer.set_text_model(text_file)
    tokenizer.save_pretrained(folder / "visual")
    extract_codes(tokenizer, source, folder / "codes", progress=False)
    return {
        "tokenizer": str(folder / "visual"),
        "model": {
            "visual_width": 24,
            "visual_num_heads": 2,
            "visual_mlp_ratio": 1.5,
            "depth_num_layers": 1,
            "depth_width": 16,
            "depth_num_heads": 2,
            "depth_intermediate_size": 24,
        },
        "backbone": {
            "config": {
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
            "text_vocab_size": 120,
        },
        "data": {
            "codes": str(folder / "codes"),
            "mixture": {"text_to_image": 0.5, "caption": 0.1, "chat": 0.4},
            "unconditional": 0.3,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 4, "weight_decay": 0.05},
    }


def make_task(stage: str, file: Path, out: Path, world: int, overrides: Sequence[str] = ()) -> tuple[Task, TrainConfig]:
    """The task and configuration of a run on `world` ranks at the same global micro-batch as on one."""
    task_class, config_class = STAGES[stage]
    fixed = [f"output_dir={out}", f"engine.micro_batch_size={GLOBAL_BATCH // world}"]
    config = load_config(config_class, file, [*fixed, *overrides])
    return task_class(config), config


def run_stage(
    stage: str,
    file: Path,
    out: Path,
    world: int,
    overrides: Sequence[str] = (),
    kill: tuple[int, int] | None = None,
    prepare: Any = None,
) -> list[dict[str, Any]]:
    """Train on this rank and return the log without timing. `kill`: SIGKILL at (step, rank), in the middle of it."""
    task, config = make_task(stage, file, out, world, overrides)
    if kill is not None:
        _kill_at(task, *kill)
    if prepare is not None:
        prepare(task)
    train(task, config)
    return read_log(out / "log.jsonl")


def _kill_at(task: Task, step: int, victim: int) -> None:
    """Die after the backward passes of the step's first micro-batch."""
    original = task.micro_step

    def micro_step(engines: dict[str, Any], batch: Any, micro_index: int, now: int) -> dict[str, Tensor]:
        metrics = original(engines, batch, micro_index, now)
        if (now, rank()) == (step, victim):
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics

    task.micro_step = micro_step  # type: ignore[method-assign]


def mix_by_rank(task: Task) -> None:
    """Stage two: of three micro-batches one gives half its samples to chat and half to text to image, the next the
    other way round, the third mixes freely. Two ranks then work on different tasks; one process sees the same."""
    if not isinstance(task, MllmTask):
        return
    original, data = task._sequence, task.config.data
    free = data.mixture
    chat, image = (MixtureConfig(text_to_image=0, caption=0, chat=1), MixtureConfig(text_to_image=1, caption=0, chat=0))
    order, size = SampleOrder(task.num_samples, task.config.seed), task.num_samples
    assert size % GLOBAL_BATCH == 0  # so that all samples of a micro-batch are of one epoch

    def sequence(sample: Any, index: int, epoch: int) -> Any:
        position = next(p for p in range(epoch * size, (epoch + 1) * size) if order.index(p) == index)
        half = position % GLOBAL_BATCH * 2 // GLOBAL_BATCH
        turn = position // GLOBAL_BATCH % 3
        data.mixture = free if turn == 2 else (chat, image)[half ^ turn]
        return original(sample, index, epoch)

    task._sequence = sequence  # type: ignore[method-assign]


EVERY_KIND = "data.mixture={text_to_image: 2, caption: 1, plain: 1, chat: 2, text: 2}"  # with `write_recipes`


def write_recipes(folder: Path) -> Path:
    """`mllm.yaml`, what it names, and `texts.jsonl`, in a folder of their own."""
    (folder / "mllm.yaml").write_text(yaml.safe_dump(COMMON | mllm_values(folder) | {"output_dir": "unset"}))
    documents = [{"text": f"the {number} th red circle is left of a blue square"} for number in range(7)]
    documents.append({"text": "a green triangle " * 40})
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, documents)) + "\n")
    return folder


def task_of(folder: Path, out: Path, *options: str, file: str = "mllm.yaml") -> MllmTask:
    """Stage two's task for a configuration file of `folder`, in one process."""
    task = make_task("mllm", folder / file, out, 1, options)[0]
    assert isinstance(task, MllmTask)
    return task


def plain_steps(task: MllmTask, count: int = 2, size: int = 8) -> tuple[UniTokMLLM, list[dict[str, float]]]:
    """Steps of plain SGD in this process, without DeepSpeed; the model and the metrics of each."""
    network = task.build()["mllm"]
    torch.manual_seed(0)
    engine = PlainEngine(network.module.train())
    optimizer = torch.optim.SGD(parameter_groups(network.module, network.optimizer), lr=0.1)
    log = []
    for step in range(count):
        batch = task.load_batch(list(range(step * size, (step + 1) * size)), 0)
        task.prepare_step([batch], step)
        optimizer.zero_grad()
        metrics = task.micro_step({"mllm": engine}, batch, 0, step)
        optimizer.step()
        log.append({name: float(value) for name, value in metrics.items()})
    return network.module.model, log


def out_of_phase(phases: Sequence[tuple[Kind, Kind]]) -> Callable[[Task], None]:
    """Stage two: of every micro-batch the first half is of one kind alone and the second of another, `phases` in turn.
    Each of two ranks then sees a kind of its own; one process sees the same samples."""

    def prepare(task: Task) -> None:
        assert isinstance(task, MllmTask)
        data, size, order = task.config.data, task.num_samples, SampleOrder(task.num_samples, task.config.seed)
        free = data.mixture
        assert size % GLOBAL_BATCH == 0 and set(chain(*phases)) <= {k for k in KINDS if getattr(free, k) > 0}

        def load(index: int, epoch: int) -> Loaded:
            position = next(p for p in range(epoch * size, (epoch + 1) * size) if order.index(p) == index)
            kind = phases[position // GLOBAL_BATCH % len(phases)][position % GLOBAL_BATCH * 2 // GLOBAL_BATCH]
            if kind == "text":
                return task._document(index % len(task.texts), epoch)
            data.mixture = MixtureConfig(**(dict.fromkeys(KINDS, 0.0) | {"text": free.text, kind: 1.0}))
            loaded = task._read(index, epoch)
            data.mixture = free
            assert loaded.kind == kind
            return loaded

        task._load = load  # type: ignore[method-assign]

    return prepare
