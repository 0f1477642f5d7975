"""Charts as SVG, laid out here and drawn by ``report.html.jinja``: lines, points with error bars, ticks, a legend.

Lengths are SVG units of a chart that is WIDTH × HEIGHT. Every point carries its numbers, so that a page can be read
and tested without its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, log10

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 12, 46
# Paul Tol's bright scheme and two more, told apart in grey by their dashes.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777", "#994455")
DASHES = ("", "6 3", "2 3")
MOST_SERIES = len(COLOURS) * len(DASHES)


@dataclass(frozen=True)
class Point:
    """title: what stands beside it when it is pointed at. error: half the length of its bar."""

    x: float
    y: float
    title: str
    error: float = 0.0


@dataclass(frozen=True)
class Series:
    """Points of one kind; ``line`` joins them."""

    label: str
    points: tuple[Point, ...]
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """A label, the ends, and how a tick is written."""

    label: str
    low: float
    high: float
    written: Callable[[float], str]

    def ticks(self) -> list[float]:
        """About five round numbers between the ends."""
        rough = (self.high - self.low) / 5
        unit = 10 ** floor(log10(rough))
        step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= rough * 0.999)
        first = -(-self.low // step)
        return [step * (first + i) for i in range(12) if step * (first + i) <= self.high * (1 + 1e-9)]


@dataclass(frozen=True)
class Chart:
    """title, axes and series; note: what to know about it; diagonal: draw y = x."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    note: str = ""
    diagonal: bool = False

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM

    def across(self, value: float) -> float:
        """Where a value of x lies."""
        share = (value - self.x.low) / (self.x.high - self.x.low)
        return round(self.left + share * (self.right - self.left), 2)

    def down(self, value: float) -> float:
        """Where a value of y lies."""
        share = (value - self.y.low) / (self.y.high - self.y.low)
        return round(self.bottom - share * (self.bottom - self.top), 2)

    def path(self, series: Series) -> str:
        """The points of a line."""
        return " ".join(f"{self.across(p.x)},{self.down(p.y)}" for p in series.points)

    def clipped(self, value: float) -> float:
        """A value of y inside the axis, for error bars."""
        return min(max(value, self.y.low), self.y.high)

    def colour(self, i: int) -> str:
        """The i-th series' colour."""
        return COLOURS[i % len(COLOURS)]

    def dash(self, i: int) -> str:
        """The i-th series' dashes."""
        return DASHES[i // len(COLOURS) % len(DASHES)]


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.4g}%"


def plain(value: float) -> str:
    """A number, short."""
    return f"{value:.4g}"


def share_axis(label: str) -> Axis:
    """An axis of shares from 0 to 1."""
    return Axis(label, 0.0, 1.0, percent)


def score_axis(label: str) -> Axis:
    """An axis of scores from 0 to 1."""
    return Axis(label, 0.0, 1.0, plain)


def number_axis(label: str, values: Sequence[float]) -> Axis:
    """An axis from 0 to a little above the largest value."""
    return Axis(label, 0.0, 1.06 * max((*values, 0.0)) or 1.0, plain)
