"""The page in a real browser: it asks for nothing, says nothing to the console, and is drawn."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import zlib

import pytest

from fedpara_plugins import Ledger, LedgerEntry
from fedpara_plugins.ledger.page import read_runs, render_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("FEDPARA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-default-apps",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
    # Browsers talk to their makers whatever the flags say: no name leads out of this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]

# `tox run -e core-browser` asks for one, and fails where there is none.
pytestmark = pytest.mark.skipif(
    BROWSER is None and os.environ.get("FEDPARA_BROWSER") != "required",
    reason="no Chromium found: the page's structure is tested without it",
)


@pytest.fixture
def visit(tmp_path):
    """Opens a page; gives its picture's pixels, its console and the requests it made."""

    assert BROWSER, "no Chromium found: install it, or name it in FEDPARA_CHROMIUM"

    def run(page, width=1200):
        profile, log, shot = tmp_path / "profile", tmp_path / "net.json", tmp_path / "shot.png"
        words = [f"--user-data-dir={profile}", f"--log-net-log={log}", f"--screenshot={shot}"]
        command = [BROWSER, *FLAGS, *words, f"--window-size={width},1600", page.as_uri()]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            try:
                errors = process.communicate(timeout=120)[1].decode(errors="replace")
            finally:
                if process.poll() is None:  # with everything that it started
                    os.killpg(process.pid, signal.SIGKILL)
        console = re.findall(r"CONSOLE[^\n]*", errors)
        return pixels(shot), console, requests(log)

    return run


def requests(log):
    """What the page asked for, beside itself; not what the browser asks of its own accord."""
    text = log.read_text().rstrip()
    events = json.loads(text if text.endswith("}") else text.rstrip(",") + "]}")["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    assert asked  # the log is there, and as it is read here
    by_page = [params["url"] for params in asked if params["initiator"] != "not an origin"]
    return [url for url in by_page if not url.startswith(("file:", "data:"))]


def pixels(path):
    """Rows of RGB triples of an 8-bit PNG."""
    data = path.read_bytes()
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert (depth, colour) in {(8, 2), (8, 6)}
    step, place, packed = 3 if colour == 2 else 4, 8, b""
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            packed += data[place + 8 : place + 8 + size]
        place += 12 + size
    raw, rows, before = zlib.decompress(packed), [], bytes(width * step)
    for y in range(height):
        start = y * (width * step + 1)
        before = unfiltered(raw[start], raw[start + 1 : start + 1 + width * step], before, step)
        rows.append(before)
    return width, {row[i : i + 3] for row in rows for i in range(0, len(row), step)}


def unfiltered(kind, line, before, step):
    out = bytearray(line)
    for i, value in enumerate(line):
        left = out[i - step] if i >= step else 0
        corner = before[i - step] if i >= step else 0
        up = before[i]
        if kind == 4:
            guess = left + up - corner
            near = min((left, up, corner), key=lambda c: abs(guess - c))
        else:
            near = (0, left, up, (left + up) // 2)[kind]
        out[i] = (value + near) & 255
    return bytes(out)


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "run.jsonl"
    ledger = Ledger(path)
    for number in (1, 2, 3):
        entry = LedgerEntry(
            round=number, kind="train", direction="up", client="<script>alert(1)</script>",
            tensors=1, raw_bytes=10, encoded_bytes=10 * number, dense_bytes=100,
        )  # fmt: skip
        ledger.record(entry)
        ledger.log(number, accuracy=number / 4)
    html = tmp_path / "report.html"
    html.write_text(render_page(read_runs([str(path)])), encoding="utf-8")
    return html


@pytest.mark.parametrize("width", [500, 1200])
def test_the_page_is_drawn_and_asks_for_nothing(visit, page, width):
    (found, colours), console, asked = visit(page, width)
    assert found == width
    assert bytes.fromhex("0072b2") in colours  # the first run's
    assert console == []
    assert asked == []


def test_the_watch_sees_requests_and_errors(visit, page):
    """The test above can fail: a page that does all this is caught."""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    bad = '<script>console.error("seen");nothing()</script><img src="http://127.0.0.1:9/x.png">'
    page.write_text(text.replace("</body>", bad + "</body>"), encoding="utf-8")
    _, console, asked = visit(page)
    assert len(console) == 2
    assert "http://127.0.0.1:9/x.png" in asked


def test_the_pages_policy_stops_them(visit, page):
    """Were a name ever to slip through as an element, the browser would still refuse it."""
    text = page.read_text(encoding="utf-8")
    bad = '<script>document.title="ran"</script><img src="http://127.0.0.1:9/x.png">'
    page.write_text(text.replace("</body>", bad + "</body>"), encoding="utf-8")
    _, console, asked = visit(page)
    assert asked == []
    assert len(console) == 2
    assert all("Content Security Policy" in line for line in console)
