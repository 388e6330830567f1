"""Speed of a unified model on random prompts: sampling of codes, answers, the training step.

Times are of the best repeat: wall time on a GPU, this process's CPU time on a CPU, where other programs run beside it.
The floor of a position is the time to read the weights that it needs once from memory (those of the depth transformer
once for each code), at the bandwidth that summing a large tensor reached. B images, K codebooks, L positions, T text.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from unitok.core.config import Config
from unitok.core.rng import derive_seed, torch_rng
from unitok.core.signature import config_from_signature
from unitok.eval.flops import count_flops
from unitok.eval.plain_sampling import plain_codes
from unitok.eval.results import Metric
from unitok.eval.speed import Setting, device_peak
from unitok.eval.speed_chat import ChatWork
from unitok.mllm import UniTokMLLM, UniTokMLLMConfig
from unitok.mllm.build import new_text_config
from unitok.mllm.configuration import IGNORE
from unitok.mllm.cross_entropy import choose_method
from unitok.mllm.precision import cast_weights
from unitok.mllm.quantize import stored_bytes, weight_bytes
from unitok.mllm.sampler import CodeSampler
from unitok.mllm.start import set_attention

MllmSizes = config_from_signature(UniTokMLLMConfig, "MllmSizes", skip=("text_config",))
_BANDWIDTH_BYTES = {"cpu": 2**28, "cuda": 2**32}  # far more than any cache holds


class SamplingSizes(Config):
    """What is sampled where nothing else is said; `images` is the batch."""

    prompt_length: int = Field(32, ge=1)
    num_positions: int = Field(64, ge=2)
    images: int = Field(2, ge=1)
    guidance_scale: float = Field(5.0, ge=1)


class TrainingSizes(Config):
    """Text-to-image samples of a training step."""

    batch_size: int = Field(4, ge=1)
    text_length: int = Field(24, ge=2)


class MllmSpeedConfig(Config):
    """The model, by the sizes of `UniTokMLLMConfig` and of its backbone, and the work that is measured."""

    text_config: dict[str, Any] = {}  # of the family `model_type`
    model: MllmSizes = MllmSizes()
    sampling: SamplingSizes = SamplingSizes()
    answers: ChatWork = ChatWork()
    training: TrainingSizes = TrainingSizes()


def random_model(config: MllmSpeedConfig, setting: Setting, **changes: Any) -> UniTokMLLM:
    """A model of these sizes (`changes` replace them) with random weights, made right on the device."""
    text_config = new_text_config(config.text_config, "text_config")
    sizes = UniTokMLLMConfig(text_config=text_config, **(config.model.model_dump() | changes))
    torch.manual_seed(derive_seed("mllm", setting.seed))
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    with torch.device(setting.device):
        model = cast_weights(UniTokMLLM(sizes), dtype)
    return model.eval()


# ---- clocks


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call; see the module's text."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def repeated(function: Callable[[], object], setting: Setting) -> list[float]:
    """Seconds of each repeat, after a call that does not count."""
    function()
    return [seconds(function, setting.device) for _ in range(setting.repeats)]


def memory_bandwidth(setting: Setting) -> float:
    """Bytes per second at which a sum reads a tensor that no cache holds."""
    values = torch.ones(_BANDWIDTH_BYTES[setting.device.type] // 4, device=setting.device)
    return stored_bytes(values) / min(repeated(values.sum, setting))


# ---- sampling


def bytes_per_position(model: UniTokMLLM) -> int:
    """Weights that one position of sampling needs: each module's once, the depth transformer's for each code."""
    depth, count = model.depth, model.config.num_codebooks
    backbone = weight_bytes(model.backbone) - weight_bytes(model.get_input_embeddings())
    embedder = weight_bytes(model.embedder.projection) + weight_bytes(model.embedder.mlp)
    heads = weight_bytes(depth.head) * (count if depth.head.weight.shape[0] == 1 else 1)
    return backbone + embedder + count * weight_bytes(depth.layers) + heads + weight_bytes(depth.in_proj)


def random_prompts(model: UniTokMLLM, sizes: SamplingSizes, images: int, seed: int) -> Tensor:
    """Ids `[2B, T]` (`[B, T]` without guidance) without padding."""
    rows, vocab = images * (2 if sizes.guidance_scale > 1 else 1), model.config.text_config.vocab_size
    ids = torch.randint(vocab, (rows, sizes.prompt_length), generator=torch_rng("speed", seed))
    if model.config.image_token_id is not None:  # stands for an image, of which a prompt has none
        ids[ids == model.config.image_token_id] = 0
    return ids.to(model.device)


def sampling_speed(
    model: UniTokMLLM, sizes: SamplingSizes, images: int, num_positions: int, setting: Setting, bandwidth: float
) -> dict[str, Any]:
    """Figures of `generate_codes`, greedy, its prompts included."""
    ids = random_prompts(model, sizes, images, setting.seed)

    def sample() -> Tensor:
        return model.generate_codes(ids, None, sizes.guidance_scale, do_sample=False, num_positions=num_positions)

    return sampling_figures(repeated(sample, setting), images, num_positions, bytes_per_position(model) / bandwidth)


def sampling_figures(measured: list[float], images: int, num_positions: int, floor: float) -> dict[str, Any]:
    """`floor`: seconds of a position that reading the weights takes alone."""
    best = min(measured)
    return {
        "images": images,
        "positions": num_positions,
        "visual_tokens_per_second": images * num_positions / best,
        "images_per_second": images / best,
        "seconds": best,
        "seconds_of_repeats": measured,
        "ms_per_position": 1000 * best / num_positions,
        "floor_ms_per_position": 1000 * floor,
        "times_floor": best / num_positions / floor,
    }


def plain_loop(model: UniTokMLLM, sizes: SamplingSizes, embedder_cache: str, setting: Setting) -> dict[str, Any]:
    """The engine and the plain loop in turns, greedy: seconds of both, their ratio, whether the codes are equal."""
    ids = random_prompts(model, sizes, sizes.images, setting.seed)
    options = {"num_positions": sizes.num_positions, "embedder_cache": embedder_cache}
    found: dict[str, Tensor] = {}

    def plain() -> None:
        sampler = CodeSampler(range(sizes.images), False, 1.0, 0, 1.0, device=ids.device)
        found["plain"] = plain_codes(model, ids, torch.ones_like(ids), sampler, sizes.guidance_scale, **options)

    def engine() -> None:
        found["engine"] = model.generate_codes(ids, None, sizes.guidance_scale, do_sample=False, **options)

    times: dict[str, list[float]] = {"plain": [], "engine": []}
    engine()  # compiles, on a GPU
    for _ in range(setting.repeats):
        times["plain"].append(seconds(plain, setting.device))
        times["engine"].append(seconds(engine, setting.device))
    tokens = sizes.images * sizes.num_positions
    return {
        "embedder_cache": embedder_cache,
        "images": sizes.images,
        "positions": sizes.num_positions,
        "plain_visual_tokens_per_second": tokens / min(times["plain"]),
        "visual_tokens_per_second": tokens / min(times["engine"]),
        "seconds_of_repeats": times,
        "ratio": min(times["plain"]) / min(times["engine"]),
        "median_ratio": statistics.median(a / b for a, b in zip(times["plain"], times["engine"], strict=True)),
        "equal_codes": torch.equal(found["plain"], found["engine"]),
    }


def speed_metrics(found: dict[str, Any], repeats: int) -> list[Metric]:
    """The rates of all parts that were measured, the best of `repeats`, in the form of every evaluation."""
    rates = {f"visual_tokens_per_second, {part['images']} images": part for part in found["batches"]}
    rates |= {f"visual_tokens_per_second, {part['positions']} positions": part for part in found["positions"]}
    rates |= {f"visual_tokens_per_second, {part['num_codebooks']} codes": part for part in found["codebooks"]}
    values = {name: part["visual_tokens_per_second"] for name, part in rates.items()}
    for part in found.get("baseline", []):
        values[f"ratio to the plain loop, {part['embedder_cache']}"] = part["ratio"]
    for part in found.get("answers", []):
        values[f"answer_tokens_per_second, {part['way']}"] = part["answer_tokens_per_second"]
        values[f"ratio to generate, {part['way']}"] = part["ratio"]
    if "train" in found:
        values["training tokens_per_second"] = found["train"]["tokens_per_second"]
    return [Metric(name, value, None, repeats) for name, value in values.items()]


# ---- training


def training_speed(model: UniTokMLLM, sizes: TrainingSizes, setting: Setting) -> dict[str, Any]:
    """Figures of forward pass, backward pass and an AdamW step on text-to-image samples, packed as the configurations
    of large models do; leaves the weights changed."""
    set_attention(model, "auto", setting.device, setting.precision)  # as training has them
    model.cross_entropy = choose_method("auto", setting.device)
    padded = _training_batch(model, sizes, setting.seed)
    packed = _packed(padded)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def forward_backward(batch: dict[str, Tensor]) -> None:
        sums = model.losses(**batch)
        (sums.text / sums.num_text + sums.image / sums.num_image).backward()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward_backward(packed)
        optimizer.step()

    with _nothing_twice(model):  # in rows of their own: packed, what a mask hides would count
        flops = count_flops(lambda: forward_backward(padded))
    measured = repeated(step, setting)
    visual, whole = sizes.batch_size * model.config.num_image_positions, padded["input_ids"].numel()
    peak = device_peak(setting.device, setting.precision)
    return {
        "batch_size": sizes.batch_size,
        "visual_tokens_per_second": visual / min(measured),
        "tokens_per_second": whole / min(measured),
        "seconds": min(measured),
        "seconds_of_repeats": measured,
        "gflop_per_step": flops / 1e9,
        "gflop_per_second": flops / min(measured) / 1e9,
        "mfu": None if peak is None else flops / min(measured) / peak,
    }


@contextmanager
def _nothing_twice(model: UniTokMLLM) -> Iterator[None]:
    """Without what is computed again only to save memory: MFU counts the products that the result needs."""
    cross_entropy = model.cross_entropy
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    model.cross_entropy = "plain"
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        model.cross_entropy = cross_entropy
        for module in checkpointed:
            module.gradient_checkpointing = True


def _training_batch(model: UniTokMLLM, sizes: TrainingSizes, seed: int) -> dict[str, Tensor]:
    """Arguments of `losses`: text, an image after it, the last text id learnt (as the begin-of-image mark is)."""
    config, count = model.config, sizes.batch_size
    text = SamplingSizes(prompt_length=sizes.text_length, guidance_scale=1.0)
    ids = random_prompts(model, text, count, seed)
    image = torch.full((count, config.num_image_positions), config.image_token_id, device=ids.device)
    ids = torch.cat([ids, image], dim=1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, sizes.text_length - 1] = ids[:, sizes.text_length - 1]
    shape = (count, config.num_codebooks, config.num_image_positions)
    codes = torch.randint(config.codebook_size, shape, generator=torch_rng("speed", seed)).to(ids.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "codes": codes,
        "learn_image": torch.ones(count, dtype=torch.bool, device=ids.device),
    }


def _packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same samples in one row, as `data.pack` lays them out."""
    count, length = batch["input_ids"].shape
    position_ids = torch.arange(length, device=batch["input_ids"].device).repeat(1, count)
    kept = {name: value for name, value in batch.items() if name != "attention_mask"}
    return kept | {name: batch[name].view(1, -1) for name in ("input_ids", "labels")} | {"position_ids": position_ids}
