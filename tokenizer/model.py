"""UniTok as a transformers model (paper: arXiv 2502.20321, figure 2).

B batch, K codebooks, L positions, C channels, H W pixels, D embedding channels, T text positions.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from unitok.core.errors import UserError
from unitok.tokenizer.configuration import UniTokConfig
from unitok.tokenizer.decoder import ViTaminDecoder
from unitok.tokenizer.encoder import NORM_EPS, ViTaminEncoder
from unitok.tokenizer.projection import ProjectionAttention, build_projection
from unitok.tokenizer.quantizer import MultiCodebookQuantizer
from unitok.tokenizer.text import TEXT_MODEL_FILE, TextTokenizer, build_text_tower

MAX_LOGIT_SCALE = math.log(100.0)
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


@dataclass
class UniTokOutput(ModelOutput):
    """What one training pass gives; `usage` counts `[K, V]` how often each entry was chosen.

    A ModelOutput, because ZeRO finds tensors in dictionaries but not in plain dataclasses.
    """

    reconstruction: Tensor | None = None  # [B, 3, H, W], not clamped
    last_hidden: Tensor | None = None  # input of the decoder's last convolution, for the adaptive adversarial weight
    codes: Tensor | None = None  # [B, K, L]
    vq_loss: Tensor | None = None
    entropy_loss: Tensor | None = None  # only with_entropy
    usage: Tensor | None = None
    features: Tensor | None = None  # [B, L, C] after the projection out of the code space
    image_embedding: Tensor | None = None  # [B, D], unit length
    text_embedding: Tensor | None = None  # [B, D], unit length; only with text_ids
    logit_scale: Tensor | None = None  # [1], a copy (ZeRO 3 lets go of the parameter after the pass); with text_ids


class UniTok(PreTrainedModel):
    """Encoder -> projection -> multi-codebook quantizer -> projection -> decoder; a CLIP head on the code features.

    Projections, quantizer and the CLIP head run in fp32 under autocast: bf16 would blur the choice of codes.
    """

    config_class = UniTokConfig
    base_model_prefix = "unitok"
    main_input_name = "pixels"
    supports_gradient_checkpointing = True
    # what decides the codes, and what makes vectors of them (the paper trains it in fp32)
    _keep_in_fp32_modules_strict = ["quant_proj", "quantizer", "post_quant_proj", "fc_norm", "projection"]
    _no_split_modules = ["Block", "MbConvLNBlock", "InvertedBottleneck"]

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__(config)
        self.encoder = ViTaminEncoder(config)
        self.quant_proj = build_projection(config, to_codes=True)
        self.quantizer = MultiCodebookQuantizer(
            config.num_codebooks,
            config.codebook_size,
            config.code_dim,
            config.commitment_weight,
            config.entropy_temperature,
        )
        self.post_quant_proj = build_projection(config, to_codes=False)
        self.decoder = ViTaminDecoder(config)
        self.fc_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.projection = nn.Linear(config.width, config.embed_dim)
        self.text_encoder = (
            build_text_tower(config.text_tower_config, config.embed_dim) if config.text_tower_config else None
        )
        self.logit_scale = nn.Parameter(torch.full((1,), INITIAL_LOGIT_SCALE))  # DeepSpeed cannot send a scalar
        self._text_tokenizer: TextTokenizer | None = None
        self._text_model_file: Path | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, MultiCodebookQuantizer):
            module.reset_parameters()
        elif isinstance(module, ProjectionAttention):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
        elif isinstance(module, ViTaminEncoder):
            nn.init.zeros_(module.pos_embed)
            if module.query_tokens is not None:
                nn.init.trunc_normal_(module.query_tokens, std=0.02)
        elif isinstance(module, ViTaminDecoder):  # after its convolutions: they start far smaller than the encoder's
            for convolution in module.modules():
                if isinstance(convolution, nn.Conv2d):
                    nn.init.xavier_normal_(convolution.weight, gain=0.5)
        elif isinstance(module, UniTok):
            nn.init.constant_(module.logit_scale, INITIAL_LOGIT_SCALE)
        elif type(module).__name__ == "TextTransformer":
            module.init_parameters()
            module.attn_mask.copy_(module.build_causal_mask())  # a buffer that no checkpoint stores

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would only distort."""
        names = {"logit_scale", "quantizer.codebooks", "encoder.query_tokens"}
        if self.text_encoder is not None:
            names |= {"text_encoder.positional_embedding", "text_encoder.token_embedding.weight"}
        return names

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self._set_checkpointing(False)

    def _set_checkpointing(self, enabled: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = enabled
        self.encoder.backbone.grad_checkpointing = enabled
        if self.text_encoder is not None:
            self.text_encoder.set_grad_checkpointing(enabled)

    def forward(self, pixels: Tensor, text_ids: Tensor | None = None, with_entropy: bool = False) -> UniTokOutput:
        """Pixels `[B, 3, H, W]` in [-1, 1] and, for the contrastive side, `text_ids` `[B, T]` -> UniTokOutput."""
        encoded_BLC = self.encoder(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            quantized = self.quantizer(self.quant_proj(encoded_BLC.float()), with_entropy)
            features_BLC = self.post_quant_proj(quantized.quantized)
            image_BD = self._image_embedding(features_BLC)
        reconstruction, last_hidden = self._decode(features_BLC, tuple(pixels.shape[-2:]))
        return UniTokOutput(
            reconstruction=reconstruction,
            last_hidden=last_hidden,
            codes=quantized.codes,
            vq_loss=quantized.vq_loss,
            entropy_loss=quantized.entropy_loss,
            usage=quantized.usage,
            features=features_BLC,
            image_embedding=F.normalize(image_BD, dim=-1),
            text_embedding=None if text_ids is None else self.encode_text(text_ids, normalize=True),
            logit_scale=None if text_ids is None else self.logit_scale.clone(),
        )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes int64 `[B, K, L]` of pixels `[B, 3, H, W]` in [-1, 1]."""
        encoded_BLC = self.encoder(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.quantizer.encode(self.quant_proj(encoded_BLC.float()))

    @torch.no_grad()
    def decode(self, codes: Tensor, image_shape: tuple[int, int] | None = None) -> Tensor:
        """Pixels `[B, 3, H, W]`, clamped to [-1, 1], of codes `[B, K, L]`; `image_shape` when not square."""
        with torch.autocast(codes.device.type, enabled=False):
            features_BLC = self.post_quant_proj(self.code_vectors(codes))
        return self._decode(features_BLC, image_shape)[0].clamp(-1, 1)

    def _decode(self, features_BLC: Tensor, image_shape: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        # a model loaded in half precision keeps its projections in fp32, but not its decoder
        return self.decoder(features_BLC.to(self.decoder.norm.weight.dtype), image_shape)

    def code_vectors(self, codes: Tensor) -> Tensor:
        """Concatenated normalised codebook vectors `[B, L, K * code_dim]` of codes `[B, K, L]`."""
        return self.quantizer.lookup(codes)

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Pixels -> codes -> pixels, clamped to [-1, 1]."""
        return self.decode(self.encode(pixels), tuple(pixels.shape[-2:]))

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Embedding `[B, D]` of images in CLIP space, taken from the *quantized* features."""
        codes = self.encode(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            image_BD = self._image_embedding(self.post_quant_proj(self.code_vectors(codes)))
        return F.normalize(image_BD, dim=-1) if normalize else image_BD

    def encode_text(self, text_ids: Tensor, normalize: bool = True) -> Tensor:
        """Embedding `[B, D]` of text ids `[B, T]` in CLIP space; UserError for a tokenizer without a text tower."""
        if self.text_encoder is None:
            raise UserError("this tokenizer has no text tower (text_tower: null): it cannot embed text")
        text_BD = self.text_encoder(text_ids)
        return F.normalize(text_BD.float(), dim=-1) if normalize else text_BD

    def tokenize_text(self, texts: list[str]) -> Tensor:
        """Ids `[B, context_length]` for `encode_text`, with the text tokenizer that belongs to this model."""
        if self._text_tokenizer is None:
            if self.config.text_tower_config is None:
                raise UserError("this tokenizer has no text tower (text_tower: null): it cannot tokenize text")
            self._text_tokenizer = TextTokenizer(self.config.text_tower_config, self._text_model_file)
        return self._text_tokenizer(texts)

    def set_text_model(self, file: Path | None) -> None:
        """Use this sentencepiece file for `tokenize_text`, and store a copy with the model."""
        self._text_model_file, self._text_tokenizer = file, None

    def _image_embedding(self, features_BLC: Tensor) -> Tensor:
        return self.projection(self.fc_norm(features_BLC.mean(dim=1)))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        target = Path(save_directory) / TEXT_MODEL_FILE
        if self._text_model_file is not None and self._text_model_file.resolve() != target.resolve():
            shutil.copyfile(self._text_model_file, target)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> "UniTok":
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        text_file = Path(pretrained_model_name_or_path) / TEXT_MODEL_FILE
        if text_file.is_file():
            model.set_text_model(text_file)
        return loaded
