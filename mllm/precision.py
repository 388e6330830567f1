"""A model's weights in another precision, after it was made."""

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from unitok.mllm.model import UniTokMLLM


def cast_weights(model: "UniTokMLLM", dtype: torch.dtype) -> "UniTokMLLM":
    """As `from_pretrained(dtype=...)` leaves a model, in place.

    Codebooks stay fp32, so that codes keep their meaning, and so do rotary angles, which no state holds: in bf16 they
    would blur positions. `model.to(dtype)` rounds both.
    """
    kept = re.compile("|".join(model._keep_in_fp32_modules_strict))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept.search(name) else dtype)
    return model
