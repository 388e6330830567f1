"""The training loop: one for all tasks. It owns accumulation, the finite check, logging, saving and signals."""

import contextlib
import random
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unitok.core import checkpoint
from unitok.core.config import Config
from unitok.core.distributed import (
    all_gather_object,
    all_reduce_sum_,
    barrier,
    broadcast_object,
    init_distributed,
    is_main,
    rank,
    shutdown_distributed,
    world_size,
)
from unitok.core.engine import set_learning_rate, whole_parameters
from unitok.core.errors import ConfigError, NonFiniteError
from unitok.core.optim import lr_at
from unitok.core.rng import derive_seed
from unitok.core.run import Run, TrainConfig, identity, locked, resume, set_up
from unitok.core.runlog import RunLog
from unitok.core.sampling import batches, order_of
from unitok.core.signals import StopSignals
from unitok.core.task import Task

Evaluator = Callable[[dict[str, nn.Module], int], dict[str, float]]


def train(
    task: Task,
    config: TrainConfig,
    resolved_config: Config | dict[str, Any] | None = None,
    evaluators: dict[str, Evaluator] | None = None,
) -> dict[str, float]:
    """Train `task` for `config.steps` steps, resuming where an earlier call stopped, and export the result.

    resolved_config: what is written to config.yaml and into checkpoints (default: `config`).
    evaluators: called every `eval_every` steps and at the end, on every rank, with the (EMA) modules in eval mode.

    Returns the last logged metrics. Raises ConfigError, CheckpointError, DataError, NonFiniteError. On SIGTERM or
    SIGINT it saves a checkpoint and raises SystemExit(0).
    """
    if config.eval_every and not evaluators:
        raise ConfigError(
            f"eval_every={config.eval_every}: the command line has nothing to evaluate during training; leave it at 0 "
            "and use `unitok eval` on the export (callers of `train` give `evaluators`)"
        )
    device = init_distributed(config.device)
    run: Run | None = None
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        try:
            checkpoint.on_main(lambda: stack.enter_context(locked(Path(config.output_dir))))
            run = set_up(task, config, resolved_config or config, device)
            resume(run)
            if is_main():
                run.log = RunLog(Path(config.output_dir), config.steps, task.headline, config.tracker, run.resolved)
                run.log.start(run.step, run.samples)
            if _steps(run, evaluators or {}, signals):
                _message(run, f"stopped at step {run.step}, resume with the same command")
                raise SystemExit(0)
            _export(run)
            return run.metrics
        finally:
            if run is not None:
                _tear_down(run)
            shutdown_distributed()


def _steps(run: Run, evaluators: dict[str, Evaluator], signals: StopSignals) -> bool:
    """Run the remaining steps. Returns True if a signal asked to stop before the end."""
    config, task = run.config, run.task
    accumulation = config.engine.accumulation_steps
    per_step = run.global_micro_batch * accumulation
    order = order_of(task, config.seed, config.shuffle_window)
    stream = batches(
        task, order, run.samples, config.steps * per_step, config.engine.micro_batch_size, config.num_workers
    )
    while run.step < config.steps:
        micro_batches = list(islice(stream, accumulation))
        task.prepare_step(micro_batches, run.step)
        sums: list[dict[str, Tensor]] = []
        for index, batch in enumerate(micro_batches):
            _seed_micro_step(config.seed, run.step, index)
            sums.append(task.micro_step(run.engines, batch, index, run.step))
            if index < accumulation - 1:
                for engine in run.active().values():
                    engine.step()  # not at the boundary: DeepSpeed only counts the micro-batch
        metrics, stop = _agree(run, sums, signals)
        rates = _optimizer_step(run)
        replaced = task.after_step(run.modules, run.step) or {}
        for name in run.active():
            if name in run.emas:
                run.emas[name].replace(replaced.get(name, {}))
                run.emas[name].update()
        run.step += 1
        run.samples += per_step
        _finish_step(run, metrics, rates, evaluators, stop)
        if stop and run.step < config.steps:
            return True
    return False


def _seed_micro_step(seed: int, step: int, index: int) -> None:
    """Random state (dropout) from where we are, so that a resumed run draws the same."""
    value = derive_seed("step", seed, step, index, rank())
    torch.manual_seed(value)
    random.seed(value)


def _agree(run: Run, micro_metrics: list[dict[str, Tensor]], signals: StopSignals) -> tuple[dict[str, float], bool]:
    """One all-reduce: mean metrics over ranks and micro-batches, whether all is finite, whether any rank must stop."""
    names = list(micro_metrics[0])
    rows = [torch.stack([_scalar(m[name], run.device) for name in names]) for m in micro_metrics]
    flags = [run.guards[name].flag() for name in run.active()]
    bad_gradient = torch.stack(flags).sum() if flags else torch.zeros((), dtype=torch.float64, device=run.device)
    wish = torch.tensor(float(signals.requested), dtype=torch.float64, device=run.device)
    packed = torch.cat([torch.stack(rows).sum(dim=0), torch.stack([bad_gradient, wish])])
    *totals, bad, stop = all_reduce_sum_(packed).tolist()
    count = world_size() * len(rows)
    metrics = {name: total / count for name, total in zip(names, totals, strict=True)}
    infinite = [name for name, value in metrics.items() if not abs(value) < float("inf")]
    if infinite or bad > 0:
        _stop_non_finite(run, infinite)
    return metrics, stop > 0


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(value, device=device).detach().double().reshape(())


