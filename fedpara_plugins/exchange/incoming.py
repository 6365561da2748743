"""One record of a message to a client: decoded, checked against its model, and completed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

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


@dataclass(eq=False)
class ReceivedRecord:
    """One record of a message, decoded.

    Attributes:
        spec: of the model that it belongs to; without private names for a side record.
        held: as it was received.
        private: the client's private tensors.
        fresh: the private ones are the seeded first ones.
        trains_dense: whether the client trains an ordinary model.
        frozen: returns the frozen tensors. Apps build their model before they read a message, and
            these may be that model's: so it is called when the whole is first asked for.
    """

    spec: ModelSpec
    held: DecodedDownlink
    private: State = field(default_factory=dict)
    fresh: bool = False
    trains_dense: bool = False
    frozen: Callable[[], State] = dict

    @cached_property
    def full(self) -> State:
        """All tensors: shared ones as received, frozen and private ones of this client.

        Raises:
            LacksFrozenError: nothing here holds the frozen ones.
            MismatchError: this client's own frozen ones differ from the server's.
        """
        if not self.private and not self.spec.frozen:
            return self.held.tensors
        return merge(self.spec, self.held.tensors, {**self.private, **self.frozen()})

    @cached_property
    def dense(self) -> DenseRound | None:
        """The round of an ordinary model, where the client trains one."""
        return DenseRound(self.spec, self.full) if self.trains_dense else None

    @property
    def user_tensors(self) -> State:
        """The tensors for the user's code."""
        return self.full if self.dense is None else self.dense.dense

    @property
    def user_names(self) -> tuple[str, ...]:
        """The names of the tensors for the user's code, in order."""
        return tuple(self.user_tensors) if self.trains_dense else tuple(self.spec.keys)


def read_side(held: DecodedDownlink) -> ReceivedRecord:
    """Return a record beside the model, with its tensors as received."""
    return ReceivedRecord(plain_spec(held.tensors), held)


def read_model(
    held: DecodedDownlink,
    *,
    state: ClientState,
    settings: ExchangeSettings,
    own: OwnModels,
    budget: MessageBudget,
    frozen: Callable[[ModelSpec], State],
) -> ReceivedRecord:
    """Return a model's record, completed with the client's private tensors.

    Args:
        held: as it was received.
        state: what the client keeps.
        settings: of the run.
        own: the client's models, as far as they are known.
        budget: of the message; what the private tensors take is spent.
        frozen: returns the values of the frozen tensors that a spec names.

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
    names = set(spec.keys)
    private = {key: value for key, value in private.items() if key in names}
    received = {**held.tensors, **private}
    if set(received) | set(spec.frozen) != names:
        merge(spec, held.tensors, private)  # raises, and says which names are missing
    if settings.trains_dense:
        log_idle_options(settings.config)
        budget.spend(spec.dense_bytes(received) - tensor_bytes(received))
    return ReceivedRecord(
        spec,
        held,
        private,
        fresh=first and bool(private),
        trains_dense=settings.trains_dense,
        frozen=lambda: frozen(spec),
    )
