"""One record of a message to a client: decoded, checked against its model, and completed."""

from __future__ import annotations

from dataclasses import dataclass

from fedpara_plugins.exchange.budget import MessageBudget
from fedpara_plugins.exchange.client_state import ClientState
from fedpara_plugins.exchange.dense_round import DenseRound, log_idle_options
from fedpara_plugins.exchange.headers import spec_of
from fedpara_plugins.exchange.own_models import OwnModels
from fedpara_plugins.exchange.records import State, plain_spec
from fedpara_plugins.exchange.settings import ExchangeSettings
from fedpara_plugins.exchange.sizes import tensor_bytes
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_parts import shapes_of
from fedpara_plugins.models.state_split import merge
from fedpara_plugins.references import DecodedDownlink

__all__ = ["ReceivedRecord", "read_model", "read_side"]


@dataclass(frozen=True)
class ReceivedRecord:
    """One record of a message, decoded.

    Attributes:
        spec: of the model that it belongs to; without private names for a side record.
        held: as it was received.
        full: all tensors: shared ones as received, private ones of this client.
        fresh: the private ones are the seeded first ones.
        dense: the round of an ordinary model, where the client trains one.
    """

    spec: ModelSpec
    held: DecodedDownlink
    full: State
    fresh: bool = False
    dense: DenseRound | None = None

    @property
    def user_tensors(self) -> State:
        """The tensors for the user's code."""
        return self.full if self.dense is None else self.dense.dense


def read_side(held: DecodedDownlink) -> ReceivedRecord:
    """Return a record beside the model, with its tensors as received."""
    return ReceivedRecord(plain_spec(held.tensors), held, held.tensors)


def read_model(
    held: DecodedDownlink,
    *,
    state: ClientState,
    settings: ExchangeSettings,
    own: OwnModels,
    budget: MessageBudget,
) -> ReceivedRecord:
    """Return a model's record, completed with the client's private tensors.

    Args:
        held: as it was received.
        state: what the client keeps.
        settings: of the run.
        own: the client's models, as far as they are known.
        budget: of the message; what the private tensors take is spent.

    Raises:
        MismatchError: the server's model differs from this client's, or from its options.
        ConfigError: the client holds private state of what the run would share.
        TooLargeError: private or composed tensors would be larger than the budget.
        PayloadError: the message describes no model, or not that of its tensors.
    """
    theirs = spec_of(held.header, held.tensors, limit=budget.left)
    spec = own.agreed(theirs, shapes_of(held.tensors))
    state.check_still_private(spec)
    budget.spend(spec.private_bytes)
    private, first = state.private(spec, held.tensors)
    # An app may send the shared factors of a weight alone.
    private = {key: value for key, value in private.items() if key in set(spec.keys)}
    full = merge(spec, held.tensors, private)
    dense = None
    if settings.trains_dense:
        log_idle_options(settings.config)
        budget.spend(spec.dense_bytes(full) - tensor_bytes(full))
        dense = DenseRound(spec, full)
    return ReceivedRecord(spec, held, full, first and bool(private), dense)
