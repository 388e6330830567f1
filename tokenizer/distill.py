"""Distillation of the code features toward a frozen vision foundation model (any model of timm).

B images, L positions, C channels of the teacher, h w its grid of features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitok.core.errors import ConfigError
from unitok.tokenizer.settings import RANDOM_WEIGHTS, DistillConfig
from unitok.tokenizer.weights import Foreign, find_weights, load_strict, read_weights

_HEADS = ("head.", "fc.", "classifier.", "head_dist.", "fc_norm.")  # what timm leaves out with num_classes=0


class Teacher(nn.Module):
    """The frozen model: pixels in [-1, 1] -> features `[B, C, h, w]`, in evaluation mode and without gradients."""

    def __init__(self, config: DistillConfig, image_size: int) -> None:
        super().__init__()
        import timm
        from timm.data import resolve_data_config

        assert config.model is not None
        if not timm.is_model(config.model):
            raise ConfigError(f"distill.model={config.model}: timm knows no such model; see timm.list_models()")
        self.model = timm.create_model(config.model, pretrained=False, num_classes=0)
        settings, known = resolve_data_config({}, model=self.model), self.model.pretrained_cfg
        fixed = known.get("input_size", (3, image_size, image_size))[-1] if known.get("fixed_input_size") else None
        self.size = config.size or fixed or image_size
        if fixed and self.size != fixed:
            self._take_any_size(config)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(settings[name]).view(1, -1, 1, 1))
        if config.weights != RANDOM_WEIGHTS:
            self._load(config)
        self.requires_grad_(False).eval()

    @property
    def dim(self) -> int:
        """Channels of its features."""
        return self.model.num_features

    def _take_any_size(self, config: DistillConfig) -> None:
        """Transformers of timm can resize their positions as they run; ConfigError for a model that cannot."""
        import timm

        try:
            self.model = timm.create_model(config.model, pretrained=False, num_classes=0, dynamic_img_size=True)
        except TypeError as error:
            raise ConfigError(f"distill.size={config.size}: {config.model} takes images of one size only") from error
        step = self.model.patch_embed.patch_size[0]
        if self.size % step:
            raise ConfigError(f"distill.size={config.size}: {config.model} needs a multiple of its patch, {step}")

    def _load(self, config: DistillConfig) -> None:
        names = Foreign(
            "distill.weights",
            f"the weights of timm's {config.model}",
            f"the file model.safetensors of hub:timm/{config.model}.TAG; or set distill.model=null to train without",
        )
        file = find_weights(names.field, config.weights, names.what, names.hint)
        expected = self.model.state_dict()
        state = {
            name: value for name, value in read_weights(file).items() if name in expected or not name.startswith(_HEADS)
        }
        load_strict(self.model, state, f"timm's {config.model}", file)

    @torch.no_grad()
    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        x = (pixels_B3HW.float() + 1) / 2
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True)
        features = self.model.forward_features((x - self.mean) / self.std)
        if features.dim() == 3:  # a transformer's tokens, the class token and registers first
            patches_BNC = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
            side = round(patches_BNC.shape[1] ** 0.5)
            return patches_BNC.transpose(1, 2).unflatten(2, (side, side))
        # some of timm's hierarchical transformers keep channels last
        return features if features.shape[1] == self.dim else features.permute(0, 3, 1, 2)


def distillation_loss(predicted_BLC: Tensor, teacher_BChw: Tensor, grid: tuple[int, int], num_query: int) -> Tensor:
    """Mean over patches of 1 - cosine similarity; the teacher's features are resampled to the tokenizer's `grid`.

    The first `num_query` of the L positions are no patches and take no part.
    """
    target = F.interpolate(teacher_BChw.float(), size=grid, mode="bilinear", align_corners=False)
    target_BLC = target.flatten(2).transpose(1, 2)
    return 1 - F.cosine_similarity(predicted_BLC[:, num_query:].float(), target_BLC, dim=-1).mean()
