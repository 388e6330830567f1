"""What waits in the queue: one request each, and how its events come back to the event loop."""

import asyncio
import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Event = tuple[str, Any]


@dataclass(eq=False)
class Job:
    """One request. Jobs with equal `key` may go through the model together; `weight` is its share of a batch.

    `emit` may be called from any thread; `events` belong to the event loop that made the job. `deadline`, in the loop's
    time, is set when the job is queued.
    """

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, kw_only=True)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue, kw_only=True)
    cancelled: bool = field(default=False, kw_only=True)
    deadline: float = field(default=math.inf, kw_only=True)
    passed_over: int = field(default=0, init=False)  # batches that were formed while it waited
    ended: bool = field(default=False, init=False)  # "done" or "error" has been emitted

    @property
    def key(self) -> Hashable:
        return type(self).__name__

    @property
    def weight(self) -> int:
        return 1

    def begin_again(self) -> None:
        """Called before a job that was interrupted is run once more."""

    def emit(self, kind: str, value: Any) -> None:
        """Hand an event to whoever waits for this job."""
        self.ended = self.ended or kind in ("done", "error")
        if not self.cancelled:
            self.loop.call_soon_threadsafe(self.events.put_nowait, (kind, value))


@dataclass(eq=False)
class ChatJob(Job):
    """A conversation; `sampling` as `TextSampling` takes it. Choice i has seed + i. Without `stream` each choice comes
    as a whole."""

    messages: list[dict[str, Any]]
    max_new_tokens: int  # with `may_be_fewer` as far as the context reaches
    sampling: dict[str, Any]
    seed: int
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = True
    may_be_fewer: bool = False
    _sent: Counter[int] = field(default_factory=Counter, init=False)  # characters of each choice
    _again: Counter[int] = field(default_factory=Counter, init=False)  # of these, those that will come once more

    @property
    def weight(self) -> int:
        return self.n

    def begin_again(self) -> None:
        """What has been emitted will be said again, and is not emitted twice."""
        self._again = self._sent.copy()

    def emit(self, kind: str, value: Any) -> None:
        """As `Job.emit`, for "delta" without what the client has from before `begin_again`."""
        if kind == "delta":
            choice, text = value
            known = min(self._again[choice], len(text))
            self._again[choice] -= known
            value = choice, text[known:]
            self._sent[choice] += len(value[1])
            if not value[1]:
                return
        super().emit(kind, value)


@dataclass(eq=False)
class ImageJob(Job):
    """`n` pictures of a prompt; `sampler`: settings of `generate_images` that replace the export's."""

    prompt: str
    n: int
    seed: int
    sampler: dict[str, float]
    prompt_ids: int = 0

    @property
    def key(self) -> Hashable:
        return "images", tuple(sorted(self.sampler.items()))

    @property
    def weight(self) -> int:
        return self.n


@dataclass(eq=False)
class ReconstructJob(Job):
    """`pixels` `[3, H, W]` as the visual tokenizer takes them."""

    pixels: "torch.Tensor"
