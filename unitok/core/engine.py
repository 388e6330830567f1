"""DeepSpeed engines from typed settings: the DeepSpeed configuration is generated here and stands nowhere else."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unitok.core.config import Config
from unitok.core.distributed import is_main, rank, world_size
from unitok.core.errors import ConfigError
from unitok.core.optim import OptimizerConfig


class EngineConfig(Config):
    """How a step is computed.

    precision: "fp32"; "autocast" = bf16 matrix products with fp32 parameters and gradient communication; "bf16" = bf16
    parameters with fp32 master weights (ZeRO 1 to 3, not for networks that hold codebooks).
    gradient_clipping: largest gradient norm, 0 for none.
    zero3_persistence: under ZeRO 3, parameters up to this size stay whole on every rank.
    """

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["fp32", "autocast", "bf16"] = "fp32"
    micro_batch_size: int = Field(8, ge=1)
    accumulation_steps: int = Field(1, ge=1)
    gradient_clipping: float = Field(1.0, ge=0)
    zero3_persistence: int = Field(100_000, ge=0)


def deepspeed_config(config: EngineConfig) -> dict[str, Any]:
    """The DeepSpeed configuration that `config` stands for."""
    stage = config.zero_stage
    if config.precision == "bf16" and stage == 0:
        raise ConfigError("engine.precision=bf16 needs engine.zero_stage 1, 2 or 3 (they keep the fp32 master weights)")
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["overlap_comm"] = torch.cuda.is_available()
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = config.zero3_persistence
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps,
        # always written: DeepSpeed clips at 1.0 where the key is missing. Without ZeRO the loop clips (it has the norm)
        "gradient_clipping": config.gradient_clipping if stage else 0.0,
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.precision == "autocast":
        # an empty list of "safe" modules: for those DeepSpeed would communicate gradients and weights in bf16
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        settings["torch_autocast"] = autocast
    elif config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def build_engine(
    module: nn.Module, optimizer_groups: list[dict[str, Any]], optimizer: OptimizerConfig, config: EngineConfig
) -> Any:
    """A `deepspeed.DeepSpeedEngine` around `module` with torch's fused AdamW over `optimizer_groups`."""
    import deepspeed
    from deepspeed.runtime import torch_autocast

    settings = deepspeed_config(config)
    if config.precision != "autocast":
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # global of DeepSpeed: an earlier run may have set it
    # Also global. Weights are used once a pass: kept, their bf16 copies only fill the memory (12 GB of a 7B model), and
    # the parts of a weight's gradient would be summed in bf16 where it is used in chunks.
    torch.set_autocast_cache_enabled(config.precision != "autocast")
    adamw = torch.optim.AdamW(
        optimizer_groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True, foreach=False
    )
    if config.zero_stage:
        _refuse_opaque_outputs(module, everywhere=config.zero_stage == 3)
    engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=settings, dist_init_required=False)
    if config.zero_stage == 0 and world_size() == 1:
        engine.enable_backward_allreduce = False  # one rank: it would only copy all gradients to and fro
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    """Give all parameter groups of the engine's optimizer the rate, times the group's own factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def _refuse_opaque_outputs(module: nn.Module, everywhere: bool) -> None:
    """Stop at the first forward pass if ZeRO cannot see the tensors of a module's output (it would train wrongly)."""

    def check(owner: nn.Module, _inputs: Any, output: Any) -> None:
        if dataclasses.is_dataclass(output) and not isinstance(output, dict):
            raise TypeError(
                f"{type(owner).__name__}.forward returns the dataclass {type(output).__name__}, whose tensors ZeRO "
                "does not find; derive it from transformers.utils.ModelOutput, or return a tuple or dict"
            )

    for part in module.modules() if everywhere else (module,):
        part.register_forward_hook(check)


class GradientGuard:
    """Finds gradients that are not finite, and their norm, before the optimizer step.

    Without ZeRO the whole gradients are there after the last backward pass, and their norm tells. With ZeRO they are
    reduced and freed during the backward pass, so hooks look at each one as it arrives (no synchronisation with the
    device). `flag` is summed over ranks by the loop.
    """

    def __init__(self, engine: Any, config: EngineConfig) -> None:
        self.config = config
        self.named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self.norm: Tensor | None = None
        self.bad = torch.zeros(len(self.named), dtype=torch.bool, device=engine.device)
        if config.zero_stage:
            for index, (_, parameter) in enumerate(self.named):
                parameter.register_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def look(gradient: Tensor) -> None:
            if gradient.numel():  # the largest one tells, in one pass without temporaries: NaN stays NaN
                self.bad[index] |= ~torch.isfinite(torch.linalg.vector_norm(gradient, float("inf")))

        return look

    def flag(self) -> Tensor:
        """1 if a gradient of this step is not finite on this rank, else 0 (float64 scalar on the device)."""
        if self.config.zero_stage:
            return self.bad.any().double()
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else []
        self.norm = (
            torch.linalg.vector_norm(torch.stack(norms).float()) if norms else torch.zeros((), device=self.bad.device)
        )
        return (~torch.isfinite(self.norm)).double()

    def clip_(self) -> None:
        """Scale whole gradients down to the largest norm (ZeRO does it inside its own step)."""
        if self.config.zero_stage == 0 and self.config.gradient_clipping > 0 and self.norm is not None:
            gradients = [p.grad for _, p in self.named if p.grad is not None]
            torch._foreach_mul_(gradients, (self.config.gradient_clipping / (self.norm + 1e-6)).clamp(max=1.0))

    def gradient_norm(self, engine: Any) -> float:
        """Norm of the whole gradient before clipping; with ZeRO known only after the engine's step."""
        norm = self.norm if self.config.zero_stage == 0 else engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def reset(self) -> None:
        """Forget what was found: the step it belongs to is left out."""
        self.bad.zero_()
        self.norm = None

    def names(self) -> list[str]:
        """Parameters of this rank whose gradient is not finite."""
        if self.config.zero_stage:
            return [name for (name, _), bad in zip(self.named, self.bad.tolist(), strict=True) if bad]
        return [name for name, p in self.named if p.grad is not None and not bool(torch.isfinite(p.grad).all())]


