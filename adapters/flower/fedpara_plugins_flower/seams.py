"""Every undocumented part of Flower that the adapter uses, in one place.

No other module of the adapter imports anything but ``flwr.app``, ``flwr.clientapp``,
``flwr.serverapp`` and ``flwr.serverapp.strategy``. Each entry states what it
relies on (*Stands on*), why no public way serves (*Not public*), and in which releases of Flower it
was found (*Seen*). Each has a test in ``compat_tests/test_flower_seams.py``, which fails in the
release that changes it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from flwr.app import Message
from flwr.client import mod as legacy_mods
from flwr.clientapp import ClientApp
from flwr.clientapp import mod as mods
from flwr.common import Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

from fedpara_plugins.support import parent_of, shortened, started_at

__all__ = [
    "CLIPPING_MODS",
    "CLIPPING_NORM",
    "ERROR_END",
    "EVALUATE_METRICS",
    "EXAMPLES",
    "FLOWER_LOGGER",
    "GET_PARAMETERS",
    "LEGACY_EXAMPLES",
    "LEGACY_REPLIES",
    "LEGACY_REQUESTS",
    "LOCAL_DP_MODS",
    "MOD_FAILED",
    "NORM_BIT",
    "NUMPY",
    "SCALAR_ERROR",
    "SECAGG_CONFIGS",
    "SECAGG_MASKED",
    "SECAGG_STAGE",
    "Parameters",
    "change_class",
    "checked_replies",
    "forward_grid",
    "guard_pulling",
    "is_legacy",
    "mods_of",
    "ndarrays_to_parameters",
    "parameters_to_ndarrays",
    "reachable_functions",
    "replaced_methods",
    "round_of",
    "running_app",
    "seen_components",
    "strategy_attributes",
    "superlink_of_this_process",
    "supernode_of_this_process",
    "unreadable",
    "wrap_strategy_start",
    "wrap_unmask_stage",
]

Method = Callable[..., Any]
A = TypeVar("A")

# Apps ---------------------------------------------------------------------------------------------


def change_class(app: A, subclass: type[A]) -> A:
    """Make an existing app an instance of a subclass of its class, and return it.

    Stands on: apps are ordinary objects without slots, and engines run one by calling it.
    Not public: a ServerApp has no mods, and an app that wraps another would lose its decorators.
    Seen: flwr 1.22 to 1.42.
    """
    app.__class__ = subclass
    return app


def mods_of(app: ClientApp) -> Sequence[Any]:
    """Return the mods that an app was made with.

    Stands on: ``ClientApp._mods``.
    Not public: mods are arguments of the constructor, and nothing lists them afterwards.
    Seen: flwr 1.22 to 1.42.
    """
    return tuple(getattr(app, "_mods", None) or ())


@contextlib.contextmanager
def seen_components(app: ServerApp, see: Callable[[Any], None]) -> Iterator[None]:
    """Call a function with the components that a legacy app makes while this context is open.

    Stands on: ``ServerApp._server_fn``, which returns `ServerAppComponents` when the app runs.
    Not public: the function is an argument of the constructor.
    Seen: flwr 1.22 to 1.42.
    """
    original = getattr(app, "_server_fn", None)
    if original is None:
        yield
        return

    def server_fn(context: Any) -> Any:
        components = original(context)
        see(components)
        return components

    app._server_fn = server_fn
    try:
        yield
    finally:
        app._server_fn = original


def running_app() -> ClientApp | ServerApp | None:
    """Return the app in whose call the caller runs; None outside of apps.

    Stands on: both classes' ``__call__`` name the app ``self`` and call the user's function.
    Not public: no function tells which app is running.
    Seen: flwr 1.22 to 1.42.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        app = frame.f_locals.get("self")
        if isinstance(app, ClientApp | ServerApp):
            return app
        frame = frame.f_back
    return None


FLOWER_LOGGER = "flwr"
"""Name of the only logger that Flower shows, with its children.

Stands on: ``flwr.common.logger.LOGGER_NAME`` (from 1.38 on in ``flwr.supercore.logger``).
Not public: Flower documents a function ``log`` and no place for others' loggers.
Seen: flwr 1.22 to 1.42.
"""

