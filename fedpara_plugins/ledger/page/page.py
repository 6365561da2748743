"""The page: plots, tables and texts in one HTML file that loads nothing else.

It has no script, and its content security policy forbids the browser to run or load any, because
the names in a ledger are untrusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from fedpara_plugins._version import __version__
from fedpara_plugins.ledger.page.charts import COLOURS, swatch
from fedpara_plugins.ledger.page.figures import (
    Figure,
    by_client,
    by_direction,
    by_layer,
    by_round,
    metric_figures,
)
from fedpara_plugins.ledger.page.runs import DIRECTIONS, RunData
from fedpara_plugins.ledger.page.style import STYLE
from fedpara_plugins.support.units import readable_bytes
from fedpara_plugins.text import printable, shortened

__all__ = ["render_page"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
METRICS = 6
"""Number of metrics that are plotted, in the order of the ledgers."""
CLIENTS = 20
"""Number of clients in the table of a run."""
NONE = "&ndash;"

Metric = tuple[str, str]


def render_page(runs: Sequence[RunData], metric: str | None = None) -> str:
    """Return the page as HTML.

    Args:
        runs: at least one.
        metric: the name of the metric to plot; None plots those with ``acc`` in their names, or
            else all.
    """
    return "\n".join(_page(runs, _chosen_metrics(runs, metric), metric)) + "\n"


def _page(runs: Sequence[RunData], metrics: Sequence[Metric], wanted: str | None) -> Iterator[str]:
    title = "Bytes of a federated run" if len(runs) == 1 else f"Bytes of {len(runs)} federated runs"
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>{title}</h1>"
    yield (
        '<p class="soft">Counted on the encoded messages while the runs went on, training and '
        "evaluation, both directions. 1 MB = 10<sup>6</sup> bytes.</p>"
    )
    yield from _totals(runs, metrics)
    yield "<h2>How good the model was</h2>"
    yield from _metric_part(runs, metrics, wanted)
    yield "<h2>Where the bytes went</h2>"
    figures = [by_direction(runs), *(by_round(runs, way) for way in DIRECTIONS), by_client(runs)]
    layers = by_layer(runs)
    yield _charts(runs, [*figures, layers] if layers else figures)
    yield (
        "<p>A coded message is one stream over all layers, so no coded byte belongs to one layer: "
        "the sizes by layer are those of the tensors before coding, once per model.</p>"
        if layers
        else '<p class="soft">No ledger says how large the layers are.</p>'
    )
    yield from _client_tables(runs)
    yield from _sources(runs)
    yield "</body></html>"


# Tables


def _totals(runs: Sequence[RunData], metrics: Sequence[Metric]) -> Iterator[str]:
    # The most important columns come first: a phone shows four of them.
    heads = ["run", "total", "fewer than dense"]
    heads += [f"{_text(metric)}, {_text(source)}" for source, metric in metrics]
    words = {0, len(heads), len(heads) + 1}
    heads += ["method", "codec"]
    heads += ["down", "up", "before coding", "dense", "rounds", "clients", "messages"]
    yield '<div class="table"><table><thead><tr>'
    yield "".join(f"<th{_left(i in words)}>{head}</th>" for i, head in enumerate(heads))
    yield "</tr></thead><tbody>"
    for place, run in enumerate(runs):
        cells = [_run_name(place, run), *_total_cells(run), *_metric_cells(run, metrics)]
        cells += [*_setting_cells(run), *_byte_cells(run)]
        row = "".join(f"<td{_left(i in words)}>{cell}</td>" for i, cell in enumerate(cells))
        yield f"<tr>{row}</tr>"
    yield "</tbody></table></div>"
    yield (
        '<p class="soft">before coding: the tensors that are shared; dense: the same messages with '
        "the dense model, uncoded; metrics are those of the last round that has one.</p>"
    )


def _setting_cells(run: RunData) -> list[str]:
    if not run.starts:
        return [NONE, NONE]
    last = run.starts[-1]
    return [_text(last.method), _text(last.codec)]


def _total_cells(run: RunData) -> Iterator[str]:
    whole = run.totals()
    yield _size_text(whole.totals.encoded_bytes)
    yield NONE if whole.fewer is None else f"{whole.fewer:.1f}x"


def _metric_cells(run: RunData, metrics: Sequence[Metric]) -> Iterator[str]:
    for source, metric in metrics:
        found = run.metrics.get((source, metric))
        if not found:
            yield NONE
            continue
        value = found[max(found)]
        share = "acc" in metric.lower() and all(0 <= v <= 1 for v in found.values())
        yield f"{value:.1%}" if share else f"{value:.4g}"


def _byte_cells(run: RunData) -> Iterator[str]:
    whole = run.totals()
    totals = whole.totals
    yield from (_size_text(run.totals(way).totals.encoded_bytes) for way in DIRECTIONS)
    yield _size_text(totals.raw_bytes)
    known = totals.dense_bytes and not whole.unknown
    yield readable_bytes(totals.dense_bytes) if known else "not known"
    yield f"{len({number for number, _ in run.rounds}):,}"
    yield f"{len({client for client, _ in run.clients}):,}"
    yield f"{totals.messages:,}"


def _size_text(size: int) -> str:
    return f'<span title="{size:,} bytes">{readable_bytes(size)}</span>'


def _client_tables(runs: Sequence[RunData]) -> Iterator[str]:
    for place, run in enumerate(runs):
        names = run.client_names
        if not names:
            continue
        shown = names[:CLIENTS]
        which = "its clients" if len(names) <= CLIENTS else f"the {CLIENTS} with most bytes"
        yield f"<details><summary>{_run_name(place, run)}: {which}</summary>"
        yield '<div class="table"><table><thead><tr><th class="left">client</th><th>messages</th>'
        yield "<th>down</th><th>up</th><th>fewer than dense</th></tr></thead><tbody>"
        for client in shown:
            whole = run.client_totals(client)
            fewer = NONE if whole.fewer is None else f"{whole.fewer:.1f}x"
            down, up = (
                readable_bytes(run.client_totals(client, way).totals.encoded_bytes)
                for way in DIRECTIONS
            )
            yield (
                f'<tr><td class="left">{_text(client)}</td><td>{whole.totals.messages:,}</td>'
                f"<td>{down}</td><td>{up}</td><td>{fewer}</td></tr>"
            )
        yield "</tbody></table></div></details>"


# Plots


def _metric_part(
    runs: Sequence[RunData], metrics: Sequence[Metric], wanted: str | None
) -> Iterator[str]:
    if not metrics:
        which = f"no metric called {_text(wanted)}" if wanted else "no metrics"
        yield (
            f"<p>These ledgers hold {which}. The Flower adapter writes what strategies and clients "
            f"evaluate; elsewhere call <code>ledger.log(round, accuracy=...)</code>.</p>"
        )
        return
    shown = metrics[:METRICS]
    yield _charts(runs, [figure for pair in shown for figure in metric_figures(runs, *pair)])
    if rest := metrics[METRICS:]:
        names = ", ".join(f"{_text(metric)} ({_text(source)})" for source, metric in rest[:20])
        yield f'<p class="soft">Not plotted, choose with --metric: {names}.</p>'


def _charts(runs: Sequence[RunData], figures: Sequence[Figure]) -> str:
    return f'<div class="charts">{"".join(_figure(runs, figure) for figure in figures)}</div>'


def _figure(runs: Sequence[RunData], figure: Figure) -> str:
    legend = "".join(f"<li>{_run_name(run, runs[run], figure.bars)}</li>" for run in figure.runs)
    note = f"<br><span>{escape(figure.note)}</span>" if figure.note else ""
    return (
        f"<figure><figcaption>{escape(figure.title)}{note}</figcaption>"
        f'<ul class="legend">{legend}</ul>{figure.svg}</figure>'
    )


def _chosen_metrics(runs: Sequence[RunData], wanted: str | None) -> list[Metric]:
    found = list(dict.fromkeys(pair for run in runs for pair in run.metrics))
    if wanted is not None:
        return [pair for pair in found if pair[1] == wanted]
    accuracies = [pair for pair in found if "acc" in pair[1].lower()]
    # The server's model comes first: in most runs it is the result.
    return sorted(accuracies or found, key=lambda pair: pair[0] != "server")


# Words


def _sources(runs: Sequence[RunData]) -> Iterator[str]:
    yield "<h2>Where this comes from</h2><ul>"
    for run in runs:
        notes = [f"{_text(run.name)}: <code>{escape(printable(str(run.path)))}</code>"]
        if run.torn:
            notes.append(f"its last line is unfinished ({run.torn:,} bytes) and was left out")
        if len(run.starts) > 1:
            notes.append(
                f"the file holds {len(run.starts)} starts of a run: bytes are those of all "
                f"together, metrics the last of each round"
            )
        if run.totals().unknown:
            notes.append("some of its messages have no dense size, so no ratio is given")
        yield f"<li>{'; '.join(notes)}</li>"
    yield f'</ul><p class="soft">Written by fedpara-plugins {escape(__version__)}.</p>'


def _run_name(place: int, run: RunData, square: bool = False) -> str:
    if square:
        sign = (
            f'<svg class="swatch s{place % COLOURS}" viewBox="0 0 26 14" aria-hidden="true">'
            f'<path class="square" d="M6 0h14v14h-14z"/></svg>'
        )
    else:
        sign = swatch(place)
    return f"{sign} {_text(run.name)}"


def _text(name: str) -> str:
    shown = printable(name)
    short = shortened(shown)
    if short == shown:
        return escape(shown)
    return f'<span title="{escape(shown[:400])}">{escape(short)}</span>'


def _left(words: bool) -> str:
    return ' class="left"' if words else ""
