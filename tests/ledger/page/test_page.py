"""The page of `fedpara report`: whole, self-contained, and right about the numbers."""

import re
from html.parser import HTMLParser

import pytest

from fedpara_plugins import Ledger, LedgerEntry
from fedpara_plugins.ledger import LayerSize, RunStart
from fedpara_plugins.ledger.page import read_runs, render_page

VOID = {"meta", "br"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x00\x1b\u202e&amp;\n"


class Page(HTMLParser):
    """Checks that every element is closed in its turn; keeps elements, attributes and texts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.titles = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        elif "style" not in self.open and data.strip():
            self.texts.append(data)

    def count(self, tag):
        return sum(found == tag for found, _ in self.elements)

    def of_class(self, name):
        return [attrs for _, attrs in self.elements if name in attrs.get("class", "").split()]

    @property
    def text(self):
        return "\n".join(self.texts)


def write(path, rounds=3, clients=4, size=1000, dense=20_000, accuracy=True, layers=True):
    ledger = Ledger(path)
    ledger.describe(RunStart(version="0.1.0", method="fedpara", codec="int8"))
    if layers:
        ledger.describe(LayerSize(layer="conv1", tensors=5, raw_bytes=300, dense_bytes=15_000))
        ledger.describe(LayerSize(layer="fc", tensors=2, raw_bytes=100, dense_bytes=5_000))
    for number in range(1, rounds + 1):
        for client in range(clients):
            for direction in ("down", "up"):
                ledger.record(
                    LedgerEntry(
                        round=number,
                        kind="train",
                        direction=direction,
                        client=f"c{client}",
                        tensors=7,
                        raw_bytes=4 * size,
                        encoded_bytes=size + (500 if direction == "down" else client),
                        dense_bytes=dense,
                    )
                )
        if accuracy:
            ledger.log(number, accuracy=0.5 + 0.4 * number / rounds)
            ledger.log(number, eval_acc=0.4, source="clients")
    return path


def page(*paths, metric=None):
    text = render_page(read_runs([str(path) for path in paths]), metric)
    return Page(text), text


def cells(parsed_text, row):
    """The cells of a row of the first table, without tags."""
    rows = re.findall(r"<tr>(.*?)</tr>", parsed_text, re.S)
    return [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", rows[row])]


def test_totals_are_those_of_the_messages(tmp_path):
    found, text = page(write(tmp_path / "small.jsonl"), write(tmp_path / "big.csv", size=90_000))
    #      rounds x clients x (size + 500), and x size + rounds x (0 + 1 + 2 + 3)
    down, up = 3 * 4 * 1500, 3 * 4 * 1000 + 3 * 6
    total, dense = down + up, 3 * 4 * 2 * 20_000
    assert cells(text, 1) == [
        "small", "30.0 kB", f"{dense / total:.1f}x", "90.0%", "40.0%", "fedpara", "int8",
        "18.0 kB", "12.0 kB", "96.0 kB", "480 kB", "3", "4", "24",
    ]  # fmt: skip
    second = cells(text, 2)
    assert [second[0], *second[5:7]] == ["big", "fedpara", "int8"]
    assert f'title="{total:,} bytes"' in text
    # two figures, each over bytes and rounds; direction, down, up, client, layer
    assert found.count("figure") == len(found.of_class("chart")) == 4 + 5
    assert len(found.of_class("legend")) == 9


def test_points_say_what_they_are(tmp_path):
    found, _ = page(write(tmp_path / "run.jsonl"))
    sent = [1 * (4 * 1500 + 4000 + 6) * n for n in (1, 2, 3)]
    for number, value in ((1, "63.33%"), (2, "76.67%"), (3, "90%")):
        kilo = f"{sent[number - 1] / 1000:.1f} kB"
        assert f"run, round {number}: {value}, {kilo} sent" in found.titles
    assert "run, round 2: 6,000 bytes" in found.titles  # down
    assert "run, round 2: 4,006 bytes" in found.titles  # up
    # c3 sent most: its client number is added to each of its uplinks
    ranked = [title for title in found.titles if "client c" in title]
    assert ranked == [f"run, client c{n}: {7_500 + 3 * n:,} bytes" for n in (3, 2, 1, 0)]
    assert "run: 300 bytes, 75.0% of the message; dense 15,000 bytes" in found.titles
    assert "300 B of 15.0 kB" in found.texts


def test_points_stand_where_the_axes_say(tmp_path):
    """Positions are recomputed from the ticks that are drawn, for the figure over rounds."""
    _, text = page(write(tmp_path / "run.jsonl"))
    svg = next(s for s in re.findall(r"<svg class=\"chart\".*?</svg>", text) if "over rounds" in s)
    across = [(float(x), float(t)) for x, t in re.findall(r'mid" x="([\d.]+)" y="\d+">(\d+)<', svg)]
    upward = [
        (float(y) - 4, float(t)) for y, t in re.findall(r'end" x="46" y="([\d.]+)">([\d.]+)<', svg)
    ]
    dots = re.findall(r'class="dot" d="M([\d.]+) ([\d.]+)m[^>]*><title>[^:]*: ([\d.]+)%', svg)
    assert len(dots) == 3
    for number, (x, y, value) in enumerate(dots, start=1):
        assert float(x) == pytest.approx(at(across, number), abs=0.2)
        assert float(y) == pytest.approx(at(upward, float(value)), abs=0.2)
    left, top, bottom, right = map(
        float, re.search(r'class="axis" d="M(\d+) (\d+)V(\d+)H(\d+)"', svg).groups()
    )
    assert (upward[0][0], upward[-1][0]) == pytest.approx((bottom, top))
    assert across[-1][0] == pytest.approx(right)
    assert across[0][0] >= left


def at(ticks, value):
    """Straight line through the first and the last tick."""
    (low, a), (high, b) = ticks[0], ticks[-1]
    return low + (value - a) / (b - a) * (high - low)


def test_nothing_is_asked_of_anybody(tmp_path):
    found, text = page(write(tmp_path / "run.jsonl"))
    assert {tag for tag, _ in found.elements}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "image", "use", "a", "form", "base"}
    )
    for tag, attrs in found.elements:
        assert not {name for name in attrs if name.startswith("on")}, tag
        assert not {"src", "href", "xlink:href", "style", "action"} & set(attrs), tag
    assert "url(" not in text
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    policy = next(a["content"] for t, a in found.elements if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_names_from_strangers_are_only_text(tmp_path):
    path = tmp_path / "run.jsonl"
    ledger = Ledger(path)
    ledger.describe(RunStart(version="1", method=HOSTILE, codec=HOSTILE))
    ledger.describe(LayerSize(layer=HOSTILE, tensors=1, raw_bytes=10, dense_bytes=20))
    entry = LedgerEntry(
        round=1, kind=HOSTILE, direction="up", client=HOSTILE, tensors=1, raw_bytes=9,
        encoded_bytes=9, dense_bytes=10,
    )  # fmt: skip
    ledger.record(entry)
    ledger.log(1, {HOSTILE + "acc": 0.5}, source=HOSTILE)
    plain, _ = page(write(tmp_path / "plain.jsonl", rounds=1, clients=1))
    runs = read_runs([str(path)])
    runs[0].name = HOSTILE
    found = Page(render_page(runs))
    assert found.count("script") == found.count("img") == 0
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in plain.elements}
    assert {key for _, attrs in found.elements for key in attrs} <= {
        *(key for _, attrs in plain.elements for key in attrs)
    }
    assert "<script>alert(1)" in found.text
    assert not {c for c in "\x00\x1b\u202e" if c in found.text + "".join(found.titles)}
    missing = Page(render_page(read_runs([str(path)]), HOSTILE))
    assert missing.count("script") == 0
    assert "no metric called <script>" in "".join(missing.texts)


def test_runs_that_lack_something(tmp_path):
    """One round, no figure, no dense size, no layers, no message: every mixture gives a page."""
    start = tmp_path / "start.jsonl"
    Ledger(start).describe(RunStart(version="0.1.0", method="none", codec="none"))
    runs = [
        start,
        write(tmp_path / "one.jsonl", rounds=1, clients=1),
        write(tmp_path / "bare.jsonl", dense=0, accuracy=False, layers=False),
        write(tmp_path / "empty_messages.jsonl", size=0, accuracy=False),
        write(tmp_path / "full.jsonl", size=100_000),
    ]
    for chosen in [runs, *([run] for run in runs), runs[:2], runs[2:4]]:
        _, text = page(*chosen)
        assert "nan" not in text.lower()
        assert not re.search(r"\binf\b", text)
    found, text = page(runs[2])
    assert cells(text, 1)[2] == "&ndash;"
    assert cells(text, 1)[8] == "not known"
    assert "no metrics" in found.text
    assert "No ledger says how large the layers are" in found.text
    assert "some of its messages have no dense size" in found.text
    assert not [title for title in page(start)[0].titles if "round" in title]
    assert cells(page(start)[1], 1)[-3:] == ["0", "0", "0"]


def test_what_is_odd_about_a_file_is_said(tmp_path):
    path = write(tmp_path / "run.jsonl")
    write(path)
    with path.open("a") as file:
        file.write('{"round":')
    found, text = page(path)
    assert "its last line is unfinished (9 bytes)" in found.text
    assert "the file holds 2 starts of a run" in found.text
    assert cells(text, 1)[-1] == "48"


def test_the_metric_can_be_chosen(tmp_path):
    path = write(tmp_path / "run.jsonl", accuracy=False)
    ledger = Ledger(path)
    for number in (1, 2, 3):
        ledger.log(number, loss=2.0 / number)
    assert "loss, server, over bytes" in page(path)[0].text  # there is no other
    ledger.log(3, accuracy=0.5)
    assert "loss, server, over bytes" not in page(path)[0].text
    assert "loss, server, over bytes" in page(path, metric="loss")[0].text
    found, _ = page(path, metric="lost")
    assert "no metric called lost" in found.text


def test_one_figure_that_diverged_does_not_flatten_the_others(tmp_path):
    path = write(tmp_path / "run.jsonl", accuracy=False)
    ledger = Ledger(path)
    for number, value in enumerate((0.5, float("inf"), 1e200, -1e300, 0.7)):
        ledger.log(number, accuracy=value)
    found, _ = page(path)
    said = [title for title in found.titles if re.search(r"round \d: .*sent$", title)]
    assert len(said) == 4  # rounds 0 and 4, over bytes and over rounds


@pytest.mark.parametrize("figures", [[5e-324], [0.0, 1e-320], [-1e-300, 1e-310], [0.0]])
def test_figures_next_to_nothing_are_drawn(tmp_path, figures):
    """Found by fuzzing: the width of such an axis has no logarithm."""
    path = tmp_path / "run.jsonl"
    ledger = Ledger(path)
    for number, value in enumerate(figures, start=1):
        ledger.log(number, loss=value)
    found, text = page(path)
    assert cells(text, 1)[3] == f"{figures[-1]:.4g}"
    assert found.count("figure") > 1


def test_runs_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = [write(tmp_path / name / "run.ledger.jsonl") for name in "ab"]
    assert [run.name for run in read_runs(map(str, paths))] == ["a/run", "b/run"]
    twice = [str(paths[0]), str(paths[0]), f"mine={paths[1]}"]
    assert [run.name for run in read_runs(twice)] == ["a/run", "a/run (2)", "mine"]
    odd = write(tmp_path / "x=y.csv")
    assert [run.name for run in read_runs([str(odd)])] == ["x=y"]


def test_many_runs_differ_by_colour_dash_and_mark(tmp_path):
    paths = [write(tmp_path / f"run{i}.jsonl", rounds=2, clients=2) for i in range(9)]
    _, text = page(*paths)
    legend = re.findall(r'<svg class="swatch.*?</svg>', text.partition("</table>")[0])
    assert len(legend) == len(set(legend)) == 9
    assert "dash1" in legend[8]


def test_large_runs_stay_small_and_keep_their_peaks(tmp_path):
    """What grows with rounds and clients is thinned out; the highest round is still there."""
    path = tmp_path / "run.jsonl"
    ledger = Ledger(path)
    for number in range(2000):
        ledger.record(
            LedgerEntry(
                round=number,
                kind="train",
                direction="up",
                client=f"{number}",
                tensors=1,
                raw_bytes=10,
                encoded_bytes=5_000 if number == 777 else 1_000,
                dense_bytes=1000,
            )
        )
        ledger.log(number, accuracy=0.5)
    found, text = page(path)
    assert len(text) < 100_000
    assert "the 20 with most bytes" in found.text
    svg = next(s for s in re.findall(r"<svg class=\"chart\".*?</svg>", text) if "Bytes up" in s)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", svg.partition("line")[2])]
    assert min(heights) < sorted(heights)[1] - 50
