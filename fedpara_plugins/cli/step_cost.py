"""The time of a training step of a user's model with factors, predicted from timed parts.

The parts are the dense step and what factors add to it. For most weights, that is composing the
weight and taking its gradient back to the factors. For layers that can do without the whole weight,
it is the layer itself, with factors and without. No step of the converted model is run.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from fedpara_plugins.cli.step_parts import Call, record_uses, timed_parts, training_step
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.layers.base import FactorisedLayer
from fedpara_plugins.models.conversion import convert

__all__ = ["StepCost", "parse_input", "step_cost"]

SECONDS = 8.0
"""About how long to measure, besides one warm-up round and the `FEWEST` rounds."""

FEWEST, MOST = 3, 25
"""Numbers of rounds; in each round, the dense step and every part are timed once."""

SHORT = 2e-3
"""Least seconds of a timed part: a shorter one is repeated within a round."""


@dataclass(frozen=True)
class StepCost:
    """The time of one training step (forward, backward, SGD) on one core.

    Attributes:
        dense: seconds of the unconverted model's step.
        added: seconds that factors add, by the weight's name; negative if they save time.
    """

    dense: float
    added: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """Seconds of the step with factors divided by those of the dense step."""
        return 1 + sum(self.added.values()) / self.dense

    def __str__(self) -> str:
        start = f"one training step on one core here: {_milliseconds(self.dense)} dense"
        if not self.added:
            return f"{start}; the same with this method, as clients train no factors"
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
    """Predict the time of a step with factors, from a timed dense step and timed parts.

    Times are CPU time of the process on one thread: the median of several rounds, in each of which
    every part runs once, so that other load on the machine affects all parts alike. The loss is the
    sum of squares of all floating-point outputs.

    Args:
        model: unconverted; a copy of it is trained on its device.
        config: method, ranks and all other options that decide what is factorised.
        inputs: one batch, as the model's forward takes it.
        seconds: about how long to measure.

    Raises:
        ConfigError: the model's forward or backward pass fails on these inputs.
        ConversionError: the model cannot be converted.
    """
    with _one_thread():
        dense = copy.deepcopy(model).train()
        inputs = [_on_device(dense, x) for x in inputs]
        converted = _converted(model, config)
        layers = {n: m for n, m in converted.named_modules() if isinstance(m, FactorisedLayer)}
        calls: dict[str, Call] = {"": training_step(dense, inputs)}
        calls[""]()  # unsuitable inputs raise here, before factors are involved
        uses = record_uses(converted, layers, inputs)
        shares: dict[str, list[tuple[str, float]]] = {}
        for name, layer in layers.items():
            for key, parts in timed_parts(name, layer, dense.get_submodule(name), uses[name]):
                shares[key] = [(part, sign) for part, sign, _ in parts]
                calls.update({part: call for part, _, call in parts})
        times = _timed(calls, seconds)
    added = {key: sum(s * times[part] for part, s in parts) for key, parts in shares.items()}
    return StepCost(times[""], added)


def _converted(model: nn.Module, config: FedParaConfig) -> nn.Module:
    """Return the model that a client trains."""
    own = copy.deepcopy(model).train()
    if config.method == "none" or config.local == "dense":
        return own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table above the prediction shows the same
        return convert(own, config.without_values()).train()


def _timed(calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
    """Return the median seconds of each call, over rounds in which each is timed once."""
    repeats = {}
    for name, call in calls.items():
        call()
        once = _seconds_of(call, 1)
        repeats[name] = max(1, min(1000, round(SHORT / max(once, 1e-7))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    start = time.process_time()
    for done in range(MOST):
        if done >= FEWEST and time.process_time() - start > seconds:
            break
        for name, call in calls.items():
            found[name].append(_seconds_of(call, repeats[name]))
    return {name: median(times) for name, times in found.items()}


def _seconds_of(call: Call, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def parse_input(text: str) -> Tensor:
    """Return a random input for the model.

    Args:
        text: a shape, batch first, such as ``16x3x32x32``, for normal values. With ``:N`` after it,
            the values are whole numbers below N, such as tokens of a vocabulary: ``16x80:1000``.

    Raises:
        ConfigError: the text is neither.
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
    """Use one thread, and restore the caller's threads and random state at the end."""
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
    # Text does not give a dtype, so floating-point values get the model's.
    floating = x.is_floating_point() and first.is_floating_point()
    return x.to(first.device, first.dtype if floating else None)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
