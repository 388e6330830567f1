"""What a run tells: log.jsonl (one line per logged step), the progress line, and an optional tracker. Rank 0 only."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from unitok.core.errors import ConfigError

TIMING_KEYS = ("time", "samples_per_s", "data_wait")
Tracker = Literal["none", "tensorboard", "wandb"]


class RunLog:
    """Writes records of `{"step", metrics..., "lr", "grad_norm", "samples"}` plus the timing keys: unix time, samples a
    second, and `data_wait`, the share of the time since the last record in which rank 0 waited for its next batches.

    Without the timing keys the lines of two equal runs are equal bit for bit: floats are written in full precision.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        headline: tuple[str, ...] = ("loss",),
        tracker: Tracker = "none",
        config: dict[str, Any] | None = None,
        interval: float = 10.0,
    ) -> None:
        self.path = Path(folder) / "log.jsonl"
        self.total_steps, self.headline, self.interval = total_steps, headline, interval
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: Any = None
        self._tracker = _make_tracker(tracker, Path(folder), config or {})
        self._bar: Any = None
        self._start_step, self._last_print = 0, 0.0
        self._clock = self._begin = time.monotonic()
        self._clock_samples: int | None = None
        self._begin_samples = 0
        self._waited = self._waited_before = 0.0

    def start(self, step: int, samples: int) -> None:
        """Drop the lines after `step` (a resumed run writes them again), and start the clock."""
        truncate_log(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._start_step, self._clock_samples, self._begin_samples = step, samples, samples
        self._clock = self._begin = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True)

    def waited(self, seconds: float) -> None:
        """Time spent waiting for the next micro-batches (with `num_workers: 0`: loading them)."""
        self._waited += seconds

    def write(self, record: dict[str, Any]) -> None:
        """Append one record (it must hold "step" and "samples"); the timing keys are added here."""
        now = time.monotonic()
        rate = (record["samples"] - (self._clock_samples or 0)) / max(now - self._clock, 1e-9)
        share = (self._waited - self._waited_before) / max(now - self._clock, 1e-9)
        self._clock, self._clock_samples, self._waited_before = now, record["samples"], self._waited
        timing = {"time": round(time.time(), 3), "samples_per_s": round(rate, 3), "data_wait": round(share, 4)}
        self._file.write(json.dumps({**record, **timing}) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker({**record, **timing})

    def progress(self, step: int, metrics: dict[str, float], samples: int) -> None:
        """Show where the run is: a bar on a terminal, else a plain line every few seconds."""
        shown = {name: f"{metrics[name]:.4g}" for name in self.headline if name in metrics}
        now = time.monotonic()
        done = max(1, step - self._start_step)
        rate = samples / max(1, step) * done / max(now - self._begin, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix(shown | {"samples/s": f"{rate:.1f}"}, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        if now - self._last_print < self.interval and step < self.total_steps:
            return
        self._last_print = now
        left = (now - self._begin) / done * (self.total_steps - step)
        values = "  ".join(f"{name} {value}" for name, value in shown.items())
        print(f"step {step}/{self.total_steps}  {values}  {rate:.1f} samples/s  {_clock_text(left)} left", flush=True)

    def summary(self, step: int, samples: int, counts: Mapping[str, int] = MappingProxyType({})) -> None:
        """The last line: how far, how fast, how much of the time went into waiting for data, and how many of the
        samples of the whole run were bad (`counts`: "read" and "bad")."""
        seconds = time.monotonic() - self._begin
        if step > self._start_step:
            rate = (samples - self._begin_samples) / max(seconds, 1e-9)
            bad = f", {counts['bad']} of {counts['read']} samples bad" if counts else ""
            self.message(
                f"{step - self._start_step} steps in {_clock_text(seconds)}, {rate:.1f} samples/s, "
                f"{self._waited / max(seconds, 1e-9):.1%} of the time waiting for data{bad}"
            )

    def message(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Close the file, the bar and the tracker."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._tracker is not None:
            self._tracker(None)
            self._tracker = None


def truncate_log(path: Path, step: int) -> None:
    """Keep the whole lines of `path` up to `step`, atomically. A last line cut short by a crash is dropped."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # written by a process that was killed in the middle of it; the step is written again
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def read_log(path: Path, timing: bool = False) -> list[dict[str, Any]]:
    """The records of a log; without the timing keys unless asked for."""
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in record.items() if timing or k not in TIMING_KEYS} for record in records]


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _make_tracker(name: Tracker, folder: Path, config: dict[str, Any]) -> Any:
    """A function of one record (None closes), or None."""
    if name == "none":
        return None
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            import wandb
    except ImportError as error:
        raise ConfigError(f"tracker={name} is not installed ({error}); install unitok[trackers] or use none") from error
    if name == "tensorboard":
        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(record: dict[str, Any] | None) -> None:
            if record is None:
                writer.close()
                return
            for key, value in record.items():
                if isinstance(value, int | float) and key != "step":
                    writer.add_scalar(key, value, record["step"])

        return to_tensorboard
    run = wandb.init(project="unitok", name=folder.name, dir=str(folder), config=config, resume="allow")

    def to_wandb(record: dict[str, Any] | None) -> None:
        if record is None:
            run.finish()
        else:
            run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    return to_wandb
