"""FLOPs and peak memory of one micro-batch of either stage, by running the real networks on shapes alone.

Parameters and inputs are fake tensors (`FakeTensorMode`): every operation gives a tensor of the right shape, type and
lifetime without memory behind it, so a model of any size is traced in seconds. They pass for the CPU's, because
autocast and fused attention then choose as on a GPU: bf16 products, and no T x T scores kept for the backward pass.

B batch, K codebooks, L image positions, T text and image positions of a row, D width, H W pixels.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from unitok.eval.flops import FlopCount, MeasuredTask, random_batch
from unitok.mllm import UniTokMLLM
from unitok.tokenizer.dino import DinoDiscriminator
from unitok.tokenizer.task import TokenizerTrainConfig

_aten = torch.ops.aten
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trace:
    """Of one micro-batch, forward and backward.

    flops: products as executed. course: bytes of the parameters' gradients made so far, and the most bytes that all
    other tensors made in it then held at a time.
    """

    flops: int
    course: tuple[tuple[int, int], ...]

    @property
    def activations(self) -> int:
        """The most bytes at a time without gradients of parameters."""
        return max(held for _, held in self.course)

    def peak(self, share: float, beyond: int = 0) -> float:
        """The most bytes at a time with this share of all bytes of gradients `beyond` so many that are there."""
        return max(held + share * max(gradients - beyond, 0) for gradients, held in self.course)


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live:` ... bytes of storages that operations inside have made and that are still there.

    Works on fake and on real tensors. What was there before does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.gradients = self.peak = 0
        self.course: list[tuple[int, int]] = []  # see `Trace`, but for the last stretch
        self._stretch = 0  # the most since the last gradient
        self._known: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default and isinstance(args[0], torch._subclasses.FakeTensor):
            return 0.5 if args[0].is_floating_point() else 0  # a draw that decides something: likely enough
        out = func(*_without_masks(func, args), **(kwargs or {}))
        given: set[int] | None = None  # views of what was there, and what is changed in place, are nothing new
        for value in tree_iter(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                if given is None:
                    given = {
                        one.untyped_storage()._cdata
                        for one in tree_iter((args, kwargs))
                        if isinstance(one, Tensor) and one.layout == torch.strided
                    }
                if value.untyped_storage()._cdata not in given:
                    self._see(value)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.now -= size

        self._known[key] = (weakref.ref(storage, gone), size)
        self.now += size
        self.peak, self._stretch = max(self.peak, self.now), max(self._stretch, self.now)

    def take_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's finished gradient as one, and let go of it (as ZeRO does, or in the next step)."""
        assert parameter.grad is not None
        self.course.append((self.gradients, self._stretch))
        storage = parameter.grad.untyped_storage()
        if self._known.pop(storage._cdata, None) is not None:
            self.now -= storage.nbytes()
        self.gradients += storage.nbytes()
        self._stretch = self.now
        parameter.grad = None


