"""What a run needs before it is started: parameters, memory per GPU by ZeRO stage, FLOPs, hours and cost.

Nothing is built in memory: networks are made on the meta device, a micro-batch is traced on shapes (`eval/trace.py`).
The rest are the formulas in FORMULAS and in `memory`, whose numbers are bytes per element (fp32 4, bf16 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from unitok.core.config import config_path, load_config, read_yaml
from unitok.core.engine import EngineConfig
from unitok.core.errors import ConfigError
from unitok.core.run import TrainConfig
from unitok.data.packing import first_fit_decreasing
from unitok.eval.flops import peak_flops
from unitok.eval.planned import planned_model
from unitok.eval.speed import measured_config
from unitok.eval.trace import Trace, TracedMllm, TracedTokenizer, Work
from unitok.mllm.losses import split_by_length
from unitok.mllm.settings import KINDS, MllmDataConfig, MllmTrainConfig
from unitok.tokenizer.task import TokenizerTrainConfig

ZERO_STAGES = (0, 1, 2, 3)
BUCKET = 500_000_000  # elements of DeepSpeed's reduce buckets (its default, which the engine leaves as it is)
LIVE = 1_050_000_000  # elements that ZeRO 3 keeps gathered at most, with what it fetches ahead (defaults)
RESERVE = 2e9  # bytes for CUDA's context, NCCL and fragmentation
# Share of the peak that a run reaches, unless told otherwise. Stage one: what the authors' 50 hours on 256 A100 come to
# (docs/cluster.md); stage two: what comparable stacks report with bf16 products (33 to 50 %).
MFU = {"tokenizer": 0.17, "mllm": 0.4}


@dataclass(frozen=True)
class Hardware:
    """One GPU. name: as in the table of peaks (`unitok.eval.flops`). memory: bytes. bandwidth: bytes per second. price:
    US dollars per hour, an assumption about rented ones."""

    name: str
    memory: float
    bandwidth: float
    price: float


# Memory and bandwidth from NVIDIA's data sheets of A100, H100, H200, L40S and the RTX 4090.
HARDWARE = {
    "a100": Hardware("A100-SXM4-80GB", 80e9, 2.04e12, 1.5),
    "a100-40gb": Hardware("A100-SXM4-40GB", 40e9, 1.56e12, 1.2),
    "h100": Hardware("H100 80GB HBM3", 80e9, 3.35e12, 2.5),
    "h100-pcie": Hardware("H100 PCIe", 80e9, 2.0e12, 2.2),
    "h200": Hardware("H200", 141e9, 4.8e12, 3.5),
    "l40s": Hardware("L40S", 48e9, 0.864e12, 1.0),
    "rtx4090": Hardware("RTX 4090", 24e9, 1.008e12, 0.5),
}

FORMULAS = {
    "parameters": "b P, under ZeRO 3 b P / N (b = 4, with engine.precision=bf16 2; P parameters, N GPUs)",
    "master": "4 T / N under ZeRO 1 to 3: the fp32 weights that the optimizer steps (T trained parameters)",
    "gradients": "4 T without ZeRO, 4 T / N with it; 4 T more under ZeRO 1 with bf16 or accumulation",
    "optimizer": "8 T (AdamW's two averages), 8 T / N under ZeRO 1 to 3",
    "ema": "4 P where there is an average, 4 P / N under ZeRO 3",
    "frozen": "4 x parameters of LPIPS, DINO and teacher, whole on every GPU; and buffers (codebooks)",
    "buckets": "under ZeRO 4 x 5e8 (bf16: none under 1, 2 x 5e8 under 2), twice under 1 and 2 (communication beside "
    "computation), for each network under 3 and under 1 with accumulation; and a copy of what is reduced: "
    "4 min(T, 5e8), under 1 and 2 / N",
    "gathered": "ZeRO 3: b min(P, 1.05e9) held whole around the layer at work",
    "activations": "traced: the most that forward and backward pass of one micro-batch hold at a time, autocast's bf16 "
    "copies of weights at work and one chunk of logits included",
    "total": "the most at a time: without accumulation gradients grow while activations go (under ZeRO 1 and 2 from "
    "the first full bucket on), so less than the sum",
    "contrastive": "16 G D + 24 B G: features and logits of the global batch (G pairs, B of this GPU, width D)",
    "flops_per_step": "N x accumulation x traced products of a micro-batch: matrix products, convolutions, attention, "
    "a multiply-add as 2; nothing twice for checkpointing",
    "hours": "FLOPs of all steps / (MFU x peak x N x 3600)",
    "cost": "hours x N x price",
}


@dataclass(frozen=True)
class Size:
    """Of one network that is trained: elements of all and of trained parameters, bytes of buffers."""

    parameters: int
    trained: int
    buffers: int = 0
    ema: bool = False


@dataclass
class Plan:
    """Everything that `unitok plan` prints; bytes, FLOPs, hours."""

    stage: str
    gpus: int
    hardware: Hardware
    engine: EngineConfig
    steps: int
    mfu: float
    parts: dict[str, dict[str, int]]  # part -> {"trained", "frozen"} parameters
    networks: dict[str, Size]
    frozen_bytes: int
    traces: dict[bool, Trace]  # by gradient checkpointing: the largest micro-batch
    checkpointing: bool
    flops_per_step: float
    flops_of_run: float
    per_step: dict[str, float]  # what a step of all GPUs holds: images, ids
    contrastive_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU in the engine's precision."""
        peak = peak_flops(self.hardware.name, "fp32" if self.engine.precision == "fp32" else "bf16")
        assert peak is not None, self.hardware.name
        return peak

    @property
    def hours(self) -> float:
        return self.flops_of_run / (self.mfu * self.peak * self.gpus * 3600)

    @property
    def cost(self) -> float:
        return self.hours * self.gpus * self.hardware.price

    def memory(self, zero_stage: int, checkpointing: bool) -> dict[str, float]:
        """Bytes on one GPU by what they are for, and "total", the most at a time."""
        return memory(
            self.networks, self.frozen_bytes + self.contrastive_bytes, self.engine, self.gpus, zero_stage,
            self.traces[checkpointing],
        )  # fmt: skip

    def fits(self, zero_stage: int, checkpointing: bool) -> bool:
        return self.memory(zero_stage, checkpointing)["total"] + RESERVE <= self.hardware.memory


