"""What a client's own options say about private values, without a model at hand."""

from __future__ import annotations

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import MismatchError
from fedpara_plugins.models.private import matches
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.plugins import method_named

__all__ = ["check_options", "has_private_half", "hides_values", "may_hide_halves", "option_names"]


WRAPPERS = frozenset(
    {"_orig_mod", "module", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""Names under which torch's and Opacus's wrappers hold the model inside of them."""


def has_private_half(method: str) -> bool:
    """Return whether weights of a method have operands that stay on the device.

    Raises:
        ConfigError: there is no such method.
    """
    found = method_named(method)
    return found is not None and bool(found.private)


def own_methods(config: FedParaConfig) -> set[str]:
    """Return the methods that layers may have with these options."""
    if config.method == "none":
        return set()
    others = (dict(options).get("method") for _, options in config.overrides)
    return {config.method, *map(str, filter(None, others))} - {"none"}


def may_hide_halves(config: FedParaConfig) -> bool:
    """Return whether a model converted with these options may have private factors.

    Their names are not known without the model.
    """
    added = config.private_head or config.label_prior
    return added or any(map(has_private_half, own_methods(config)))


def hides_values(name: str, config: FedParaConfig) -> bool:
    """Return whether the option ``private`` names a tensor, as it is or inside of a wrapper."""
    while name:
        if matches(name, config.private):
            return True
        wrapper, _, name = name.partition(".")
        if wrapper not in WRAPPERS:
            return False
    return False


def option_names(config: FedParaConfig) -> str:
    """Return the patterns of the option ``private`` as a user writes them."""
    return ", ".join(config.private)


def check_options(theirs: ModelSpec, config: FedParaConfig) -> None:
    """Raise unless a message's model may come of this client's options.

    Without the client's own model, only methods and names can be compared.

    Args:
        theirs: the message's description.
        config: of this client.

    Raises:
        MismatchError: the server has other options.
    """
    methods = {plan.method.name for plan in theirs.weights.values()}
    own = own_methods(config)
    # A part of a model may have no factorised weight: its own model tells, as soon as it is built.
    lacks_half = bool(methods) and has_private_half(config.method) and not theirs.private_factors
    if not methods <= own or lacks_half:
        raise MismatchError(
            f"the server's model has method {', '.join(sorted(methods)) or 'none'}, this client "
            f"has {', '.join(sorted(own)) or 'none'}. Set the same fedpara options on both sides"
        )
    factors = theirs.shared_shapes()
    for name in theirs.shared_keys:
        if name not in factors and hides_values(name, config):
            raise MismatchError(
                f"the option private differs: this client keeps {name!r}, for the server it is "
                f"shared. Set the same fedpara option private on both sides"
            )
    added = config.private_head or config.label_prior
    for name, tensor in theirs.own.items():
        if not (hides_values(name, config) or (added and tensor.onto)):
            raise MismatchError(
                f"the option private differs: this client shares {name!r}, for the server it is "
                f"private. Set the same fedpara option private on both sides"
            )
