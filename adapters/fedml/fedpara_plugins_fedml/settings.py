"""The options of a FedML project: the keys ``fedpara_*`` of its YAML, as attributes of ``args``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from fedpara_plugins import ConfigError, ConversionError, FedParaConfig
from fedpara_plugins.exchange import ExchangeSettings, to_number
from fedpara_plugins.optimizers import Guard

__all__ = ["PREFIX", "FedMLSettings", "naming_keys"]

PREFIX = "fedpara_"
"""Prefix of the plugin's keys: FedML drops the names of sections."""

WEIGHTINGS = ("", "uniform", "examples")
_SWITCHES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class FedMLSettings(ExchangeSettings):
    """Everything that the user may set for one run; see `ExchangeSettings` for the rest.

    Attributes:
        mend: whether the plugin's engine runs even with method and codec ``none``, as the dense
            baseline of a comparison, with optimizers as published.
        min_clients: number of usable replies, and of client processes, below which the run ends. 0
            is 1.
        weighting: how SCAFFOLD, FedDyn and Mime weigh clients: ``uniform``, as published, or
            ``examples``; "" leaves it to the optimizer.
        scaffold_option: the new variate of SCAFFOLD's clients: ``II``, from their steps, or ``I``,
            the gradient at the server's model, which costs a pass over their data.
        guard: whether SCAFFOLD's and FedDyn's updates are bounded (`fedpara_plugins.optimizers`);
            None leaves it to the optimizer: SCAFFOLD's are.
        guard_tau: see `Guard`.
        guard_window: see `Guard`.
        guard_collect: see `Guard`; None for one pass over the clients.
        timeout: seconds without a message after which a process counts as gone.
        start_timeout: seconds within which all processes must be connected.
        round_timeout: seconds within which clients must answer in a round; 0 waits for all that are
            heard.
        server_rule: the rules that FedOpt's ``server_optimizer`` names: ``torch``, as in FedML, or
            ``flower``, which both frameworks can be set to.
        server_beta_1: of adaptive server optimizers; None for the rule's default.
        server_beta_2: likewise.
        server_tau: added to the root by adaptive server optimizers (torch's ``eps``); likewise.
    """

    mend: bool = False
    min_clients: int = 0
    weighting: str = ""
    scaffold_option: str = "II"
    guard: bool | None = None
    guard_tau: float = 1.5
    guard_window: int = 50
    guard_collect: int | None = None
    timeout: float = 40.0
    start_timeout: float = 600.0
    round_timeout: float = 0.0
    server_rule: str = "torch"
    server_beta_1: float | None = None
    server_beta_2: float | None = None
    server_tau: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("min_clients", self.min_clients >= 0, "0 or more", self.min_clients)
        expected = "'uniform' or 'examples'"
        _check("weighting", self.weighting in WEIGHTINGS, expected, self.weighting)
        options = "'I' or 'II'"
        _check(
            "scaffold_option", self.scaffold_option in ("I", "II"), options, self.scaffold_option
        )
        for name in ("timeout", "start_timeout"):
            value = getattr(self, name)
            _check(name, 0 < value < 2**31, "seconds above 0", value)
        limit = self.round_timeout
        _check("round_timeout", 0 <= limit < 2**31, "seconds, or 0 for no limit", limit)
        rules = "'torch' or 'flower'"
        _check("server_rule", self.server_rule in ("torch", "flower"), rules, self.server_rule)
        for name in ("server_beta_1", "server_beta_2"):
            beta = getattr(self, name)
            _check(name, beta is None or 0 <= beta < 1, "a number from 0 to below 1", beta)
        tau = self.server_tau
        _check("server_tau", tau is None or tau > 0, "a number above 0", tau)
        self.guard_for(default=True)

    @classmethod
    def from_args(cls, args: Any) -> FedMLSettings:
        """Read and validate the keys; all defaults (method and codec ``none``) without any.

        Args:
            args: FedML's, or any object with the keys as attributes.

        Raises:
            ConfigError: if a key (the error names the nearest known one), method or codec is
                unknown, or a value is out of range.
        """
        section = {
            key[len(PREFIX) :].replace("-", "_"): "" if value is None else value
            for key, value in vars(args).items()
            if key.startswith(PREFIX)
        }
        _refuse_section(vars(args))
        _refuse_unknown(section)
        own = _own_options(section)
        with naming_keys():
            return cls(**cls.read(section), **own)

    def guard_for(self, *, default: bool) -> Guard | None:
        """Return the guard of an optimizer; None for the published algorithm.

        Args:
            default: whether the optimizer has one if the user sets nothing.
        """
        if not (default if self.guard is None else self.guard):
            return None
        return Guard(tau=self.guard_tau, window=self.guard_window, collect=self.guard_collect)


@contextmanager
def naming_keys() -> Iterator[None]:
    """Let the core's errors in this context name options as the YAML does, with the prefix."""
    try:
        yield
    except (ConfigError, ConversionError) as error:
        text = re.sub(rf"\b(option '|min_size=)(?!{PREFIX})", _with_prefix, str(error))
        raise type(error)(text) from None


def _with_prefix(found: re.Match[str]) -> str:
    text = found[0]
    return f"{text}{PREFIX}" if text.endswith("'") else f"{PREFIX}{text}"


_OWN = {
    field.name: field
    for field in fields(FedMLSettings)
    if field.name not in {base.name for base in fields(ExchangeSettings)}
}


def _own_options(section: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in _OWN.items():
        value = section.pop(name, "")
        if value == "":
            continue
        kind = str(field.type)
        if kind.startswith("bool"):
            found[name] = _switch(name, value)
        elif kind == "str":
            found[name] = str(value)
        else:
            number = to_number(PREFIX + name, value)
            if kind.startswith("int") and number is not None:
                _check(name, number == int(number), "an integer", value)
                number = int(number)
            found[name] = number
    return found


def _switch(name: str, value: Any) -> bool:
    found = _SWITCHES.get(str(value).lower())
    _check(name, found is not None, "true or false", value)
    return bool(found)


def _check(name: str, valid: bool, expected: str, value: Any) -> None:
    if not valid:
        raise ConfigError(f"option '{PREFIX}{name}': expected {expected}, got {repr(value)[:80]}")


def _refuse_section(values: Mapping[str, Any]) -> None:
    """Raise for a section in another one: FedML flattens one level, and leaves it a mapping."""
    for key in ("fedpara", "fedpara_args"):
        if isinstance(values.get(key), Mapping):
            raise ConfigError(
                f"the YAML has {key!r} inside another section, where its keys are not read: put "
                f"fedpara_args at the left margin, with keys like fedpara_method: pfedpara in it"
            )


def _refuse_unknown(section: Mapping[str, Any]) -> None:
    known = [field.name for field in (*fields(FedParaConfig), *fields(FedMLSettings))]
    known = [name for name in known if name not in ("config", "uplink", "downlink")]
    for name in section:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else "."
            raise ConfigError(
                f"unknown key {PREFIX}{name} in the YAML{hint} Known: "
                f"{', '.join(PREFIX + other for other in known)}"
            )
