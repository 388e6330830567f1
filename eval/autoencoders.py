"""What can be measured side by side: UniTok folders and releases, and autoencoders of diffusers (SD-VAE and others).

Each is a module with `config.image_size`, `config.preprocess`, `encode(pixels)` and `decode(what encode gave)`, pixels
in [-1, 1]; those with codes also have `config.num_codebooks` and `config.codebook_size`.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from unitok.core.errors import CheckpointError, UserError
from unitok.core.pretrained import load_model_folder, read_json


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


def open_autoencoder(
    name: str, device: torch.device | str = "cpu", image_size: int | None = None, preprocess: str = "plain"
) -> nn.Module:
    """By what `name` is: a UniTok folder, a released UniTok file (.pth), or a folder of diffusers (`_class_name` in its
    config.json; also hub:OWNER/REPOSITORY[/SUBFOLDER]).

    image_size, preprocess: for diffusers, which fix neither (256 pixels where nothing is given).
    Raises CheckpointError or UserError that names what is there.
    """
    from unitok.tokenizer import UniTok

    path = Path(name)
    if path.is_file():
        return UniTok.from_official(path).eval().to(device)
    if name.startswith("hub:") or (path / "config.json").is_file() and "_class_name" in read_json(path / "config.json"):
        network = _from_diffusers(name)
        return DiffusersAutoencoder(network, image_size or 256, preprocess).eval().to(device)
    return load_model_folder(UniTok, path).eval().to(device)


def _from_diffusers(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{name} is a model of diffusers, which is not installed: install unitok[diffusers]") from error
    options: dict[str, Any] = {}
    if name.startswith("hub:"):
        owner, repository, *rest = name.removeprefix("hub:").split("/")
        where = f"{owner}/{repository}"
        options = {"subfolder": "/".join(rest)} if rest else {}
    else:
        where = name
        cls = read_json(Path(name) / "config.json")["_class_name"]
        if not (isinstance(cls, str) and cls.startswith(("Autoencoder", "VQModel", "Consistency", "Asymmetric"))):
            raise CheckpointError(f"{name}: _class_name is {cls!r}; expected an autoencoder of diffusers")
    try:
        return diffusers.AutoModel.from_pretrained(where, use_safetensors=True, **options)
    except (OSError, ValueError, AttributeError) as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name} cannot be loaded by diffusers ({text}); give a folder with safetensors"
        ) from None


def system_names(paths: list[str]) -> list[str]:
    """A short name of each for the table's columns: the folder's, with more of the path where two are equal."""
    names = [Path(path).name or path for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