def memory(
    networks: Mapping[str, Size],
    frozen_bytes: int,
    engine: EngineConfig,
    gpus: int,
    zero_stage: int,
    trace: Trace,
    bucket: int = BUCKET,
    overlap: bool = True,
) -> dict[str, float]:
    """Bytes on one GPU; see FORMULAS. overlap: communication beside computation, as on GPUs, with a second bucket."""
    width = 2 if engine.precision == "bf16" else 4
    share = 1 / gpus if zero_stage else 1.0
    all_, trained = (sum(getattr(size, name) for size in networks.values()) for name in ("parameters", "trained"))
    averaged = sum(size.parameters for size in networks.values() if size.ema)
    whole = 1 / gpus if zero_stage == 3 else 1.0
    stays = zero_stage == 1 and (engine.precision == "bf16" or engine.accumulation_steps > 1)  # ZeRO 1 adds up whole
    parts: dict[str, float] = {
        "parameters": width * all_ * whole,
        "master": 4 * trained * share if zero_stage else 0.0,
        "gradients": 4 * trained * share + 4 * trained * stays,
        "optimizer": 8 * trained * share,
        "ema": 4 * averaged * whole,
        "frozen": frozen_bytes + sum(size.buffers for size in networks.values()),
    }
    parts["buckets"] = _buckets(networks, engine, gpus, zero_stage, bucket, overlap)
    parts["gathered"] = width * min(all_, LIVE) if zero_stage == 3 else 0.0
    parts["activations"] = trace.activations
    standing = sum(parts[name] for name in ("parameters", "master", "optimizer", "ema", "frozen", "gathered"))
    # What a backward pass begins with; the rest comes to be with the gradients, while activations go.
    early = _buckets(networks, engine, gpus, zero_stage, bucket, overlap, copied=False)
    if stays:
        early += 4 * trained
    elif engine.accumulation_steps > 1 or zero_stage == 3:
        early += parts["gradients"]
    late = parts["gradients"] + parts["buckets"] - early
    # ZeRO 1 and 2 reduce when a bucket is full, or in the end: until then gradients lie in the bucket alone.
    waiting = 0 if zero_stage in (0, 3) or stays else width * BUCKET
    backward = standing + early + trace.peak(late / max(1, width * trained), beyond=waiting)
    parts["total"] = max(backward, standing + early + late)
    return parts