def _without_masks(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a mask selects is unknown without values: it is everything (all captions are given)."""
    if func is not _aten.index.Tensor or not isinstance(args[0], torch._subclasses.FakeTensor):
        return args
    indices = [
        torch.arange(index.shape[0]) if index is not None and index.dtype == torch.bool else index for index in args[1]
    ]
    return (args[0], indices)


# ---- networks without memory


def made_fake(module: nn.Module, mode: Any, dtype: Callable[[str], torch.dtype] | None = None) -> nn.Module:
    """`module` (made on the meta device) with fake tensors in place of its parameters and buffers, in place.

    dtype: by name, the type that a parameter of floats gets (default: its own).
    """
    kept: dict[int, nn.Parameter] = {}  # shared parameters stay shared
    with mode:
        for path, part in module.named_modules():
            for name, value in part._parameters.items():
                if value is None:
                    continue
                if id(value) not in kept:
                    wanted = dtype(f"{path}.{name}") if dtype is not None else value.dtype
                    kept[id(value)] = nn.Parameter(torch.empty(value.shape, dtype=wanted), value.requires_grad)
                part._parameters[name] = kept[id(value)]
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
    return module


class TracedEngine:
    """What `micro_step` asks of a DeepSpeed engine, with its autocast."""

    def __init__(self, module: nn.Module, autocast: bool) -> None:
        self.module, self.device, self.autocast = module, _CPU, autocast

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with bf16_products(self.autocast):
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def bf16_products(enabled: bool) -> Any:
    """As the engines have it: without copies of weights that stay (`build_engine`)."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if enabled else nullcontext()


@contextmanager
def _gradients_taken(parameters: Iterable[Tensor], live: LiveBytes) -> Iterator[None]:
    hooks = [p.register_post_accumulate_grad_hook(live.take_gradient) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trace(function: Callable[[], object], modules: Iterable[nn.Module], mode: Any) -> Trace:
    """Run `function`, forward and backward of `modules` made fake in `mode`."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    live = LiveBytes()
    with mode, _gradients_taken(parameters, live), live, FlopCount() as count:
        function()
    return Trace(count.total, (*live.course, (live.gradients, live._stretch)))


def fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


# ---- stage one


class TracedTokenizer:
    """Stage one's networks without memory. `config` must name no file (see `unitok.eval.speed.measured_config`)."""

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.config, self.mode = config.model_copy(update={"compile": False}), fake_mode()
        self.task = MeasuredTask(self.config, torch.device("meta"))
        self.networks = {name: network.module.train() for name, network in self.task.build().items()}
        self.frozen = {
            name: module for name in ("lpips", "teacher") if (module := getattr(self.task, name)) is not None
        }
        for part in self.networks["discriminator"].modules() if "discriminator" in self.networks else ():
            if isinstance(part, DinoDiscriminator):  # it keeps DINO beside its own modules
                self.frozen["dino"] = part.dino
        for module in [*self.networks.values(), *self.frozen.values()]:
            made_fake(module, self.mode)
        for module in self.frozen.values():
            module.to = lambda *_args, _same=module, **_kwargs: _same  # already where it belongs

    def step(self, started: bool, checkpointing: bool) -> Trace:
        """Of a micro-batch of one rank, with the discriminator at work or not yet."""
        tokenizer = self.networks["tokenizer"]
        tokenizer.gradient_checkpointing_enable() if checkpointing else tokenizer.gradient_checkpointing_disable()
        autocast = self.config.engine.precision != "fp32"
        engines = {
            name: TracedEngine(module, autocast)
            for name, module in self.networks.items()
            if started or name == "tokenizer"
        }
        with self.mode:
            batch = {
                name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
                for name, value in random_batch(self.config).items()
            }
        number = self.config.discriminator.start_step
        return trace(lambda: self.task.micro_step(engines, batch, 0, number), self.networks.values(), self.mode)


# ---- stage two


@dataclass(frozen=True)
class Work:
    """What one row asks of the unified model: `length` ids, of which `images` x L are image positions; `text` of them
    are learnt, and `drawn` positions' codes."""

    length: int
    images: int
    text: int
    drawn: int


class TracedMllm:
    """The unified model (made on the meta device, its recipe applied) without memory."""

    def __init__(self, model: UniTokMLLM, precision: str) -> None:
        self.mode, self.autocast = fake_mode(), precision == "autocast"
        self.model = model.train()
        fixed = tuple(model._keep_in_fp32_modules_strict)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        made_fake(model, self.mode, lambda name: torch.float32 if name.startswith(fixed) else dtype)

    def step(self, work: Work, checkpointing: bool, method: str) -> Trace:
        """Of one row. method: that of `unitok.mllm.cross_entropy`."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if not checkpointing:
            for module in self.model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False
        return trace(lambda: self._losses(work, method), [self.model], self.mode)

    def _losses(self, work: Work, method: str) -> None:
        """`UniTokMLLM.losses` without what depends on values: where images stand, and which ids are learnt."""
        model, config = self.model, self.model.config
        positions, continuous = config.num_image_positions, config.visual_input == "continuous"
        with bf16_products(self.autocast):
            parts = [model.get_input_embeddings()(torch.zeros(1, work.length - work.images * positions).long())]
            if work.images:
                shape = (work.images, config.code_width if continuous else config.num_codebooks, positions)
                given = torch.zeros(shape) if continuous else torch.zeros(shape, dtype=torch.long)
                parts.append(model.embedder(given).flatten(0, 1)[None].to(parts[0].dtype))
            hidden_TD = model.backbone(inputs_embeds=torch.cat(parts, dim=1), use_cache=False).last_hidden_state[0]
            loss, _, _ = model.lm_head(hidden_TD[: work.text], torch.zeros(work.text).long(), method)
            if work.drawn:
                codes_NK = torch.zeros(work.drawn, config.num_codebooks).long()
                image, _, squares = model.depth.losses(hidden_TD[-work.drawn :], codes_NK, method)
                loss = loss + image + squares
        if loss.requires_grad:
            loss.backward()
