"""The plots of the page, and the data that they show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedpara_plugins.ledger import Direction
from fedpara_plugins.ledger.page.charts import Axis, Bar, BarGroup, Series, bar_chart, line_chart
from fedpara_plugins.ledger.page.runs import DIRECTIONS, RunData
from fedpara_plugins.ledger.page.scale import AxisScale, byte_unit
from fedpara_plugins.support.units import readable_bytes
from fedpara_plugins.text import printable, shortened

__all__ = ["Figure", "by_client", "by_direction", "by_layer", "by_round", "metric_figures"]

WORDS = {"down": "server to clients", "up": "clients to server"}
SPREAD = 4.0
"""Runs that differ by more than this factor get a logarithmic axis."""
LAYERS = 16
"""Number of layers shown, largest first; one bar sums up the others."""


@dataclass(frozen=True)
class Figure:
    """A plot with its texts.

    Attributes:
        title: the caption.
        note: how to read the plot.
        runs: indices of the runs in it.
        svg: the plot.
        bars: whether it has bars; lines otherwise.
    """

    title: str
    note: str
    runs: Sequence[int]
    svg: str
    bars: bool = False


def metric_figures(runs: Sequence[RunData], source: str, metric: str) -> list[Figure]:
    """Return two figures of one metric: over bytes and over rounds."""
    values = [run.metrics.get((source, metric), {}) for run in runs]
    every = [value for found in values for value in found.values()]
    percent = _is_share(metric) and all(0 <= value <= 1 for value in every)
    factor, sign = (100, "%") if percent else (1, "")
    name = shortened(printable(metric))
    y = Axis(
        AxisScale.linear([value * factor for value in every]), name + (f", {sign}" if sign else "")
    )
    over_bytes: list[Curve] = []
    over_rounds: list[Curve] = []
    for run, found in zip(runs, values, strict=True):
        sent = _sent_at(run, found)
        texts = {
            number: f"{printable(run.name)}, round {number}: {value * factor:.4g}{sign or ''}, "
            f"{readable_bytes(sent[number])} sent"
            for number, value in found.items()
        }
        rows = sorted(found.items())
        over_bytes.append([(sent[n], value * factor, texts[n]) for n, value in rows])
        over_rounds.append([(n, value * factor, texts[n]) for n, value in rows])
    title = f"{name}, {shortened(printable(source))}"
    note = "both directions together, of all messages until the end of the round"
    first, note_log = _over_bytes(over_bytes, y, f"{title} over bytes sent")
    return [
        Figure(f"{title}, over bytes", note + note_log, _present(over_bytes), first),
        Figure(
            f"{title}, over rounds", "", _present(over_rounds), _over_rounds(over_rounds, y, title)
        ),
    ]


def by_direction(runs: Sequence[RunData]) -> Figure:
    """Return a figure of each run's totals by direction, beside the dense model's."""
    groups = []
    for way in DIRECTIONS:
        bars = []
        for place, run in enumerate(runs):
            found = run.totals(way)
            sent, dense = found.totals.encoded_bytes, found.totals.dense_bytes
            fewer = ", " + _fewer(found.fewer) if found.fewer is not None else ""
            background = 0 if found.fewer is None else dense
            title = f"{printable(run.name)}: {sent:,} bytes; dense {dense:,}"
            bars.append(Bar(place, sent, background, readable_bytes(sent) + fewer, title))
        groups.append(BarGroup(f"{way}: {WORDS[way]}", bars))
    return Figure(
        "By direction",
        "coloured: sent; pale: what the dense model would have sent uncoded, where it is known",
        range(len(runs)),
        bar_chart(groups, label="Bytes sent by direction"),
        bars=True,
    )


def by_round(runs: Sequence[RunData], direction: Direction) -> Figure:
    """Return a figure of the bytes of each round in one direction."""
    curves: list[Curve] = [
        [
            (number, size, f"{printable(run.name)}, round {number}: {size:,} bytes")
            for number, size in run.round_bytes(direction).items()
        ]
        for run in runs
    ]
    title = f"{direction.capitalize()} in each round"
    svg, note = _bytes_chart(curves, "round", f"Bytes {direction} in each round")
    return Figure(title, f"{WORDS[direction]}, all clients{note}", _present(curves), svg)


def by_client(runs: Sequence[RunData]) -> Figure:
    """Return a figure of the bytes of each client over the run, largest first."""
    curves: list[Curve] = []
    for run in runs:
        curve: Curve = []
        for rank, client in enumerate(run.client_names, start=1):
            size = run.client_totals(client).totals.encoded_bytes
            who = shortened(printable(client))
            curve.append((rank, size, f"{printable(run.name)}, client {who}: {size:,} bytes"))
        curves.append(curve)
    svg, note = _bytes_chart(curves, "clients, most bytes first", "Bytes sent by client")
    note = f"both directions, the whole run; clients ordered by their bytes{note}"
    return Figure("By client", note, _present(curves), svg)


def by_layer(runs: Sequence[RunData]) -> Figure | None:
    """Return a figure of the layers' sizes before encoding; None if no ledger has them."""
    chosen = [place for place, run in enumerate(runs) if run.layers]
    if not chosen:
        return None
    sizes: dict[str, int] = {}
    for place in chosen:
        for layer in runs[place].layers.values():
            size = max(layer.raw_bytes, layer.dense_bytes)
            sizes[layer.layer] = max(size, sizes.get(layer.layer, 0))
    largest = set(sorted(sizes, key=lambda name: -sizes[name])[:LAYERS])
    groups = [
        BarGroup(
            shortened(printable(name)) or "(the model itself)",
            [_layer_bar(place, runs[place], [name]) for place in chosen],
        )
        for name in sizes
        if name in largest
    ]
    if rest := [name for name in sizes if name not in largest]:
        bars = [_layer_bar(place, runs[place], rest) for place in chosen]
        groups.append(BarGroup(f"{len(rest)} other layers", bars))
    return Figure(
        "By layer, before coding",
        "coloured: what one message of the whole model carries of the layer before it is coded; "
        "pale: the dense layer",
        chosen,
        bar_chart(groups, label="Bytes of each layer in one message, before coding"),
        bars=True,
    )