def _buckets(
    networks: Mapping[str, Size],
    engine: EngineConfig,
    gpus: int,
    zero_stage: int,
    bucket: int,
    overlap: bool,
    copied: bool = True,
) -> float:
    """Bytes of DeepSpeed's reduce buckets and, if `copied`, of what is communicated out of them."""
    if zero_stage == 0:
        return 0.0
    if zero_stage == 1 and engine.precision == "bf16":  # gradients are added up in fp32, and reduced from there
        bucket = 0
    trained = [size.trained for size in networks.values() if size.trained]
    width = 2 if zero_stage == 2 and engine.precision == "bf16" else 4
    lasting = zero_stage == 3 or (zero_stage == 1 and engine.accumulation_steps > 1)  # else let go after each backward
    standing = width * bucket * (2 if overlap and zero_stage < 3 else 1) * (len(trained) if lasting else 1)
    copy = 4 * min(max(trained, default=0), BUCKET) * (1 if zero_stage == 3 else 1 / gpus)
    return standing + (copy if copied else 0.0)


def stage_of(file: Path | str, overrides: list[str]) -> TrainConfig:
    """The checked configuration in `file`, of whichever stage it is; ConfigError where it is of none."""
    keys = set(read_yaml(config_path(file)))
    second = keys & (set(MllmTrainConfig.model_fields) - set(TokenizerTrainConfig.model_fields))
    if keys & {"text_config", "sampling", "training"}:
        raise ConfigError(f"{file} is the configuration of a speed measurement; expected one of a training stage")
    return load_config(MllmTrainConfig if second else TokenizerTrainConfig, file, overrides)


# ---- stage one


def plan_tokenizer(config: TokenizerTrainConfig, gpus: int, hardware: Hardware, mfu: float | None = None) -> Plan:
    """Stage one. The memory is that with the discriminator at work."""
    measured = measured_config(config)
    traced = TracedTokenizer(measured)
    settings, engine = config.discriminator, config.engine
    start = min(settings.start_step, config.steps) if settings.enabled else config.steps
    before = traced.step(started=False, checkpointing=False)
    after = traced.step(started=True, checkpointing=False) if settings.enabled else before
    checkpointed = traced.step(started=settings.enabled, checkpointing=True)
    micro_batches = gpus * engine.accumulation_steps
    pairs = engine.micro_batch_size * gpus
    embed = config.model.embed_dim if config.loss.contrastive > 0 else 0
    tokenizer = traced.networks["tokenizer"]
    parts = {name: count(part) for name, part in tokenizer.named_children() if any(True for _ in part.parameters())}
    if settings.enabled:
        parts["discriminator"] = count(traced.networks["discriminator"])
    frozen = sum(sum(p.numel() for p in module.parameters()) for module in traced.frozen.values())
    parts |= {name: count(module, frozen=True) for name, module in traced.frozen.items()}
    averaged = {"tokenizer": config.ema_decay is not None}
    return Plan(
        "tokenizer", gpus, hardware, engine, config.steps, mfu or MFU["tokenizer"], parts,
        {name: size_of(module, averaged.get(name, False)) for name, module in traced.networks.items()},
        4 * frozen,
        {False: after, True: checkpointed},
        config.gradient_checkpointing,
        micro_batches * after.flops,
        micro_batches * (start * before.flops + (config.steps - start) * after.flops),
        {"images": pairs * engine.accumulation_steps},
        contrastive_bytes=(16 * pairs * embed + 24 * engine.micro_batch_size * pairs) * (embed > 0),
        notes=[f"the discriminator works from step {start} of {config.steps} on"] if settings.enabled else [],
    )  # fmt: skip


# ---- stage two


@dataclass(frozen=True)
class Lengths:
    """Ids of a caption's sample and of a conversation beside the image's positions, marks and prompts included, and of
    a document (None: data.max_length)."""

    caption: int = 64
    chat: int = 344
    document: int | None = None


