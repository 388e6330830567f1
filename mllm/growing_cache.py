"""A layer of transformers' cache that grows in place. B rows, T positions."""

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """Keys and values at the front of buffers with `room` behind them.

    A step writes its column; transformers' own layer copies all columns in every step.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, heads, T, width]` with the new positions at the end."""
        start = self.get_seq_length()
        self.keys = self._append(0, self.keys, key_states, start)
        self.values = self._append(1, self.values, value_states, start)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.keys, self.values

    def _append(self, which: int, held: Tensor | None, new: Tensor, start: int) -> Tensor:
        end, buffer = start + new.shape[-2], self._buffers[which]
        if buffer is None or buffer.shape[-2] < end:
            buffer = new.new_empty(*new.shape[:2], end + self.room, new.shape[-1])
            if start:
                buffer[..., :start, :] = held
            self._buffers[which] = buffer
        buffer[..., start:end, :] = new
        return buffer[..., :end, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = [None, None]  # those of the old rows

    def cut(self, length: int) -> None:
        """Forget all positions from `length` on, also where an interrupted pass has filled some of the layers only."""
        if self.is_initialized:
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]
