"""The step of an image position as one CUDA graph: compiled and recorded once, then replayed without a launch from
Python.

A graph reads the weights where they lie, so it is kept for the model's next call as long as they stay there.
"""

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unitok.mllm.stepper import PositionStepper

if TYPE_CHECKING:
    from unitok.mllm.model import UniTokMLLM

SLOT_MULTIPLE = 64  # prompts of about the same length share a graph
_WARM_UP = 2  # steps before recording: the first compiles
_KEPT: "WeakKeyDictionary[UniTokMLLM, tuple[Any, GraphedStepper]]" = WeakKeyDictionary()


class GraphedStepper:
    """A static `PositionStepper` whose steps are replayed; the same calls as there."""

    def __init__(self, stepper: PositionStepper) -> None:
        assert stepper.static and stepper.backbone.graphable
        self.stepper = stepper
        self.graph: torch.cuda.CUDAGraph | None = None
        self.codes_BK: Tensor

    def start(self, *arguments: Any) -> Tensor:
        codes_BK = self.stepper.start(*arguments)
        if self.graph is None and self.stepper.length > 1:
            self._record(codes_BK)
        return codes_BK

    def next(self, codes_BK: Tensor, position: int) -> Tensor:
        self.codes_BK.copy_(codes_BK)
        self.graph.replay()
        return self.codes_BK.clone()

    def _record(self, codes_BK: Tensor) -> None:
        self.codes_BK = codes_BK.clone()
        step = torch.compile(self.stepper.step, fullgraph=True, dynamic=False)
        ends = (self.stepper.length, self.stepper.slots)
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.stepper.go_to(0)
                step(self.codes_BK, *ends)
            self.stepper.go_to(0)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            self.codes_BK.copy_(step(self.codes_BK, *ends))
        self.graph = graph


def graphed_stepper(model: "UniTokMLLM", key: tuple[Any, ...], **sizes: Any) -> GraphedStepper | PositionStepper:
    """The model's kept stepper if it has these sizes and its weights lie where they lay, else a new one. A backbone
    whose steps cannot be recorded gets one that runs eagerly. `key`: what else must be the same."""
    places = tuple(value.data_ptr() for value in (*model.parameters(), *model.buffers()))
    key = (*key, *sizes.items(), places)
    kept = _KEPT.get(model)
    if kept is not None and kept[0] == key:
        return kept[1]
    _KEPT.pop(model, None)  # its memory is free before the next one takes some
    stepper = PositionStepper(model, static=True, **sizes)
    if not stepper.backbone.graphable:
        stepper.static = False
        return stepper
    _KEPT[model] = (key, GraphedStepper(stepper))
    return _KEPT[model][1]
