"""Stage one as a training task: batches, networks and losses. The loop (`unitok.core.loop`) drives it."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.core.bad_share import Reading
from unitok.core.distributed import rank, world_size
from unitok.core.engine import clamp_parameter_
from unitok.core.errors import ConfigError
from unitok.core.optim import OptimizerConfig, warmup_ramp
from unitok.core.rng import derive_seed, torch_rng
from unitok.core.run import resumed_folder
from unitok.core.same_run import check_same_mixture
from unitok.core.task import Network, Replaced, Task
from unitok.data.images import ImageBatches
from unitok.data.mixtures import MixtureSource
from unitok.data.samples import Source
from unitok.data.sentencepieces import load_sentencepiece, run_sentencepiece
from unitok.data.shards import reader_of
from unitok.data.transforms import as_pixels
from unitok.tokenizer.adversarial import (
    Augmentation,
    adaptive_weight,
    adversarial_loss,
    build_discriminator,
    discriminator_losses,
)
from unitok.tokenizer.codebook_care import revive_dead_codes_
from unitok.tokenizer.configuration import DOWNSAMPLING, TextTowerConfig, UniTokConfig
from unitok.tokenizer.distill import Teacher, distillation_loss
from unitok.tokenizer.initial import compile_blocks, freeze, initial_weights
from unitok.tokenizer.losses import contrastive_loss, reconstruction_loss
from unitok.tokenizer.lpips import LPIPS
from unitok.tokenizer.model import MAX_LOGIT_SCALE, UniTok
from unitok.tokenizer.quantizer import usage_statistics
from unitok.tokenizer.settings import RANDOM_WEIGHTS, TokenizerTrainConfig, check_settings, model_config
from unitok.tokenizer.text import TEXT_MODEL_FILE

__all__ = ["TokenizerTask", "TokenizerTrainConfig"]


class TokenizerTask(Task):
    """Two networks: "tokenizer" (UniTok) and, from its start step on, "discriminator"."""

    name = "tokenizer"
    incidental = ("data.cache", "data.max_bad_fraction", "gradient_checkpointing", "compile", "init_from", "init_clip")
    headline = ("loss", "reconstruction", "usage")

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.config = config
        check_settings(config)
        model_config(config.model)  # sizes that contradict each other are refused before data are read
        self.batches = ImageBatches(config.data, config.model.image_size, config.seed)
        self.text_file: Path | None = None
        self.model: UniTok | None = None
        self.lpips: LPIPS | None = None
        self.teacher: Teacher | None = None

    @property
    def num_samples(self) -> int:
        return len(self.batches)

    @property
    def epochs_differ(self) -> bool:  # type: ignore[override]
        return bool(self.batches.source.parts)

    @property
    def shard_sizes(self) -> list[int] | None:
        reader = reader_of(self.batches.source)
        return None if reader is None else reader.sizes

    def readings(self) -> list[Reading]:
        source, limit = self.batches.source, self.config.data.max_bad_fraction
        if not isinstance(source, MixtureSource):
            return [Reading(source.name, len(source), len(source), limit, source.num_lost)]
        members = zip(source.names, source.parts, source.counts, strict=True)
        return [
            Reading(name, len(part), count, limit, sum(leaf.num_lost for leaf in part.leaves()))
            for name, part, count in members
        ]

    def places(self, batch: dict[str, Any]) -> Tensor:
        return batch["places"]

    # ---- networks

    def check_batch(self) -> None:
        """ConfigError for a global micro-batch from which a loss learns nothing."""
        size = self.config.engine.micro_batch_size
        if self.config.loss.contrastive > 0 and size * world_size() < 2:
            raise ConfigError(
                f"engine.micro_batch_size={size} on one rank: the contrastive loss compares the images of one "
                "micro-batch, and of one alone it is always 0; raise it (accumulation adds nothing to it), or set "
                "loss.contrastive=0"
            )

    def build(self) -> dict[str, Network]:
        """Networks with the same weights on every rank."""
        config = self.config
        self.check_batch()
        sizes = config.model.model_dump()
        if sizes["text_tower"] is not None and sizes["text_tower"].get("tokenizer") == "sentencepiece":
            self.text_file = self._sentencepiece_file(sizes["text_tower"])
        if config.loss.lpips > 0:
            random = config.loss.lpips_weights == RANDOM_WEIGHTS
            self.lpips = LPIPS.random() if random else LPIPS.from_file(config.loss.lpips_weights)
        if config.distill.model is not None:
            torch.manual_seed(derive_seed("teacher", config.seed))  # random weights, if so, are equal on every rank
            self.teacher = Teacher(config.distill, config.model.image_size)
            sizes["distill_dim"] = self.teacher.dim
        torch.manual_seed(derive_seed("tokenizer", config.seed))
        self.model = UniTok(UniTokConfig(**sizes))
        if resumed_folder(config) is None:  # a checkpoint holds everything
            initial_weights(self.model, config)
        self.model.set_text_model(self.text_file)
        freeze(self.model, config)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if config.compile:
            compile_blocks(self.model)
        networks = {"tokenizer": Network(self.model, config.optimizer, config.ema_decay)}
        if config.discriminator.enabled:
            torch.manual_seed(derive_seed("discriminator", config.seed))
            start = config.discriminator.start_step
            network = build_discriminator(config.discriminator)
            networks["discriminator"] = Network(network, self._discriminator_optimizer(), None, start_step=start)
        return networks

    def _discriminator_optimizer(self) -> OptimizerConfig:
        settings = self.config.discriminator
        return settings.optimizer.model_copy(update={"start_step": settings.start_step})

    def _sentencepiece_file(self, tower: dict[str, Any]) -> Path:
        """Train the caption tokenizer once per run (or take that of `init_from`) and set the tower's vocabulary size to
        what it really has."""
        folder, resumed = Path(self.config.output_dir), resumed_folder(self.config)
        given = Path(self.config.init_from or "")  # a folder, or a released file
        given = given if given.is_dir() else given.parent
        if resumed is None and self.config.init_from and (given / TEXT_MODEL_FILE).is_file():
            resumed = given  # the initial weights belong to its pieces
        pieces = tower.get("vocab_size", TextTowerConfig.vocab_size) - 2
        path = run_sentencepiece(folder, TEXT_MODEL_FILE, resumed, self.batches.all_captions, pieces)
        tower["vocab_size"] = load_sentencepiece(path).get_piece_size() + 2
        return path

    # ---- a step

    def load_batch(self, indices: list[int], epoch: int) -> dict[str, Any]:
        batch = self.batches.load(indices, epoch)
        batch["places"] = self._places(indices, epoch)
        batch["keys"] = [self._read_key(*self.place(index, epoch)) for index in indices]
        if self.model is not None and self.config.loss.contrastive > 0:  # in a loader's worker, where there is one
            batch["text_ids"] = self.model.tokenize_text(batch["captions"])
        return batch

    def _places(self, indices: list[int], epoch: int) -> Tensor:
        """What `places` gives, of samples that have been loaded here: a bad one is bad in every epoch."""
        mixture = self.batches.source
        counts = torch.zeros(len(mixture.parts) or 1, 2, dtype=torch.int64)
        for index, of_epoch in (self.place(index, epoch) for index in indices):
            member = mixture.member(index) if isinstance(mixture, MixtureSource) else 0
            source, number = mixture.turn(index, of_epoch)
            counts[member] += torch.tensor([1, number in source.bad])
        return counts

    def sample_keys(self, indices: list[int], epoch: int) -> list[str]:
        turns = (self.batches.source.turn(*self.place(index, epoch)) for index in indices)
        return [source.key(number) for source, number in turns]

    def batch_keys(self, batch: dict[str, Any], indices: list[int], epoch: int) -> list[str]:
        return batch["keys"]

    def _read_key(self, index: int, epoch: int) -> str:
        """Of a sample that has been loaded here: as `_places`."""
        source, number = self.batches.source.turn(index, epoch)
        while number in source.bad:
            number = (number + 1) % len(source)
        return source.key(number)

    def prepare_step(self, batches: list[Any], step: int) -> None:
        """Stage one's losses are means over equally large batches: no counts are needed."""

    def micro_step(
        self, engines: dict[str, Any], batch: dict[str, Any], micro_index: int, step: int
    ) -> dict[str, Tensor]:
        weights, generator = self.config.loss, engines["tokenizer"]
        pixels = as_pixels(batch["pixels"].to(generator.device, non_blocking=True))
        text_ids = batch["text_ids"].to(generator.device) if weights.contrastive > 0 else None
        out = generator(
            pixels,
            text_ids,
            with_entropy=weights.entropy > 0,
            num_reconstructed=self.config.reconstruction_batch_size,
            drop_draws=self._drop_draws(pixels, micro_index, step),
        )
        out.reconstruction = out.reconstruction.float()
        target = pixels[: out.reconstruction.shape[0]]
        terms, metrics = self._terms(out, pixels, batch["captions"])
        adversarial = "discriminator" in engines and step >= self.config.discriminator.start_step
        augmentation = Augmentation(self.config.discriminator, self.config.seed, step, micro_index)
        if adversarial:
            part = self._adversarial(engines["discriminator"].module, out, target, augmentation, step, metrics)
        else:
            part = self._reconstruction(out.reconstruction, target, metrics)
        generator.backward(terms + part)
        if adversarial:
            with self._autocast(pixels.device):
                loss, judged = discriminator_losses(
                    engines["discriminator"],
                    target,
                    out.reconstruction.detach(),
                    augmentation,
                    self.config.discriminator,
                )
            engines["discriminator"].backward(loss)
            metrics |= judged
        counts = self.batches.count_sources(batch, world_size() * self.config.engine.accumulation_steps)
        return self._finish(metrics, out, target) | counts

    def _drop_draws(self, pixels: Tensor, micro_index: int, step: int) -> Tensor | None:
        """Draws for stochastic depth, by an image's place in the global micro-batch."""
        if self.config.model.drop_path == 0:
            return None
        assert self.model is not None
        count = pixels.shape[0]
        rng = torch_rng("drop path", self.config.seed, step, micro_index)
        draws = torch.rand(count * world_size(), self.model.num_drop_draws, generator=rng)
        return draws[rank() * count : (rank() + 1) * count].to(pixels.device)

    def _terms(self, out: Any, pixels: Tensor, captions: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses besides reconstruction and adversarial ones: their weighted sum, and each of them."""
        weights = self.config.loss
        found: dict[str, tuple[float, Tensor]] = {"vq": (weights.vq, out.vq_loss)}
        if out.text_embedding is not None:
            has_text = torch.tensor([bool(text) for text in captions], device=pixels.device)
            contrastive = contrastive_loss(out.image_embedding, out.text_embedding, out.logit_scale, has_text)
            found["contrastive"] = (weights.contrastive, contrastive)
        if out.entropy_loss is not None:
            found["entropy"] = (weights.entropy, out.entropy_loss)
        if self.teacher is not None:
            self.teacher.to(pixels.device)
            grid = (pixels.shape[-2] // DOWNSAMPLING, pixels.shape[-1] // DOWNSAMPLING)
            with self._autocast(pixels.device):
                wanted = self.teacher(pixels)
            distilled = distillation_loss(out.distilled, wanted, grid, self.config.model.num_query_tokens)
            found["distill"] = (self.config.distill.weight, distilled)
        total = torch.stack([weight * value for weight, value in found.values()]).sum()
        return total, {name: value for name, (_, value) in found.items()}

    def _reconstruction(self, image: Tensor, target: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """Pixel losses and LPIPS of the images, weighted."""
        weights = self.config.loss
        loss = reconstruction_loss(image, target, weights.l1, weights.l2)
        if self.lpips is not None:
            with self._autocast(image.device):
                metrics["lpips"] = self.lpips.to(image.device)(image, target)
            loss = loss + weights.lpips * metrics["lpips"]
        metrics["reconstruction"] = loss
        return loss

    def _adversarial(
        self,
        discriminator: Any,
        out: Any,
        target: Tensor,
        augmentation: Augmentation,
        step: int,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """A term whose gradient is that of the reconstruction losses plus the weighted adversarial loss.

        Both gradients are taken at the reconstruction, on a detached leaf: the generator's parameters, which ZeRO may
        hold in parts, are touched by one backward pass only.
        """
        settings = self.config.discriminator
        leaf = out.reconstruction.detach().requires_grad_()
        reconstruction = self._reconstruction(leaf, target, metrics)
        with self._autocast(leaf.device):
            adversarial = adversarial_loss(discriminator, leaf, augmentation)
        (reconstruction_grad,) = torch.autograd.grad(reconstruction, leaf)
        (adversarial_grad,) = torch.autograd.grad(adversarial, leaf)
        weight = torch.tensor(self.config.loss.adversarial * self._ramp(step), device=leaf.device)
        if settings.adaptive:
            shape = torch.Size((3, out.last_hidden.shape[1], 3, 3))
            weight = weight * adaptive_weight(
                out.last_hidden, reconstruction_grad, adversarial_grad, shape, settings.adaptive_kind
            )
        metrics |= {"adversarial": adversarial, "adversarial_weight": weight}
        return (out.reconstruction * (reconstruction_grad + weight * adversarial_grad)).sum()

    def _ramp(self, step: int) -> float:
        """Share of the adversarial weight that counts at this step."""
        settings = self.config.discriminator
        update = {"warmup_steps": settings.warmup_steps}
        return warmup_ramp(self._discriminator_optimizer().model_copy(update=update), step)

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        """bf16 products in frozen networks and discriminator where the engine has them in the tokenizer."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.config.engine.precision == "autocast")

    def _finish(self, metrics: dict[str, Tensor], out: Any, target: Tensor) -> dict[str, Tensor]:
        """Metrics of the micro-batch: losses, squared error, and the health of every codebook over all ranks."""
        assert self.model is not None
        weights = self.config.loss.model_dump() | {"distill": self.config.distill.weight}
        summed = ("vq", "contrastive", "entropy", "distill")
        total = metrics["reconstruction"] + sum(weights[name] * metrics[name] for name in summed if name in metrics)
        mse = F.mse_loss(out.reconstruction.detach().clamp(-1, 1), target)
        health = usage_statistics(out.usage, self.model.quantizer.usage_average)
        every = {f"{name}_{k}": value for name, values in health.items() for k, value in enumerate(values)}
        means = {name: values.mean() for name, values in health.items()}
        metrics = {"loss": total, **metrics, "mse": mse, **means, **every}
        return {name: value.detach() for name, value in metrics.items()}

    def after_step(self, modules: dict[str, nn.Module], step: int) -> Replaced | None:
        """Keep the temperature of the contrastive loss in [1/100, 1], as CLIP does; revive dead codes when due."""
        model = modules["tokenizer"]
        if model.logit_scale.requires_grad:
            clamp_parameter_(model.logit_scale, 0.0, MAX_LOGIT_SCALE)
        revive = self.config.revive
        if revive.every and (step + 1) % revive.every == 0 and step < (revive.until or self.config.steps):
            replaced = revive_dead_codes_(model.quantizer, revive.below, self.config.seed, step)
            return None if replaced is None else {"tokenizer": {"quantizer.codebooks": replaced}}
        return None

    def extra_state(self) -> dict[str, Any]:
        """How images are prepared: it came with the initial weights, which a resumed run does not read again. And whose
        turn it is in a mixture."""
        assert self.model is not None
        return {"preprocess": self.model.config.preprocess, "mixture": _shares(self.batches.source)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """CheckpointError when the members of a mixture share an epoch otherwise: the order would be another one."""
        assert self.model is not None
        present = _shares(self.batches.source)
        check_same_mixture(self.config.output_dir, state.get("mixture", present), present)  # once it was not saved
        self.model.config.preprocess = state["preprocess"]

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Write the tokenizer (EMA weights if there are any) as a UniTok folder."""
        model = modules["tokenizer"]
        model.set_text_model(self.text_file)
        model.save_pretrained(folder)


def _shares(source: Source) -> list[Any] | None:
    """What decides, with the seed, whose turn it is in a mixture and in those within it; None of any other source."""
    if not isinstance(source, MixtureSource):
        return None
    members = zip(source.names, source.shares, map(_shares, source.parts), strict=True)
    return [[name, *share, *([] if inner is None else [inner])] for name, share, inner in members]
