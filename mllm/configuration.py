"""Configuration of the unified model: a text backbone, the code embedder, the depth transformer and the layouts."""

from typing import Any, Literal, get_args

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unitok.core.errors import ConfigError
from unitok.tokenizer.configuration import QuantizerKind

IGNORE = -100  # label of a text position that is not learnt
EmbedderCache = Literal["consistent", "released"]
VisualInput = Literal["codes", "quantized", "continuous"]
_AT_LEAST_1 = (
    "num_codebooks", "codebook_size", "code_dim", "num_image_positions", "visual_width", "visual_num_heads",
    "depth_num_layers", "depth_width", "depth_num_heads", "depth_num_key_value_heads", "depth_intermediate_size"
)  # fmt: skip


class UniTokMLLMConfig(PretrainedConfig):
    """Sizes and sequence layout of the unified model; the defaults of the sizes are those of the released one.

    `quantizer` and the code sizes (`num_codebooks`, `codebook_size`, `code_dim`, `num_image_positions`) are those of
    the tokenizer whose codes the model was trained on. `visual_*` describe the causal projection of code vectors,
    `depth_*` the transformer over the K sub-codes (None: as the backbone; its heads do not share keys and values unless
    `depth_num_key_value_heads` says so). `image_token_id` is the placeholder that
    image vectors replace.

    Layouts: text to image is `bos text suffix boi <img> eoi eos`; captions are `bos boi <img> eoi text eos`; in a chat
    the image stands where the turn names it, between the two marks only if `chat_image_marks`.
    `code_usage`: the state also holds the running usage of the codebooks, as released weights do; nothing reads it.
    `embedder_cache`: during generation the newest position's projection sees the whole prefix as in training
    ("consistent") or itself alone, as the released sampler does ("released").

    `visual_input`, for measuring what discretisation costs: "codes" are projected causally, as generation needs it.
    Models that only understand may read the visual tokenizer's own projection, with attention among all positions: of
    the codes ("quantized"), or of the encoder's normalised vectors before quantization ("continuous").
    """

    model_type = "unitok_mllm"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        quantizer: QuantizerKind = "multi_codebook",
        num_codebooks: int = 8,
        codebook_size: int = 4096,
        code_dim: int = 8,
        num_image_positions: int = 256,
        visual_width: int = 1024,
        visual_num_heads: int = 16,
        visual_mlp_ratio: float = 2.0,
        depth_num_layers: int = 3,
        depth_width: int | None = None,
        depth_num_heads: int | None = None,
        depth_num_key_value_heads: int | None = None,
        depth_intermediate_size: int | None = None,
        depth_shared_head: bool = True,
        image_position_embedding: bool = False,
        begin_image_id: int | None = None,
        end_image_id: int | None = None,
        image_token_id: int | None = None,
        instruction_suffix: str = " Generate an image based on this description.",
        unconditional_text: str = "<unconditional>",
        system_prompt: str = "",
        user_prefix: str = "USER: ",
        assistant_prefix: str = " ASSISTANT:",
        chat_image_marks: bool = False,
        embedder_cache: EmbedderCache = "consistent",
        visual_input: VisualInput = "codes",
        code_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config.get("model_type", "llama")](**text_config)
        self.text_config = text_config if text_config is not None else CONFIG_MAPPING["llama"]()
        self.quantizer = quantizer
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.num_image_positions = num_image_positions
        self.visual_width = visual_width
        self.visual_num_heads = visual_num_heads
        self.visual_mlp_ratio = visual_mlp_ratio
        self.depth_num_layers = depth_num_layers
        self.depth_width = depth_width
        self.depth_num_heads = depth_num_heads
        self.depth_num_key_value_heads = depth_num_key_value_heads
        self.depth_intermediate_size = depth_intermediate_size
        self.depth_shared_head = depth_shared_head
        self.image_position_embedding = image_position_embedding
        self.begin_image_id = begin_image_id
        self.end_image_id = end_image_id
        self.image_token_id = image_token_id
        self.instruction_suffix = instruction_suffix
        self.unconditional_text = unconditional_text
        self.system_prompt = system_prompt
        self.user_prefix = user_prefix
        self.assistant_prefix = assistant_prefix
        self.chat_image_marks = chat_image_marks
        self.embedder_cache = embedder_cache
        self.visual_input = visual_input
        self.code_usage = code_usage
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name in _AT_LEAST_1:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1")
        if self.visual_mlp_ratio <= 0:
            raise ConfigError(f"visual_mlp_ratio={self.visual_mlp_ratio}: expected a positive number")
        if self.visual_width % self.visual_num_heads:
            raise ConfigError(
                f"visual_width={self.visual_width} does not divide into visual_num_heads={self.visual_num_heads} heads"
            )
        if self.visual_width < self.code_width:
            raise ConfigError(
                f"visual_width={self.visual_width} is narrower than a code vector: expected at least "
                f"{'code_dim' if self.quantizer == 'residual' else 'num_codebooks*code_dim'}={self.code_width}"
            )
        depth_width = self.depth_width or self.text_config.hidden_size
        depth_heads = self.depth_num_heads or self.text_config.num_attention_heads
        if depth_width % (2 * depth_heads):
            raise ConfigError(
                f"depth_width={depth_width} does not divide into depth_num_heads={depth_heads} heads of an even width, "
                f"which rotary positions need"
            )
        if self.depth_num_key_value_heads and depth_heads % self.depth_num_key_value_heads:
            raise ConfigError(
                f"depth_num_heads={depth_heads} does not divide into "
                f"depth_num_key_value_heads={self.depth_num_key_value_heads} groups"
            )
        if self.depth_intermediate_size is None and not getattr(self.text_config, "intermediate_size", None):
            raise ConfigError(
                f"depth_intermediate_size is not set: the default is the backbone's intermediate_size, which a "
                f"{self.text_config.model_type} does not have; set depth_intermediate_size"
            )
        kinds = {"embedder_cache": EmbedderCache, "visual_input": VisualInput, "quantizer": QuantizerKind}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                expected = " or ".join(map(repr, get_args(kind)))
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {expected}")

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def context_length(self) -> int | None:
        """Positions that the backbone reads; None: no limit. With two sets of rotary factors those of the short one:
        transformers takes the set by the longest row of a batch, which would change the other rows."""
        text = self.text_config
        limit, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
        if limit is not None and rope.get("rope_type") == "longrope":
            short = rope.get("original_max_position_embeddings")
            return min(limit, short or getattr(text, "original_max_position_embeddings", limit))
        return limit

    @property
    def own_image_marks(self) -> bool:
        """Are the image marks tokens of their own? The released vocabulary has none: there the placeholder lies outside
        of it and the two marks are borrowed from ordinary bytes, which texts and answers may hold too."""
        return self.image_token_id is not None and 0 <= self.image_token_id < self.text_config.vocab_size

    @property
    def code_width(self) -> int:
        """Channels of one code vector: K chunks together, or the sum of K residual entries."""
        return self.code_dim if self.quantizer == "residual" else self.num_codebooks * self.code_dim
