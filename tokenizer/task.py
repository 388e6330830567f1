"""Stage one as a training task: batches, networks and losses. The loop (`unitok.core.loop`) drives it."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unitok.core.config import Config
from unitok.core.distributed import all_reduce_sum_
from unitok.core.engine import clamp_parameter_
from unitok.core.errors import ConfigError
from unitok.core.optim import OptimizerConfig
from unitok.core.rng import derive_seed
from unitok.core.run import TrainConfig, resumed_folder
from unitok.core.signature import config_from_signature
from unitok.core.task import Network, Task
from unitok.data.images import ImageBatches, ImageDataConfig
from unitok.data.sentencepieces import load_sentencepiece, run_sentencepiece
from unitok.tokenizer.adversarial import PatchDiscriminator, adaptive_weight
from unitok.tokenizer.configuration import TextTowerConfig, UniTokConfig
from unitok.tokenizer.losses import contrastive_loss, hinge_discriminator_loss, reconstruction_loss
from unitok.tokenizer.model import MAX_LOGIT_SCALE, UniTok
from unitok.tokenizer.quantizer import usage_statistics
from unitok.tokenizer.text import TEXT_MODEL_FILE

UniTokSizes = config_from_signature(UniTokConfig, "UniTokSizes")


class LossWeights(Config):
    """Weights of the generator's losses (paper, section 3.1; defaults as in the released training code)."""

    l1: float = Field(0.2, ge=0)
    l2: float = Field(1.0, ge=0)
    adversarial: float = Field(0.4, ge=0)
    contrastive: float = Field(1.0, ge=0)
    vq: float = Field(1.0, ge=0)
    entropy: float = Field(0.0, ge=0)


class DiscriminatorConfig(Config):
    """The adversarial part. It starts at `start_step` and its weight grows linearly over `warmup_steps`."""

    enabled: bool = True
    start_step: int = Field(0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    adaptive: bool = True
    channels: int = Field(32, ge=1)
    num_layers: int = Field(3, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.9), weight_decay=0.0)


class TokenizerTrainConfig(TrainConfig):
    """Everything of a stage-one run."""

    model: UniTokSizes = UniTokSizes()
    data: ImageDataConfig = ImageDataConfig()
    loss: LossWeights = LossWeights()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, weight_decay=0.02)
    ema_decay: float | None = Field(0.9999, ge=0, lt=1)
    gradient_checkpointing: bool = False


