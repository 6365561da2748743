"""The decision about a whole model: every check of a conversion, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConversionError
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.ratio_check import refuse_unreachable_ratios
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.base import full_name
from fedpara_plugins.models.config_checks import CONFIG_CHECKS
from fedpara_plugins.models.forms import decide_form, planned_weights
from fedpara_plugins.models.head import choose_head
from fedpara_plugins.models.layer_decisions import LayerDecision, decide_layers
from fedpara_plugins.models.private import private_tensors
from fedpara_plugins.models.trainable import check_trainable
from fedpara_plugins.models.weight_checks import check_model
from fedpara_plugins.models.wrapped import lost_hooks, refuse_wrapped
from fedpara_plugins.plugins import method_named

__all__ = ["Conversion", "decide", "repeated_modules"]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Everything that a conversion is going to do to a model.

    It holds the dense layers. Drop it after the conversion, so that they can be freed.

    Attributes:
        config: the options, with ``base="frozen"`` if the weights decided so.
        layers: the layers that are replaced, in the model's order.
        head: name of the layer that ``private_head`` and ``label_prior`` are about, or None.
        warnings: texts that the user should read.
        note: a sentence about the form of the weights, for the log; "" if the options decided it.
    """

    config: FedParaConfig
    layers: tuple[LayerDecision, ...] = ()
    head: str | None = None
    warnings: tuple[str, ...] = ()
    note: str = ""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The dense weights that are replaced, by full name."""
        return planned_weights(self.layers)


def decide(model: nn.Module, config: FedParaConfig) -> Conversion:
    """Decide what a conversion does to a model, and check that it can be done.

    Args:
        model: not converted; it is not changed.
        config: the options.

    Returns:
        The decision. With method ``none`` it replaces no layer.

    Raises:
        ConfigError: an option is out of range for this model, a pattern matches nothing, or
            weights that look trained would be replaced.
        ConversionError: nothing to convert, or a layer that cannot be (the message names it).
    """
    check_model(model)
    for check in CONFIG_CHECKS:
        check(config)
    method = method_named(config.method)
    private_tensors(model, config.private)  # raises for patterns that cannot be meant
    if method is None:
        return Conversion(config=config)
    _refuse_converted(model)
    refuse_wrapped(model)
    found = decide_layers(model, config)
    config, note = decide_form(found, config)
    if note:
        found = decide_layers(model, config)
    check_trainable(model, config)
    _refuse_repeated_modules(model, found)
    refuse_unreachable_ratios(_by_ratio(found, config))
    if not any(decision.plans for decision in found):
        reasons = "\n".join(_reason_lines(found))
        raise ConversionError(f"no layer of the model can be factorised:\n{reasons}")
    plans = [plan for decision in found for plan in decision.plans.values()]
    head = choose_head(model, config, private_factors=any(p.private_names for p in plans))
    return Conversion(
        config=config,
        layers=tuple(decision for decision in found if decision.plans or decision.name == head),
        head=head,
        warnings=tuple(_warnings(planned_weights(found))),
        note=note,
    )


def repeated_modules(model: nn.Module, layers: Sequence[LayerDecision]) -> list[list[str]]:
    """Return the names of each dense layer that is factorised and stands in several places."""
    names: dict[int, list[str]] = {
        id(decision.layer): []
        for decision in layers
        if decision.plans and not isinstance(decision.layer, FactorisedLayer)
    }
    for name, layer in model.named_modules(remove_duplicate=False):
        if id(layer) in names:
            names[id(layer)].append(name)
    return [places for places in names.values() if len(places) > 1]


def _refuse_converted(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, FactorisedLayer):
            raise ConversionError(
                f"layer {name!r} is already factorised: convert a fresh model, or go back with "
                f"to_dense() first"
            )


def _refuse_repeated_modules(model: nn.Module, found: Sequence[LayerDecision]) -> None:
    """Raise for a module in two places: replacing it in one of them would untie the two."""
    for first, second, *_ in repeated_modules(model, found):
        raise ConversionError(
            f"layers {first!r} and {second!r} are one and the same module: give each place a "
            f"module of its own (copy.deepcopy), or exclude {first!r} from conversion"
        )


def _by_ratio(
    found: Sequence[LayerDecision], config: FedParaConfig
) -> Iterator[tuple[str, WeightPlan, float]]:
    """Yield name, plan and ratio of every weight that is factorised by a ratio."""
    for decision in found:
        ratio = config.for_layer(decision.name).ratio
        if ratio is None:
            continue
        for weight, plan in decision.plans.items():
            yield full_name(decision.name, weight), plan, ratio


def _reason_lines(found: Sequence[LayerDecision]) -> Iterator[str]:
    if not found:
        yield "  it has no parameters"
    for decision in found:
        for weight, reason in decision.reasons.items():
            yield f"  {full_name(decision.name, weight) or '(model)'}: {reason}"


def _warnings(weights: Mapping[str, Tensor]) -> Iterator[str]:
    if lost := lost_hooks(weights):
        yield (
            f"hooks were registered on {_first_three(lost)} before the model was converted; a "
            f"composed weight does not have them. Register them on the factors, after convert()."
        )


def _first_three(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