def discard_gradients(engine: Any) -> None:
    """Leave this step out at its last micro-batch: as `engine.step()`, but nothing is updated. Every rank calls.

    DeepSpeed does the same when its own loss scaling overflows, but has no call for it; the names are its own.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization():
        optimizer.zero_grad()
        if engine.zero_optimization_stage() == 3:
            optimizer.averaged_gradients = {}  # the partitions are written anew: zero_grad restarts the micro-batches
        elif hasattr(optimizer, "averaged_gradients"):
            from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    else:
        engine.zero_grad()
    engine.micro_steps += 1
    engine.skipped_steps += 1


@contextmanager
def whole_parameters(module: nn.Module | Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """All parameters of `module` whole inside the block, also under ZeRO 3 (every rank must enter).

    With `write` every rank takes over what rank 0 has made of them.
    """
    given = module.parameters() if isinstance(module, nn.Module) else module
    parameters = [p for p in given if hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


@contextmanager
def whole_on_main(module: nn.Module) -> Iterator[None]:
    """All parameters of `module` whole on rank 0 inside the block (every rank must enter). Those that ZeRO 3 has in
    parts are gathered one after the other and held in host memory: the whole network would not fit beside what
    training has on a GPU. They are for reading alone."""
    held: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for parameter in module.parameters():
            if hasattr(parameter, "ds_id"):
                with whole_parameters([parameter]):
                    whole = parameter.detach().to("cpu", copy=True) if is_main() else None
                if whole is not None:
                    held.append((parameter, parameter.data))
                    parameter.data = whole
        yield
    finally:
        for parameter, part in held:
            parameter.data = part


@contextmanager
def partitioned(config: EngineConfig) -> Iterator[None]:
    """Under ZeRO 3, modules made inside the block keep this rank's part of each parameter alone (rank 0's values)."""
    if config.zero_stage != 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config)):
        yield


@torch.no_grad()
def edit_parameter_(parameter: Any, function: Callable[[Tensor], Tensor]) -> None:
    """Replace a (possibly partitioned) parameter's value by `function(value)`, which must be the same on every rank.

    The master weights of ZeRO 1 to 3 follow. Every rank calls.
    """
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_local_fp32_param

        value = function(safe_get_full_fp32_param(parameter).view(parameter.ds_shape))
        size = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))
        own = padded[rank() * size : (rank() + 1) * size]
        safe_set_local_fp32_param(parameter, own)
        parameter.ds_tensor.copy_(own.view_as(parameter.ds_tensor))
        if parameter.numel() == value.numel():  # held whole
            parameter.data.copy_(value.view_as(parameter))
    elif hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        value = function(safe_get_full_fp32_param(parameter))
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
    else:
        parameter.data.copy_(function(parameter.data))


@torch.no_grad()
def fill_partitioned_(parameter: Any, first: int, count: int, values: Tensor | None) -> None:
    """Replace `count` numbers of a parameter that ZeRO 3 has partitioned, counted through from number `first` on, by
    rank 0's `values`. Every rank calls; the parameter is nowhere whole. Before its engine is made."""
    own, size = parameter.ds_tensor.data.view(-1), parameter.ds_tensor.numel()
    for number in range(world_size()):
        low, high = max(first, number * size), min(first + count, (number + 1) * size)
        if low >= high:
            continue
        place = own[low - number * size : high - number * size]
        if rank() == 0:
            assert values is not None and values.numel() == count, "rank 0 has the numbers"
            part = values.reshape(-1)[low - first : high - first]
            if number == 0:
                place.copy_(part)
            else:
                torch.distributed.send(part.to(own.device, own.dtype).contiguous(), number)
        elif rank() == number:
            torch.distributed.recv(place, 0)


@torch.no_grad()
def load_whole_(parameter: Any, value: Tensor) -> None:
    """Give a frozen (possibly partitioned) parameter, which no optimizer holds, its whole value. Every rank calls."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    size = parameter.ds_tensor.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))
    parameter.ds_tensor.copy_(padded[rank() * size : (rank() + 1) * size].view_as(parameter.ds_tensor))
    if parameter.data.numel() == value.numel():  # held whole
        parameter.data.copy_(value.view_as(parameter))


def clamp_parameter_(parameter: Any, low: float, high: float) -> None:
    """Clamp a (possibly partitioned) parameter in place. Every rank calls."""
    edit_parameter_(parameter, lambda value: value.clamp(low, high))
