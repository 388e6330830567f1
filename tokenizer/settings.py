"""Settings of a stage-one run. Defaults are those of UniTok's released training code, unless a comment says why not."""

from typing import Literal

from pydantic import Field

from unitok.core.config import Config
from unitok.core.errors import ConfigError
from unitok.core.optim import OptimizerConfig
from unitok.core.run import TrainConfig
from unitok.core.signature import config_from_signature
from unitok.data.images import ImageDataConfig
from unitok.tokenizer.configuration import UniTokConfig

UniTokSizes = config_from_signature(UniTokConfig, "UniTokSizes")
RANDOM_WEIGHTS = "random"  # in the place of a file: random weights, for tests and for trying out


class LossWeights(Config):
    """Weights of the generator's losses (paper, section 3.1). `lpips`, `contrastive` and `entropy` cost nothing at 0.

    `lpips_weights`: file of the perceptual network, `hub:OWNER/REPOSITORY/FILE`, or "random". `lpips` is 0 unless set
    (released: 1), because it needs that file.
    """

    l1: float = Field(0.2, ge=0)
    l2: float = Field(1.0, ge=0)
    lpips: float = Field(0.0, ge=0)
    adversarial: float = Field(0.4, ge=0)
    contrastive: float = Field(1.0, ge=0)
    vq: float = Field(1.0, ge=0)
    entropy: float = Field(0.0, ge=0)
    lpips_weights: str | None = None


class DiscriminatorConfig(Config):
    """The adversarial part. It starts at `start_step`; its weight grows linearly over `warmup_steps`.

    kind: "dino" = heads on frozen DINOv2-S features (released), "patch" = a small convolutional network that needs no
    weights of others. `dino_weights`: as `loss.lpips_weights`.
    loss: of the discriminator. adaptive: scale the adversarial loss by the ratio of gradient norms at the decoder's
    last layer, kept within the bounds of `adaptive_kind` (0 to 4, the numbers of the released code).
    augment_probability, cutout: differentiable augmentation of what it sees (arXiv 2006.10738); `blur_steps`: a blur
    that fades out over so many steps from `start_step` on (released: twice the warm-up).
    norm: of its DINO heads; "bn" normalises over groups of 8 images of a rank, "gn" each image alone.
    consistency: weight of balanced consistency (arXiv 2002.04724), the squared change of the logits under
    augmentation; 0 for none.
    """

    enabled: bool = True
    kind: Literal["patch", "dino"] = "patch"
    start_step: int = Field(0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    loss: Literal["hinge", "softplus", "linear"] = "hinge"
    adaptive: bool = True
    adaptive_kind: int = Field(0, ge=0, le=4)
    augment_probability: float = Field(0.0, ge=0, le=1)
    cutout: float = Field(0.2, ge=0, le=1)
    blur_steps: int = Field(0, ge=0)
    consistency: float = Field(0.0, ge=0)
    consistency_cutout: float = Field(0.2, ge=0, le=1)
    # only for the patch discriminator
    channels: int = Field(32, ge=1)
    num_layers: int = Field(3, ge=1)
    # only for the one on DINO
    dino_weights: str | None = None
    key_depths: tuple[int, ...] = (0, 2, 5, 8, 11)
    kernel_size: int = Field(9, ge=1)
    norm: Literal["gn", "bn"] = "gn"
    spectral_norm: bool = False
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.9), weight_decay=0.0)


class TextLockConfig(Config):
    """Keep the text tower as it is, but for its last `unlocked_layers` groups (projection; last block with the final
    norm; the blocks before it, one by one) and, if `train_layer_norm`, its LayerNorms."""

    enabled: bool = False
    unlocked_layers: int = Field(0, ge=0)
    train_layer_norm: bool = False


class DistillConfig(Config):
    """Distil a frozen vision model (any name of timm) into the code features: 1 - cosine at each position.

    `weights`: a file for timm's model, `hub:...`, or "random". `size`: side of the images it sees (None: its own).
    """

    model: str | None = None
    weights: str | None = None
    weight: float = Field(1.0, ge=0)
    size: int | None = Field(None, ge=1)


class RevivalConfig(Config):
    """Each `every` steps, entries chosen less often than `below` / V on average become vectors of the batch.

    `until`: the last step that does so (None: to the end). The averaged weights take revived entries over at once.
    """

    every: int = Field(0, ge=0)
    until: int | None = Field(None, ge=1)
    below: float = Field(0.01, gt=0, lt=1)