def _layer_bar(place: int, run: RunData, names: Iterable[str]) -> Bar:
    found = [run.layers[name] for name in names if name in run.layers]
    if not found:
        return Bar(place, None, 0, "not in this run")
    raw, dense = sum(f.raw_bytes for f in found), sum(f.dense_bytes for f in found)
    whole = sum(layer.raw_bytes for layer in run.layers.values())
    share = f"{raw / whole:.1%} of the message" if whole else "no bytes"
    text = readable_bytes(raw) + (f" of {readable_bytes(dense)}" if dense else "")
    title = f"{printable(run.name)}: {raw:,} bytes, {share}; dense {dense:,} bytes"
    return Bar(place, raw, dense, text, title)


# Axes


Curve = list[tuple[float, float, str]]


def _over_bytes(curves: Sequence[Curve], y: Axis, label: str) -> tuple[str, str]:
    ends = [max((p[0] for p in curve), default=0) for curve in curves]
    log = _spread([end for end in ends if end])
    shown = [[p for p in curve if p[0] > 0] for curve in curves] if log else list(curves)
    every = [p[0] for curve in shown for p in curve]
    unit, size = byte_unit(max(every, default=0))
    places = [value / size for value in every]
    scale = AxisScale.logarithmic(places) if log else AxisScale.linear(places, zero=True)
    label_x = f"{unit} sent so far" + (", log scale" if log else "")
    series = [
        Series(run, [(a / size, b, text) for a, b, text in curve])
        for run, curve in enumerate(shown)
    ]
    note = "; the figure before the first byte is left out" if log and _zero(curves) else ""
    return line_chart(series, x=Axis(scale, label_x), y=y, label=label), note


def _over_rounds(curves: Sequence[Curve], y: Axis, label: str) -> str:
    x = Axis(AxisScale.linear([p[0] for c in curves for p in c]), "round", whole=True)
    series = [Series(run, curve) for run, curve in enumerate(curves)]
    return line_chart(series, x=x, y=y, label=f"{label} over rounds")


def _bytes_chart(curves: Sequence[Curve], label_x: str, label: str) -> tuple[str, str]:
    """Return a chart with bytes on the vertical axis, and what to add to its note."""
    every = [p[1] for curve in curves for p in curve]
    log = _spread([value for value in every if value])
    unit, size = byte_unit(max(every, default=0))
    places = [value / size for value in every if value or not log]
    scale = AxisScale.logarithmic(places) if log else AxisScale.linear(places, zero=True)
    series = [
        Series(run, [(a, b / size, text) for a, b, text in curve if b or not log])
        for run, curve in enumerate(curves)
    ]
    x = Axis(AxisScale.linear([p[0] for c in curves for p in c]), label_x, whole=True)
    y = Axis(scale, unit + (", log scale" if log else ""))
    note = "; what is 0 is left out" if log and len(places) < len(every) else ""
    return line_chart(series, x=x, y=y, label=label), note


def _sent_at(run: RunData, rounds: Iterable[int]) -> Mapping[int, int]:
    """Return the bytes sent up to the end of each of these rounds, with or without messages."""
    known = sorted(run.sent_until().items())
    found, sent, place = {}, 0, 0
    for number in sorted(rounds):
        while place < len(known) and known[place][0] <= number:
            sent = known[place][1]
            place += 1
        found[number] = sent
    return found


def _fewer(ratio: float) -> str:
    if ratio >= 1.05:
        return f"{ratio:.1f}x fewer"
    return "as dense" if ratio > 0.95 else f"{1 / ratio:.1f}x more"


def _spread(values: Sequence[float]) -> bool:
    return len(values) > 1 and max(values) >= SPREAD * min(values)


def _zero(curves: Sequence[Curve]) -> bool:
    return any(p[0] == 0 for curve in curves for p in curve)


def _present(curves: Sequence[Curve]) -> list[int]:
    return [run for run, curve in enumerate(curves) if curve]


def _is_share(metric: str) -> bool:
    return "acc" in metric.lower()
