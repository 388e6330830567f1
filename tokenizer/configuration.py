"""Configuration of the UniTok tokenizer: one flat, validated set of sizes (paper: arXiv 2502.20321, section 3)."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from unitok.core.errors import ConfigError
from unitok.data.preprocess import Preprocess

TextTokenizerKind = Literal["clip", "sentencepiece"]
ProjectionKind = Literal["attention", "linear"]
QuantizerKind = Literal["multi_codebook", "residual"]
CodebookInit = Literal["uniform", "normal"]
DOWNSAMPLING = 16  # stem, two convolutional stages and the strided convolution before the blocks halve the image each


@dataclass
class TextTowerConfig:
    """Sizes of the CLIP text tower; `vocab_size` counts the start and end tokens, which take its two highest ids."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    heads: int = 12
    layers: int = 12
    tokenizer: TextTokenizerKind = "clip"


# The ViTamin sizes (arXiv 2404.02132, table 2) under the names that released checkpoints store.
VITAMIN_SIZES: dict[str, dict[str, Any]] = {
    "vitamin_small": {"stem_width": 64, "stage_widths": (64, 128), "width": 384, "depth": 14, "num_heads": 6},
    "vitamin_base": {"stem_width": 128, "stage_widths": (128, 256), "width": 768, "depth": 14, "num_heads": 12},
    "vitamin_large": {"stem_width": 160, "stage_widths": (160, 320), "width": 1024, "depth": 31, "num_heads": 16},
}


_POSITIVE = (
    "image_size", "stem_width", "width", "depth", "num_heads", "num_codebooks", "codebook_size", "code_dim", "embed_dim"
)  # fmt: skip


def _check_positive(sizes: Mapping[str, Any]) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1")


def _check_text_tower(tower: Any) -> None:
    """ConfigError unless `tower` is None or fits TextTowerConfig."""
    if tower is None:
        return
    known = [field.name for field in fields(TextTowerConfig)]
    if not isinstance(tower, Mapping):
        raise ConfigError(f"text_tower={tower!r}: expected null or the keys {', '.join(known)}")
    for name in tower:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown key 'text_tower.{name}'; the nearest known key is 'text_tower.{near}'")
    values = asdict(TextTowerConfig(**tower))
    kind = values.pop("tokenizer")
    if kind not in get_args(TextTokenizerKind):
        raise ConfigError(f"text_tower.tokenizer={kind!r}: expected one of {', '.join(get_args(TextTokenizerKind))}")
    _check_positive({f"text_tower.{name}": value for name, value in values.items()})
    if values["context_length"] < 3:
        raise ConfigError(
            f"text_tower.context_length={values['context_length']}: expected at least 3, for start, a word and end"
        )
    if values["width"] % values["heads"]:
        raise ConfigError(f"text_tower.width={values['width']} does not divide into heads={values['heads']}")


_CHOICES = {
    "projection": ProjectionKind, "quantizer": QuantizerKind, "codebook_init": CodebookInit, "preprocess": Preprocess
}  # fmt: skip


