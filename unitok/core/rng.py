"""Random state from what it belongs to (a seed, a step, a sample's key), never from the process that draws.

So a batch does not depend on the number of ranks or workers, nor on what was drawn before it.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from `parts`; the same parts give the same seed on every machine.

    The types count too: 1 and "1" differ, and so do ("ab", "c") and ("a", "bc").
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str | np.integer):
            raise TypeError(f"a part of a seed is {part!r} ({type(part).__name__}); expected int or str")
        text = part if isinstance(part, str) else str(int(part))
        encoded = text.encode("utf-8", "surrogatepass")  # names of files need not be Unicode
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(encoded)}:".encode())
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def numpy_rng(*parts: int | str) -> np.random.Generator:
    """A numpy generator seeded with `derive_seed(*parts)`."""
    return np.random.default_rng(derive_seed(*parts))


def torch_rng(*parts: int | str, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A torch generator on `device` seeded with `derive_seed(*parts)`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
