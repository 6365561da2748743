"""What a training step of a user's own model costs with factors, from constants measured here.

The dense step is timed, and so is what factors add to it: for every weight, composing it and taking
its gradient back to the factors; for layers that can do without the whole weight, the layer itself,
with factors and without. No step of the converted model is run for it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn

from fedpara_plugins.cli.step_parts import Call, parts_of, training_step, uses_of
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.layers.base import FactorisedLayer
from fedpara_plugins.models.conversion import convert

__all__ = ["StepCost", "parse_input", "step_cost"]

SECONDS = 8.0
"""Of measuring, about, beside one turn that warms up and `FEWEST` turns."""

FEWEST, MOST = 3, 25
"""Turns; in each the dense step and every part is timed once."""

SHORT = 2e-3
"""Seconds that a timed piece takes at least: shorter ones are repeated within a turn."""


@dataclass(frozen=True)
class StepCost:
    """One training step (forward, backward, SGD) of one core.

    Attributes:
        dense: seconds of the model as it is.
        added: seconds that factors add (less than zero where they save), by the name of the weight.
    """

    dense: float
    added: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """Seconds of the step with factors over those of the dense step."""
        return 1 + sum(self.added.values()) / self.dense

    def __str__(self) -> str:
        start = f"one training step on one core here: {_milliseconds(self.dense)} dense"
        if not self.added:
            return f"{start}; clients train no factors, so the same with this method"
        with_factors = _milliseconds(self.dense * self.ratio)
        lines = [f"{start}, about {with_factors} with factors: {self.ratio:.2f} times"]
        dearest = sorted(self.added.items(), key=lambda item: -item[1])[:3]
        if dearest and dearest[0][1] > 0:
            named = ", ".join(f"{n} {_milliseconds(s)}" for n, s in dearest if s > 0)
            lines.append(f"Most of what is added: {named}.")
        return "\n".join(lines)


def step_cost(
    model: nn.Module, config: FedParaConfig, inputs: Sequence[Tensor], *, seconds: float = SECONDS
) -> StepCost:
    """Predict what a step with factors costs, from a timed dense step and timed parts.

    Times are process-CPU time on one thread, the median of turns in which each piece runs once, so
    that what else the machine does falls on all of them. The loss is the sum of squares of all
    floating-point outputs.

    Args:
        model: unconverted; it is copied, and trained on its device.
        config: method, ranks and everything else that decides what is factorised.
        inputs: of one batch, as the model's forward takes them.
        seconds: of measuring, about.

    Raises:
        ConfigError: the model's forward or backward pass fails on these inputs.
        ConversionError: the model cannot be converted.
    """
    with _one_thread():
        dense = copy.deepcopy(model).train()
        inputs = [_on_device(dense, x) for x in inputs]
        converted = _converted(model, config)
        layers = {n: m for n, m in converted.named_modules() if isinstance(m, FactorisedLayer)}
        pieces: dict[str, Call] = {"": training_step(dense, inputs)}
        pieces[""]()  # what is wrong with the inputs shows here, without factors
        uses = uses_of(converted, layers, inputs)
        shares: dict[str, list[tuple[str, float]]] = {}
        for name, layer in layers.items():
            for key, parts in parts_of(name, layer, dense.get_submodule(name), uses[name]):
                shares[key] = [(part, sign) for part, sign, _ in parts]
                pieces.update({part: call for part, _, call in parts})
        times = _timed(pieces, seconds)
    added = {key: sum(s * times[part] for part, s in parts) for key, parts in shares.items()}
    return StepCost(times[""], added)


def _converted(model: nn.Module, config: FedParaConfig) -> nn.Module:
    """What a client trains."""
    own = copy.deepcopy(model).train()
    if config.method == "none" or config.local == "dense":
        return own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table above the prediction says it
        return convert(own, replace(config, init="random")).train()


def _timed(pieces: Mapping[str, Call], seconds: float) -> dict[str, float]:
    """Median seconds of each, in turns."""
    repeats = {}
    for name, call in pieces.items():
        call()
        once = _clocked(call, 1)
        repeats[name] = max(1, min(1000, round(SHORT / max(once, 1e-7))))
    found: dict[str, list[float]] = {name: [] for name in pieces}
    start = time.process_time()
    for turn in range(MOST):
        if turn >= FEWEST and time.process_time() - start > seconds:
            break
        for name, call in pieces.items():
            found[name].append(_clocked(call, repeats[name]))
    return {name: median(times) for name, times in found.items()}


def _clocked(call: Call, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def parse_input(text: str) -> Tensor:
    """Make up one input of a batch.

    Args:
        text: a shape, batch first, such as ``16x3x32x32``, for normal values; with ``:N`` behind it
            whole numbers below N, such as the tokens of a vocabulary: ``16x80:1000``.

    Raises:
        ConfigError: it is neither.
    """
    shape, colon, below = text.strip().partition(":")
    sides = [int(side) for side in shape.split("x") if side.isdecimal()]
    whole = not colon or (below.isdecimal() and int(below) > 0)
    if len(sides) != len(shape.split("x")) or 0 in sides or not whole:
        raise ConfigError(
            f"--input: expected a shape, batch first, such as 16x3x32x32, or 16x80:1000 for whole "
            f"numbers below 1000; got {text!r}"
        )
    generator = torch.Generator().manual_seed(0)
    if colon:
        return torch.randint(0, int(below), sides, generator=generator)
    return torch.randn(sides, generator=generator)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The caller's threads and random numbers come back afterwards."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def _on_device(model: nn.Module, x: Tensor) -> Tensor:
    first = next(model.parameters(), None)
    if first is None:
        return x
    # Text cannot say a dtype: numbers are of the model's own.
    floating = x.is_floating_point() and first.is_floating_point()
    return x.to(first.device, first.dtype if floating else None)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
