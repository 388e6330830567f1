"""A run: its settings, its state, building it and taking it up again from a checkpoint."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

import unitok
from unitok.core import checkpoint
from unitok.core.bad_share import BadCounts
from unitok.core.config import Config, default_values, save_config
from unitok.core.distributed import is_main, world_size
from unitok.core.ema import Ema
from unitok.core.engine import EngineConfig, GradientGuard, build_engine
from unitok.core.errors import CheckpointError, ConfigError
from unitok.core.optim import parameter_groups
from unitok.core.reshard import RUN_FILES
from unitok.core.rng import derive_seed
from unitok.core.runlog import RunLog, Tracker
from unitok.core.same_run import check_same_run
from unitok.core.sampling import check_same_order, order_of
from unitok.core.task import Network, Task


class TrainConfig(Config):
    """Settings of a run that every task has.

    save_every, eval_every: in steps; 0 = only at the end, or never. keep_last: complete checkpoints that stay; those of
    steps that keep_every (in steps, 0 = none) divides stay for good.
    shuffle_window: shards shuffled together, where reading at random is slow (see docs/scale.md); 0 = all samples are.
    resume: "auto" = from the newest complete checkpoint of output_dir if there is one; "never"; or a checkpoint folder,
    from which a new output_dir starts: given again, the command goes on from what it has saved since.
    resume_fallback: where the newest checkpoint is corrupt, set it aside and take the newest that is whole.
    non_finite: a step whose loss or gradient is not finite is an error ("stop") or left out on all ranks ("skip"), as
    long as no more than non_finite_limit come in a row and non_finite_total in the whole run.
    rank_timeout: seconds without a sign of life after which the other ranks give a rank up.
    device: "auto", "cpu" or "cuda".
    """

    output_dir: str
    steps: int = Field(1000, ge=1)
    seed: int = 0
    engine: EngineConfig = EngineConfig()
    log_every: int = Field(1, ge=1)
    save_every: int = Field(0, ge=0)
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    eval_every: int = Field(0, ge=0)
    tracker: Tracker = "none"
    num_workers: int = Field(0, ge=0)
    shuffle_window: int = Field(0, ge=0)
    resume: str = "auto"
    resume_fallback: bool = False
    non_finite: Literal["stop", "skip"] = "stop"
    non_finite_limit: int = Field(5, ge=1)
    non_finite_total: int = Field(100, ge=1)
    rank_timeout: float = Field(30.0, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass
class Skipped:
    """Steps left out because something was not finite."""

    total: int = 0
    in_a_row: int = 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training into `folder`; ConfigError if one does. The lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another process is training into it; wait for it or take another output_dir"
            ) from None
        yield


@dataclass
class Run:
    """Everything that a step needs."""

    task: Task
    config: TrainConfig
    resolved: dict[str, Any]
    networks: dict[str, Network]
    engines: dict[str, Any]
    guards: dict[str, GradientGuard]
    emas: dict[str, Ema]
    device: torch.device
    log: RunLog | None = None
    step: int = 0
    samples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    last_checkpoint: Path | None = None
    started_from: dict[str, str] | None = None  # the checkpoint that `resume` named when this output_dir began
    skipped: Skipped = field(default_factory=Skipped)
    bad: BadCounts = field(default_factory=lambda: BadCounts([]))

    @property
    def checkpoints(self) -> Path:
        return Path(self.config.output_dir) / "checkpoints"

    @property
    def global_micro_batch(self) -> int:
        return self.config.engine.micro_batch_size * world_size()

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {name: engine.module for name, engine in self.engines.items()}

    def active(self) -> dict[str, Any]:
        """The engines that are stepped at this step."""
        return {name: engine for name, engine in self.engines.items() if self.step >= self.networks[name].start_step}


def set_up(task: Task, config: TrainConfig, resolved: Config | dict[str, Any], device: torch.device) -> Run:
    """Networks, engines and averages of a new run, the same on every rank."""
    resolved = resolved.model_dump(mode="json") if isinstance(resolved, Config) else resolved
    torch.manual_seed(derive_seed("build", config.seed))
    networks = task.build()
    for name, network in networks.items():
        _refuse_cast_codebooks(name, network, config.engine)
    engines, guards, emas = {}, {}, {}
    for name, network in networks.items():
        groups = parameter_groups(network.module, network.optimizer)
        engines[name] = build_engine(network.module, groups, network.optimizer, config.engine)
        guards[name] = GradientGuard(engines[name], config.engine)
        if network.ema_decay is not None:
            emas[name] = Ema(engines[name].module, network.ema_decay)
        engines[name].train()
    counts = BadCounts(task.readings())
    return Run(task, config, resolved, networks, engines, guards, emas, device, bad=counts)


def _refuse_cast_codebooks(name: str, network: Network, engine: EngineConfig) -> None:
    found = [key for key, _ in network.module.named_parameters() if "codebook" in key]
    if engine.precision == "bf16" and (network.holds_codebooks or found):
        raise ConfigError(
            f"engine.precision=bf16 would cast the codebooks of network {name!r} to bf16; use engine.precision=autocast"
        )


def resume(run: Run) -> None:
    """Take up the run from its checkpoint, if there is one, and write its config.yaml. Every rank calls.

    Raises CheckpointError for one that is corrupt or of another run.
    """
    config = run.config
    run.last_checkpoint = checkpoint.on_main(lambda: _find_checkpoint(run))
    if run.last_checkpoint is not None:
        path = run.last_checkpoint
        present, defaults = identity(run), default_values(type(run.config))
        settings = (run.task.incidental, run.task.decisive, defaults, run.task.switches)
        checkpoint.on_main(lambda: check_same_run(path, checkpoint.read_state(path), present, *settings))
        checkpoint.on_main(lambda: check_same_order(path, checkpoint.read_state(path), present))
        state = checkpoint.load_checkpoint(path, run.engines, run.emas)
        run.step, run.samples, run.metrics = state["step"], state["samples_seen"], state["metrics"]
        run.skipped = Skipped(**state.get("skipped", {}))
        run.bad.load(state.get("bad", []))
        named = config.resume not in ("auto", "never") and path == Path(config.resume)
        run.started_from = checkpoint.on_main(lambda: checkpoint.origin(path)) if named else state.get("started_from")
        run.task.load_extra_state(state["extra_state"])
    checkpoint.on_main(lambda: save_config(run.resolved, Path(config.output_dir) / "config.yaml"))
    if is_main() and run.last_checkpoint is not None:
        print(f"resuming {run.task.name} from {run.last_checkpoint} (step {run.step})", flush=True)


def resumed_folder(config: TrainConfig) -> Path | None:
    """The output folder of the run that will be resumed; None for a new run. Beside its checkpoints it holds what a
    task made at its start. A universal checkpoint carries these files with it."""
    if config.resume not in ("auto", "never"):
        path = Path(config.resume).resolve()
        if _has_gone_on(config, path):
            return Path(config.output_dir)
        return path / RUN_FILES if (path / RUN_FILES).is_dir() else path.parent.parent
    folder = Path(config.output_dir)
    return folder if checkpoint.latest_complete(folder / "checkpoints") is not None else None


def _find_checkpoint(run: Run) -> Path | None:
    config = run.config
    if config.resume not in ("auto", "never"):
        path = Path(config.resume)
        if _has_gone_on(config, path):
            newest = _newest_whole(run.checkpoints, config.resume_fallback)
            if newest is not None:
                return newest
        checkpoint.verify(path)
        _refuse_newer(run.checkpoints, path)
        return path
    path = checkpoint.latest_complete(run.checkpoints)
    if path is not None and config.resume == "never":
        raise ConfigError(f"resume=never, but {path} exists; delete it, take another output_dir, or use resume=auto")
    return _newest_whole(run.checkpoints, config.resume_fallback)


def _has_gone_on(config: TrainConfig, start: Path) -> bool:
    """Whether output_dir holds the run that started from the checkpoint `start`, as the newest of its checkpoints says
    that can be read."""
    found = reversed(checkpoint.all_complete(Path(config.output_dir) / "checkpoints"))
    said = (checkpoint.came_from(path, start) for path in found)
    return next((one for one in said if one is not None), False)


def _newest_whole(folder: Path, fall_back: bool) -> Path | None:
    """The newest complete checkpoint, verified. One that is corrupt is an error, or is set aside and said so."""
    while (path := checkpoint.latest_complete(folder)) is not None:
        try:
            checkpoint.verify(path)
            return path
        except CheckpointError as error:
            if not fall_back:
                raise CheckpointError(f"{error}, or set resume_fallback=true to go on from the one before") from error
            aside = checkpoint.set_aside(path)
            print(f"resume_fallback: {error}; moved to {aside.name}, looking for the one before it", flush=True)
    return None


def _refuse_newer(folder: Path, path: Path) -> None:
    """ConfigError if `folder` holds checkpoints newer than `path`: going back would mix two runs in it."""
    step = checkpoint.read_state(path)["step"]
    newest = checkpoint.latest_complete(folder)
    if newest is not None and checkpoint.step_of(newest) > step:
        raise ConfigError(
            f"resume={path} is of step {step}, but {newest} is newer; take another output_dir, or delete the newer "
            "checkpoints to go back"
        )


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint says of the run, beside the position."""
    return {
        "config": run.resolved,
        "world_size": world_size(),
        "global_micro_batch": run.global_micro_batch,
        "num_samples": run.task.num_samples,
        "order": order_of(run.task, run.config.seed, run.config.shuffle_window).kind,
        "code_version": unitok.__version__,
    }
