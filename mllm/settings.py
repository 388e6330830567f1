"""Settings of stage two: what is trained on what, and how a step is computed."""

from typing import Literal, get_args

from pydantic import Field, model_validator

from unitok.core.config import Config
from unitok.core.optim import OptimizerConfig
from unitok.core.run import TrainConfig
from unitok.data.mixtures import SourceShare
from unitok.mllm.build import BackboneConfig, UniTokMLLMSettings

Recipe = Literal["warmup", "pretrain", "sft", "align", "llava_sft"]
Attention = Literal["auto", "flash", "sdpa", "flex"]
CrossEntropy = Literal["auto", "chunked", "liger", "plain"]
Kind = Literal["text_to_image", "caption", "plain", "chat", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class MixtureConfig(Config):
    """Relative shares of what is learnt.

    text_to_image: codes from a caption. caption: a caption from the image, between the image's marks. plain: the same
    as LLaVA aligns with, the image first and no marks. chat: answers to questions or conversations. text: documents of
    `data.texts` alone. A sample takes part in those of the first four that it has words for; one with words for none
    of them is a bad sample. Documents take the place of `text`'s share of the samples of every epoch.
    """

    text_to_image: float = Field(0.6, ge=0)
    caption: float = Field(0.1, ge=0)
    plain: float = Field(0.0, ge=0)
    chat: float = Field(0.3, ge=0)
    text: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _some_kind(self) -> "MixtureConfig":
        if self.total <= 0:
            raise ValueError(f"{', '.join(KINDS[:-1])} and {KINDS[-1]} are all 0; give at least one of them a share")
        return self

    @property
    def total(self) -> float:
        return sum(getattr(self, kind) for kind in KINDS)


class MllmDataConfig(Config):
    """Code shards of stage one, documents, and how both become sequences.

    `codes` is a folder of code shards, a brace pattern of several, or a list of {source, weight} (see docs/data.md).
    `texts` are files of documents for the mixture's `text`: `.jsonl` with a "text" in each line, or `.txt` with one
    document per line. A document of more than `max_length` ids gives one part each time it is its turn, in order.

    `unconditional` is the share of text-to-image samples without their text (for guidance); `questions_per_image`
    questions make one conversation, in words drawn anew if `paraphrase` (made for the shapes world: its rules spoil
    other questions). Of an image's captions one is drawn with a chance that grows with its number of words to the power
    `caption_detail`: long ones say more of what is to be drawn. Samples that cannot be read or have no words for the
    mixture are left out and logged; a share of them above `max_bad_fraction` ends it.

    Long samples are cut: what stands before an image that is drawn to `max_caption` ids, any sample to `max_length`:
    captions at their end, conversations behind the last answer that fits, or in mid-answer where that is the first one.
    The log counts them (`samples_cut`). One that cannot hold its image and something to be learnt is a bad sample.

    `code_noise`: of a picture that is to be drawn, up to this share of positions (how many is drawn for each sample) is
    read as random codes, and still predicted as it was. The positions before then tell less than the text, which would
    else be learnt last: it decides one position of an object, and all others follow from that one.

    `classes`: a file of class folders, one a line; every image's words are then its class's token and nothing else
    (`backbone.class_tokens` makes these single pieces of the text).

    `pack`: the samples of a micro-batch stand one behind the other in as few rows of at most `max_length` ids as
    possible, each seeing only itself; what is learnt in a step stays the same.
    """

    codes: str | list[SourceShare] = "runs/codes"
    classes: str | None = None
    texts: list[str] = []
    mixture: MixtureConfig = MixtureConfig()
    unconditional: float = Field(0.1, ge=0, le=1)
    caption_detail: float = Field(0.0, ge=0)
    code_noise: float = Field(0.0, ge=0, le=1)
    questions_per_image: int = Field(4, ge=1)
    paraphrase: bool = False
    max_length: int = Field(2048, ge=4)
    max_caption: int = Field(1750, ge=2)
    pack: bool = False
    max_bad_fraction: float = Field(0.01, ge=0, le=1)

    @model_validator(mode="after")
    def _texts_are_used(self) -> "MllmDataConfig":
        if bool(self.texts) != (self.mixture.text > 0):
            raise ValueError(
                f"texts={self.texts} with mixture.text={self.mixture.text}: documents need both, files and a share"
            )
        return self


class LoraConfig(Config):
    """Low-rank adapters on the backbone's linear maps, trained in place of backbone and text head.

    targets: ends of module names, such as q_proj; empty: every linear map of the backbone. An adapter's product is
    scaled by alpha / rank.
    """

    rank: int = Field(64, ge=1)
    alpha: float = Field(128.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = []


class SamplerDefaults(Config):
    """How images are sampled unless told otherwise: `image_sampler` in the export's generation_config.json.

    `depth_temperature` is that of all codes of a position but the first (null: `temperature`).
    """

    guidance_scale: float = Field(5.0, ge=0)
    temperature: float = Field(0.9, gt=0)
    top_k: int = Field(2048, ge=0)
    top_p: float = Field(0.96, gt=0, le=1)
    depth_temperature: float | None = Field(None, gt=0)


class MllmTrainConfig(TrainConfig):
    """Everything of a stage-two run.

    recipe: which parts are trained (see `unitok.mllm.recipes`). init_from: the export folder of the step before, whose
    weights, sizes, layout, text tokenizer and visual tokenizer are taken; else `tokenizer` (the folder of the visual
    tokenizer that made the codes), `model` and `backbone` say what is built. lora: adapters in place of the backbone;
    an export holds them merged.

    image_z_weight: weight of the mean squared largest logit of the codes, part of the image loss; it keeps logits from
    growing without bound. loss_normalisation: "tokens" weighs text and image by the numbers of ids and codes of the
    whole step, "modality" alike, those that the step holds; `image_weight` is a factor on the image loss in both.

    attention: how the backbone attends; "auto" is flash-attn on a GPU where it is installed and engine.precision is not
    fp32, else sdpa. For packed rows sdpa gets masks of T x T, while flash and flex pass over what is masked.
    cross_entropy: "chunked" computes logits a few tokens at a time and again in the backward pass, "liger" by
    liger-kernel's fused kernel (text head), "plain" all at once; "auto" is liger on a GPU where it is installed, else
    chunked. gradient_checkpointing: layers of backbone and depth transformer are computed again in the backward pass.
    """

    recipe: Recipe = "pretrain"
    init_from: str | None = None
    tokenizer: str = "runs/tokenizer/export"
    model: UniTokMLLMSettings = UniTokMLLMSettings()
    backbone: BackboneConfig = BackboneConfig()
    lora: LoraConfig | None = None
    data: MllmDataConfig = MllmDataConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-5, weight_decay=0.0)
    ema_decay: float | None = Field(None, ge=0, lt=1)
    loss_normalisation: Literal["tokens", "modality"] = "tokens"
    image_weight: float = Field(1.0, ge=0)
    image_z_weight: float = Field(5e-5, ge=0)
    sampler: SamplerDefaults = SamplerDefaults()
    attention: Attention = "auto"
    cross_entropy: CrossEntropy = "auto"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _init_from_decides(self) -> "MllmTrainConfig":
        if self.init_from is not None:
            for name in ("tokenizer", "model", "backbone"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"init_from={self.init_from} and {name} are both set: an export folder has its own; "
                        f"remove {name}"
                    )
        return self
