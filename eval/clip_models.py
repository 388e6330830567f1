"""Models with images and texts in one space, side by side: UniTok (what its codes keep) and any model of open_clip.

B images or texts, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unitok.core.errors import CheckpointError, UserError
from unitok.data.transforms import eval_transform

_SCHEMES = ("local-dir:", "hf-hub:")


@dataclass
class ClipModel:
    """`network` has `encode_image(pixels, normalize)` and `encode_text(ids, normalize)`."""

    name: str
    network: Any
    preprocess: Any  # PIL image -> pixels [3, H, W]
    tokenize: Any  # texts -> ids [B, T]
    device: torch.device | str
    protocol: dict[str, Any]

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [B, D]."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        return self.network.encode_image(pixels, normalize=True).float()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D]."""
        return self.network.encode_text(self.tokenize(list(texts)).to(self.device), normalize=True).float()


def open_tokenizer(path: str, device: torch.device | str, preprocess: str = "clip_val") -> ClipModel:
    """A UniTok folder or a released file; UserError where it has no text tower.

    preprocess: "clip_val" is what the released model is measured with; "plain" as in our own training.
    """
    from unitok.eval.autoencoders import open_autoencoder
    from unitok.tokenizer import UniTok

    network = open_autoencoder(path, device)
    if not isinstance(network, UniTok):
        raise UserError(f"{path}: is no UniTok; models of open_clip are given by --open-clip")
    if network.text_encoder is None:
        raise UserError(f"{path}: has no text tower (text_tower: null), so it cannot be asked in words")
    size = network.config.image_size
    return ClipModel(
        path,
        network,
        lambda image: eval_transform(image, size, preprocess),
        network.tokenize_text,
        device,
        {"preprocess": preprocess, "image_size": size},
    )


def open_open_clip(spec: str, device: torch.device | str) -> ClipModel:
    """NAME=WEIGHTS (a file, or a tag that open_clip downloads), local-dir:FOLDER or hf-hub:OWNER/REPOSITORY.

    Weights are read as tensors only. Raises UserError for an unknown name and for OpenAI's weights without QuickGELU,
    which open_clip would run with another activation than they were trained with.
    """
    import open_clip

    name, _, weights = spec.partition("=")
    if not name.startswith(_SCHEMES):
        if name not in open_clip.list_models():
            raise UserError(
                f"--open-clip {spec}: open_clip has no model {name!r}; expected NAME=WEIGHTS or local-dir:DIR"
            )
        if not weights:
            raise UserError(f"--open-clip {spec}: without weights it knows nothing; give {name}=FILE or {name}=TAG")
        _check_activation(open_clip, spec, name, weights)
    elif name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:")).is_dir():
        raise CheckpointError(f"--open-clip {spec}: no such folder; expected open_clip_config.json and weights in it")
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(name, weights or None, device=device)
        tokenize = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"--open-clip {spec}: cannot be loaded ({text}); give the file of its weights") from None
    protocol = {"preprocess": str(preprocess.transforms[0]), "image_size": network.visual.image_size}
    return ClipModel(spec, network.eval(), preprocess, tokenize, device, protocol)


def _check_activation(open_clip: Any, spec: str, name: str, weights: str) -> None:
    """open_clip only warns."""
    wants = weights == "openai" or (open_clip.get_pretrained_cfg(name, weights) or {}).get("quick_gelu")
    config = open_clip.get_model_config(name) or {}
    if wants and not config.get("quick_gelu"):
        raise UserError(
            f"--open-clip {spec}: these weights were trained with QuickGELU; use {name}-quickgelu={weights}"
        )
