"""Training curves as small inline SVG, coloured by the page's CSS variables so that they follow light and dark."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
MAX_POINTS = 400
SMOOTHING_SHARE = 0.02  # the strong line is a running mean over this share of the points

_NOT_A_CURVE = frozenset({"step", "samples", "time", "samples_per_s", "epoch", "samples_seen", "seconds"})
_LAST = ("grad_norm", "lr")


def curve_names(log: Sequence[Mapping[str, Any]], limit: int = 12) -> list[str]:
    """Metrics of a log worth a curve: finite numbers that are not zero throughout; losses first, learning rate last."""
    names: dict[str, None] = {}
    for line in log:
        for key, value in line.items():
            if key not in _NOT_A_CURVE and is_finite(value) and value != 0:
                names[key] = None
    plain = [name for name in names if not name.startswith(_LAST)]
    plain.sort(key=lambda name: (name != "loss", "loss" not in name))
    return (plain + [name for name in names if name.startswith(_LAST)])[:limit]


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that can be drawn (not a flag, not NaN)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve_svg(log: Sequence[Mapping[str, Any]], name: str) -> str:
    """One metric over the step: raw values faint, running mean strong. Empty text where there are under two points."""
    points = [
        (float(line["step"]), float(line[name]))
        for line in log
        if is_finite(line.get("step")) and is_finite(line.get(name))
    ]
    if len(points) < 2:
        return ""
    smooth = _running_mean(points, max(1, round(len(points) * SMOOTHING_SHARE)))
    y_ticks, x_ticks = _ticks([y for _, y in points], 4), _ticks([x for x, _ in points], 4)
    x_low, x_high = points[0][0], points[-1][0]
    y_low, y_high = min(y_ticks[0], min(y for _, y in points)), max(y_ticks[-1], max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def line(series: list[tuple[float, float]], style: str) -> str:
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in _thin(series)))
        return f'<polyline class="{style}" points="{text}"/>'

    grid = "".join(_y_tick(place(x_low, y)[1], y) for y in y_ticks)
    below = "".join(_x_tick(place(x, y_low)[0], x) for x in x_ticks if x_low <= x <= x_high)
    end_x, end_y = place(*smooth[-1])
    label = f"{name}: {_short(points[0][1])} at step {_short(x_low)}, {_short(points[-1][1])} at step {_short(x_high)}"
    end = f'<circle class="end" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3"/>'
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{grid}{below}{line(points, 'raw')}{line(smooth, 'mean')}{end}</svg>"
    )


def _y_tick(y: float, value: float) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_short(value)}</text>'
    )


def _x_tick(x: float, value: float) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{_short(value)}</text>'


def _running_mean(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Mean of the last `window` values (fewer at the start), in one pass."""
    out, total = [], 0.0
    for index, (x, y) in enumerate(points):
        total += y
        if index >= window:
            total -= points[index - window][1]
        out.append((x, total / min(index + 1, window)))
    return out


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS of them; the last one stays."""
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    return points[:-1:step] + points[-1:]


def _ticks(values: Sequence[float], wanted: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover the values."""
    low, high = min(values), max(values)
    if low == high:
        return [low]
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if rough <= factor * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _short(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
