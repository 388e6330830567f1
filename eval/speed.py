"""Speed of a tokenizer on random pixels: encoding, decoding, the codebook search alone, the training step.

Every figure is a median of repeats after a warm-up. FLOPs are those of `unitok.eval.flops`. Peak memory is, on a GPU,
the largest amount that tensors took during the repeats (weights included); on a CPU, the growth of resident memory
since before the networks were built, sampled, so an approximation.

B batch, K codebooks, L positions, C channels of the code space, S pixels per side.
"""

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import psutil
import torch

from unitok.core.distributed import init_distributed, shutdown_distributed
from unitok.core.engine import set_learning_rate
from unitok.core.optim import lr_at
from unitok.core.rng import torch_rng
from unitok.core.run import Run, set_up
from unitok.data.images import ImageDataConfig
from unitok.data.shapes import MIN_SIZE
from unitok.eval.flops import MeasuredTask, inference_flops, peak_flops, random_batch, training_flops
from unitok.tokenizer import UniTok
from unitok.tokenizer.configuration import DOWNSAMPLING
from unitok.tokenizer.dino import FrozenDino
from unitok.tokenizer.lpips import LPIPS
from unitok.tokenizer.settings import RANDOM_WEIGHTS
from unitok.tokenizer.task import TokenizerTrainConfig

WARM_UP = {"cpu": 1, "cuda": 3}
LEAST_SECONDS = 0.02  # a repeat of something quicker is several calls
SAMPLING_SECONDS = 0.01


@dataclass(frozen=True)
class Setting:
    """Where and how to measure. `precision` is "fp32", or "bf16" for products in bf16 (autocast)."""

    device: torch.device
    precision: str = "fp32"
    repeats: int = 5
    seed: int = 0


class PeakMemory:
    """`with PeakMemory(device, base_mb) as memory:` ... `memory.peak_mb`, see the module's text."""

    def __init__(self, device: torch.device, base_mb: float) -> None:
        self.device, self.base_mb, self.peak_mb = device, base_mb, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.peak_mb = torch.cuda.max_memory_allocated(self.device) / 1e6
        else:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        while True:
            stopped = self._stop.wait(SAMPLING_SECONDS)
            self.peak_mb = max(self.peak_mb, resident_mb() - self.base_mb)
            if stopped:
                return


def resident_mb() -> float:
    """Memory that this process holds now."""
    return psutil.Process().memory_info().rss / 1e6


def measure(function: Callable[[], object], setting: Setting, base_mb: float) -> tuple[list[float], float]:
    """Seconds of a call, once for each repeat, and the peak memory in MB."""
    for _ in range(WARM_UP[setting.device.type]):
        warm = _seconds(function, setting.device, calls=1)
    calls = max(1, min(1000, round(LEAST_SECONDS / max(warm, 1e-9))))
    with PeakMemory(setting.device, base_mb) as memory:
        seconds = [_seconds(function, setting.device, calls) for _ in range(setting.repeats)]
    return seconds, memory.peak_mb


