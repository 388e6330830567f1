"""Collectives that also work in a process without a process group (one rank), and the set-up of that group.

W ranks, B batch of one rank, D width.
"""

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unitok.core.errors import ConfigError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_distributed() -> bool:
    """True when a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """True on the rank that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum `tensor` over ranks in place and return it (no gradient flows through)."""
    if world_size() > 1:
        # NCCL reduces tensors of the GPU only; counts are kept on the CPU
        there = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)
    return tensor


def all_gather_object(value: Any) -> list[Any]:
    """The picklable `value` of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable `value` on every rank."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_with_grad(x_BD: Tensor) -> Tensor:
    """Rows of all ranks, `[W * B, D]` in rank order, with gradient: what every rank's use of a row contributes is
    summed back on the rank that owns it.

    So for a loss that each rank computes over all rows and that DeepSpeed averages over ranks, the gradient is that
    of one process holding the whole batch. B must be equal on all ranks.
    """
    return x_BD if world_size() == 1 else _Gather.apply(x_BD)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> Tensor:
        rows = [torch.empty_like(x_BD) for _ in range(world_size())]
        dist.all_gather(rows, x_BD.contiguous())
        ctx.batch = x_BD.shape[0]
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = all_reduce_sum_(gradients[0].contiguous().clone())
        start = rank() * ctx.batch
        return total[start : start + ctx.batch]


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def training_device(device: str = "auto") -> torch.device:
    """The kind of device that a setting "auto" (a GPU if there is one), "cpu" or "cuda" means here."""
    return torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")


def inference_device() -> torch.device:
    """Where a model in use goes: the GPU of this process, by its number on this host (the LOCAL_RANK of torchrun and
    deepspeed, the SLURM_LOCALID of srun, else 0), or the CPU. Processes beyond the GPUs they see share them: srun may
    show each its own alone."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device("cuda", int(number) % torch.cuda.device_count())


def init_distributed(device: str = "auto") -> torch.device:
    """Join the process group of the launcher (`deepspeed`, `torchrun`), or make one of a single rank.

    `device` is "auto" (the local GPU if there is one), "cpu" or "cuda". Returns the device of this rank.
    Call `shutdown_distributed` when training ends; then it can be called again in the same process.
    """
    # DeepSpeed chooses its accelerator once per process, when it is first imported
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no GPU here; use device=auto or device=cpu")
    use_cuda = training_device(device).type == "cuda"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_cuda else "cpu")
    import deepspeed
    import deepspeed.comm

    _quiet(deepspeed)
    if not is_distributed():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            _alone()
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
        # No operator of DeepSpeed is used: probing for them runs a compiler for seconds, and building the one for
        # shared memory takes most of a minute. gloo alone does for CPU ranks.
        deepspeed.ops.__compatible_ops__ = {}
        if use_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # Where NCCL hears that a rank is gone, torch would end this one by SIGABRT. As "2" it ends the collective:
            # the next call raises, and our watchdog says who it was.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        deepspeed.init_distributed("nccl" if use_cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def shutdown_distributed() -> None:
    """Destroy the process group and forget a single rank's made-up environment."""
    if is_distributed():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()
    if os.environ.pop("UNITOK_ALONE", None):
        _unset(LAUNCHER_VARIABLES)


def _alone() -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ["UNITOK_ALONE"] = "1"


def _unset(names: Sequence[str]) -> None:
    for name in names:
        os.environ.pop(name, None)


def _quiet(deepspeed: Any) -> None:
    import logging
    import warnings

    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
