"""Random permutations that are functions: item i of a permutation of a billion costs microseconds and no memory."""

import math

import numpy as np

from unitok.core.rng import derive_seed, numpy_rng

WHOLE_BELOW = 2**22  # up to so many items (32 MB) numpy shuffles, which is exactly uniform
ROUNDS = 8  # of mixing: 4 for each half
_64_BITS = 2**64 - 1


def kind_of_order(size: int) -> str:
    """What draws permutations of `size` items: checkpoints carry it, for a run that goes on must find the same."""
    return "shuffle" if size < WHOLE_BELOW else f"feistel-{ROUNDS}"


class Permutation:
    """A bijection of range(size), drawn by `key` (see `derive_seed`): `permutation[i]`.

    Small ones are numpy's shuffle. Large ones are a Feistel network on pairs (l, r), l < a, r < b, of the numbers below
    a * b, where a is about sqrt(size) and a * b >= size: each round adds a hash of one half to the other, which can be
    undone whatever the hash is. Fewer than a numbers are not below `size`: they are sent through again.
    """

    def __init__(self, size: int, *key: int | str, whole_below: int = WHOLE_BELOW) -> None:
        if size < 1:
            raise ValueError(f"a permutation of {size} items; expected at least 1")
        self.size = size
        self._whole: np.ndarray | None = None
        if size < whole_below:
            self._whole = numpy_rng(*key).permutation(size)
            return
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        self._keys = [derive_seed(*key, "round", number) for number in range(ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"item {index} of a permutation of {self.size}")
        if self._whole is not None:
            return int(self._whole[index])
        value = self._mixed(int(index))
        while value >= self.size:
            value = self._mixed(value)
        return value

    def _mixed(self, value: int) -> int:
        a, b = self._a, self._b
        left, right = divmod(value, b)
        for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
            left = (left + _hash(right + even)) % a
            right = (right + _hash(left + odd)) % b
        return left * b + right


def _hash(value: int) -> int:
    """Steele, Lea and Flood's splitmix64, without its counter."""
    value &= _64_BITS
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _64_BITS
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _64_BITS
    return value ^ value >> 31