class TokenizerTrainConfig(TrainConfig):
    """Everything of a stage-one run.

    trainable: "all", or "decoder" = decoder-only fine-tuning of `init_from`: encoder and codebooks stay, so its codes
    keep their meaning. init_from: weights to begin with, a UniTok folder or a released `.pth`. init_clip: encoder and
    text tower from a ViTamin CLIP checkpoint in OpenCLIP's layout.
    reconstruction_batch_size: images of each rank's micro-batch that are decoded (all by default; the decoder costs
    most). So which images they are depends on the number of ranks.
    compile: torch.compile for the blocks of encoder, decoder and text tower (not with ZeRO 3).
    """

    model: UniTokSizes = UniTokSizes()
    data: ImageDataConfig = ImageDataConfig()
    loss: LossWeights = LossWeights()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, weight_decay=0.02)
    ema_decay: float | None = Field(0.9999, ge=0, lt=1)
    trainable: Literal["all", "decoder"] = "all"
    init_from: str | None = None
    init_clip: str | None = None
    text_lock: TextLockConfig = TextLockConfig()
    distill: DistillConfig = DistillConfig()
    revive: RevivalConfig = RevivalConfig()
    reconstruction_batch_size: int | None = Field(None, ge=1)
    gradient_checkpointing: bool = False
    compile: bool = False


def check_settings(config: TokenizerTrainConfig) -> None:
    """ConfigError where settings contradict each other, before anything heavy is done."""
    rules: list[tuple[bool, str]] = [
        (
            config.loss.contrastive > 0 and config.model.text_tower is None,
            "loss.contrastive > 0 needs a text tower: set model.text_tower, or loss.contrastive=0 to do without",
        ),
        (
            config.discriminator.optimizer.start_step not in (0, config.discriminator.start_step),
            f"discriminator.optimizer.start_step={config.discriminator.optimizer.start_step} contradicts "
            f"discriminator.start_step={config.discriminator.start_step}; set the latter only",
        ),
        (
            config.trainable == "decoder" and config.init_from is None,
            "trainable=decoder needs init_from: the tokenizer whose encoder and codebooks are to stay",
        ),
        (
            config.trainable == "decoder" and config.loss.contrastive + config.loss.entropy > 0,
            "trainable=decoder trains with reconstruction and adversarial losses only: set loss.contrastive=0 and "
            "loss.entropy=0",
        ),
        (
            config.trainable == "decoder" and (config.revive.every > 0 or config.distill.model is not None),
            "trainable=decoder keeps the codes as they are: set revive.every=0 and distill.model=null",
        ),
        (
            config.init_from is not None and config.init_clip is not None,
            "init_from and init_clip both give the encoder's weights; set one of them",
        ),
        (
            config.loss.entropy > 0 and config.model.quantizer == "residual",
            "model.quantizer=residual has no entropy loss; set loss.entropy=0",
        ),
        (
            config.compile and config.engine.zero_stage == 3,
            "compile=true does not go with engine.zero_stage=3, which gathers parameters as modules run; use 1 or 2",
        ),
        (
            config.discriminator.enabled and config.loss.adversarial == 0,
            "loss.adversarial=0 leaves a discriminator without use; set discriminator.enabled=false too",
        ),
        (
            config.text_lock.enabled and config.loss.contrastive == 0,
            "text_lock.enabled=true locks a text tower that loss.contrastive=0 does not train; set one of them",
        ),
        (
            config.text_lock.unlocked_layers > 0 and not config.text_lock.enabled,
            f"text_lock.unlocked_layers={config.text_lock.unlocked_layers} counts with text_lock.enabled=true only",
        ),
        (
            config.distill.weights is not None and config.distill.model is None,
            "distill.weights is set, but no teacher: set distill.model too",
        ),
        (
            (config.reconstruction_batch_size or 0) > config.engine.micro_batch_size,
            f"reconstruction_batch_size={config.reconstruction_batch_size} is more than "
            f"engine.micro_batch_size={config.engine.micro_batch_size}",
        ),
        (
            config.model.distill_dim is not None and config.distill.model is None,
            "model.distill_dim follows from the teacher; set distill.model",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise ConfigError(message)


def model_config(sizes: UniTokSizes) -> UniTokConfig:
    """The checked model configuration of the settings' `model` part."""
    return UniTokConfig(**sizes.model_dump())
