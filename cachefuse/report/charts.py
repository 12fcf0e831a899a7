"""Line charts as SVG geometry: the coordinates of lines, ticks and dots. The page's template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH, HEIGHT = 440, 310
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 28, 44
MAIN, SECOND, THIN = "main", "second", "thin"  # kinds of line
MAX_POINTS = 8000  # of all lines of a chart
FEWEST_POINTS = 40


@dataclass(frozen=True)
class Line:
    """A line through points (n,) in the style of its ``kind``; ``mark`` is the index of a point with a dot."""

    kind: str
    x: np.ndarray
    y: np.ndarray
    title: str = ""
    mark: int | None = None


@dataclass(frozen=True)
class Chart:
    """A chart for the template: paths and dots with their kind of line, and ticks, in viewBox coordinates."""

    title: str
    about: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[str, str, str]] = field(default_factory=list)
    dots: list[tuple[str, float, float]] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    several: bool = False
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    about: str,
    x_label: str,
    y_label: str,
    legend: Sequence[tuple[str, str]] = (),
    unit: bool = False,
    log_x: bool = False,
) -> Chart:
    """Return a chart of lines; the axes span the data, or 0 to 1 with ``unit``.

    Points that are not finite break a line. With ``log_x`` the x axis is logarithmic; x must be at least 1.
    """
    lines = [line for line in lines if np.isfinite(line.y).any()]
    xs, ys = (np.concatenate([getattr(line, axis) for line in lines] or [np.zeros(1)]) for axis in ("x", "y"))
    x_low, x_high = (0.0, 1.0) if unit else _span(xs)
    y_low, y_high = (0.0, 1.0) if unit else _span(ys[np.isfinite(ys)])
    y_ticks = ticks(y_low, y_high, outward=not unit)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    x_ticks = log_ticks(x_low, x_high) if log_x else ticks(x_low, x_high, whole=not unit)

    def place_x(x: np.ndarray) -> np.ndarray:
        fraction = np.log(x / x_low) / np.log(x_high / x_low) if log_x else (x - x_low) / (x_high - x_low)
        return LEFT + fraction * (WIDTH - LEFT - RIGHT)

    def place_y(y: np.ndarray) -> np.ndarray:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    chart = Chart(
        title=title,
        about=about,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[(round(float(place_x(np.array(x))), 1), text(x)) for x in x_ticks],
        y_ticks=[(round(float(place_y(np.array(y))), 1), text(y)) for y in y_ticks],
        legend=list(legend),
        several=sum(line.kind == MAIN for line in lines) > 1,
    )
    most = max(FEWEST_POINTS, MAX_POINTS // max(1, len(lines)))
    for line in lines:
        kept = np.unique(np.linspace(0, len(line.x) - 1, min(most, len(line.x))).round().astype(int))
        x, y = place_x(line.x), place_y(line.y)
        chart.paths.append((line.kind, path(x[kept], y[kept]), line.title))
        if line.mark is not None and np.isfinite(y[line.mark]):
            chart.dots.append((line.kind, round(float(x[line.mark]), 1), round(float(y[line.mark]), 1)))
    return chart


def path(x: np.ndarray, y: np.ndarray) -> str:
    """Return an SVG path through points (n,); a single point becomes a short visible dash."""
    commands, pen = [], "M"
    finite = np.isfinite(y)
    for i in range(len(x)):
        if not finite[i]:
            pen = "M"
            continue
        commands.append(f"{pen}{x[i]:.1f} {y[i]:.1f}")
        alone = pen == "M" and (i + 1 == len(x) or not finite[i + 1])
        commands.append("h2" if alone else "")
        pen = "L"
    return "".join(commands)


def ticks(low: float, high: float, whole: bool = False, outward: bool = False, most: int = 6) -> list[float]:
    """Return about ``most`` round numbers from low to high; with ``outward`` they enclose both ends.

    With ``whole`` the numbers are integers.
    """
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * k for k in (1, 2, 5, 10, 20) if (high - low) / (step * k) < most)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if outward:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Return round numbers from low to high for a log axis: 1, 2 and 5 times powers of ten, or only the powers."""
    powers = [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for steps in ((1, 2, 5), (1,)):
        numbers = [power * k for power in powers for k in steps if low <= power * k <= high]
        if len(numbers) <= most:
            break
    return numbers if len(numbers) > 1 else ticks(low, high, whole=True)


def text(value: float) -> str:
    return f"{value:.5g}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.5g}"


def _span(values: np.ndarray) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return (low, high) if high - low > 1e-9 * max(1.0, abs(high)) else (low - 0.5, high + 0.5)
