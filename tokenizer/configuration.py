"""Configuration of the UniTok tokenizer: one flat, validated set of sizes (paper: arXiv 2502.20321, section 3)."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from unitok.core.errors import ConfigError

TextTokenizerKind = Literal["clip", "sentencepiece"]
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


class UniTokConfig(PretrainedConfig):
    """Sizes of encoder, projections, quantizer, decoder and text tower. The defaults are the released ViTamin-L.

    `code_dim` is the width of *one* chunk; the code space has `num_codebooks * code_dim` channels. `codebook_size` is
    per codebook. `text_tower: null` gives a tokenizer without the contrastive side (open_clip is then not needed).
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
        projection: Literal["attention", "linear"] = "attention",
        projection_causal: bool = False,
        num_codebooks: int = 8,
        codebook_size: int = 4096,
        code_dim: int = 8,
        commitment_weight: float = 0.25,
        entropy_temperature: float = 0.01,
        embed_dim: int = 768,
        text_tower: dict[str, Any] | TextTowerConfig | None = None,
        initializer_range: float = 0.02,
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
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.commitment_weight = commitment_weight
        self.entropy_temperature = entropy_temperature
        self.embed_dim = embed_dim
        self.initializer_range = initializer_range
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
        for name in ("mlp_ratio", "entropy_temperature"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"{name}={value}: expected a positive number")
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
        if self.projection not in ("attention", "linear"):
            raise ConfigError(f"projection={self.projection!r}: expected 'attention' or 'linear'")
        if self.projection == "attention" and self.width % self.code_width:
            raise ConfigError(
                f"num_codebooks*code_dim={self.num_codebooks}*{self.code_dim}={self.code_width} does not divide "
                f"width={self.width}, which the attention projection needs (heads = width / code width)"
            )

    @property
    def code_width(self) -> int:
        """Channels of the whole code vector (K chunks together)."""
        return self.num_codebooks * self.code_dim

    @property
    def num_positions(self) -> int:
        """Positions L of a square image of `image_size`, query tokens included."""
        return (self.image_size // DOWNSAMPLING) ** 2 + self.num_query_tokens

    @property
    def text_tower_config(self) -> TextTowerConfig | None:
        return None if self.text_tower is None else TextTowerConfig(**self.text_tower)
