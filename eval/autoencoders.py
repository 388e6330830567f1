"""What can be measured side by side: UniTok folders and releases, and autoencoders of diffusers (SD-VAE and others).

Each is a module with `config.image_size`, `config.preprocess`, `encode(pixels)` and `decode(what encode gave)`, pixels
in [-1, 1]; those with codes also have `config.num_codebooks` and `config.codebook_size`.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from unitok.core.errors import CheckpointError, UserError
from unitok.core.pretrained import load_model_folder, read_json

# Image autoencoders of diffusers that have been tried. Others encode videos or sound, or draw noise while decoding.
DIFFUSERS = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL", "AutoencoderDC", "VQModel")
ACCEPTED = (
    "a UniTok folder, a released UniTok .pth, or a folder (or hub:OWNER/REPOSITORY[/SUBFOLDER]) of diffusers whose "
    f"config.json has the _class_name {', '.join(DIFFUSERS[:-1])} or {DIFFUSERS[-1]}"
)


class DiffusersAutoencoder(nn.Module):
    """An autoencoder of diffusers; the latent is the mean of its distribution, so that nothing is drawn."""

    def __init__(self, network: nn.Module, image_size: int, preprocess: str) -> None:
        super().__init__()
        self.network = network
        self.config = SimpleNamespace(image_size=image_size, preprocess=preprocess, num_codebooks=0)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        out = self.network.encode(pixels_B3HW)
        return out.latent_dist.mode() if hasattr(out, "latent_dist") else out[0]

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents).sample


class DiffusersVQ(DiffusersAutoencoder):
    """VQModel of diffusers (VQGAN): one codebook, whose codes `[B, 1, L]` are counted as UniTok's are."""

    def __init__(self, network: Any, image_size: int, preprocess: str) -> None:
        super().__init__(network, image_size, preprocess)
        self.config.num_codebooks, self.config.codebook_size = 1, network.config.num_vq_embeddings

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        _, _, (_, _, indices) = self.network.quantize(self.network.encode(pixels_B3HW).latents)
        return indices.reshape(len(pixels_B3HW), 1, -1)

    def decode(self, codes_B1L: Tensor) -> Tensor:
        side = math.isqrt(codes_B1L.shape[-1])
        quantize = self.network.quantize
        entries = quantize.get_codebook_entry(codes_B1L.flatten(), (len(codes_B1L), side, side, quantize.vq_embed_dim))
        quantized = self.network.post_quant_conv(entries)
        spatial = entries if self.network.config.norm_type == "spatial" else None
        return self.network.decoder(quantized, spatial)


def open_autoencoder(
    name: str, device: torch.device | str = "cpu", image_size: int | None = None, preprocess: str = "plain"
) -> nn.Module:
    """By what `name` is, one of `ACCEPTED`.

    image_size, preprocess: for diffusers, which fix neither (256 pixels where nothing is given).
    Raises CheckpointError or UserError that names what is there.
    """
    from unitok.tokenizer import UniTok

    path = Path(name)
    if path.is_file():
        return UniTok.from_official(path).eval().to(device)
    if name.startswith("hub:"):
        return _diffusers(name, image_size or 256, preprocess).eval().to(device)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "_class_name" in config:
        _check_class(name, config["_class_name"])
        return _diffusers(name, image_size or 256, preprocess).eval().to(device)
    if config.get("model_type", UniTok.config_class.model_type) != UniTok.config_class.model_type:
        raise CheckpointError(f"{name}: model_type is {config['model_type']!r}; expected {ACCEPTED}")
    return load_model_folder(UniTok, path).eval().to(device)


def _check_class(name: str, found: Any) -> None:
    if found not in DIFFUSERS:
        raise CheckpointError(f"{name}: _class_name is {found!r}; expected {ACCEPTED}")


def _diffusers(name: str, image_size: int, preprocess: str) -> DiffusersAutoencoder:
    network = _from_diffusers(name)
    _check_class(name, type(network).__name__)  # of the hub it is known only now
    kind = DiffusersVQ if type(network).__name__ == "VQModel" else DiffusersAutoencoder
    return kind(network, image_size, preprocess)


def _from_diffusers(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{name} is a model of diffusers, which is not installed: install unitok[diffusers]") from error
    where, options = name, {}
    if name.startswith("hub:"):
        owner, _, rest = name.removeprefix("hub:").partition("/")
        repository, _, subfolder = rest.partition("/")
        if not owner or not repository:
            raise UserError(f"{name}: expected hub:OWNER/REPOSITORY[/SUBFOLDER], such as hub:stabilityai/sd-vae-ft-mse")
        where, options = f"{owner}/{repository}", {"subfolder": subfolder} if subfolder else {}
    try:
        return diffusers.AutoModel.from_pretrained(where, use_safetensors=True, **options)
    except (OSError, ValueError, AttributeError) as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name} cannot be loaded by diffusers ({text}); give a folder with safetensors"
        ) from None


def system_names(paths: list[str]) -> list[str]:
    """A short name of each for the table's columns: the folder's, with more of the path where two are equal."""
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{twice} is given twice; name each system once")
    names = [Path(path).name or path for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
