"""Line and bar charts as SVG text; the page's style sheet sets colours, fonts and line widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from fedpara_plugins.ledger.page.scale import AxisScale, tick_label

__all__ = ["COLOURS", "Axis", "Bar", "BarGroup", "Series", "bar_chart", "line_chart", "swatch"]

COLOURS = 7
"""Number of colours; further runs get the same colours with other dashes and markers."""

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 26, 44
TEXT_WIDTH = 165
"""Space at the right of the bars for their texts."""

MARKED = 60
"""Up to this many points of a series get markers, which show their values on hover."""
BUCKETS = 150
"""A longer series keeps the lowest and the highest point of each of this many intervals."""

Point = tuple[float, float, str]


@dataclass(frozen=True)
class Axis:
    """An axis: its scale, its label, and whether its ticks are whole numbers."""

    scale: AxisScale
    label: str
    whole: bool = False


@dataclass(frozen=True)
class Series:
    """The points (x, y, text) of one run, and the run's index in the legend."""

    run: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Bar:
    """One run's bar.

    Attributes:
        run: the run's index in the legend.
        value: length of the bar; None draws none.
        background: length of the pale bar behind it; 0 draws none.
        text: written beside the bar.
        title: shown on hover.
    """

    run: int
    value: float | None
    background: float
    text: str
    title: str = ""


@dataclass(frozen=True)
class BarGroup:
    """Bars under one heading."""

    label: str
    bars: Sequence[Bar] = field(default_factory=tuple)


def swatch(run: int) -> str:
    """Return the symbol of a run in a legend."""
    line = f'<path class="line{_dash(run)}" d="M1 7H25"/>'
    return (
        f'<svg class="swatch s{run % COLOURS}" viewBox="0 0 26 14" aria-hidden="true">{line}'
        f'<path class="dot" d="{_mark(run, 13, 7)}"/></svg>'
    )


# Lines


def line_chart(series: Sequence[Series], *, x: Axis, y: Axis, label: str) -> str:
    """Return a chart with a line for each series.

    Args:
        series: with points in order of x, inside both scales.
        x: the horizontal axis.
        y: the vertical axis.
        label: description for screen readers.
    """
    parts = [*_grid_lines(x, y)]
    for one in series:
        points = _thinned(one.points)
        places = [(_x(x, p[0]), _y(y, p[1])) for p in points]
        parts.append(f'<g class="s{one.run % COLOURS}">')
        if len(places) > 1:
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
            parts.append(f'<path class="line{_dash(one.run)}" d="M{path}"/>')
        if len(points) <= MARKED:
            parts.extend(
                f'<path class="dot" d="{_mark(one.run, a, b)}"><title>{escape(p[2])}</title></path>'
                for p, (a, b) in zip(points, places, strict=True)
            )
        parts.append("</g>")
    return _svg("".join(parts), HEIGHT, label)


def _grid_lines(x: Axis, y: Axis) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in y.scale.ticks(whole=y.whole):
        place = _y(y, tick)
        yield f'<path class="grid" d="M{LEFT} {place:.1f}H{right}"/>'
        yield f'<text class="end" x="{LEFT - 6}" y="{place + 4:.1f}">{tick_label(tick)}</text>'
    for tick in x.scale.ticks(whole=x.whole):
        place = _x(x, tick)
        yield f'<path class="grid" d="M{place:.1f} {TOP}V{bottom}"/>'
        yield f'<text class="mid" x="{place:.1f}" y="{bottom + 16}">{tick_label(tick)}</text>'
    yield f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'
    yield f'<text class="unit" x="2" y="12">{escape(y.label)}</text>'
    yield f'<text class="unit end" x="{right}" y="{HEIGHT - 6}">{escape(x.label)}</text>'


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.scale.position(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.scale.position(value) * (HEIGHT - TOP - BOTTOM)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most about twice `BUCKETS` points, with all peaks, the first and the last point."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    kept = {0, len(points) - 1}
    size = len(points) / BUCKETS
    for bucket in range(BUCKETS):
        places = range(int(bucket * size), int((bucket + 1) * size))
        kept.add(min(places, key=lambda i: points[i][1]))
        kept.add(max(places, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def _dash(run: int) -> str:
    return f" dash{min(run // COLOURS, 3)}" if run >= COLOURS else ""


def _mark(run: int, x: float, y: float) -> str:
    """Return the path of a run's marker; shapes differ, since some readers cannot tell colours."""
    at = f"{x:.1f} {y:.1f}"
    return (
        f"M{at}m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
        f"M{at}m-3.2 -3.2h6.4v6.4h-6.4z",
        f"M{at}m0 -4.2l4 7h-8z",
        f"M{at}m0 -4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z",
        f"M{at}m0 4.2l4 -7h-8z",
    )[run % 5]


# Bars


def bar_chart(groups: Sequence[BarGroup], *, label: str) -> str:
    """Return a chart of horizontal bars from zero, under headings, with texts beside them.

    Args:
        groups: the headings with their bars.
        label: description for screen readers.
    """
    lengths = [max(bar.value or 0.0, bar.background) for group in groups for bar in group.bars]
    unit = (WIDTH - TEXT_WIDTH) / (max(lengths, default=0.0) or 1.0)
    parts, top = [], 0
    for group in groups:
        parts.append(f'<text class="head" x="0" y="{top + 13}">{escape(group.label)}</text>')
        top += 19
        for bar in group.bars:
            parts.append(_bar(bar, top, unit))
            top += 17
        top += 8
    return _svg("".join(parts), max(top, 1), label)


def _bar(bar: Bar, top: int, unit: float) -> str:
    title = f"<title>{escape(bar.title)}</title>" if bar.title else ""
    background = ""
    if bar.background:
        width = bar.background * unit
        background = f'<rect class="ghost" x="0" y="{top}" width="{width:.1f}" height="13"/>'
    solid = ""
    if bar.value is not None:
        # Wide enough to be seen: beside the dense model's bytes, the bar may be under one pixel.
        width = max(1.5, bar.value * unit) if bar.value else 0
        solid = f'<rect class="bar" x="0" y="{top}" width="{width:.1f}" height="13"/>'
    text = f'<text class="end" x="{WIDTH}" y="{top + 11}">{escape(bar.text)}</text>'
    return f'<g class="s{bar.run % COLOURS}">{title}{background}{solid}{text}</g>'


def _svg(content: str, height: int, label: str) -> str:
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {height}" '
        f'aria-label="{escape(label)}">{content}</svg>'
    )
