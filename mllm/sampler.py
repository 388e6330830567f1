"""Choosing codes from logits: temperature, top-k, nucleus, and one random stream per image.

B images, K codebooks, V entries.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unitok.core.errors import NonFiniteError, UserError
from unitok.core.rng import torch_rng

Setting = float | Sequence[float] | Tensor
_SMALLEST = 2.0**-25  # in place of a random number 0, whose logarithm is not finite
# Beyond these a temperature changes nothing that can be seen (the likeliest choice, an even one), but logits overflow.
_COLDEST, _HOTTEST = 1e-6, 1e6
SETTINGS = ("guidance_scale", "do_sample", "temperature", "depth_temperature", "top_k", "top_p")  # of `generate_codes`
MAX_GUIDANCE = 1000.0  # far beyond what draws anything; logits still fit fp32 at the coldest temperature
_MAX_TOP_K = 2**31 - 1  # more entries than any vocabulary has


def filter_logits(logits: Tensor, temperature: float | Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    """Temperature, then top-k (0 = off; ties with the k-th value stay), then nucleus filtering of logits `[..., V]`.

    Settings are numbers or tensors `[..., 1]`; a dropped entry becomes minus infinity.
    """
    logits = _tempered(logits, temperature)
    ordered, order = logits.sort(dim=-1, descending=True)
    size = logits.shape[-1]
    top_k = torch.as_tensor(top_k if isinstance(top_k, Tensor) else min(top_k, _MAX_TOP_K), device=logits.device)
    last = torch.where(top_k > 0, top_k, size).clamp(max=size) - 1
    kth = ordered.gather(-1, last.expand(*ordered.shape[:-1], 1))
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probs = ordered.softmax(dim=-1)
    # The mass *before* an entry decides, so the first is always kept.
    before = probs.cumsum(dim=-1) - probs  # more than 1 by rounding, where nothing is to be dropped
    kept = ordered.masked_fill((before > top_p) & (torch.as_tensor(top_p, device=before.device) < 1), -torch.inf)
    return torch.empty_like(kept).scatter_(-1, order, kept)


def _tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return logits / temperature.clamp(_COLDEST, _HOTTEST)
    return logits / min(max(temperature, _COLDEST), _HOTTEST)


def check_logits(largest: Tensor) -> None:
    """NonFiniteError where the largest of some logits is not finite: nothing can be chosen among them."""
    if not bool(largest.isfinite().all()):
        raise NonFiniteError(
            "the model's scores are not finite: its weights are damaged, or training went wrong; check the export"
        )


def draw(logits_BV: Tensor, uniform_BV: Tensor) -> Tensor:
    """One entry `[B]` of each row by the probabilities of its logits (minus infinity: none), from random numbers in
    [0, 1): the largest of the logits with Gumbel noise.

    Every entry has a number of its own, so rounding decides only where the two best are as good as equal. Where one
    number picks a place on the line of all probabilities, it moves thousands of borders, and an image would depend on
    its neighbours (of 4000 draws of 4096 entries that rounding of 3e-6 changed, 5; in this way none).
    """
    noise_BV = uniform_BV.clamp(min=_SMALLEST).log_().neg_().log_()
    return (logits_BV - noise_BV).argmax(dim=-1)


def check_guidance(scale: float) -> None:
    """UserError for one that cannot be drawn with."""
    if isinstance(scale, Sequence) or not 0 <= scale <= MAX_GUIDANCE:
        raise UserError(f"guidance_scale={scale}: expected 0 to {MAX_GUIDANCE:g} (up to 1 is off)")


def check_temperature(values: Sequence[float], name: str = "temperature") -> None:
    """UserError for one that nothing can be drawn with."""
    if wrong := [value for value in values if not 0 < value < math.inf]:
        raise UserError(f"{name}={wrong[0]}: must be positive (do_sample=False takes the likeliest)")


def check_filter(top_ks: Sequence[float], top_ps: Sequence[float]) -> None:
    """UserError for settings of `filter_logits` out of range."""
    if wrong := [p for p in top_ps if not 0 < p <= 1]:
        raise UserError(f"top_p={wrong[0]}: expected a share in (0, 1]")
    if wrong := [k for k in top_ks if not (0 <= k < math.inf and k == int(k))]:
        raise UserError(f"top_k={wrong[0]:g}: expected 0 (off) or a positive number")


class CodeSampler:
    """Draws one code per image; each image has its own random stream, so its picture does not depend on the batch.

    `temperature` holds for the first code of a position, `depth_temperature` (None: the same) for the others. The first
    code mostly settles what stands there, the others how it looks: only the first choice should vary between images,
    while the look should be the likeliest one, or the parts of one object fall apart.
    Every setting is one number, or one for each image. UserError for one out of range.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        do_sample: bool,
        temperature: Setting,
        top_k: Setting,
        top_p: Setting,
        depth_temperature: Setting | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        depth_temperature = temperature if depth_temperature is None else depth_temperature
        count = len(seeds)
        first = _per_image("temperature", temperature, count)
        others = _per_image("depth_temperature", depth_temperature, count)
        ks, ps = _per_image("top_k", top_k, count), _per_image("top_p", top_p, count)
        for name, values in (("temperature", first), ("depth_temperature", others)):
            if do_sample:
                check_temperature(values, name)
        check_filter(ks, ps)
        self.do_sample, self.filtered = do_sample, any(k > 0 for k in ks) or any(p < 1 for p in ps)
        self.generators = [torch_rng("image", seed, device=device) for seed in seeds]
        self.temperatures = torch.tensor([first, others], dtype=torch.float32, device=device).unsqueeze(-1)
        self.top_k = torch.tensor([min(int(k), _MAX_TOP_K) for k in ks], device=device).unsqueeze(-1)
        self.top_p = torch.tensor(ps, dtype=torch.float32, device=device).unsqueeze(-1)

    def fill_(self, uniform_BN: Tensor) -> None:
        """The next random numbers in [0, 1) of every image, in the order of its part `[B, ..]`."""
        for own, generator in zip(uniform_BN, self.generators, strict=True):
            own.uniform_(generator=generator)

    def take(self, other: "CodeSampler") -> "CodeSampler":
        """The settings and streams of `other`, in the tensors of this one, which a recorded step reads."""
        assert (self.do_sample, self.filtered) == (other.do_sample, other.filtered)
        for mine, theirs in (
            (self.temperatures, other.temperatures),
            (self.top_k, other.top_k),
            (self.top_p, other.top_p),
        ):
            mine.copy_(theirs)
        self.generators = other.generators
        return self

    def choose(self, logits_BV: Tensor, index: int, uniform_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[B]` number `index` (0 to K - 1) of a position, from a random number for each entry; and the largest
        logits `[B]`, for `check_logits`."""
        largest_B, code_B = logits_BV.max(dim=-1)
        if not self.do_sample:
            return code_B, largest_B
        logits_BV, temperature_B1 = logits_BV.float(), self.temperatures[min(index, 1)]
        if self.filtered:
            logits_BV = filter_logits(logits_BV, temperature_B1, self.top_k, self.top_p)
        else:
            logits_BV = _tempered(logits_BV, temperature_B1)
        return draw(logits_BV, uniform_BV), largest_B

    def __call__(self, logits_BV: Tensor, index: int) -> Tensor:
        """As `choose`, with the next numbers of each image's stream."""
        uniform_BV = torch.empty_like(logits_BV, dtype=torch.float32)
        if self.do_sample:
            self.fill_(uniform_BV)
        return self.choose(logits_BV, index, uniform_BV)[0]


def check_settings(settings: Mapping[str, Any]) -> None:
    """UserError for SETTINGS that are not one number for all images, or out of range."""
    if wrong := [name for name, value in settings.items() if not isinstance(value, int | float)]:
        raise UserError(f"{wrong[0]}={settings[wrong[0]]!r}: expected one number for all images")
    check_guidance(settings.get("guidance_scale", 1.0))
    neutral = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    CodeSampler([0], **(neutral | {name: value for name, value in settings.items() if name != "guidance_scale"}))


def _per_image(name: str, value: Setting, count: int) -> list[float]:
    """`count` numbers; UserError when a list of them has another length."""
    values = value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value
    if not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise UserError(f"{name}: {len(values)} values for {count} images: give one number, or one for each image")
    return list(values)
