"""The training loop: one for all tasks. It owns accumulation, the finite check, logging, saving and signals."""

import contextlib
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unitok.core import checkpoint
from unitok.core.config import Config
from unitok.core.distributed import (
    all_reduce_sum_,
    broadcast_object,
    init_distributed,
    rank,
    shutdown_distributed,
    world_size,
)
from unitok.core.engine import set_learning_rate, whole_on_main
from unitok.core.errors import EXIT_RESUME, ConfigError
from unitok.core.non_finite import Buffers, stop_or_skip
from unitok.core.optim import lr_at
from unitok.core.rng import derive_seed
from unitok.core.run import Run, TrainConfig, identity, locked, resume, set_up
from unitok.core.runlog import RunLog
from unitok.core.sampling import SampleOrder, batches, order_of
from unitok.core.signals import StopSignals
from unitok.core.task import Task
from unitok.core.watchdog import Watchdog
from unitok.core.workers import loader_deaths

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

    Returns the last logged metrics. Raises ConfigError, CheckpointError, DataError, NonFiniteError, RankLostError,
    WorkerLostError. On
    SIGTERM or SIGINT it saves a checkpoint and raises SystemExit(EXIT_RESUME).
    """
    if config.eval_every and not evaluators:
        raise ConfigError(
            f"eval_every={config.eval_every}: the command line has nothing to evaluate during training; leave it at 0 "
            "and use `unitok eval` on the export (callers of `train` give `evaluators`)"
        )
    if config.keep_every and (not config.save_every or config.keep_every % config.save_every):
        raise ConfigError(f"keep_every={config.keep_every} must be a multiple of save_every={config.save_every}")
    device = init_distributed(config.device)
    run: Run | None = None
    watchdog = Watchdog(config.rank_timeout)
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        try:
            with watchdog, loader_deaths():
                checkpoint.on_main(lambda: stack.enter_context(locked(Path(config.output_dir))))
                run = set_up(task, config, resolved_config or config, device)
                resume(run)
                checkpoint.on_main(lambda: _open_log(run))
                watchdog.ready()
                if _steps(run, evaluators or {}, signals):
                    _message(run, f"stopped at step {run.step}, resume with the same command")
                    raise SystemExit(EXIT_RESUME)
                _export(run)
                return run.metrics
        finally:
            if run is not None:
                _tear_down(run)
            shutdown_distributed()
            watchdog.close()


def _open_log(run: Run) -> None:
    run.log = RunLog(Path(run.config.output_dir), run.config.steps, run.task.headline, run.config.tracker, run.resolved)
    run.log.start(run.step, run.samples)


def _steps(run: Run, evaluators: dict[str, Evaluator], signals: StopSignals) -> bool:
    """Run the remaining steps. Returns True if a signal asked to stop before the end."""
    config = run.config
    per_step = run.global_micro_batch * config.engine.accumulation_steps
    order = order_of(run.task, config.seed, config.shuffle_window)
    stop = config.steps * per_step
    stream = batches(run.task, order, run.samples, stop, config.engine.micro_batch_size, config.num_workers)
    with contextlib.closing(stream):  # workers end here, also where an error keeps the stream alive
        return _take_steps(run, order, stream, evaluators, signals)


def _take_steps(
    run: Run, order: SampleOrder, stream: Iterator[Any], evaluators: dict[str, Evaluator], signals: StopSignals
) -> bool:
    config, task = run.config, run.task
    accumulation = config.engine.accumulation_steps
    per_step = run.global_micro_batch * accumulation
    while run.step < config.steps:
        buffers = Buffers(run)
        micro_batches = _next_batches(run, stream, accumulation)
        task.prepare_step(micro_batches, run.step)
        sums: list[dict[str, Tensor]] = []
        for index, batch in enumerate(micro_batches):
            _seed_micro_step(config.seed, run.step, index)
            sums.append(task.micro_step(run.engines, batch, index, run.step))
            if index < accumulation - 1:
                for engine in run.active().values():
                    engine.step()  # not at the boundary: DeepSpeed only counts the micro-batch
        metrics, infinite, stop = _agree(run, micro_batches, sums, signals)
        run.bad.check(math.ceil((run.samples + per_step) / task.num_samples))
        if infinite is None:
            rates = _update(run)
        else:
            _message(run, stop_or_skip(run, order, micro_batches, sums, infinite, buffers))
            metrics, rates = {}, {}
        if config.non_finite == "skip":
            rates["skipped"] = run.skipped.total
        rates |= run.bad.metrics()
        run.step += 1
        run.samples += per_step
        _finish_step(run, metrics, rates, evaluators, stop)
        if stop and run.step < config.steps:
            return True
    return False


def _next_batches(run: Run, stream: Iterator[Any], count: int) -> list[Any]:
    started = time.perf_counter()
    found = list(islice(stream, count))
    if run.log is not None:
        run.log.waited(time.perf_counter() - started)
    return found


def _seed_micro_step(seed: int, step: int, index: int) -> None:
    """Random state (dropout) from where we are, so that a resumed run draws the same."""
    value = derive_seed("step", seed, step, index, rank())
    torch.manual_seed(value)
    random.seed(value)


def _agree(
    run: Run, micro_batches: list[Any], micro_metrics: list[dict[str, Tensor]], signals: StopSignals
) -> tuple[dict[str, float], list[str] | None, bool]:
    """One all-reduce: mean metrics over ranks and micro-batches, None if all is finite (else the metrics that are not;
    an empty list means gradients), whether any rank must stop. The run's counts of bad samples grow."""
    names = list(micro_metrics[0])
    rows = [torch.stack([_scalar(m[name], run.device) for name in names]) for m in micro_metrics]
    flags = [run.guards[name].flag() for name in run.active()]
    bad_gradient = torch.stack(flags).sum() if flags else torch.zeros((), dtype=torch.float64, device=run.device)
    wish = torch.tensor(float(signals.requested), dtype=torch.float64, device=run.device)
    own = [torch.stack(rows).sum(dim=0), torch.stack([bad_gradient, wish])]
    if run.bad.readings:
        places = torch.stack([run.task.places(batch) for batch in micro_batches]).sum(dim=0)
        own.append(places.flatten().to(run.device, torch.float64))
    reduced = all_reduce_sum_(torch.cat(own)).tolist()
    totals, (bad, stop), places = reduced[: len(names)], reduced[len(names) : len(names) + 2], reduced[len(names) + 2 :]
    run.bad.add(places)
    count = world_size() * len(rows)
    metrics = {name: total / count for name, total in zip(names, totals, strict=True)}
    infinite = [name for name, value in metrics.items() if not abs(value) < float("inf")]
    return metrics, infinite if infinite or bad > 0 else None, stop > 0


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(value, device=device).detach().double().reshape(())