def _stop_non_finite(run: Run, infinite: list[str]) -> None:
    """Raise on every rank, before any optimizer step. Collective: it asks all ranks which gradients are at fault."""
    own = [f"{name}.{key}" for name in run.active() for key in run.guards[name].names()]
    parameters = list(dict.fromkeys(key for keys in all_gather_object(own) for key in keys))
    what = [f"metric {', '.join(infinite)}"] if infinite else []
    if parameters:
        more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
        what.append(f"gradient of {parameters[0]}{more}")
    last = f"the last complete checkpoint is {run.last_checkpoint}" if run.last_checkpoint else "no checkpoint yet"
    raise NonFiniteError(
        f"step {run.step + 1}: {' and '.join(what)} is not finite; stopped before the optimizer step, {last}; "
        "look at the data of this step, lower the learning rate or clip gradients"
    )


def _optimizer_step(run: Run) -> dict[str, float]:
    """Step every network that has started. Returns the learning rates and gradient norms to log."""
    logged: dict[str, float] = {}
    for index, name in enumerate(run.networks):
        if run.step < run.networks[name].start_step:
            continue
        engine, guard = run.engines[name], run.guards[name]
        rate = lr_at(run.networks[name].optimizer, run.step, run.config.steps)
        set_learning_rate(engine, rate)
        guard.clip_()
        engine.step()
        suffix = "" if index == 0 else f"_{name}"
        logged[f"lr{suffix}"] = rate
        logged[f"grad_norm{suffix}"] = guard.gradient_norm(engine)
    return logged


def _finish_step(
    run: Run, metrics: dict[str, float], rates: dict[str, float], evaluators: dict[str, Evaluator], stop: bool
) -> None:
    """Log, evaluate and save after step `run.step` (already counted)."""
    config = run.config
    last = run.step == config.steps
    run.metrics = {**metrics, **rates}
    evaluated: dict[str, float] = {}
    if evaluators and (last or (config.eval_every and run.step % config.eval_every == 0)):
        evaluated = _evaluate(run, evaluators)
        run.metrics |= evaluated
    if run.log is not None and (evaluated or last or run.step % config.log_every == 0):
        run.log.write({"step": run.step, **run.metrics, "samples": run.samples})
    if run.log is not None:
        run.log.progress(run.step, run.metrics, run.samples)
    if last or stop or (config.save_every and run.step % config.save_every == 0):
        _save(run)


def _evaluate(run: Run, evaluators: dict[str, Evaluator]) -> dict[str, float]:
    torch.manual_seed(derive_seed("evaluate", run.config.seed, run.step))
    results: dict[str, float] = {}
    with _inference_modules(run) as modules:
        for name, evaluator in evaluators.items():
            found = evaluator(modules, run.step)
            results |= {f"{name}/{key}": float(value) for key, value in found.items()}
    return broadcast_object(results)


@contextlib.contextmanager
def _inference_modules(run: Run) -> Iterator[dict[str, nn.Module]]:
    """The modules with averaged weights (where there are any), in eval mode and without gradients."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for ema in run.emas.values():
            stack.enter_context(ema.swap())
        for module in run.modules.values():
            module.eval()
        try:
            yield run.modules
        finally:
            for module in run.modules.values():
                module.train()


def _save(run: Run) -> None:
    state = {
        **identity(run),
        "step": run.step,
        "samples_seen": run.samples,
        "metrics": run.metrics,
        "extra_state": run.task.extra_state(),
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    run.last_checkpoint = checkpoint.save_checkpoint(run.checkpoints, run.step, run.engines, run.emas, state)
    if is_main():
        checkpoint.prune(run.checkpoints, run.config.keep_last)


def _export(run: Run) -> None:
    """Write `export/` on rank 0 with whole (averaged) weights."""
    with _inference_modules(run) as modules, contextlib.ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(whole_parameters(module))
        if is_main():
            final = Path(run.config.output_dir) / "export"
            partial = final.with_name("export.partial")
            shutil.rmtree(partial, ignore_errors=True)
            run.task.export(modules, partial)
            checkpoint.replace_folder(partial, final)
        barrier()


def _message(run: Run, text: str) -> None:
    if run.log is not None:
        run.log.message(text)


def _tear_down(run: Run) -> None:
    """Let go of everything that would outlive the run: log, hooks of DeepSpeed, process group."""
    if run.log is not None:
        run.log.close()
    for engine in run.engines.values():
        engine.destroy()
