"""Choosing codes from logits: temperature, top-k, nucleus, and one random stream per image.

B images, K codebooks, V entries.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unitok.core.errors import NonFiniteError, UserError
from unitok.core.rng import torch_rng

Setting = float | Sequence[float] | Tensor
_BLOCK = 1024  # random numbers that an image's stream gives at a time
# The largest share of the total that a draw may ask for: rounding must not carry it past the last entry.
_LARGEST = 1 - 2.0**-20
# Beyond these a temperature changes nothing that can be seen (the likeliest choice, an even one), but logits overflow.
_COLDEST, _HOTTEST = 1e-6, 1e6
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
    kept = ordered.masked_fill(probs.cumsum(dim=-1) - probs > top_p, -torch.inf)
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


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The entry `[B]` whose part of the unit interval, laid out in order, holds `uniform_B`."""
    cumulative_BV = probs_BV.double().cumsum(dim=-1)  # an entry without probability must not get any by rounding
    wanted_B1 = uniform_B.clamp(max=_LARGEST).unsqueeze(-1) * cumulative_BV[:, -1:]
    found_B = torch.searchsorted(cumulative_BV, wanted_B1, right=True)[:, 0]
    return found_B.clamp_(max=probs_BV.shape[-1] - 1)  # behind the last where there is a NaN, of which others tell


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
        self.generators = [torch_rng("image", seed) for seed in seeds]
        self.temperatures = torch.tensor([first, others], device=device).unsqueeze(-1)
        self.top_k = torch.tensor([min(int(k), _MAX_TOP_K) for k in ks], device=device).unsqueeze(-1)
        self.top_p = torch.tensor(ps, device=device).unsqueeze(-1)
        self._ready = torch.empty(count, 0, device=device)

    def uniforms(self, count: int) -> Tensor:
        """The next `count` random numbers in [0, 1) of every image, `[B, count]`."""
        while self._ready.shape[1] < count:
            block = [torch.rand(_BLOCK, generator=generator) for generator in self.generators]
            self._ready = torch.cat([self._ready, torch.stack(block).to(self._ready.device)], dim=1)
        taken, self._ready = self._ready[:, :count], self._ready[:, count:]
        return taken

    def take(self, other: "CodeSampler") -> "CodeSampler":
        """The settings of `other`, in the tensors of this one, which a recorded step reads."""
        assert (self.do_sample, self.filtered) == (other.do_sample, other.filtered)
        for mine, theirs in (
            (self.temperatures, other.temperatures),
            (self.top_k, other.top_k),
            (self.top_p, other.top_p),
        ):
            mine.copy_(theirs)
        return self

    def choose(self, logits_BV: Tensor, index: int, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[B]` number `index` (0 to K - 1) of a position, from one random number for each image; and the largest
        logits `[B]`, for `check_logits`."""
        largest_B, code_B = logits_BV.max(dim=-1)
        if not self.do_sample:
            return code_B, largest_B
        logits_BV, temperature_B1 = logits_BV.float(), self.temperatures[min(index, 1)]
        if self.filtered:
            logits_BV = filter_logits(logits_BV, temperature_B1, self.top_k, self.top_p)
        else:
            logits_BV = _tempered(logits_BV, temperature_B1)
        return draw(logits_BV.softmax(dim=-1), uniform_B), largest_B

    def __call__(self, logits_BV: Tensor, index: int) -> Tensor:
        """As `choose`, with the next number of each image's stream."""
        uniform_B = self.uniforms(1)[:, 0] if self.do_sample else self._ready
        return self.choose(logits_BV, index, uniform_B)[0]


def _per_image(name: str, value: Setting, count: int) -> list[float]:
    """`count` numbers; UserError when a list of them has another length."""
    values = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise UserError(f"{name}: {len(values)} values for {count} images: give one number, or one for each image")
    return list(values)