def _seconds(function: Callable[[], object], device: torch.device, calls: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def figures(
    unit: str, units: int, flops: float, measured: tuple[list[float], float], peak: float | None
) -> dict[str, Any]:
    """Results of one part: `units` per call, `flops` per unit, the device's `peak` FLOP/s if it is known."""
    seconds, memory_mb = measured
    median = statistics.median(seconds)
    rate = units / median
    return {
        f"{unit}s_per_second": rate,
        "seconds": median,
        "seconds_of_repeats": seconds,
        f"{unit}s_per_call": units,
        "peak_memory_mb": memory_mb,
        f"gflop_per_{unit}": flops / 1e9,
        "gflop_per_second": rate * flops / 1e9,
        "mfu": None if peak is None else rate * flops / peak,
    }


def device_peak(device: torch.device, precision: str, kernel: bool = False) -> float | None:
    """Peak FLOP/s to compare with, None where it is not known (CPUs, other GPUs).

    In fp32 it is that of TF32 where torch may use it, which by default holds for convolutions only: a GPU's MFU in
    fp32 is then a lower bound. `kernel`: the codebook search, which never rounds to TF32.
    """
    if device.type != "cuda":
        return None
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    kind = "fp32" if kernel else "bf16" if precision == "bf16" else "tf32" if tf32 else "fp32"
    return peak_flops(torch.cuda.get_device_name(device), kind)


def inference_speed(
    build: Callable[[], UniTok], image_size: int, batch_size: int, setting: Setting
) -> dict[str, dict[str, Any]]:
    """Figures of "encode", "decode" (images) and "search" (positions, each of K codes; always in fp32).

    `build` gives the model on the setting's device.
    """
    device, base_mb = setting.device, resident_mb()
    model = build().eval()
    config, rng = model.config, torch_rng("speed", setting.seed)
    length = (image_size // DOWNSAMPLING) ** 2 + config.num_query_tokens
    pixels = (torch.rand(batch_size, 3, image_size, image_size, generator=rng) * 2 - 1).to(device)
    codes_BKL = torch.randint(config.codebook_size, (batch_size, config.num_codebooks, length), generator=rng).to(
        device
    )
    features_BLC = torch.randn(batch_size, length, config.code_width, generator=rng).to(device)

    def autocast() -> torch.autocast:  # anew for each call: it keeps the weights that it has cast
        return torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16")

    def encode() -> None:
        with autocast():
            model.encode(pixels)

    def decode() -> None:
        with autocast():
            model.decode(codes_BKL, (image_size, image_size))

    def search() -> None:
        model.quantizer.encode(features_BLC)

    flops = inference_flops(config, image_size)
    peak, search_peak = device_peak(device, setting.precision), device_peak(device, "fp32", kernel=True)
    positions = batch_size * length
    return {
        "encode": figures("image", batch_size, flops["encode"], measure(encode, setting, base_mb), peak),
        "decode": figures("image", batch_size, flops["decode"], measure(decode, setting, base_mb), peak),
        "search": figures("position", positions, flops["search"], measure(search, setting, base_mb), search_peak),
    }


def measured_config(config: TokenizerTrainConfig) -> TokenizerTrainConfig:
    """`config` with all that speed does not depend on replaced: data, weights of others, the text tower's tokenizer.

    The discriminator has started, at its full weight and without the blur of its first steps.
    """
    values = config.model_dump()
    size = max(MIN_SIZE, config.model.image_size)
    values["data"] = ImageDataConfig(source=f"shapes:train?num=16&size={size}").model_dump()
    values["loss"]["lpips_weights"] = RANDOM_WEIGHTS
    values["distill"]["weights"] = RANDOM_WEIGHTS if config.distill.model is not None else None
    values["discriminator"] |= {"dino_weights": RANDOM_WEIGHTS, "start_step": 0, "warmup_steps": 0, "blur_steps": 0}
    values["discriminator"]["optimizer"]["start_step"] = 0
    if values["model"]["text_tower"] is not None:
        values["model"]["text_tower"] |= {"tokenizer": "clip"}  # needs no file; the ids are random
    return TokenizerTrainConfig.model_validate(values)


def uses_perceptual_weights(config: TokenizerTrainConfig) -> bool:
    """Whether a step runs a frozen network of others: LPIPS, DINO or a teacher."""
    dino = config.discriminator.enabled and config.discriminator.kind == "dino"
    return config.loss.lpips > 0 or dino or config.distill.model is not None


def training_speed(config: TokenizerTrainConfig, setting: Setting) -> dict[str, Any]:
    """Figures of whole training steps of `config` (a `measured_config`) in this process, with its precision, ZeRO
    stage, gradient accumulation and compilation; of the setting, the precision does not count."""
    flops = training_flops(config)
    images = config.engine.micro_batch_size * config.engine.accumulation_steps
    precision = "fp32" if config.engine.precision == "fp32" else "bf16"
    batch = random_batch(config, setting.seed)
    with measured_run(config, setting.device) as (run, base_mb):
        measured = measure(lambda: training_step(run, batch), setting, base_mb)
        return figures("image", images, flops, measured, device_peak(setting.device, precision))


@contextmanager
def measured_run(config: TokenizerTrainConfig, device: torch.device) -> Iterator[tuple[Run, float]]:
    """A run as `unitok train` sets it up, and the resident memory before it was; nothing of it is left behind."""
    run: Run | None = None
    place = init_distributed(device.type)
    try:
        base_mb = resident_mb()
        with TemporaryDirectory() as folder:
            task = MeasuredTask(_weights_in_files(config, Path(folder)), place)
            run = set_up(task, config, config, place)
        yield run, base_mb
    finally:
        if run is not None:
            for engine in run.engines.values():
                engine.destroy()
        shutdown_distributed()


def _weights_in_files(config: TokenizerTrainConfig, folder: Path) -> TokenizerTrainConfig:
    """Random weights of LPIPS and DINO as files: drawing them needs the CPU, loading them works on every device."""
    from safetensors.torch import save_file

    loss, discriminator = config.loss, config.discriminator
    if loss.lpips > 0:
        save_file(LPIPS.random().state_dict(), folder / "lpips.safetensors")
        loss = loss.model_copy(update={"lpips_weights": str(folder / "lpips.safetensors")})
    if discriminator.enabled and discriminator.kind == "dino":
        save_file(FrozenDino.random().state_dict(), folder / "dino.safetensors")
        discriminator = discriminator.model_copy(update={"dino_weights": str(folder / "dino.safetensors")})
    return config.model_copy(update={"loss": loss, "discriminator": discriminator})


def training_step(run: Run, batch: dict[str, Any]) -> None:
    """One step as the training loop takes it, without loading, logging and saving; the same batch every time."""
    task, count = run.task, run.config.engine.accumulation_steps
    task.prepare_step([batch] * count, run.step)
    metrics = []
    for index in range(count):
        metrics += task.micro_step(run.engines, batch, index, run.step).values()
        if index < count - 1:
            for engine in run.active().values():
                engine.step()
    flags = [run.guards[name].flag() for name in run.active()]
    torch.stack(
        [torch.as_tensor(value, device=run.device).double().reshape(()) for value in [*metrics, *flags]]
    ).tolist()
    for name, engine in run.active().items():
        set_learning_rate(engine, lr_at(run.networks[name].optimizer, run.step, run.config.steps))
        run.guards[name].clip_()
        engine.step()
        run.guards[name].gradient_norm(engine)
    task.after_step(run.modules, run.step)
    for name in run.active():
        if name in run.emas:
            run.emas[name].update()
    run.step += 1


def free_memory(device: torch.device) -> None:
    """Give back what the networks measured before have held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