class UniTokConfig(PretrainedConfig):
    """Sizes of encoder, projections, quantizer, decoder and text tower. The defaults are the released ViTamin-L.

    `code_dim` is the width of *one* chunk; the code space has `num_codebooks * code_dim` channels. `codebook_size` is
    per codebook. With `quantizer: residual` every codebook codes what the ones before it left over, so `code_dim` is
    the width of the whole code space. `num_codebooks: 1` is plain vector quantization.
    `text_tower: null` gives a tokenizer without the contrastive side (open_clip is then not needed).
    `codebook_init`: "uniform" entries within `code_dim**-0.5 / 36` as released, or "normal" ones of about unit length
    (they turn more slowly under Adam, which keeps small codebooks from collapsing in short runs).
    `decoder_init_gain`: of the Xavier weights of the decoder's convolutions, 0.5 as released; None: they begin as wide
    as the encoder's, which keeps small codebooks from collapsing in short runs.
    `drop_path`: stochastic depth of the last block, growing linearly from 0 at the first (training only).
    `distill_dim`: width of a frozen teacher whose features the code features learn to predict; None without.
    `preprocess`: how images become pixels for this tokenizer (`unitok.data.transforms.eval_transform`).
    Raises ConfigError where the sizes contradict each other.
    """

    model_type = "unitok"

    def __init__(
        self,
        image_size: int = 256,
        stem_width: int = 160,
        stage_widths: tuple[int, int] = (160, 320),
        stage_depths: tuple[int, int] = (2, 4),
        width: int = 1024,
        depth: int = 31,
        num_heads: int = 16,
        mlp_ratio: float = 2.0,
        decoder_stage_depths: tuple[int, int] = (4, 2),
        num_query_tokens: int = 0,
        projection: ProjectionKind = "attention",
        projection_causal: bool = False,
        projection_mlp_ratio: float = 2.0,
        quantizer: QuantizerKind = "multi_codebook",
        num_codebooks: int = 8,
        codebook_size: int = 4096,
        code_dim: int = 8,
        commitment_weight: float = 0.25,
        entropy_temperature: float = 0.01,
        embed_dim: int = 768,
        text_tower: dict[str, Any] | TextTowerConfig | None = None,
        initializer_range: float = 0.02,
        codebook_init: CodebookInit = "uniform",
        decoder_init_gain: float | None = 0.5,
        drop_path: float = 0.0,
        distill_dim: int | None = None,
        preprocess: Preprocess = "plain",
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.stem_width = stem_width
        self.stage_widths = list(stage_widths)
        self.stage_depths = list(stage_depths)
        self.width = width
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.decoder_stage_depths = list(decoder_stage_depths)
        self.num_query_tokens = num_query_tokens
        self.projection = projection
        self.projection_causal = projection_causal
        self.projection_mlp_ratio = projection_mlp_ratio
        self.quantizer = quantizer
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.commitment_weight = commitment_weight
        self.entropy_temperature = entropy_temperature
        self.embed_dim = embed_dim
        self.initializer_range = initializer_range
        self.codebook_init = codebook_init
        self.decoder_init_gain = decoder_init_gain
        self.drop_path = drop_path
        self.distill_dim = distill_dim
        self.preprocess = preprocess
        self.text_tower = asdict(text_tower) if isinstance(text_tower, TextTowerConfig) else text_tower
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        sizes = {name: getattr(self, name) for name in _POSITIVE}
        for name in ("stage_widths", "stage_depths", "decoder_stage_depths"):
            if len(getattr(self, name)) != 2:
                raise ConfigError(f"{name}={getattr(self, name)}: expected two numbers, one a stage")
            sizes |= {f"{name}[{index}]": value for index, value in enumerate(getattr(self, name))}
        _check_positive(sizes)
        for name in ("mlp_ratio", "projection_mlp_ratio", "entropy_temperature"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"{name}={value}: expected a positive number")
        if self.decoder_init_gain is not None and not self.decoder_init_gain > 0:
            raise ConfigError(f"decoder_init_gain={self.decoder_init_gain}: expected a positive number or null")
        if not self.commitment_weight >= 0:
            raise ConfigError(f"commitment_weight={self.commitment_weight}: expected 0 or more")
        if self.num_query_tokens < 0:
            raise ConfigError(f"num_query_tokens={self.num_query_tokens}: expected 0 or more")
        _check_text_tower(self.text_tower)
        if self.codebook_size < 2:
            raise ConfigError(f"codebook_size={self.codebook_size}: a codebook needs at least 2 entries")
        if self.image_size % DOWNSAMPLING:
            raise ConfigError(
                f"image_size={self.image_size} is not a multiple of {DOWNSAMPLING}: use "
                f"{max(1, round(self.image_size / DOWNSAMPLING)) * DOWNSAMPLING}"
            )
        if self.width % self.num_heads:
            raise ConfigError(f"width={self.width} does not divide into num_heads={self.num_heads} heads")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(get_args(kind))}")
        if not isinstance(self.drop_path, int | float) or not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path={self.drop_path!r}: expected 0 or more and less than 1")
        if self.distill_dim is not None:
            _check_positive({"distill_dim": self.distill_dim})
        if self.projection == "attention" and self.width % self.code_width:
            raise ConfigError(
                f"{self.code_width_text} does not divide width={self.width}, which the attention projection needs "
                f"(heads = width / code width)"
            )

    @property
    def code_width(self) -> int:
        """Channels of the whole code vector (K chunks together; residual codebooks share all of them)."""
        return self.code_dim if self.quantizer == "residual" else self.num_codebooks * self.code_dim

    @property
    def code_width_text(self) -> str:
        """How the code width comes about, for messages."""
        if self.quantizer == "residual":
            return f"code_dim={self.code_dim}"
        return f"num_codebooks*code_dim={self.num_codebooks}*{self.code_dim}={self.code_width}"

    @property
    def num_positions(self) -> int:
        """Positions L of a square image of `image_size`, query tokens included."""
        return (self.image_size // DOWNSAMPLING) ** 2 + self.num_query_tokens

    @property
    def text_tower_config(self) -> TextTowerConfig | None:
        return None if self.text_tower is None else TextTowerConfig(**self.text_tower)
