"""Train the app in `flower_digits` dense, with FedPara and with pFedPara, and compare.

    python examples/demo.py [--output build/demo] [--runs none fedpara pfedpara] [--update-readme]

The demo applies `flower_digits.diff` to a copy of the app. Then `flwr run` trains the copy once per
method in Flower's simulation engine; only the method and the codec differ between runs. The demo
writes a table, a picture, the figures behind them (results.json) and the page that `fedpara report`
makes (report.html). Each training leaves its log, its ledger and a dense checkpoint. The demo loads
the checkpoint into the unmodified model and tests it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

EXAMPLES = Path(__file__).resolve().parent
APP = EXAMPLES / "flower_digits"
DIFF = EXAMPLES / "flower_digits.diff"
README = EXAMPLES.parent / "README.md"
PICTURE = EXAMPLES.parent / "docs" / "demo.png"

# By name: method, codec, colour in the picture. `none-small` shows what the codec does by itself.
RUNS = {
    "none": ("none", "none", "#444444"),
    "none-small": ("none", "small", "#009e73"),
    "fedpara": ("fedpara", "small", "#0072b2"),
    "pfedpara": ("pfedpara", "small", "#d55e00"),
}
DEFAULT_RUNS = ["none", "fedpara", "pfedpara"]
NUM_CLIENTS = 10
TIME_LIMIT = 600  # seconds for one training, after which something must be wrong

Run = dict[str, Any]


class DemoError(Exception):
    """An error that ends the demo, with a message for the user."""


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=DEFAULT_RUNS)
    parser.add_argument("--rounds", type=int, help="instead of the app's own number")
    parser.add_argument("--update-readme", action="store_true", help="put the results there")
    options = parser.parse_args()
    # SIGTERM (a cancelled job) must clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        compare(options)
    except DemoError as error:
        sys.exit(f"\ndemo: {error}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: interrupted")


def compare(options: argparse.Namespace) -> None:
    """Train once for every run, then write and show the results."""
    start = time.monotonic()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedpara-demo-", ignore_cleanup_errors=True) as folder:
        app = patched_app(Path(folder) / "app")
        with flower(Path(folder)) as env:
            runs = [train(app, name, output, options.rounds, env) for name in options.runs]
    table = render_table(runs)
    (output / "results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(table, encoding="utf-8")
    draw(runs, output / "accuracy_over_bytes.png")
    write_report(options.runs, output)
    print(f"\n{table}\nall in {output}, after {time.monotonic() - start:.0f} s")
    if options.update_readme:
        update_readme(table, output / "accuracy_over_bytes.png")


# The app and Flower


def patched_app(folder: Path) -> Path:
    """Return a copy of the app with the diff applied, as a user would apply it."""
    if shutil.which("git") is None:
        raise DemoError("git was not found: it applies flower_digits.diff. Install git.")
    app = folder / "examples" / APP.name
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    # Inside someone's repository git would take the paths for that repository's.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    command = ["git", "apply", "--verbose", str(DIFF)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode or "fedpara" not in (app / "pyproject.toml").read_text(encoding="utf-8"):
        raise DemoError(f"{DIFF.name} does not apply to {APP.name}:\n{done.stderr}{done.stdout}")
    return app


@contextlib.contextmanager
def flower(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of `flwr run`, and end the SuperLink that it leaves running."""
    home = folder / "flwr-home"
    for needed in (home, folder / "empty"):
        needed.mkdir()
    scripts = str(Path(sys.executable).parent)
    # A home and ports of our own: a SuperLink that already runs has its own working directory and
    # packages, and would take this run's apps for others of the same name.
    with socket.socket() as first, socket.socket() as second:
        ports = []
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
            ports.append(str(each.getsockname()[1]))
    env = os.environ | {
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": ports[1],
        # Otherwise Flower installs the app's dependencies afresh, and gigabytes of CUDA with them.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        yield env
    finally:
        end_processes(str(home))


def end_processes(mark: str) -> None:
    """End every process that has ``mark`` in its command line or environment, and its children."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        pids = marked_processes(mark)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        while marked_processes(mark) & pids and time.monotonic() < deadline:
            time.sleep(0.2)


def marked_processes(mark: str) -> set[int]:
    """Return the ids of the processes with ``mark``, and of their descendants."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for pid, parent, text in processes():
        parents[pid] = parent
        if mark in text:
            found.add(pid)
    found.discard(os.getpid())
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grown = bool(children)
    return found


def processes() -> Iterator[tuple[int, int, str]]:
    """Yield id, parent's id and command line (on Linux with the environment) of all processes."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        listing = subprocess.run(["ps", "-Ao", "pid=,ppid=,command="], capture_output=True)
        for line in listing.stdout.decode(errors="replace").splitlines():
            pid, parent, text = [*line.split(None, 2), ""][:3]
            yield int(pid), int(parent), text
        return
    for entry in proc.iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # ended meanwhile
            stat = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            words = (entry / "cmdline").read_bytes()
            with contextlib.suppress(PermissionError):  # another user's
                words += (entry / "environ").read_bytes()
            if stat[0] != "Z":
                yield int(entry.name), int(stat[1]), words.decode(errors="replace")


# One training


def train(app: Path, name: str, output: Path, rounds: int | None, env: dict[str, str]) -> Run:
    """Train once and return the figures of every round."""
    method, codec, _ = RUNS[name]
    files = {
        "results": output / f"{name}.rounds.json",
        "fedpara.ledger": output / f"{name}.ledger.jsonl",
        "fedpara.checkpoint": output / f"{name}.safetensors",
    }
    for file in files.values():
        file.unlink(missing_ok=True)
    config: dict[str, Any] = {option: str(file) for option, file in files.items()}
    config |= {"fedpara.method": method, "fedpara.codec": codec}
    if method == "pfedpara":
        shutil.rmtree(output / f"{name}-clients", ignore_errors=True)
        config["fedpara.client-checkpoints"] = str(output / f"{name}-clients")
    if rounds is not None:
        config["num-server-rounds"] = rounds
    print(f"\nmethod {method}, codec {codec}: starting Flower", flush=True)
    start, log = time.monotonic(), output / f"{name}.log"
    flwr_run(app, config, name, log, env)
    seconds = time.monotonic() - start
    if missing := [str(file) for file in files.values() if not file.exists()]:
        # Flower's command succeeds even where the run that it shows has failed.
        raise DemoError(f"{tail(log)}\n\n{name}: the run failed, {', '.join(missing)} missing")
    checkpoint = files["fedpara.checkpoint"]
    accuracy = checkpoint_accuracy(checkpoint)
    print(
        f"{name}: done after {seconds:.0f} s; the unmodified model loads {checkpoint.name}: "
        f"server {accuracy:.1%}",
        flush=True,
    )
    return {
        "method": method,
        "codec": codec,
        "seconds": round(seconds, 1),
        "checkpoint": str(checkpoint),
        "checkpoint_accuracy": accuracy,
        "rounds": with_bytes(
            json.loads(files["results"].read_text(encoding="utf-8"))["rounds"],
            files["fedpara.ledger"].read_text(encoding="utf-8"),
        ),
    }


def flwr_run(app: Path, config: dict[str, Any], name: str, log: Path, env: dict[str, str]) -> None:
    """Run `flwr run`, and print one line for every round."""
    flwr = shutil.which("flwr", path=env["PATH"])
    if flwr is None:
        raise DemoError("flwr was not found next to this Python: pip install 'flwr[simulation]'")
    command = [flwr, "run", str(app), "--stream"]
    command += ["--federation-config", f"num-supernodes={NUM_CLIENTS} client-resources-num-cpus=1"]
    # All in one option: of two, Flower keeps only the last one's values of a nested section.
    overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    command += ["--run-config", overrides]
    start = time.monotonic()
    with (
        log.open("w", encoding="utf-8") as copy,
        subprocess.Popen(
            command,
            # Ray's workers import from here; an empty folder has nothing to take by mistake.
            cwd=Path(env["FLWR_HOME"]).parent / "empty",
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        timer = threading.Timer(TIME_LIMIT, process.kill)
        timer.start()
        try:
            for line in progress(process.stdout, copy):
                print(f"{name:9} {line}  {time.monotonic() - start:4.0f} s", flush=True)
            process.wait()
        finally:
            timer.cancel()
            process.kill()
    if process.returncode:
        slow = f" (more than {TIME_LIMIT} s)" if time.monotonic() - start > TIME_LIMIT else ""
        raise DemoError(
            f"{tail(log)}\n\n{name}: flwr run ended with code {process.returncode}{slow}"
        )


def progress(lines: Iterable[str], copy: TextIO) -> Iterator[str]:
    """Copy Flower's output, and yield a line with the accuracies after each round."""
    current, clients = "", ""
    for coloured in lines:
        line = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
        copy.write(line)
        copy.flush()
        if found := re.search(r"\[ROUND (\d+)/(\d+)\]", line):
            current = f"round {found[1]:>2}/{found[2]}"
        elif found := re.search(r"'eval_acc': ([\d.e-]+)", line):
            clients = f"  clients {float(found[1]):6.1%}"
        elif current and (found := re.search(r"MetricRecord: \{'accuracy': ([\d.e-]+)", line)):
            yield f"{current}  server {float(found[1]):6.1%}{clients}"
            current = ""


def tail(log: Path, lines: int = 40) -> str:
    """Return the last lines of a log and the path of its file."""
    text = log.read_text(encoding="utf-8")
    return "\n".join([*text.splitlines()[-lines:], f"(end of {log})"])


# Figures


def with_bytes(rounds: list[Run], ledger: str) -> list[Run]:
    """Add to the app's figures of every round the bytes that the plugin's ledger counted."""
    sums: dict[tuple[int, str], int] = defaultdict(int)
    for line in ledger.splitlines():
        entry = json.loads(line)
        if entry.get("line", "message") != "message":
            continue
        sums[entry["round"], entry["direction"]] += entry["encoded_bytes"]
    for row in rounds:
        row |= {f"bytes_{way}": sums.pop((row["round"], way), 0) for way in ("up", "down")}
    if sums:
        raise DemoError(f"the ledger has rounds that the app did not report: {sorted(sums)}")
    return rounds


def checkpoint_accuracy(path: Path) -> float:
    """Return the accuracy of the unmodified model with a dense checkpoint, on all test data."""
    from safetensors.torch import load_file

    if str(APP) not in sys.path:
        sys.path.insert(0, str(APP))
    from digits_app import task  # type: ignore[import-not-found]

    model = task.Net()
    model.load_state_dict(load_file(path), strict=True)
    return float(task.test(model, task.load_test_data(app_seed()))[1])


def app_seed() -> int:
    """Return the seed in the app's own config, which determines how the data are split."""
    found = re.search(r"^seed = (\d+)", (APP / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise DemoError("the app's pyproject.toml has no seed")
    return int(found[1])


def is_plain(run: Run) -> bool:
    """Return whether the plugin left everything as it was."""
    return bool(run["method"] == run["codec"] == "none")


def total(run: Run, way: str) -> int:
    """Return the bytes of a whole run in one direction."""
    return sum(row[f"bytes_{way}"] for row in run["rounds"])


def render_table(runs: list[Run]) -> str:
    """Return the comparison as a Markdown table, with an explanation of its columns before it."""
    dense = next((total(r, "up") + total(r, "down") for r in runs if is_plain(r)), None)
    head = ["method", "codec", "server's model, all test data"]
    head += ["clients' own models, own held-out data", "MB up", "MB down", "ratio to dense", "s"]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for run in runs:
        up, down = total(run, "up"), total(run, "down")
        last = run["rounds"][-1]
        rows.append(
            [
                run["method"],
                run["codec"],
                f"{last['server_accuracy']:.1%}",
                f"{last['client_accuracy']:.1%}",
                f"{up / 1e6:.2f}",
                f"{down / 1e6:.2f}",
                "-" if dense is None else f"{dense / (up + down):.1f}",
                f"{run['seconds']:.0f}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rounds = runs[0]["rounds"][-1]["round"]
    note = (
        f"Each run has {rounds} rounds and {NUM_CLIENTS} clients with two to four labels each. "
        "Accuracies are those after the last round, with one seed.\n\n"
        "With pFedPara, the server's model is W1, the shared half of each weight. No client uses "
        "it alone, so its accuracy on all test data says little: read the column of the clients' "
        "own models.\n\n"
        "Bytes are those of the encoded messages, for training and evaluation; 1 MB = 10^6 bytes. "
        "The ratio to dense is the bytes of `none` divided by the bytes of this run. Seconds are "
        "those of the whole `flwr run`.\n\n"
    )
    return note + "\n".join(lines) + "\n"


def draw(runs: list[Run], path: Path) -> None:
    """Draw accuracy over the bytes sent so far, in both directions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = ("Server's model, all test data", "Clients' own models, own held-out data")
    keys = ("server_accuracy", "client_accuracy")
    for panel, title, key in zip(panels, titles, keys, strict=True):
        for run in runs:
            sent, points = 0, []
            for row in run["rounds"]:
                sent += row["bytes_up"] + row["bytes_down"]
                if sent:
                    points.append((sent / 1e6, 100 * row[key]))
            label = "dense" if run["method"] == "none" else run["method"]
            label += "" if is_plain(run) else f", {run['codec']}"
            colour = next(c for *way, c in RUNS.values() if way == [run["method"], run["codec"]])
            panel.plot(*zip(*points, strict=True), ".-", color=colour, label=label)
        panel.set(title=title, xscale="log", xlabel="MB sent so far, up and down", ylim=(0, 100))
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("accuracy, %")
    panels[1].legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(names: list[str], output: Path) -> None:
    """What `fedpara report` makes of the ledgers."""
    fedpara = str(Path(sys.executable).with_name("fedpara"))
    ledgers = [f"{name}={output / name}.ledger.jsonl" for name in names]
    command = [fedpara, "report", *ledgers, "--output", str(output / "report.html")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def update_readme(table: str, picture: Path) -> None:
    """Write the command, the table and the picture between the README's marks."""
    begin, end = "<!-- demo:begin -->", "<!-- demo:end -->"
    text = README.read_text(encoding="utf-8")
    if begin not in text or end not in text.partition(begin)[2]:
        raise DemoError(f"{README} lacks the lines {begin} and {end}, which enclose the results")
    PICTURE.parent.mkdir(exist_ok=True)
    shutil.copyfile(picture, PICTURE)
    before, rest = text.split(begin, 1)
    block = "`tox run -e demo -- --update-readme` wrote this:\n\n" + table
    block += "\n![Accuracy over bytes sent](docs/demo.png)\n"
    README.write_text(f"{before}{begin}\n{block}{end}{rest.split(end, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
