"""The step of an image position as one CUDA graph: compiled and recorded once, then replayed without a launch from
Python.

A graph reads the weights where they lie, so it is kept for the model's next calls as long as they stay there. All of
it happens on the model's device, whatever torch's current one is: elsewhere a graph would be recorded empty.
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
_MOST_KEPT = 4  # of one model: a last batch that is smaller and longer prompts need graphs of their own
_FREE_SHARE = 0.5  # of the GPU's memory, below which a new graph takes the place of the older ones
_KEPT: "WeakKeyDictionary[UniTokMLLM, dict[Any, GraphedStepper]]" = WeakKeyDictionary()  # the longest unused first


class GraphedStepper:
    """A static `PositionStepper` whose steps are replayed; the same calls as there."""

    def __init__(self, stepper: PositionStepper) -> None:
        assert stepper.static and stepper.backbone.graphable
        self.stepper, self.device = stepper, stepper.place.device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.codes_BK: Tensor

    def start(self, *arguments: Any) -> Tensor:
        with torch.cuda.device(self.device):
            codes_BK = self.stepper.start(*arguments)
            if self.graph is None and self.stepper.length > 1:
                self._record(codes_BK)
        return codes_BK

    def next(self, codes_BK: Tensor, position: int) -> Tensor:
        with torch.cuda.device(self.device):
            self.codes_BK.copy_(codes_BK)
            self.stepper.roll()
            self.graph.replay()
            return self.codes_BK.clone()

    def _record(self, codes_BK: Tensor) -> None:
        self.codes_BK = codes_BK.clone()
        # Dynamo counts the versions of one code and refuses the ninth. Recorded graphs do not need the earlier ones.
        torch._dynamo.reset_code(PositionStepper.step.__code__)
        step = torch.compile(self.stepper.step, fullgraph=True, dynamic=False)
        ends = (self.stepper.length, self.stepper.slots)
        side, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.stepper.go_to(0)
                step(self.codes_BK, *ends)
            self.stepper.go_to(0)
        torch.cuda.current_stream(self.device).wait_stream(side)
        # A stream of this device (torch's own for recording is the first device's), and other threads may use the GPU
        # meanwhile: `generate_many` decodes in one.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            self.codes_BK.copy_(step(self.codes_BK, *ends))
        self.graph = graph


def graphed_stepper(model: "UniTokMLLM", key: tuple[Any, ...], **sizes: Any) -> GraphedStepper | PositionStepper:
    """A kept stepper of the model if one has these sizes and its weights lie where they lay, else a new one. A backbone
    whose steps cannot be recorded gets one that runs eagerly. `key`: what else must be the same."""
    places = tuple(value.data_ptr() for value in (*model.parameters(), *model.buffers()))
    key = (*key, *sizes.items(), places)
    kept = _KEPT.setdefault(model, {})
    for stale in [other for other in kept if other[-1] != places]:
        del kept[stale]
    graphed = kept.pop(key, None)
    if graphed is None:
        # The memory of those that go is free before the new one takes some.
        while kept and (len(kept) >= _MOST_KEPT or _free_share(model.device) < _FREE_SHARE):
            del kept[next(iter(kept))]
        stepper = PositionStepper(model, static=True, **sizes)
        if not stepper.backbone.graphable:
            stepper.static = False
            return stepper
        graphed = GraphedStepper(stepper)
    kept[key] = graphed
    return graphed


def _free_share(device: torch.device) -> float:
    """Of a GPU's memory, what torch holds unused included."""
    free, total = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / total
