"""Models with an image and a text embedding in one space, read the same way: UniTok and open_clip's.

B images or texts, D width of the embedding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unitok.core.errors import UserError
from unitok.data.transforms import eval_transform

OPEN_CLIP = "open_clip:"
BATCH_OF_TEXTS = 256


class ImageText(Protocol):
    """`images` and `texts` give unit vectors `[B, D]` on the CPU; `settings` says how images are prepared."""

    settings: dict[str, Any]

    def images(self, images: Sequence[Image.Image]) -> Tensor: ...

    def texts(self, texts: Sequence[str]) -> Tensor: ...


class UniTokImageText:
    """UniTok's contrastive side: the embedding of the *quantized* features."""

    def __init__(self, tokenizer: Any, preprocess: str, device: torch.device | str) -> None:
        self.tokenizer, self.preprocess, self.device = tokenizer, preprocess, device
        self.settings = {"preprocess": preprocess, "image_size": tokenizer.config.image_size}

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        size = self.tokenizer.config.image_size
        pixels = torch.stack([eval_transform(image, size, self.preprocess) for image in images])
        return self.tokenizer.encode_image(pixels.to(self.device), normalize=True).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        ids = self.tokenizer.tokenize_text(list(texts)).to(self.device)
        return self.tokenizer.encode_text(ids, normalize=True).float().cpu()


class OpenClipImageText:
    """Any model of open_clip with its own preparation of images."""

    def __init__(self, name: str, weights: str, device: torch.device | str) -> None:
        import open_clip

        if name not in open_clip.list_models():
            known = ", ".join(found for found in open_clip.list_models() if found[:5] == name[:5]) or "ViT-L-14, ..."
            raise UserError(f"open_clip has no model {name!r}; near it: {known[:200]}")
        _check_activation(name, weights)
        tags = open_clip.list_pretrained_tags_by_model(name)
        if weights not in tags and not Path(weights).is_file():  # open_clip would log a page before it refuses
            known = f"a name that open_clip can fetch, such as {', '.join(tags[:3])}" if tags else "another model"
            raise UserError(f"{OPEN_CLIP}{name}:{weights}: no such file or name; give a file of weights, or {known}")
        try:
            model, _, prepare = open_clip.create_model_and_transforms(
                name, pretrained=weights, device=device, weights_only=True
            )
        except (RuntimeError, OSError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(
                f"{OPEN_CLIP}{name}:{weights} cannot be loaded ({text}); give its weights as a file, or go online"
            ) from None
        self.model, self.prepare, self.device = model.eval(), prepare, device
        self.tokenize = open_clip.get_tokenizer(name)
        self.settings = {"preprocess": "open_clip's", "weights": Path(weights).name}

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([self.prepare(image) for image in images]).to(self.device)
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(self.model.encode_text(self.tokenize(list(texts)).to(self.device)).float(), dim=-1).cpu()


def _check_activation(name: str, weights: str) -> None:
    """UserError for weights that were trained with QuickGELU in a model without it: open_clip only warns."""
    import open_clip

    trained = weights == "openai" or (open_clip.get_pretrained_cfg(name, weights) or {}).get("quick_gelu")
    if trained and not (open_clip.get_model_config(name) or {}).get("quick_gelu"):
        raise UserError(
            f"{OPEN_CLIP}{name}:{weights}: these weights were trained with QuickGELU, which {name} computes "
            f"without; use {OPEN_CLIP}{name}-quickgelu:{weights}"
        )


def open_image_text(name: str, preprocess: str = "clip_val", device: torch.device | str = "cpu") -> ImageText:
    """A UniTok folder or released .pth, or `open_clip:MODEL:WEIGHTS` (a file, or a name that open_clip fetches).

    preprocess: of UniTok; the release's zero-shot figures take "clip_val". UserError or CheckpointError.
    """
    if name.startswith(OPEN_CLIP):
        model, _, weights = name.removeprefix(OPEN_CLIP).partition(":")
        if not model or not weights:
            raise UserError(f"{name}: expected {OPEN_CLIP}MODEL:WEIGHTS, such as {OPEN_CLIP}ViT-L-14-quickgelu:openai")
        return OpenClipImageText(model, weights, device)
    from unitok.eval.autoencoders import open_autoencoder
    from unitok.tokenizer import UniTok

    tokenizer = open_autoencoder(name, device)
    if not isinstance(tokenizer, UniTok):
        raise UserError(f"{name} is an autoencoder without a text side; expected UniTok or {OPEN_CLIP}MODEL:WEIGHTS")
    return UniTokImageText(tokenizer, preprocess, device)