class TokenizerTask(Task):
    """Two networks: "tokenizer" (UniTok) and, from its start step on, "discriminator"."""

    name = "tokenizer"
    incidental = ("data.cache", "data.max_bad_fraction", "gradient_checkpointing")
    headline = ("loss", "reconstruction", "usage")

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.config = config
        if config.loss.contrastive > 0 and config.model.text_tower is None:
            raise ConfigError(
                "loss.contrastive > 0 needs a text tower: set model.text_tower, or loss.contrastive=0 to do without"
            )
        if config.discriminator.optimizer.start_step not in (0, config.discriminator.start_step):
            raise ConfigError(
                f"discriminator.optimizer.start_step={config.discriminator.optimizer.start_step} contradicts "
                f"discriminator.start_step={config.discriminator.start_step}; set the latter only"
            )
        UniTokConfig(**config.model.model_dump())  # sizes that contradict each other are refused before data are read
        self.batches = ImageBatches(config.data, config.model.image_size, config.seed)
        self.text_file: Path | None = None
        self.model: UniTok | None = None

    @property
    def num_samples(self) -> int:
        return len(self.batches)

    def build(self) -> dict[str, Network]:
        """Networks with the same weights on every rank."""
        config = self.config
        sizes = config.model.model_dump()
        if sizes["text_tower"] is not None and sizes["text_tower"].get("tokenizer") == "sentencepiece":
            self.text_file = self._sentencepiece_file(sizes["text_tower"])
        torch.manual_seed(derive_seed("tokenizer", config.seed))
        self.model = UniTok(UniTokConfig(**sizes))
        self.model.set_text_model(self.text_file)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        networks = {"tokenizer": Network(self.model, config.optimizer, config.ema_decay)}
        if config.discriminator.enabled:
            d = config.discriminator
            torch.manual_seed(derive_seed("discriminator", config.seed))
            discriminator = PatchDiscriminator(d.channels, d.num_layers)
            optimizer = d.optimizer.model_copy(update={"start_step": d.start_step})
            networks["discriminator"] = Network(discriminator, optimizer, None, start_step=d.start_step)
        return networks

    def _sentencepiece_file(self, tower: dict[str, Any]) -> Path:
        """Train the caption tokenizer once per run and set the tower's vocabulary size to what it really has."""
        folder, resumed = Path(self.config.output_dir), resumed_folder(self.config)
        pieces = tower.get("vocab_size", TextTowerConfig.vocab_size) - 2
        path = run_sentencepiece(folder, TEXT_MODEL_FILE, resumed, self.batches.all_captions, pieces)
        tower["vocab_size"] = load_sentencepiece(path).get_piece_size() + 2
        return path

    def load_batch(self, indices: list[int], epoch: int) -> dict[str, Any]:
        return self.batches.load(indices, epoch)

    def prepare_step(self, batches: list[Any], step: int) -> None:
        """Stage one's losses are means over equally large batches: no counts are needed."""

    def micro_step(
        self, engines: dict[str, Any], batch: dict[str, Any], micro_index: int, step: int
    ) -> dict[str, Tensor]:
        weights, generator = self.config.loss, engines["tokenizer"]
        pixels = batch["pixels"].to(generator.device)
        text_ids = None
        if weights.contrastive > 0:
            text_ids = self.model.tokenize_text(batch["captions"]).to(generator.device)
        out = generator(pixels, text_ids, with_entropy=weights.entropy > 0)
        out.reconstruction = out.reconstruction.float()
        loss = weights.vq * out.vq_loss
        metrics = {"vq": out.vq_loss}
        if text_ids is not None:
            has_text = torch.tensor([bool(text) for text in batch["captions"]], device=generator.device)
            contrastive = contrastive_loss(out.image_embedding, out.text_embedding, out.logit_scale, has_text)
            loss = loss + weights.contrastive * contrastive
            metrics["contrastive"] = contrastive
        if out.entropy_loss is not None:
            loss = loss + weights.entropy * out.entropy_loss
            metrics["entropy"] = out.entropy_loss
        if "discriminator" in engines and step >= self.config.discriminator.start_step:
            loss = loss + self._adversarial(engines["discriminator"], out, pixels, step, metrics)
        else:
            reconstruction = reconstruction_loss(out.reconstruction, pixels, weights.l1, weights.l2)
            metrics["reconstruction"] = reconstruction
            loss = loss + reconstruction
        generator.backward(loss)
        if "discriminator" in engines and step >= self.config.discriminator.start_step:
            metrics["discriminator"] = self._discriminator_backward(engines["discriminator"], out, pixels)
        return self._finish(metrics, out, pixels)

    def _adversarial(
        self, discriminator: Any, out: Any, pixels: Tensor, step: int, metrics: dict[str, Tensor]
    ) -> Tensor:
        """A term whose gradient is that of the reconstruction losses plus the weighted adversarial loss.

        Both gradients are taken at the reconstruction, on a detached leaf: the generator's parameters, which ZeRO may
        hold in parts, are touched by one backward pass only.
        """
        weights, settings = self.config.loss, self.config.discriminator
        leaf = out.reconstruction.detach().requires_grad_()
        reconstruction = reconstruction_loss(leaf, pixels, weights.l1, weights.l2)
        adversarial = -discriminator.module(leaf).float().mean()
        (reconstruction_grad,) = torch.autograd.grad(reconstruction, leaf)
        (adversarial_grad,) = torch.autograd.grad(adversarial, leaf)
        ramp = min(1.0, (step - settings.start_step + 1) / max(1, settings.warmup_steps))
        weight = torch.tensor(weights.adversarial * ramp, device=leaf.device)
        if settings.adaptive:
            kernel_shape = torch.Size((3, out.last_hidden.shape[1], 3, 3))
            weight = weight * adaptive_weight(out.last_hidden, reconstruction_grad, adversarial_grad, kernel_shape)
        metrics |= {"reconstruction": reconstruction, "adversarial": adversarial, "adversarial_weight": weight}
        return (out.reconstruction * (reconstruction_grad + weight * adversarial_grad)).sum()

    def _discriminator_backward(self, discriminator: Any, out: Any, pixels: Tensor) -> Tensor:
        """Real and reconstructed images in one forward pass of the engine."""
        logits = discriminator(torch.cat([pixels, out.reconstruction.detach()])).float()
        loss = hinge_discriminator_loss(*logits.chunk(2))
        discriminator.backward(loss)
        return loss

    def _finish(self, metrics: dict[str, Tensor], out: Any, pixels: Tensor) -> dict[str, Tensor]:
        weights = self.config.loss
        total = metrics["reconstruction"] + weights.vq * metrics["vq"]
        if "contrastive" in metrics:
            total = total + weights.contrastive * metrics["contrastive"]
        if "entropy" in metrics:
            total = total + weights.entropy * metrics["entropy"]
        mse = F.mse_loss(out.reconstruction.detach().clamp(-1, 1), pixels)
        counts_KV = all_reduce_sum_(out.usage.clone())
        health = {name: value.mean() for name, value in usage_statistics(counts_KV).items()}
        metrics = {"loss": total, **metrics, "mse": mse, **health}
        return {name: value.detach() for name, value in metrics.items()}

    def after_step(self, modules: dict[str, nn.Module], step: int) -> None:
        """Keep the temperature of the contrastive loss in [1/100, 1], as CLIP does."""
        clamp_parameter_(modules["tokenizer"].logit_scale, 0.0, MAX_LOGIT_SCALE)

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Write the tokenizer (EMA weights if there are any) as a UniTok folder."""
        model = modules["tokenizer"]
        model.set_text_model(self.text_file)
        model.save_pretrained(folder)