def works(config: MllmTrainConfig, positions: int, lengths: Lengths) -> dict[str, Work]:
    """What a sample of each kind of the mixture asks for. Of a conversation half the ids are answers; with a caption
    begin, begin-of-image and end-of-image are given, with a drawn image its two marks and the end are learnt."""
    most = config.data.max_length
    caption, chat = (min(ids, most - positions) for ids in (lengths.caption, lengths.chat))
    document = min(lengths.document or most, most)
    if caption < 1 or chat < 1:
        raise ConfigError(f"data.max_length={most} leaves no ids beside the {positions} positions of an image")
    every = {
        "text_to_image": Work(caption + positions, 1, min(3, caption), positions),
        "caption": Work(caption + positions, 1, max(1, caption - 3), 0),
        "plain": Work(caption + positions, 1, max(1, caption - 3), 0),
        "chat": Work(chat + positions, 1, chat // 2, 0),
        "text": Work(document, 0, document - 1, 0),
    }
    return {kind: every[kind] for kind in KINDS if getattr(config.data.mixture, kind) > 0}


def composition(shares: Mapping[str, float], places: int) -> dict[str, int]:
    """`places` shared out in proportion, the largest remainders first."""
    total = sum(shares.values())
    exact = {kind: places * share / total for kind, share in shares.items()}
    counts = {kind: int(value) for kind, value in exact.items()}
    for kind in sorted(exact, key=lambda kind: counts[kind] - exact[kind])[: places - sum(counts.values())]:
        counts[kind] += 1
    return counts


def padded(lengths: list[int], data: MllmDataConfig) -> list[int]:
    """How many ids each of the samples takes up in its batch, what is padded beside it included."""
    if data.pack:
        return list(lengths)
    taken = list(lengths)
    for rows in split_by_length(lengths):
        for row in rows:
            taken[row] = max(lengths[other] for other in rows)
    return taken


def plan_mllm(
    config: MllmTrainConfig,
    file: Path | str,
    gpus: int,
    hardware: Hardware,
    mfu: float | None = None,
    lengths: Lengths | None = None,
) -> Plan:
    """Stage two. FLOPs are those of the mixture's mean, memory is that of its most likely micro-batch."""
    lengths = lengths or Lengths()
    model, notes = planned_model(config, file)
    parts = mllm_parts(model)
    engine, mixture = config.engine, config.data.mixture
    traced = TracedMllm(model, engine.precision)
    method = "plain" if config.cross_entropy == "plain" else "chunked"
    kinds = works(config, model.config.num_image_positions, lengths)
    shares = {kind: getattr(mixture, kind) / mixture.total for kind in kinds}

    places = composition(shares, engine.micro_batch_size)
    batch = [kinds[kind] for kind, count_ in places.items() for _ in range(count_)]
    taken = padded([work.length for work in batch], config.data)
    if config.data.pack:
        rows = first_fit_decreasing([work.length for work in batch], config.data.max_length)
        notes.append(f"a micro-batch of {len(batch)} samples is packed into {len(rows)} rows")
    whole = Work(sum(taken), sum(w.images for w in batch), sum(w.text for w in batch), sum(w.drawn for w in batch))
    flops, ids = 0.0, 0.0
    for kind, work in kinds.items():  # each in a row of its own: packed samples see only themselves
        same = [row for row, other in enumerate(batch) if other == work]
        row = max((taken[number] for number in same), default=work.length)
        one = traced.step(Work(row, work.images, work.text, work.drawn), checkpointing=False, method="plain")
        flops += shares[kind] * one.flops
        ids += shares[kind] * work.length
    traces = {setting: traced.step(whole, setting, method) for setting in (False, True)}
    samples = engine.micro_batch_size * engine.accumulation_steps * gpus
    notes.append(f"assumed: {lengths.caption} ids beside the image with a caption, {lengths.chat} with a conversation")
    return Plan(
        "mllm", gpus, hardware, engine, config.steps, mfu or MFU["mllm"], parts,
        {"mllm": size_of(model, config.ema_decay is not None)},
        0,
        traces,
        config.gradient_checkpointing,
        samples * flops,
        samples * flops * config.steps,
        {"samples": samples, "ids": samples * ids, "images": samples * sum(shares[k] for k in kinds if k != "text")},
        notes=notes,
    )  # fmt: skip


def mllm_parts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters of backbone, adapters, embedder, text head and depth transformer; the codebooks are a buffer."""
    parts = {}
    for name, part in model.named_children():
        adapters = [p for key, p in part.named_parameters() if ".lora_" in key]
        parts[name] = count(part)
        if adapters:
            parts[f"{name} (adapters)"] = {"trained": sum(p.numel() for p in adapters), "frozen": 0}
            parts[name]["trained"] -= parts[f"{name} (adapters)"]["trained"]
    parts["codebooks"] = {"trained": 0, "frozen": model.embedder.codebooks.numel()}
    return parts


def count(module: nn.Module, frozen: bool = False) -> dict[str, int]:
    """Trained and frozen parameters of a module (all frozen, where it is never trained)."""
    counts = {"trained": 0, "frozen": 0}
    for parameter in module.parameters():
        counts["trained" if parameter.requires_grad and not frozen else "frozen"] += parameter.numel()
    return counts


def size_of(module: nn.Module, ema: bool) -> Size:
    counts = count(module)
    buffers = sum(value.untyped_storage().nbytes() for value in module.buffers())
    return Size(sum(counts.values()), counts["trained"], buffers, ema)
