"""Tiny tokenizers, unified models and text shared by the tests; no size equals a default, so none can be hard-coded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unitok.data.conversations import IMAGE_MARK
from unitok.data.sentencepieces import train_sentencepiece
from unitok.mllm import UniTokMLLM, UniTokMLLMConfig
from unitok.mllm.processor import BEGIN_IMAGE, END_IMAGE, UniTokTextTokenizer
from unitok.tokenizer import UniTok, UniTokConfig

TEXTS = [
    "a photo of a red circle",
    "a photo of two blue squares",
    "what color is the circle?",
    "is there a green triangle?",
    "red",
    "yes",
    "two",
    "USER: ",
    " ASSISTANT:",
    "Generate an image based on this description.",
    "<unconditional>",
    "Be brief.",
]
PAD, BOS, EOS, IMAGE, BOI, EOI = 0, 2, 3, 4, 5, 6  # ids of the models made here without a text tokenizer


def tokenizer_config(**changes: Any) -> UniTokConfig:
    """K = 3, V = 16, 4 channels a chunk, 32 px, 4 positions."""
    sizes: dict[str, Any] = {
        "image_size": 32,
        "stem_width": 8,
        "stage_widths": (8, 16),
        "stage_depths": (1, 1),
        "width": 24,
        "depth": 1,
        "num_heads": 2,
        "mlp_ratio": 1.25,
        "projection_mlp_ratio": 1.5,
        "decoder_stage_depths": (1, 1),
        "num_codebooks": 3,
        "codebook_size": 16,
        "code_dim": 4,
        "embed_dim": 20,
    }
    return UniTokConfig(**(sizes | changes))


def text_tower(**changes: Any) -> dict[str, Any]:
    """A text tower over 40 ids; its sentencepiece file is the caller's."""
    sizes = {"vocab_size": 40, "context_length": 9, "width": 16, "heads": 2, "layers": 1, "tokenizer": "sentencepiece"}
    return sizes | changes


def make_tokenizer(seed: int = 0, **changes: Any) -> UniTok:
    torch.manual_seed(seed)
    return roughen(UniTok(tokenizer_config(**changes)), scale=2.0).eval()


def mllm_config(**changes: Any) -> UniTokMLLMConfig:
    """Llama of width 32 with grouped heads; 6 image positions unless changed."""
    text = {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    sizes: dict[str, Any] = {
        "text_config": text | changes.pop("text", {}),
        "num_codebooks": 3,
        "codebook_size": 16,
        "code_dim": 4,
        "num_image_positions": 6,
        "visual_width": 24,
        "visual_num_heads": 2,
        "visual_mlp_ratio": 1.5,
        "depth_num_layers": 2,
        "begin_image_id": BOI,
        "end_image_id": EOI,
        "image_token_id": IMAGE,
    }
    return UniTokMLLMConfig(**(sizes | changes))


def make_mllm(seed: int = 0, **changes: Any) -> UniTokMLLM:
    torch.manual_seed(seed)
    return roughen(UniTokMLLM(mllm_config(**changes))).eval()


def roughen(model: nn.Module, scale: float = 6.0) -> nn.Module:
    """Move weights away from their initial values: fresh ones give nearly uniform logits and hide zero biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_text_tokenizer(folder: Path, vocab_size: int = 80) -> UniTokTextTokenizer:
    path = train_sentencepiece(
        TEXTS, folder / "tokenizer.model", vocab_size, [IMAGE_MARK, BEGIN_IMAGE, END_IMAGE, "USER:", "ASSISTANT:"]
    )
    return UniTokTextTokenizer(vocab_file=str(path))


class PlainEngine:
    """What a task uses of a DeepSpeed engine."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.device = module, torch.device("cpu")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_codes(config: Any, count: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.codebook_size, (count, config.num_codebooks, length), generator=generator)


def gradients(loss: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every parameter that takes part, by name; the module's own gradients stay untouched."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {name: gradient for (name, _), gradient in zip(named, found, strict=True) if gradient is not None}


def assert_same_gradients(
    ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], **tolerance: float
) -> None:
    assert ours.keys() == reference.keys(), ours.keys() ^ reference.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, reference[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


MLLM_VARIANTS = [
    {},
    {"depth_shared_head": False},
    {"depth_width": 24, "depth_num_heads": 3, "depth_intermediate_size": 20},
    {"image_position_embedding": True},
    {"num_codebooks": 1, "code_dim": 6, "depth_shared_head": False},
]
every_mllm_variant = pytest.mark.parametrize(
    "changes", MLLM_VARIANTS, ids=["plain", "own heads", "narrow", "positions", "one"]
)


def figures_of(value, name=""):
    """Every number in nested results, with its place."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from figures_of(entry, f"{name}.{key}")
    elif isinstance(value, list):
        for entry in value:
            yield from figures_of(entry, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
