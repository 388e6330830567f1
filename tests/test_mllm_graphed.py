"""What keeps, makes and drops CUDA graphs, with stand-ins for the GPU: a replay runs the recorded step again."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny import BOI, BOS, PAD, make_mllm

from unitok.mllm import UniTokMLLM, graphed
from unitok.mllm.precision import cast_weights
from unitok.mllm.quantize import quantize_weights
from unitok.mllm.sampler import CodeSampler
from unitok.mllm.sequence import pad_left
from unitok.mllm.stepper import PositionStepper

PROMPTS = [[BOS, 20, 21, 22, BOI], [BOS, 23, BOI], [BOS, 24, 25, BOI]]


@pytest.fixture
def gpu(monkeypatch):
    """Notes of what was asked of the GPU: `devices` that were entered and are current, `made` streams, `recorded`."""
    notes = SimpleNamespace(current=[], entered=[], streams=[], recorded=[], outside=0, free=1.0)
    compiled, real_compile = [], torch.compile

    @contextmanager
    def device(which):
        notes.entered.append(which)
        notes.current.append(which)
        yield
        notes.current.pop()

    def compile(function, **options):
        real = real_compile(function, backend="eager", **options)

        def step(*arguments):
            compiled[:] = [function, arguments]
            return real(*arguments)

        return step

    class Graph:
        def replay(self):
            notes.outside += not notes.current
            function, arguments = self.call
            arguments[0].copy_(function(*arguments))

    @contextmanager
    def record(graph, stream, capture_error_mode):
        yield  # unlike a recording this runs the step, so its places are gone back to
        assert stream in notes.streams and capture_error_mode == "thread_local"
        notes.outside += not notes.current
        graph.call = tuple(compiled)
        graph.call[0].__self__.go_to(0)
        notes.recorded.append(graph)

    def stream(which):
        notes.streams.append(SimpleNamespace(device=which, wait_stream=lambda other: None))
        return notes.streams[-1]

    @contextmanager
    def on(stream):
        yield

    for name, stand_in in {
        "device": device, "CUDAGraph": Graph, "graph": record, "Stream": stream, "current_stream": stream, "stream": on,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(graphed, "_free_share", lambda device: notes.free)

    def stepper(self, sampler, graph, slots, **sizes):
        slots = -(-slots // graphed.SLOT_MULTIPLE) * graphed.SLOT_MULTIPLE
        return graphed.graphed_stepper(self, (sampler.do_sample, sampler.filtered), slots=slots, **sizes)

    notes.use = lambda: monkeypatch.setattr(UniTokMLLM, "_stepper", stepper)
    return notes


def sample(model, images, **options):
    ids, mask = pad_left([PROMPTS[image % 3] for image in range(images)], PAD)
    return model.generate_codes(ids, mask, **options)


def test_many_sizes_one_after_the_other(gpu):
    """More than the eight versions of a code that dynamo compiles; everything on the model's device."""
    model, counts = make_mllm(), range(1, 12)
    expected = [sample(model, images) for images in counts]
    gpu.use()
    for images, codes in zip(counts, expected, strict=True):
        assert torch.equal(sample(model, images), codes)
        assert torch.equal(sample(model, images), codes), "the kept graph"
    assert len(gpu.recorded) == len(counts) and len(graphed._KEPT[model]) == graphed._MOST_KEPT
    assert gpu.outside == 0 and {*gpu.entered, *(stream.device for stream in gpu.streams)} == {model.device}


def test_graphs_are_kept_while_there_is_memory(gpu):
    model = make_mllm()
    gpu.use()
    for _ in range(3):  # a full batch and what is left, at every call
        sample(model, 3)
        sample(model, 2)
    assert len(gpu.recorded) == 2
    gpu.free = 0.4
    sample(model, 1)
    assert len(gpu.recorded) == 3 and len(graphed._KEPT[model]) == 1
    sample(model, 1)
    assert len(gpu.recorded) == 3
    model.lm_head.weight.data = model.lm_head.weight.data.clone()  # graphs read the weights where they lay
    gpu.free = 1.0
    sample(model, 1)
    assert len(gpu.recorded) == 4 and len(graphed._KEPT[model]) == 1


def test_the_longest_unused_goes_first(gpu):
    model = make_mllm()
    gpu.use()
    for images in (*range(1, graphed._MOST_KEPT + 1), 1, 9):  # 9 takes the place of 2
        sample(model, images)
    made = len(gpu.recorded)
    sample(model, 1)
    assert len(gpu.recorded) == made
    sample(model, 2)
    assert len(gpu.recorded) == made + 1


def static_steps(model, alone, compiler=None):
    """Codes `[B, K, L]` of static steps, compiled with a backend if one is given; the stepper beside."""
    stepper = PositionStepper(model, rows=3, slots=32, length=6, guided=False, alone=alone, static=True)
    step = stepper.step
    if compiler is not None:
        torch._dynamo.reset_code(PositionStepper.step.__code__)
        step = torch.compile(step, fullgraph=True, dynamic=False, backend=compiler)

    def codes():
        ids, mask = pad_left(PROMPTS, PAD)
        columns = [stepper.start(model.embed(ids, None), mask, CodeSampler((1, 2, 3), False, 1.0, 0, 1.0), 1.0)]
        for _ in range(5):
            columns.append(step(columns[-1], 6, 32))
        return torch.stack(columns, dim=-1)

    return codes


@pytest.mark.parametrize("alone", [False, True], ids=["consistent", "released"])
def test_quantized_steps_compile(alone):
    """The compiler's second stage refuses inputs that share memory where weights are of a class of their own."""
    model = quantize_weights(cast_weights(make_mllm(), torch.bfloat16), "int8")
    with torch.no_grad():
        assert torch.equal(static_steps(model, alone, "aot_eager")(), static_steps(model, alone)())


def test_a_step_writes_its_slots_alone():
    """In the compiler's functional form every cache is written by one `index_put` a step, of which Inductor makes
    a write in place; the scatter of a view would copy the whole cache."""
    from torch._dynamo.backends.common import aot_autograd

    called = []

    def record(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        static_steps(make_mllm(), False, aot_autograd(fw_compiler=record))()
    assert "aten.index_put.default" in called or "aten.index_copy.default" in called, sorted(set(called))
    assert not {one for one in called if "scatter" in one or "as_strided" in one}


@pytest.mark.parametrize("alone", [False, True], ids=["consistent", "released"])
def test_kept_steps_see_weights_that_change_where_they_lie(alone):
    """As an optimizer's step, an average's swap and `attach_tokenizer` change them. In bf16 the CPU keeps no copies,
    like a GPU."""
    model = cast_weights(make_mllm(), torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        kept = static_steps(model, alone)
        before = kept()
        for value in (*model.parameters(), *model.buffers()):
            value.copy_(value.flip(0) * 1.25) if value.is_floating_point() else None
        assert torch.equal(kept(), static_steps(model, alone)())
        assert not torch.equal(kept(), before)
