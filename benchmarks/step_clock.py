"""Times and memory of several contenders, interleaved in one process.

A ratio is taken between neighbours in time, so that what else the machine does falls on both.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch.profiler import ProfilerActivity, profile

from fedpara_plugins.factors.fast import buffers

__all__ = ["Ratio", "peak_memory", "ratios"]

WARM_UP = 0.5
"""Seconds of every contender before it is timed, and at least one call."""


@dataclass(frozen=True)
class Ratio:
    """Median, lower and upper quartile of the ratios to the first contender; seconds of its own."""

    median: float
    low: float
    high: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def ratios(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Ratio]:
    """Return each contender's process-CPU time over that of the first, which runs every round.

    Args:
        contenders: called without arguments; the first is what the others are compared with.
        rounds: how often each is timed. Every second round runs in the reverse order.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for call in contenders.values():
        start = time.process_time()
        call()
        while time.process_time() - start < WARM_UP:
            call()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                start = time.process_time()
                contenders[name]()
                times[name].append(time.process_time() - start)
    finally:
        gc.enable()
    first = times[names[0]]
    return {name: _ratio(times[name], first) for name in names}


def _ratio(own: list[float], first: list[float]) -> Ratio:
    each = [a / b for a, b in zip(own, first, strict=True)]
    low, _, high = quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
    return Ratio(median(each), low, high, median(own))


def peak_memory(step: Callable[[], object]) -> int:
    """Return the peak bytes of a step beyond what was allocated before it.

    The running sum of the allocator's events; what libraries keep outside of it is not seen. Memory
    of composed weights, which is used again in every step, counts like any other: for this one step
    it is taken from the allocator.
    """
    smallest, buffers.SMALLEST = buffers.SMALLEST, sys.maxsize
    try:
        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
    finally:
        buffers.SMALLEST = smallest
    running = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            running += event.nbytes()
            peak = max(peak, running)
    return peak
