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
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from unitok.core.errors import UserError
from unitok.core.pretrained import check_model_folder, checked
from unitok.tokenizer.configuration import UniTokConfig
from unitok.tokenizer.decoder import ViTaminDecoder
from unitok.tokenizer.encoder import NORM_EPS, ViTaminEncoder, set_drop_path
from unitok.tokenizer.projection import ProjectionAttention, build_projection
from unitok.tokenizer.quantizer import Quantizer, build_quantizer
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
    distilled: Tensor | None = None  # [B, L, distill_dim], what the code features say of a teacher's; with distill_dim
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
    # (not the text tower's own projection)
    _keep_in_fp32_modules_strict = ["quant_proj", "quantizer", "post_quant_proj", "fc_norm", "(?<!_)projection"]
    _no_split_modules = ["Block", "MbConvLNBlock", "InvertedBottleneck"]

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__(config)
        self.encoder = ViTaminEncoder(config)
        self.quant_proj = build_projection(config, to_codes=True)
        self.quantizer = build_quantizer(config)
        self.post_quant_proj = build_projection(config, to_codes=False)
        self.decoder = ViTaminDecoder(config)
        self.fc_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.projection = nn.Linear(config.width, config.embed_dim)
        self.distill_head = nn.Linear(config.width, config.distill_dim) if config.distill_dim else None
        self.text_encoder = (
            build_text_tower(config.text_tower_config, config.embed_dim) if config.text_tower_config else None
        )
        self.logit_scale = nn.Parameter(torch.full((1,), INITIAL_LOGIT_SCALE))  # DeepSpeed cannot send a scalar
        self.codes_frozen = False  # in training: encoder and codebooks stay as they are, and code as in evaluation
        self._text_tokenizer: TextTokenizer | None = None
        self._text_model_file: Path | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initial weights as in the released training code (children come before the modules that hold them)."""
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
        elif isinstance(module, Quantizer):
            module.reset_parameters()
        elif isinstance(module, ProjectionAttention):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
        elif isinstance(module, ViTaminEncoder):
            nn.init.zeros_(module.pos_embed)
            if module.query_tokens is not None:
                nn.init.trunc_normal_(module.query_tokens, std=0.02)
            module.backbone.pool.proj.reset_parameters()  # the one convolution that ViTamin leaves to torch
        elif isinstance(module, UniTok):
            nn.init.constant_(module.logit_scale, INITIAL_LOGIT_SCALE)
            module.projection.reset_parameters()
            # Not under the decoder's own name: transformers passes over modules without parameters of their own.
            gain = self.config.decoder_init_gain
            for convolution in module.decoder.modules() if gain is not None else ():
                if isinstance(convolution, nn.Conv2d):  # they start far smaller than the encoder's
                    nn.init.xavier_normal_(convolution.weight, gain=gain)
        elif type(module).__name__ == "TextTransformer":
            module.init_parameters()
            for part in module.modules():  # open_clip draws the weights of its MLPs and leaves the biases to torch
                if isinstance(part, nn.Linear) and not isinstance(part, NonDynamicallyQuantizableLinear):
                    nn.init.uniform_(part.bias, -(part.in_features**-0.5), part.in_features**-0.5)
            module.attn_mask.copy_(module.build_causal_mask())  # a buffer that no checkpoint stores

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        self._set_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self._set_checkpointing(False)

    def _set_checkpointing(self, enabled: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = enabled
        self.encoder.backbone.grad_checkpointing = enabled
        if self.text_encoder is not None:
            self.text_encoder.set_grad_checkpointing(enabled)

    @property
    def num_drop_draws(self) -> int:
        """Random draws per sample that stochastic depth needs: two for each block of encoder and decoder."""
        return 4 * self.config.depth

    def forward(
        self,
        pixels: Tensor,
        text_ids: Tensor | None = None,
        with_entropy: bool = False,
        num_reconstructed: int | None = None,
        drop_draws: Tensor | None = None,
    ) -> UniTokOutput:
        """One training pass.

        Args:
            pixels: `[B, 3, H, W]` in [-1, 1].
            text_ids: `[B, T]` for the contrastive side.
            num_reconstructed: decode only the first so many images (the decoder costs most of a step).
            drop_draws: uniform `[B, num_drop_draws]` for stochastic depth; None, or eval mode: nothing is dropped.
        """
        encoder_draws, decoder_draws = (None, None) if drop_draws is None else drop_draws.chunk(2, dim=1)
        if self.codes_frozen:
            encoder_draws = None
        encoded_BLC = self._encoded(pixels, encoder_draws)
        with torch.autocast(pixels.device.type, enabled=False):
            quantized = self.quantizer(self.quant_proj(encoded_BLC.float()), with_entropy)
            features_BLC = self.post_quant_proj(quantized.quantized)
            image_BD = self._image_embedding(features_BLC)
        shown = slice(num_reconstructed)
        draws = None if decoder_draws is None else decoder_draws[shown]
        reconstruction, last_hidden = self._decode(features_BLC[shown], tuple(pixels.shape[-2:]), draws)
        return UniTokOutput(
            reconstruction=reconstruction,
            last_hidden=last_hidden,
            codes=quantized.codes,
            vq_loss=quantized.vq_loss,
            entropy_loss=quantized.entropy_loss,
            usage=quantized.usage,
            features=features_BLC,
            distilled=None if self.distill_head is None else self.distill_head(features_BLC),
            image_embedding=F.normalize(image_BD, dim=-1),
            text_embedding=None if text_ids is None else self.encode_text(text_ids, normalize=True),
            logit_scale=None if text_ids is None else self.logit_scale.clone(),
        )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes int64 `[B, K, L]` of pixels `[B, 3, H, W]` in [-1, 1]."""
        return self.quantizer.encode(self._features(pixels))

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """What `encode` finds the nearest codes of: normalised vectors `[B, L, C]` in fp32, as `code_vectors` are."""
        return self.quantizer.normalized(self._features(pixels))

    @torch.no_grad()
    def codes_and_latents(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` and `latents` give, for one pass through the encoder."""
        features_BLC = self._features(pixels)
        return self.quantizer.encode(features_BLC), self.quantizer.normalized(features_BLC)

    def _features(self, pixels: Tensor) -> Tensor:
        """What is quantized, `[B, L, C]` in fp32 whatever the surrounding autocast."""
        encoded_BLC = self._encoded(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.quant_proj(encoded_BLC.float())

    @torch.no_grad()
    def decode(self, codes: Tensor, image_shape: tuple[int, int] | None = None) -> Tensor:
        """Pixels `[B, 3, H, W]`, clamped to [-1, 1], of codes `[B, K, L]`; `image_shape` when not square."""
        with torch.autocast(codes.device.type, enabled=False):
            features_BLC = self.post_quant_proj(self.code_vectors(codes))
        return self._decode(features_BLC, image_shape)[0].clamp(-1, 1)

    def _encoded(self, pixels: Tensor, drop_draws: Tensor | None = None) -> Tensor:
        set_drop_path(self.encoder.blocks, drop_draws)
        return self.encoder(pixels.to(self.encoder.pos_embed.dtype))  # as it was loaded: the projections are in fp32

    def _decode(
        self, features_BLC: Tensor, image_shape: tuple[int, int] | None, drop_draws: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        set_drop_path(self.decoder.blocks, drop_draws)
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

    @property
    def text_model_file(self) -> Path | None:
        """The sentencepiece file of `tokenize_text`, if it uses one."""
        return self._text_model_file

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
    def from_official(cls, path: str | Path) -> "UniTok":
        """The released checkpoint (`unitok_tokenizer.pth`), read without executing anything in it; strict."""
        from unitok.tokenizer.official import load_official  # it builds this class

        return load_official(path)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> "UniTok":
        """As in transformers, but strict: CheckpointError for damaged files and for weights that do not all fit."""
        if Path(pretrained_model_name_or_path).exists():
            check_model_folder(Path(pretrained_model_name_or_path), cls.config_class.model_type)
        with_info, load = kwargs.pop("output_loading_info", False), super().from_pretrained
        model, info = checked(
            lambda: load(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs),
            pretrained_model_name_or_path,
        )
        text_file = Path(pretrained_model_name_or_path) / TEXT_MODEL_FILE
        if text_file.is_file():
            model.set_text_model(text_file)
        return (model, info) if with_info else model