def _update(run: Run) -> dict[str, float]:
    """Step every network that has started, and what follows from it. Returns what `_optimizer_step` returns."""
    rates = _optimizer_step(run)
    replaced = run.task.after_step(run.modules, run.step) or {}
    for name in run.active():
        if name in run.emas:
            run.emas[name].replace(replaced.get(name, {}))
            run.emas[name].update()
    run.skipped.in_a_row = 0
    return rates


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
        "skipped": asdict(run.skipped),
        "bad": run.bad.state(),
        "started_from": run.started_from,
        "extra_state": run.task.extra_state(),
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    run.last_checkpoint = checkpoint.save_checkpoint(run.checkpoints, run.step, run.engines, run.emas, state)
    checkpoint.on_main(lambda: checkpoint.prune(run.checkpoints, run.config.keep_last, run.config.keep_every))


def _export(run: Run) -> None:
    """Write `export/` on rank 0 with whole (averaged) weights."""

    def write(modules: dict[str, nn.Module]) -> None:
        final = Path(run.config.output_dir) / "export"
        partial = final.with_name("export.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            run.task.export(modules, partial)
            checkpoint.replace_folder(partial, final)
        except checkpoint.WRITING_FAILED as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise checkpoint.writing_error(f"export {final}", error, final.parent) from error
        if run.log is not None:
            run.log.summary(run.step, run.samples, run.bad.metrics())

    with _inference_modules(run) as modules, contextlib.ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(whole_on_main(module))
        checkpoint.on_main(lambda: write(modules))


def _message(run: Run, text: str) -> None:
    if run.log is not None:
        run.log.message(text)


def _tear_down(run: Run) -> None:
    """Let go of everything that would outlive the run: log, hooks of DeepSpeed, process group."""
    if run.log is not None:
        run.log.close()
    for engine in run.engines.values():
        engine.destroy()
