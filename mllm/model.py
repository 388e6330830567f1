"""The unified model: a text backbone that reads code vectors and predicts text ids and, through the depth head, codes.

B batch, T sequence (text ids with one placeholder id per image position), I images of a batch in order of appearance,
K codebooks, L image positions, V entries, D model width, N predicted image positions.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from unitok.core.engine import whole_parameters
from unitok.core.errors import CheckpointError, DataError, UserError
from unitok.core.pretrained import readable_weights
from unitok.mllm.configuration import IGNORE, UniTokMLLMConfig
from unitok.mllm.cross_entropy import TextHead
from unitok.mllm.depth import CodeHead, DepthTransformer
from unitok.mllm.embedder import CodeEmbedder
from unitok.mllm.generation import CodeGenerationMixin
from unitok.mllm.losses import LossMixin
from unitok.mllm.quantize import refuse_quantized
from unitok.mllm.sampler import SETTINGS, check_settings
from unitok.mllm.shards import open_shards
from unitok.tokenizer import UniTok
from unitok.tokenizer.projection import ProjectionAttention
from unitok.tokenizer.quantizer import check_codes

_LOGGER = logging.getLogger(__name__)


class UniTokMLLM(LossMixin, CodeGenerationMixin, PreTrainedModel, GenerationMixin):
    """Backbone (any decoder-only transformers model), code embedder, text head and depth transformer.

    The visual tokenizer is not part of this model: it takes and gives codes.
    """

    config_class = UniTokMLLMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_cache_class = True
    _keep_in_fp32_modules_strict = [r"embedder\.codebooks"]  # codes keep their meaning in a model of lower precision
    weight_kind: str | None = None  # set by `quantize_weights`
    _no_split_modules = ["LlamaDecoderLayer", "DepthLayer"]

    def __init__(self, config: UniTokMLLMConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.text_config)
        self.embedder = CodeEmbedder(config)
        self.depth = DepthTransformer(config)
        self.lm_head = TextHead(config.hidden_size, config.text_config.vocab_size, bias=False)
        self._visual: tuple[UniTok | None] = (None,)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config.text_config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ProjectionAttention):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
        elif isinstance(module, CodeEmbedder):
            nn.init.normal_(module.codebooks, std=module.codebooks.shape[-1] ** -0.5)
            if module.positions is not None:
                nn.init.normal_(module.positions, std=std)
        elif isinstance(module, CodeHead):
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # norms and rotary buffers of the backbone

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take the weights `[vocab, D]` of another head, such as the plain one that `resize_token_embeddings` makes."""
        vocab_size, width = new_embeddings.weight.shape
        head = TextHead(width, vocab_size, bias=False, device="meta")
        head.weight = new_embeddings.weight
        self.lm_head = head.train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would only distort."""
        # by kind: families call embeddings wte, embed_in, embed_positions; biases of experts have two dimensions
        embeddings = {f"{path}.weight" for path, one in self.named_modules() if isinstance(one, nn.Embedding)}
        names = {"embedder.positions"} | {name for name, _ in self.named_parameters() if name.endswith("bias")}
        return embeddings | names

    def attach_tokenizer(self, tokenizer: UniTok) -> None:
        """Take codebooks and, where the shapes agree, the projection out of the code space from a visual tokenizer."""
        with torch.no_grad(), whole_parameters(self.embedder.projection, write=True):
            codebooks = tokenizer.quantizer.codebooks
            if tokenizer.config.quantizer != self.config.quantizer:
                raise DataError(
                    f"the tokenizer's quantizer is {tokenizer.config.quantizer}, the model expects "
                    f"{self.config.quantizer}"
                )
            if codebooks.shape != self.embedder.codebooks.shape:
                raise DataError(
                    f"the tokenizer's codebooks are {list(codebooks.shape)}, the model expects "
                    f"{list(self.embedder.codebooks.shape)} ([num_codebooks, codebook_size, code_dim])"
                )
            self.embedder.codebooks.copy_(tokenizer.quantizer.entries())
            source, target = tokenizer.post_quant_proj.state_dict(), self.embedder.projection.state_dict()
            shapes = [{name: list(value.shape) for name, value in state.items()} for state in (source, target)]
            fits = shapes[0] == shapes[1]
            if self.config.visual_input != "codes" and (not fits or tokenizer.config.projection_causal):
                raise DataError(
                    f"visual_input={self.config.visual_input} reads the visual tokenizer's own projection: it must be "
                    "an attention projection that is not causal, with model.visual_width, visual_num_heads and "
                    "visual_mlp_ratio as there"
                )
            if fits:
                self.embedder.projection.load_state_dict(source)
            else:
                odd = next(n for n in {**shapes[0], **shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
                _LOGGER.warning(
                    "the embedder's projection starts from random weights: its %s is %s, the tokenizer's %s "
                    "(see model.visual_width, visual_num_heads, visual_mlp_ratio)",
                    odd,
                    shapes[1].get(odd),
                    shapes[0].get(odd),
                )

    @property
    def visual_tokenizer(self) -> UniTok | None:
        """The tokenizer that came with the model, if any: beside it, no part of its state."""
        return self._visual[0]

    def keep_tokenizer(self, tokenizer: UniTok) -> None:
        """Make it the `visual_tokenizer`; UserError unless its codes are those that the model was trained on."""
        check_same_codes(self, tokenizer)
        self._visual = (tokenizer,)  # in a tuple: torch would take a bare module for a part of the model

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Input vectors `[I, L, D]` of codes `[I, K, L]`; DataError for what are none of this model's."""
        if self.config.visual_input != "continuous":
            check_codes(codes, self.config.num_codebooks, self.config.codebook_size)
        return self.embedder(codes)

    def embed(self, input_ids: Tensor, codes: Tensor | None, images_at_once: int | None = None) -> Tensor:
        """Input vectors `[B, T, D]`: text embeddings, with every placeholder replaced by its image vector.

        `images_at_once`: go through the embedder in groups (None: all together).
        Raises DataError unless placeholders and image positions are equally many: going on would shift images.
        """
        is_image_BT = self._placeholders(input_ids)
        if codes is not None and self.config.visual_input != "continuous":
            check_codes(codes, self.config.num_codebooks, self.config.codebook_size)
        self._check_placeholders(is_image_BT.sum(dim=1).tolist(), codes)
        # A placeholder id may lie outside the vocabulary (released models); its text embedding is never used.
        inputs_BTD = self.get_input_embeddings()(input_ids.masked_fill(is_image_BT, 0))
        if codes is None:
            return inputs_BTD
        groups = codes.split(images_at_once or len(codes))
        vectors = torch.cat([self.embedder(group) for group in groups]).flatten(0, 1).to(inputs_BTD.dtype)
        return inputs_BTD.masked_scatter(is_image_BT.unsqueeze(-1), vectors)

    def _placeholders(self, input_ids: Tensor) -> Tensor:
        """Which of the ids `[B, T]` stand for image positions; none where the model has no such id."""
        image_id = self.config.image_token_id
        return torch.zeros_like(input_ids, dtype=torch.bool) if image_id is None else input_ids == image_id

    def _check_placeholders(self, counts: list[int], codes: Tensor | None) -> None:
        """`counts` of placeholders per row; each row must hold whole images, and all of them the given ones."""
        shape, given = (None, 0) if codes is None else (list(codes.shape), codes.shape[0] * codes.shape[2])
        if sum(counts) != given:
            raise DataError(
                f"{sum(counts)} image placeholders in input_ids, but codes of shape {shape} fill {given}: each image "
                f"needs as many placeholders (id {self.config.image_token_id}) as it has positions"
            )
        for row, count in enumerate(counts if given else []):
            if count % codes.shape[2]:
                raise DataError(
                    f"row {row} of input_ids holds {count} image placeholders, which is no multiple of the "
                    f"{codes.shape[2]} positions of an image: the rest would run over into the next row"
                )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        codes: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Text logits `[B, T, vocab]` (the last `logits_to_keep` positions, 0 = all).

        With `labels` `[B, T]` (not shifted, IGNORE where nothing is learnt) `loss` is the mean cross-entropy over text;
        training, which learns codes too, uses `losses`.
        """
        if labels is not None and logits_to_keep:
            raise DataError(f"labels need the logits of all positions, but logits_to_keep is {logits_to_keep}")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, codes)
        outputs = self.backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, codes: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict:
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] == input_ids.shape[1]:
            inputs["codes"] = codes  # the first pass holds the whole prompt; later ones only new text
        return inputs

    def suppressed_ids(self) -> list[int]:
        """Ids that no answer may hold: image marks of the vocabulary's own. As text they would mean an image that is
        not there, also in the next turn."""
        config = self.config
        if not config.own_image_marks:
            return []
        marks = (config.image_token_id, config.begin_image_id, config.end_image_id)
        return [mark for mark in marks if mark is not None]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate, with `codes` `[I, K, L]` of the prompts' images."""
        if present := self.suppressed_ids():
            kwargs.setdefault("suppress_tokens", present)
        return super().generate(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, codes: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Rows repeated for beams and several answers: the images of a row are repeated together, not one by one."""
        rows_of_codes = None
        if codes is not None and expand_size > 1:
            counts = self._placeholders(input_ids).sum(dim=1) // codes.shape[2]
            rows_of_codes = codes.split(counts.tolist())
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        if rows_of_codes is not None:
            codes = torch.cat([row for row in rows_of_codes for _ in range(expand_size)])
        return input_ids, kwargs | {"codes": codes}

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As transformers does; UserError for a model of 8-bit or 4-bit weights."""
        refuse_quantized(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> "UniTokMLLM":
        """As transformers does; `image_sampler` of generation_config.json, which it would drop, is kept, and damaged
        weights, or shards that are not what their index says, are a CheckpointError."""
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not kwargs.keys() & {"state_dict", "subfolder", "variant", "gguf_file"}:
            open_shards(folder)  # transformers takes a key from whatever shard has it
        with readable_weights(pretrained_model_name_or_path):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        sampler = read_sampler(folder)
        if sampler is not None:
            model.generation_config.image_sampler = sampler
        return loaded

    @classmethod
    def from_official(
        cls,
        folder: str | Path,
        tokenizer: str | Path | UniTok | None = None,
        dtype: torch.dtype | None = None,
    ) -> "UniTokMLLM":
        """The released model in `folder`, with its cache behaviour and sampler settings; see `load_official`.

        tokenizer: the visual tokenizer (released file or UniTok folder), checked against the model's codebooks and kept
        as `visual_tokenizer`; without it the model takes and gives codes only. dtype: None as stored.
        """
        from unitok.mllm.official import load_official

        return load_official(folder, tokenizer, dtype)


def read_sampler(folder: Path) -> dict[str, Any] | None:
    """The `image_sampler` of an export; None where it has none. CheckpointError for one that cannot be drawn with."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    return _checked_sampler(settings["image_sampler"], file) if "image_sampler" in settings else None


def _checked_sampler(settings: Any, file: Path) -> dict[str, Any]:
    """Settings of `generate_codes`; CheckpointError for anything else."""
    if not isinstance(settings, dict) or settings.keys() - set(SETTINGS):
        raise CheckpointError(f"{file}: image_sampler is {settings!r}; expected an object of {', '.join(SETTINGS)}")
    said = {name: value for name, value in settings.items() if value is not None}
    try:
        check_settings(said)
    except UserError as error:
        raise CheckpointError(f"{file}: image_sampler: {error}") from error
    # null means "as `temperature`" in this one alone
    return said | {name: None for name in settings if name == "depth_temperature" and name not in said}


def check_same_codes(model: UniTokMLLM, tokenizer: UniTok) -> None:
    """UserError unless the tokenizer's codes are those the model was trained on: same sizes, same codebooks."""
    ours, theirs = model.config, tokenizer.config
    sizes = {
        name: (getattr(ours, name), getattr(theirs, name))
        for name in ("quantizer", "num_codebooks", "codebook_size", "code_dim")
    }
    sizes["num_image_positions"] = (ours.num_image_positions, theirs.num_positions)
    advice = "use the tokenizer whose codes the model was trained on"
    for name, (own, other) in sizes.items():
        if own != other:
            raise UserError(
                f"{name}: the model was trained on codes with {own}, the visual tokenizer has {other}; {advice}"
            )
    own = model.embedder.entries().cpu()
    if not torch.allclose(own, tokenizer.quantizer.entries().cpu(), atol=2e-2):  # bf16 exports are rounded
        raise UserError(f"the codebooks of the visual tokenizer are not those of the model; {advice}")
