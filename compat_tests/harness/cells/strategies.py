"""The optimizers of the matrix, as data. Standard library only, as `harness.cells.flower`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["PLUGIN_STRATEGIES", "RATE", "STRATEGIES", "StrategySpec"]

FLOWER = "flwr.serverapp.strategy"

RATE = 0.1
"""The clients' learning rate in the cells."""


@dataclass(frozen=True)
class StrategySpec:
    """One optimizer, and the plain computation that it is checked against.

    Attributes:
        class_name: name of the strategy's class.
        rule: a name in `harness.oracles.rules.RULES`, built with the same options.
        options: arguments of its constructor; ``proximal_mu`` is the client's and not the rule's.
        home: module of the class.
        inside: class of the strategy that it wraps; empty for none. A wrapper also gets
            ``num_sampled_clients``.
        client_mod: name in ``flwr.clientapp.mod``, for the client's training; empty for none.
        clients: number of clients that take part.
        slack: additional distance allowed to a run with a lossy codec, relative to the plain loop's
            way; a tenth of it is allowed to an exact run. Not 0 where the rule decides coordinate
            by coordinate, so that one rounding can turn a decision.
        doubles: whether it returns float64 for float32 under NumPy 2.
        norms: whether it takes a norm over all tensors of a reply, or clips by one.
    """

    class_name: str
    rule: str
    options: Mapping[str, float] = field(default_factory=dict)
    home: str = FLOWER
    inside: str = ""
    client_mod: str = ""
    clients: int = 4
    slack: float = 0.0
    doubles: bool = False
    norms: bool = False

    @property
    def label(self) -> str:
        """Return the name in the table."""
        return self.class_name.replace("DifferentialPrivacy", "DP ")

    @property
    def proximal_mu(self) -> float | None:
        """Return mu of the clients' loss; None for no such term."""
        return self.options.get("proximal_mu")

    @property
    def rule_options(self) -> dict[str, float]:
        """Return the options of the rule."""
        return {key: value for key, value in self.options.items() if key != "proximal_mu"}


FIXED = {"noise_multiplier": 0.0, "clipping_norm": 0.5}
ADAPTIVE = {
    "noise_multiplier": 0.0,
    "initial_clipping_norm": 0.5,
    "target_clipped_quantile": 0.4,
    "clip_norm_lr": 0.5,
}

STRATEGIES: Mapping[str, StrategySpec] = {
    "fedavg": StrategySpec("FedAvg", "fedavg"),
    "fedprox": StrategySpec("FedProx", "fedavg", {"proximal_mu": 0.1}),
    "fedavgm": StrategySpec(
        "FedAvgM", "fedavgm", {"server_learning_rate": 0.9, "server_momentum": 0.5}
    ),
    "fedadagrad": StrategySpec("FedAdagrad", "fedadagrad", {"eta": 0.05, "tau": 0.01}),
    "fedadam": StrategySpec("FedAdam", "fedadam", {"eta": 0.05, "tau": 0.01}, doubles=True),
    "fedyogi": StrategySpec("FedYogi", "fedyogi", {"eta": 0.05, "tau": 0.01}),
    "fedmedian": StrategySpec("FedMedian", "fedmedian"),
    "fedtrimmedavg": StrategySpec("FedTrimmedAvg", "fedtrimmedavg", {"beta": 0.25}),
    "krum": StrategySpec("Krum", "krum", {"num_malicious_nodes": 1}, clients=7, norms=True),
    "multikrum": StrategySpec(
        "MultiKrum",
        "multikrum",
        {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
        clients=7,
        norms=True,
    ),
    "bulyan": StrategySpec(
        "Bulyan", "bulyan", {"num_malicious_nodes": 1}, clients=7, slack=0.05, norms=True
    ),
    "qfedavg": StrategySpec(
        "QFedAvg",
        "qfedavg",
        {"client_learning_rate": RATE, "q": 0.2},
        doubles=True,
        norms=True,
    ),
    "dpserverfixed": StrategySpec(
        "DifferentialPrivacyServerSideFixedClipping",
        "serverfixed",
        FIXED,
        inside="FedAvg",
        norms=True,
    ),
    "dpserveradaptive": StrategySpec(
        "DifferentialPrivacyServerSideAdaptiveClipping",
        "serveradaptive",
        ADAPTIVE,
        inside="FedAvg",
        norms=True,
    ),
    "dpclientfixed": StrategySpec(
        "DifferentialPrivacyClientSideFixedClipping",
        "clientfixed",
        FIXED,
        inside="FedAvg",
        client_mod="fixedclipping_mod",
        norms=True,
    ),
    "dpclientadaptive": StrategySpec(
        "DifferentialPrivacyClientSideAdaptiveClipping",
        "clientadaptive",
        ADAPTIVE,
        inside="FedAvg",
        client_mod="adaptiveclipping_mod",
        norms=True,
    ),
}
"""By marker: ``-m fedadam`` runs its cells. A new one is an entry here and a rule."""

PLUGIN = "fedpara_plugins_flower"
PLUGIN_STRATEGIES: Mapping[str, StrategySpec] = {
    "scaffold": StrategySpec("Scaffold", "scaffold", home=PLUGIN),
    "feddyn": StrategySpec("FedDyn", "feddyn", {"alpha": 0.3}, home=PLUGIN),
}
"""Optimizers that Flower lacks. Their client code differs, so `harness.flower.drift_apps` runs them
and `harness.oracles.drift` is what they are checked against."""
