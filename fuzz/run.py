"""Fuzz everything that reads untrusted bytes; ``tox run -e fuzz -- --runs 20000 --seconds 60``.

Coverage-guided with atheris where it is installed, else with random damage; the count of inputs is
printed at the end, and what broke the invariant is kept under ``build/fuzz/findings``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from invariant import Checker, damaged

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "fuzz"
SECONDS_AN_INPUT = 10
MEMORY = 2 << 30
"""Bytes of address space beyond what the process has before the first input."""
GROWTH = 96 << 20
"""Bytes that the process may grow by over a whole run; an input may use some 1 MB."""


class TooSlow(BaseException):
    """An input took too long; no Exception, so that no handler in the library hides it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, and return 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs to try")
    parser.add_argument("--seconds", type=int, default=7200, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("auto", "atheris", "random"), default="auto")
    parser.add_argument("--check", nargs="+", type=Path, help="try these files instead")
    options = parser.parse_args(arguments)
    if options.check:
        return _check_files(options.check)
    engine = options.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "random"
    start = time.monotonic()
    (BUILD / "findings").mkdir(parents=True, exist_ok=True)
    run = _guided if engine == "atheris" else _random
    with tempfile.TemporaryDirectory() as name:
        checker = Checker(Path(name))
        decoded, refused, found = run(checker, options.runs, options.seconds, options.seed)
    print(
        f"{engine}, Python {sys.version.split()[0]}, torch {torch.__version__}, seed "
        f"{options.seed}: {decoded + refused} inputs in {time.monotonic() - start:.0f} s, "
        f"{decoded} decoded, {refused} refused, {found} findings; stages and presets: "
        f"{', '.join(checker.known_texts())}"
    )
    return 1 if found else 0


def _check_files(paths: Sequence[Path]) -> int:
    """Try findings again; the first that still is one ends with its traceback."""
    with tempfile.TemporaryDirectory() as name:
        checker = Checker(Path(name))
        for path in paths:
            print(f"{path}: {'decoded' if checker.check(path.read_bytes()) else 'refused'}")
    return 0


def _random(checker: Checker, runs: int, seconds: int, seed: int) -> tuple[int, int, int]:
    torch.set_num_threads(1)
    logging.disable()  # thousands of torn ledgers
    draw = random.Random(seed)
    corpus = list(checker.seeds())
    for data in corpus:  # first, so that lazy imports do not count as growth
        checker.check(data)
    _bound_memory()
    signal.signal(signal.SIGALRM, _too_slow)
    before, end, found = _peak(), time.monotonic() + seconds, 0
    while checker.decoded + checker.refused < runs and time.monotonic() < end:
        data = draw.choice(corpus)
        for _ in range(draw.choice((1, 1, 2, 3))):
            data = damaged(data, draw)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_AN_INPUT)
        try:
            checker.check(data)
        except (Exception, TooSlow) as error:
            found += 1
            _keep(data, error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    grown = _peak() - before
    print(f"peak memory grew by {grown / 2**20:.1f} MiB")
    if grown > GROWTH:
        raise SystemExit(f"the process grew by {grown} bytes, more than {GROWTH}")
    return checker.decoded, checker.refused, found


def _guided(checker: Checker, runs: int, seconds: int, seed: int) -> tuple[int, int, int]:
    corpus = BUILD / "corpus"
    corpus.mkdir(exist_ok=True)
    for data in checker.seeds():
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    command = [sys.executable, str(HERE / "guided.py"), str(corpus), f"-runs={runs}"]
    command += [f"-max_total_time={seconds}", f"-seed={seed + 1}", "-max_len=8192"]
    command += [f"-timeout={SECONDS_AN_INPUT}", f"-rss_limit_mb={MEMORY >> 20}"]
    # Small inputs are not better inputs here: keep the structure that the seeds have.
    command += ["-reduce_inputs=0", "-mutate_depth=2", "-print_final_stats=1"]
    command += [f"-artifact_prefix={BUILD / 'findings'}/"]
    log = BUILD / "guided.log"
    environment = {**os.environ, "FUZZ_FINDINGS": str(BUILD / "findings")}
    with log.open("w") as out:
        code = subprocess.run(command, stdout=out, stderr=out, env=environment).returncode
    text = log.read_text(errors="replace")
    print("\n".join(text.splitlines()[-8:]))
    if code != 0:
        print(f"the engine ended with {code}; see {log}")
    counts = re.findall(r"CHECKED (\d+) (\d+) (\d+)", text)
    decoded, refused, found = map(int, counts[-1]) if counts else (0, 0, 0)
    return decoded, refused, found + (code != 0)


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TooSlow(f"an input took more than {SECONDS_AN_INPUT} s")


def _keep(data: bytes, error: BaseException) -> None:
    print(f"{_stored(data)}: {type(error).__name__}: {str(error)[:500]}")


def _stored(data: bytes) -> Path:
    path = BUILD / "findings" / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