# Mods ---------------------------------------------------------------------------------------------


def reachable_functions(call_next: Method) -> Iterator[Any]:
    """Yield all callables in a chain of mods: the mods after the current one, and the app.

    Stands on: ``make_ffn`` nests closures, so that each holds the next function and its mod.
    Not public: a mod gets one function, and no list of what is in it.
    Seen: flwr 1.22 to 1.42.
    """
    waiting: list[Any] = [call_next]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        if id(function) not in seen:
            seen.add(id(function))
            yield function
            waiting += [inner for inner in _enclosed(function) if callable(inner)]


def _enclosed(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            yield cell.cell_contents
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    if hasattr(function, "__wrapped__"):
        yield function.__wrapped__


CLIPPING_MODS: tuple[Any, ...] = tuple(
    getattr(home, name)
    for home in (mods, legacy_mods)
    for name in ("fixedclipping_mod", "adaptiveclipping_mod")
)
"""Flower's mods that clip what a client sends, of the Message API and of the legacy one.

Stands on: ``flwr.client.mod`` has functions of its own under the names of ``flwr.clientapp.mod``.
Not public: the legacy ones are exported there alone.
Seen: flwr 1.22 to 1.42.
"""

LOCAL_DP_MODS: tuple[type[Any], ...] = (mods.LocalDpMod, legacy_mods.LocalDpMod)
"""Flower's mods of local differential privacy, of the Message API and of the legacy one.

Stands on, not public, seen: as `CLIPPING_MODS`.
"""

CLIPPING_NORM = "clipping_norm"
"""Key of the config record under which a strategy sends clients the bound of their updates.

Stands on: ``KEY_CLIPPING_NORM`` of Flower's differential privacy.
Not public: strategies and mods share it among themselves.
Seen: flwr 1.22 to 1.42.
"""

NORM_BIT = "norm_bit"
"""Key of a reply's metric that the strategy of adaptive clipping on clients reads first.

Stands on: ``KEY_NORM_BIT`` of Flower's differential privacy.
Not public: as `CLIPPING_NORM`.
Seen: flwr 1.22 to 1.42.
"""

MOD_FAILED: int = ErrorCode.MOD_FAILED_PRECONDITION
"""Code of the error reply of a mod of Flower's that cannot work on a message.

Stands on: ``flwr.common.constant.ErrorCode``.
Not public: `flwr.app.Error` documents a code and not which there are.
Seen: flwr 1.22 to 1.42.
"""

# Messages -----------------------------------------------------------------------------------------

NUMPY = "numpy.ndarray"
"""Serialisation type of an array that NumPy reads; any other is named in the error of reading it.

Stands on: ``flwr.common.constant.SType.NUMPY``.
Not public: the attribute ``Array.stype`` is, its values are not.
Seen: flwr 1.22 to 1.42.
"""

EXAMPLES, LEGACY_EXAMPLES = "num-examples", "num_examples"
"""Metrics by which strategies weigh clients by default; the second is the legacy API's.

Stands on: the default of ``FedAvg.weighted_by_key``, and ``recorddict_compat``.
Not public: the first is only a default, the second only on the wire.
Seen: flwr 1.22 to 1.42.
"""

SCALAR_ERROR = "Invalid arguments for Array"
"""Beginning of the error of a strategy that makes an array of a NumPy scalar.

Stands on: the text of ``Array``'s TypeError; FedAdam and others run into it up to 1.27.
Not public: the error has no type of its own.
Seen: flwr 1.22 to 1.42.
"""


ERROR_END = "'>"
"""End of the reason in the error reply to an exception, after the exception's text.

Stands on: both engines make it as ``"<class ...>:<'...'>"``.
Not public: `flwr.app.Error` has one text.
Seen: flwr 1.22 to 1.42.
"""


def round_of(message: Message) -> int | None:
    """Return the round that a message to a client belongs to; None if it does not say.

    Stands on: strategies write ``server-round`` into a config record, legacy ones the group's id.
    Not public: a message has no field for the round.
    Seen: flwr 1.22 to 1.42.
    """
    for record in message.content.config_records.values():
        if "server-round" in record:
            return int(str(record["server-round"]))
    group = message.metadata.group_id
    return int(group) if group and group.isdecimal() else None


def forward_grid(subclass: type[Any], inner: str) -> None:
    """Let a subclass of Grid hand all public methods on to the Grid in the attribute ``inner``.

    Stands on: the public names in ``vars(Grid)``, and ``__abstractmethods__`` of an ABC.
    Not public: which methods a Grid has depends on the release (``get_nodes`` from 1.38 on).
    Seen: flwr 1.22 to 1.42.
    """
    for name, method in vars(Grid).items():
        if not name.startswith("_"):
            is_property = isinstance(method, property)
            setattr(subclass, name, _forwarder(name, inner, is_property=is_property))
    subclass.__abstractmethods__ = frozenset()


def _forwarder(name: str, inner: str, *, is_property: bool) -> Any:
    if is_property:
        return property(lambda self: getattr(getattr(self, inner), name))
    return lambda self, *args, **kwargs: getattr(getattr(self, inner), name)(*args, **kwargs)


UNREADABLE = "_fedpara_unreadable"
"""Attribute of a message that stands for one that could not be read: why."""

TRANSPORTS = {"grpc", "httpx", "httpcore"}


def guard_pulling(grid: Grid) -> bool:
    """Let a reply that a Grid cannot read become an error reply of its node, once a process.

    Stands on: ``pull_messages`` of the Grids of a deployment calls the functions ``pull_objects``
    and ``inflate_object_from_contents`` of its module for each entry ``msg_proto`` of the
    SuperLink's answer, whose metadata the SuperLink has checked; and ``make_message``, ``Metadata``
    and ``Error`` there.
    Not public: an exception in the middle ends the call, and with it all replies of the round.
    Seen: flwr 1.22 (``flwr.server.grid.grpc_grid``) to 1.42 (``flwr.superlink.grid.http_grid``).

    Returns:
        Whether this Grid is guarded now; one that takes nothing apart needs no guard.
    """
    owner = next((each for each in type(grid).__mro__ if "pull_messages" in vars(each)), None)
    module: Any = sys.modules.get(getattr(owner, "__module__", ""))
    needed = ("pull_objects", "inflate_object_from_contents", "make_message", "Metadata", "Error")
    if not all(callable(getattr(module, name, None)) for name in needed):
        return False
    _replace_once(module, "pull_objects", _guarded_pull)
    _replace_once(module, "inflate_object_from_contents", functools.partial(_guarded, module))
    return True


def unreadable(message: Message) -> str | None:
    """Return why a reply could not be read; None if it could.

    Stands on: a message has a ``__dict__``.
    Not public, seen: as `guard_pulling`.
    """
    found: str | None = vars(message).get(UNREADABLE)
    return found


class _Unpulled(dict[str, bytes]):
    """The objects of a message that could not be pulled."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _guarded_pull(original: Method) -> Method:
    def pull_objects(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except OSError:
            raise
        except Exception as error:
            if {each.__module__.partition(".")[0] for each in type(error).__mro__} & TRANSPORTS:
                raise
            return _Unpulled(error)

    return pull_objects


def _guarded(module: Any, original: Method) -> Method:
    def inflate_object_from_contents(object_id: str, contents: Any, **kwargs: Any) -> Any:
        asked = sys._getframe(1).f_locals.get("msg_proto")
        try:
            if isinstance(contents, _Unpulled):
                raise contents.error
            message = original(object_id, contents, **kwargs)
            if asked is not None:
                _check_sender(message, asked.metadata)
            return message
        except Exception as error:
            if asked is None:
                raise
            return _unreadable_reply(module, asked.metadata, error)

    return inflate_object_from_contents


def _check_sender(message: Any, metadata: Any) -> None:
    """Raise unless a message says of itself what the SuperLink knows of it."""
    if not isinstance(message, Message):
        raise TypeError(f"expected a Message, got {type(message).__name__}")
    for name in ("reply_to_message_id", "src_node_id"):
        if getattr(message.metadata, name) != getattr(metadata, name):
            raise ValueError(f"{name} is another one than the SuperLink's")


def _unreadable_reply(module: Any, about: Any, error: Exception) -> Message:
    """Return an error in the place of a reply, as the Grid itself makes one for a lost reply."""
    reason = f"Flower cannot read it: {type(error).__name__}: {shortened(str(error), 300)}"
    names = ("run_id", "src_node_id", "dst_node_id", "group_id", "ttl", "message_type")
    known = {name: getattr(about, name) for name in (*names, "reply_to_message_id", "created_at")}
    message: Message = module.make_message(
        metadata=module.Metadata(message_id="", **known),
        error=module.Error(code=ErrorCode.UNKNOWN, reason=reason),
    )
    vars(message)[UNREADABLE] = reason
    return message


# Strategies ---------------------------------------------------------------------------------------


def wrap_strategy_start(wrap: Callable[[Method], Method]) -> None:
    """Replace ``Strategy.start`` for all strategies, once a class.

    Stands on: strategies inherit ``start`` or define it anew, and documented apps call it.
    Not public: only the strategy itself learns of rounds and of what an ``evaluate_fn`` found.
    Seen: flwr 1.22 to 1.42.

    Args:
        wrap: gets the method and returns what stands in its place.
    """
    waiting: list[type[Any]] = [Strategy]
    while waiting:
        owner = waiting.pop()
        waiting += owner.__subclasses__()
        if "start" in vars(owner):
            _replace_once(owner, "start", wrap)


@contextlib.contextmanager
def replaced_methods(strategy: Strategy, methods: Mapping[str, Method]) -> Iterator[None]:
    """Replace methods of one strategy while it runs.

    Stands on: ``Strategy.start`` calls ``configure_train``, ``aggregate_train``,
    ``configure_evaluate`` and ``aggregate_evaluate`` through the object, which has a ``__dict__``.
    Not public: a strategy has no hooks around its rounds.
    Seen: flwr 1.22 to 1.42.
    """
    own = vars(strategy)
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            own.pop(name, None)


def strategy_attributes(strategy: Strategy) -> dict[str, Any]:
    """Return the attributes in which a strategy keeps its settings and its state.

    Stands on: moments, momentum, norms and counters are instance attributes, private ones too.
    Not public: strategies offer no state to save.
    Seen: flwr 1.22 to 1.42.
    """
    return vars(strategy)


def checked_replies(strategy: FedAvg, replies: Iterable[Message]) -> list[Message]:
    """Return a round's replies without errors, checked and logged as FedAvg does it.

    Stands on: ``FedAvg._check_and_log_replies``.
    Not public: ``aggregate_train`` checks and averages in one.
    Seen: flwr 1.22 to 1.42.
    """
    valid: list[Message] = strategy._check_and_log_replies(replies, True)[0]
    return valid


# The legacy API -----------------------------------------------------------------------------------

GET_PARAMETERS = "get_parameters"
"""Type of the message that asks one client for the first weights.

Stands on: ``MessageTypeLegacy.GET_PARAMETERS``.
Not public: the shim of the legacy API makes such messages by itself.
Seen: flwr 1.22 to 1.42.
"""

LEGACY_REQUESTS = {"train": "fitins.parameters", "evaluate": "evaluateins.parameters"}
"""Name of the record of arrays in a legacy message to a client, by the message's type.

Stands on: ``recorddict_compat`` (in ``flwr.common``, from 1.32 on in ``flwr.compat.common``).
Not public: apps of the legacy API see lists, and never the records.
Seen: flwr 1.22 to 1.42.
"""

LEGACY_REPLIES = {"train": "fitres.parameters", GET_PARAMETERS: "getparametersres.parameters"}
"""The same for a client's reply; see `LEGACY_REQUESTS`.

Stands on, not public, seen: as `LEGACY_REQUESTS`.
"""

EVALUATE_METRICS = "evaluateres.metrics"
"""Record of the metrics in a legacy client's reply to an evaluation.

Stands on, not public, seen: as `LEGACY_REQUESTS`.
"""


def is_legacy(message: Message) -> bool:
    """Return whether a message to a client comes from a strategy of the legacy API.

    Stands on, not public, seen: as `LEGACY_REQUESTS`.
    """
    begins = ("fitins.", "evaluateins.", "getparametersins.", "getpropertiesins.")
    return any(name.startswith(begins) for name in message.content)


# `Parameters`, `ndarrays_to_parameters`, `parameters_to_ndarrays`: arrays of legacy strategies.
#
# Stands on: ``flwr.common``.
# Not public: documented there alone, and moving (``flwr.compat`` in 1.42).
# Seen: flwr 1.22 to 1.42.

# Processes ----------------------------------------------------------------------------------------

SUPERNODE, SUPERLINK = "flower-supernode", "flower-superlink"


def supernode_of_this_process() -> tuple[int, str] | None:
    """Return the SuperNode for which this process runs a ClientApp: its id, and its SuperLink.

    Stands on: ``flower-supernode`` starts, directly or through ``flower-superexec``, the process of
    each message; the command's option ``--superlink``, and ``/proc``.
    Not public: a ClientApp is told of neither.
    Seen: flwr 1.42.

    Returns:
        None if no ancestor is one, or the platform does not say.
    """
    found = _ancestor(SUPERNODE)
    return None if found is None else (found[0], _option(found[1], "--superlink"))


def superlink_of_this_process() -> str:
    """Return a name of the SuperLink for which this process runs a ServerApp; "" if unknown.

    Stands on: ``flower-superlink`` starts, directly or through ``flower-superexec``, the process of
    each run; and ``/proc``.
    Not public: a ServerApp is not told of it, nor of other runs.
    Seen: flwr 1.42.
    """
    found = _ancestor(SUPERLINK)
    return "" if found is None else f"{found[0]}-{started_at(found[0])}"


def _ancestor(program: str) -> tuple[int, list[str]] | None:
    """Return the id and the command line of the process of a program that has started this one."""
    pid = parent_of(os.getpid())
    while pid is not None and pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return None
        if any(Path(word).name == program for word in words[:3]):
            return pid, words
        pid = parent_of(pid)
    return None


def _option(words: Sequence[str], name: str) -> str:
    for place, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and place + 1 < len(words):
            return words[place + 1]
    return ""


# Secure aggregation -------------------------------------------------------------------------------

SECAGG_CONFIGS, SECAGG_STAGE, SECAGG_MASKED = "secaggplus_configs", "stage", "masked_params"
"""The record that makes a message one of SecAgg+, and two of its keys: the stage, masked numbers.

Stands on: ``flwr.common.secure_aggregation.secaggplus_constants``.
Not public: ``secaggplus_mod`` and the workflow share them among themselves.
Seen: flwr 1.22 to 1.42.
"""


def wrap_unmask_stage(wrap: Callable[[Method], Method]) -> None:
    """Replace ``SecAggPlusWorkflow.unmask_stage(self, grid, context, state)``, once a process.

    Stands on: that method hands the unmasked sum to ``context.strategy.aggregate_fit``, in one
    object of `Parameters` for all results.
    Not public: the workflow gives the sum to the strategy alone.
    Seen: flwr 1.22 to 1.42.

    Args:
        wrap: gets the method and returns what stands in its place.
    """
    from flwr.server.workflow import SecAggPlusWorkflow  # the legacy server is loaded for it

    _replace_once(SecAggPlusWorkflow, "unmask_stage", wrap)


def _replace_once(owner: type[Any], name: str, wrap: Callable[[Method], Method]) -> None:
    original = getattr(owner, name)
    if hasattr(original, "_fedpara_wrapped"):
        return
    replacement: Any = functools.wraps(original)(wrap(original))
    replacement._fedpara_wrapped = True
    setattr(owner, name, replacement)
