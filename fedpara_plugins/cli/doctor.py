"""`fedpara doctor`: checks of every layer of a model before conversion, and of an optimizer.

Every finding says what was found and, if something should be done, what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from math import prod

from torch import nn
from torch.jit import ScriptModule
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, ConversionError
from fedpara_plugins.factors.fast.conditions import FALLBACKS
from fedpara_plugins.factors.fast.form import is_known
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.base import full_name
from fedpara_plugins.models.checkpoint_files import RESERVED_NAME, RESERVED_TEXT
from fedpara_plugins.models.conversion import convert
from fedpara_plugins.models.decisions import repeated_modules
from fedpara_plugins.models.first_values import fit_errors, fit_summary
from fedpara_plugins.models.forms import decide_form
from fedpara_plugins.models.infinities import infinite_tensors
from fedpara_plugins.models.layer_decisions import LayerDecision, decide_layers
from fedpara_plugins.models.norms import first_norm
from fedpara_plugins.plugins import layers
from fedpara_plugins.support.findings import Finding
from fedpara_plugins.support.torch_seams import own_parameters, trains_for_quantisation
from fedpara_plugins.training.optimizer_check import check_optimizer

__all__ = ["check_model", "check_training"]

SLOWER = (
    "composed by torch's own operations, which are slower: its combine function has no "
    "hand-written gradient"
)


def check_model(model: nn.Module, config: FedParaConfig) -> list[Finding]:
    """Check every layer: how it is converted, or why it stays dense and what to do about that.

    Args:
        model: converted in place at the end, to find out whether it can be.
        config: as for training. With ``init="fit"`` factors are fitted, which takes a while.

    Raises:
        ConfigError: no model allows an option, or a pattern matches no layer.
    """
    refused: dict[str, ConversionError] = {}
    found = decide_layers(model, config, refused=refused)
    lines = []
    try:
        config, note = decide_form(found, config)
    except ConfigError as error:  # the same as `convert` would raise, as one of several findings
        lines, note = [Finding("attention", "(model)", str(error))], ""
    if note:
        lines = [Finding("ok", "(model)", note)]
        found = decide_layers(model, config, refused=refused)
    lines += [line for decision in found for line in _about_layer(decision, config)]
    if any(decision.plans for decision in found):
        lines += _variance(model, config)
    lines += [Finding("attention", name or "(model)", str(e)) for name, e in refused.items()]
    lines += _repeated(repeated_modules(model, found))
    for name, count in infinite_tensors(model).items():
        if name.rpartition(".")[0] in refused:
            continue
        text = f"holds {count:,} infinite values (a mask?), which travel unchanged"
        lines.append(Finding("note", name, text))
    lines += _reserved(model)
    if any(is_known(p.method) for decision in found for p in decision.plans.values()):
        text = f"gradients written by hand; {FALLBACKS}, which are slower"
        lines.append(Finding("ok", "speed", text))
    if not any(line.level == "attention" for line in lines):
        lines += _converting(model, config)
    return lines


def _variance(model: nn.Module, config: FedParaConfig) -> Iterator[Finding]:
    """Say what ``variance="auto"`` has found, unless no fresh weight is drawn."""
    if config.variance != "auto" or config.base == "frozen" or config.init == "fit":
        return
    norm = first_norm(model)
    if norm is None:
        text = "auto: no norm layer, so fresh weights of linear layers and convolutions start as"
        text += " 2 / fan-in (He)"
    else:
        text = f"auto: {norm!r} is a norm layer, so fresh weights start as their kind does"
    yield Finding("ok", "variance", text)


def _about_layer(decision: LayerDecision, config: FedParaConfig) -> Iterator[Finding]:
    for weight, plan in decision.plans.items():
        saved = f"{plan.shared_parameters:,} of {prod(plan.shape):,} entries travel"
        form = "frozen, with an update by " if plan.residual else ""
        text = f"{form}{plan.method.name} of rank {plan.rank}: {saved}"
        if weight in decision.own_starts:
            kept = decision.own_starts[weight]
            text += f"; its own standard deviation of {kept:.3g} is kept, far from its kind's"
        if not (is_known(plan.method) or plan.adds_products):
            text += f"; {SLOWER}"
        yield Finding("ok", full_name(decision.name, weight), text)
    for weight, reason in decision.reasons.items():
        advice = _advice(decision, config)
        text = f"stays dense: {reason}" + (f"; {advice}" if advice else "")
        yield Finding("note", full_name(decision.name, weight) or "(model)", text)


def _advice(decision: LayerDecision, config: FedParaConfig) -> str:
    """Return what to do about a layer that stays dense; empty if there is nothing to gain."""
    layer = decision.layer
    if isinstance(layer, (ParametrizationList, ScriptModule)) or trains_for_quantisation(layer):
        return ""
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) and type(layer) not in layers():
        return "nn.LSTM and nn.GRU have a kind; for this one a plugin can register its own"
    if type(layer) in layers() or config.for_layer(decision.name).method == "none":
        return ""
    dense = next((kind for kind in layers() if isinstance(layer, kind)), None)
    if dense is not None:
        return (
            f"it is a subclass of {dense.__name__} and may compute something else: if it does "
            f"not, register a kind for it in a plugin"
        )
    sizes = [p.numel() for p in own_parameters(layer).values() if p is not None and p.ndim >= 2]
    if sum(sizes) >= config.min_size:
        return f"a plugin can register a kind for its {sum(sizes):,} matrix entries"
    return ""


def _repeated(modules: list[list[str]]) -> Iterator[Finding]:
    for names in modules:
        yield Finding(
            "attention",
            names[0],
            f"the same module stands at {', '.join(names[1:])} too: give each place a module of "
            f"its own (copy.deepcopy), or exclude {', '.join(names)}",
        )


def _reserved(model: nn.Module) -> Iterator[Finding]:
    if RESERVED_NAME in model.state_dict():
        yield Finding("attention", RESERVED_NAME, f"{RESERVED_TEXT}")


def _converting(model: nn.Module, config: FedParaConfig) -> Iterator[Finding]:
    """Yield the errors and warnings of `convert`, which checks more than single layers."""
    if any(isinstance(layer, FactorisedLayer) for layer in model.modules()):
        yield Finding("ok", "(model)", "is already converted")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = convert(model, config)
        except ConversionError as error:
            yield Finding("attention", "(model)", str(error).partition("\n")[0])
    if fitted := fit_summary(fit_errors(model)):
        yield Finding("ok", "(model)", fitted)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            yield Finding("note", "(model)", str(warning.message))


def check_training(model: nn.Module, optimizer: Optimizer) -> list[Finding]:
    """Check whether an optimizer trains a converted model; see `check_optimizer`."""
    if not any(isinstance(layer, FactorisedLayer) for layer in model.modules()):
        text = "its model is not converted: call fedpara_plugins.convert() before you create it"
        return [Finding("attention", "optimizer", text)]
    try:
        check_optimizer(model, optimizer)
    except ConversionError as error:
        return [Finding("attention", "optimizer", str(error))]
    return [Finding("ok", "optimizer", f"{type(optimizer).__name__} holds the model's factors")]
