"""All that the adapter uses of Flower without Flower documenting it: one test an entry of `seams`.

A failure here says what another release of Flower has changed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import flwr.serverapp.strategy as strategies
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord
from flwr.app import RecordDict as Content
from flwr.clientapp import ClientApp
from flwr.clientapp import mod as mods
from flwr.common import FitIns, FitRes, GetParametersIns
from flwr.common.secure_aggregation import secaggplus_constants
from flwr.server import ServerAppComponents
from flwr.server.compat import grid_client_proxy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

import fedpara_plugins_flower
from fedpara_plugins_flower import seams
from harness.flower.inprocess_grid import InProcessGrid
from harness.flower.pulling_grid import MODULE, PullingGrid

FOLDER = Path(seams.__file__).parent
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")
ARRAYS = ArrayRecord({"w": Array(np.ones(2, dtype=np.float32))})
METRICS = {"num-examples": 1}

legacy: Any = grid_client_proxy.compat
"""The conversion between the legacy API's classes and records; its place has changed once."""


def serve(main: Callable[[Any], Any], client: ClientApp | None = None) -> Any:
    """Run a function in a ServerApp, with a Grid of one client."""
    app, found = ServerApp(), []

    @app.main()
    def run(grid: Any, context: Any) -> None:
        found.append(main(grid))

    InProcessGrid(lambda: client or answering(), nodes=1).serve(app)
    return found[0]


def answering(*client_mods: Any) -> ClientApp:
    """A client that sends back what it gets."""
    app = ClientApp(mods=list(client_mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = Content({"arrays": ARRAYS, "metrics": MetricRecord(METRICS)})
        return Message(content, reply_to=message)

    return app


def message(grid: Any, content: Content, **more: Any) -> Message:
    return Message(content, next(iter(grid.get_node_ids())), "train", **more)


def configured(strategy: Strategy, grid: Any, number: int = 1) -> list[Message]:
    return list(strategy.configure_train(number, ARRAYS, ConfigRecord(), grid))


def fedavg() -> FedAvg:
    return FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)


def kinds() -> list[type[Strategy]]:
    found = [getattr(strategies, name) for name in strategies.__all__]
    return [kind for kind in found if issubclass(kind, Strategy)]


# What stands in seams ----------------------------------------------------------------------------


def _entries() -> dict[str, str]:
    """The description of each entry."""
    found: dict[str, str] = {}
    body = ast.parse(Path(seams.__file__).read_text()).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_docstring(node) or ""
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            for name in [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]:
                found[name] = str(after.value.value)
    return found


IMPORTED = ("Parameters", "ndarrays_to_parameters", "parameters_to_ndarrays")


def test_every_entry_says_what_it_stands_on_and_where_it_was_seen() -> None:
    entries = _entries()
    for name in set(seams.__all__) - set(IMPORTED):
        text = entries[name].lower()
        assert all(part in text for part in ("stands on", "not public", "seen")), name
    for name in IMPORTED:
        assert f"# `{name}`" in Path(seams.__file__).read_text() or name != IMPORTED[0]


def test_every_entry_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [name for name in seams.__all__ if f"seams.{name}" not in text] == []


def test_nothing_else_imports_what_is_not_public() -> None:
    """Public is what these four modules export; ``flwr.common`` and deeper modules are not."""
    for path in FOLDER.rglob("*.py"):
        if path.name == "seams.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "flwr" for alias in node.names), path
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
                assert node.module in PUBLIC, f"{path}: {node.module}"
                exported = import_module(node.module).__all__
                assert {alias.name for alias in node.names} <= set(exported), path


@pytest.mark.parametrize("name", ["_mods", "_check_and_log_replies", "__closure__", "f_locals"])
def test_private_attributes_are_used_in_seams_alone(name: str) -> None:
    assert [path.name for path in FOLDER.rglob("*.py") if name in _names(path)] == ["seams.py"]


def _names(path: Path) -> set[str]:
    """The attributes that a file reads, by name or by ``getattr``."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {str(node.value) for node in nodes if isinstance(node, ast.Constant)}


def test_the_old_name_of_the_settings_warns() -> None:
    with pytest.warns(DeprecationWarning, match="FlowerSettings"):
        old = fedpara_plugins_flower.Settings
    assert old is fedpara_plugins_flower.FlowerSettings


# Apps --------------------------------------------------------------------------------------------


def test_an_app_can_become_an_instance_of_a_subclass() -> None:
    called: list[str] = []
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        called.append("main")

    class Sub(ServerApp):
        def __call__(self, grid: Grid, context: Context) -> None:
            called.append("sub")
            super().__call__(grid, context)

    assert seams.change_class(app, Sub) is app
    InProcessGrid(answering, nodes=1).serve(app)
    assert called == ["sub", "main"]


def test_the_mods_of_an_app() -> None:
    assert seams.mods_of(ClientApp()) == ()
    assert seams.mods_of(answering(mods.message_size_mod)) == (mods.message_size_mod,)


def test_the_components_of_a_legacy_app() -> None:
    class StopError(Exception):
        pass

    made = ServerAppComponents()
    app, seen = ServerApp(server_fn=lambda context: made), []

    def see(components: Any) -> None:
        seen.append(components)
        raise StopError

    with pytest.raises(StopError), seams.seen_components(app, see):
        app(None, None)
    assert seen == [made]
    with seams.seen_components(ServerApp(), see):
        pass


def test_the_app_that_runs() -> None:
    found: list[Any] = []
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        found.append(seams.running_app())
        return Message(Content(), reply_to=message)

    def main(grid: Any) -> Any:
        found.append(seams.running_app())
        grid.send_and_receive([message(grid, Content())])

    serve(main, client)
    assert isinstance(found[0], ServerApp)
    assert found[1] is client
    assert seams.running_app() is None


def test_the_logger_that_flower_shows() -> None:
    module = import_module("flwr.common.logger")
    assert module.LOGGER_NAME == seams.FLOWER_LOGGER
    assert logging.getLogger(seams.FLOWER_LOGGER).handlers


# Mods --------------------------------------------------------------------------------------------


def test_a_chain_of_mods_shows_its_functions() -> None:
    found: list[Any] = []

    def first(message: Message, context: Context, call_next: Any) -> Message:
        found.extend(seams.reachable_functions(call_next))
        reply: Message = call_next(message, context)
        return reply

    def inner(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        return reply

    @functools.wraps(inner)
    def outer(*args: Any) -> Message:
        return inner(*args)

    local = mods.LocalDpMod(1.0, 1.0, 1.0, 0.1)
    partial = functools.partial(outer)
    client = answering(first, partial, mods.fixedclipping_mod, local)
    serve(lambda grid: grid.send_and_receive([message(grid, Content())]), client)
    for wanted in (partial, inner, mods.fixedclipping_mod, local):
        assert any(each is wanted for each in found)
    assert any(getattr(each, "__name__", "") == "train" for each in found)


def test_clipping_mods() -> None:
    from flwr.client import mod as old

    names = [each.__name__ for each in seams.CLIPPING_MODS]
    assert names == ["fixedclipping_mod", "adaptiveclipping_mod"] * 2
    assert set(seams.CLIPPING_MODS) == {
        *(mods.fixedclipping_mod, mods.adaptiveclipping_mod),
        *(old.fixedclipping_mod, old.adaptiveclipping_mod),
    }
    assert (mods.LocalDpMod, old.LocalDpMod) == seams.LOCAL_DP_MODS


def test_client_side_clipping_sends_the_bound_and_reads_the_bit() -> None:
    fixed = strategies.DifferentialPrivacyClientSideFixedClipping(fedavg(), 0.01, 0.5, 1)
    adaptive = strategies.DifferentialPrivacyClientSideAdaptiveClipping(fedavg(), 0.01, 1)

    def main(grid: Any) -> None:
        for strategy in (fixed, adaptive):
            for sent in configured(strategy, grid):
                (record,) = sent.content.config_records.values()
                assert seams.CLIPPING_NORM in record
        sent = list(grid.send_and_receive(configured(adaptive, grid)))
        with pytest.raises(BaseException, match=seams.NORM_BIT):  # in 1.22 no Exception
            adaptive.aggregate_train(1, sent)

    serve(main)


def test_a_mod_that_cannot_work_answers_with_its_code() -> None:
    def main(grid: Any) -> Error:
        content = Content({"a": ARRAYS, "b": ARRAYS, "config": ConfigRecord()})
        (reply,) = grid.send_and_receive([message(grid, content)])
        error: Error = reply.error
        return error

    assert serve(main, answering(mods.fixedclipping_mod)).code == seams.MOD_FAILED


# Messages ----------------------------------------------------------------------------------------


def test_the_serialisation_of_arrays() -> None:
    assert Array(np.ones(2)).stype == seams.NUMPY
    with pytest.raises(Exception, match="named here"):
        Array(dtype="float32", shape=(), stype="named here", data=b"").numpy()


def test_the_metrics_that_count_examples() -> None:
    assert FedAvg().weighted_by_key == seams.EXAMPLES
    content = legacy.fitres_to_recorddict(_fit_res(), keep_input=True)
    (counts,) = content.metric_records.values()
    assert dict(counts) == {seams.LEGACY_EXAMPLES: 7}


def test_the_error_of_an_array_of_a_scalar() -> None:
    with pytest.raises(TypeError, match=f"^{seams.SCALAR_ERROR}"):
        Array(np.float64(1.0))


@pytest.mark.parametrize(
    "module",
    ["flwr.supernode.runtime.run_clientapp", "flwr.server.superlink.fleet.vce.vce_api"],
)
def test_the_text_of_a_client_s_exception(module: str) -> None:
    found = find_spec(module)
    assert found is not None
    assert found.origin is not None
    line = f"""reason = str(type(ex)) + ":<'" + str(ex) + "{seams.ERROR_END}\""""
    assert line in Path(found.origin).read_text()


def test_the_round_of_a_message() -> None:
    def main(grid: Any) -> None:
        assert [seams.round_of(sent) for sent in configured(fedavg(), grid, 3)] == [3]
        assert seams.round_of(message(grid, Content())) is None
        assert seams.round_of(_legacy_fit(grid, 5)) == 5

    serve(main)


def test_a_grid_that_forwards() -> None:
    class Forwarding(Grid):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

    seams.forward_grid(Forwarding, "inner")
    names = [name for name in vars(Grid) if not name.startswith("_")]
    assert {"push_messages", "pull_messages", "send_and_receive", "get_node_ids"} <= set(names)
    answers = {
        name: name if isinstance(vars(Grid)[name], property) else (lambda *_, _n=name, **__: _n)
        for name in names
    }
    grid: Any = Forwarding(SimpleNamespace(**answers))  # type: ignore[abstract]
    for name in names:
        found = getattr(grid, name)
        assert (found if isinstance(found, str) else found(1, x=2)) == name


def test_a_transport_that_fails_is_no_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the SuperLink is out of reach, the Grid's own error is right."""
    failure: list[Exception] = []

    def pull_objects(object_ids: list[str]) -> None:
        raise failure[0]

    module: Any = ModuleType("grid_of_a_deployment")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(
        {name: getattr(MODULE, name) for name in ("make_message", "Metadata", "Error")},
        pull_objects=pull_objects,
        inflate_object_from_contents=lambda key, contents: contents[key],
    )
    pulling = {"__module__": module.__name__, "pull_messages": None}
    assert seams.guard_pulling(type("Grid", (), pulling)())  # type: ignore[arg-type]
    for name in ("httpx", "grpc._channel"):
        kind = type("Failure", (Exception,), {"__module__": name})
        failure[:] = [kind("refused")]
        with pytest.raises(kind):
            module.pull_objects(["a"])
    failure[:] = [ConnectionResetError()]
    with pytest.raises(ConnectionResetError):
        module.pull_objects(["a"])
    failure[:] = [ValueError("no such object")]
    with pytest.raises(ValueError, match="no such object"):  # nothing says whose reply it is
        module.inflate_object_from_contents("a", module.pull_objects(["a"]))


def test_a_grid_that_pulls_object_by_object() -> None:
    """What becomes of such replies: `test_flower_unreadable_replies.py`."""
    inner = InProcessGrid(answering, nodes=1)

    def main(grid: Any) -> list[str | None]:
        found = []
        for content in (None, b"junk"):
            pulling = PullingGrid(inner, lambda reply, objects: _spoil(reply, objects, content))  # noqa: B023
            assert seams.guard_pulling(pulling)
            (reply,) = pulling.send_and_receive([message(inner, Content({"arrays": ARRAYS}))])
            found.append(seams.unreadable(reply))
            assert reply.has_error() == (content is not None)
        return found

    honest, changed = serve(main)
    assert honest is None
    assert changed.startswith("Flower cannot read it: ")


def _spoil(reply: Message, objects: dict[str, bytes], content: bytes | None) -> None:
    if content is not None:
        objects[reply.object_id] = content


def test_a_grid_without_these_functions_is_left_alone() -> None:
    assert not seams.guard_pulling(InProcessGrid(ServerApp, nodes=1))
    assert not seams.guard_pulling(SimpleNamespace())  # type: ignore[arg-type]


# Strategies --------------------------------------------------------------------------------------


def test_all_strategies_inherit_one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    original = inspect.unwrap(Strategy.start)
    assert list(inspect.signature(original).parameters) == [
        *("self", "grid", "initial_arrays", "num_rounds", "timeout"),
        *("train_config", "evaluate_config", "evaluate_fn"),
    ]
    assert all(kind.start is Strategy.start for kind in kinds())
    monkeypatch.setattr(Strategy, "start", original)
    calls: list[int] = []

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def start(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return method(*args, **kwargs)

        return start

    seams.wrap_strategy_start(wrap)
    seams.wrap_strategy_start(wrap)
    serve(lambda grid: fedavg().start(grid=grid, initial_arrays=ARRAYS, num_rounds=1))
    assert calls == [1]


def test_start_calls_the_methods_of_the_object() -> None:
    strategy = fedavg()
    names = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
    calls: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        method = getattr(strategy, name)

        def replaced(*args: Any) -> Any:
            calls.append(name)
            return method(*args)

        return replaced

    before = dict(vars(strategy))
    with seams.replaced_methods(strategy, {name: noted(name) for name in names}):
        serve(lambda grid: strategy.start(grid=grid, initial_arrays=ARRAYS, num_rounds=1))
    assert calls == list(names)
    assert vars(strategy) == before


def test_strategies_keep_their_state_in_attributes() -> None:
    momentum = strategies.FedAvgM(
        server_momentum=0.9, min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0
    )
    before = dict(seams.strategy_attributes(momentum))
    assert before["server_momentum"] == 0.9
    serve(lambda grid: momentum.start(grid=grid, initial_arrays=ARRAYS, num_rounds=1))
    after = seams.strategy_attributes(momentum)
    assert any(after[name] is not before[name] for name in before)
    inner = fedavg()
    outer = strategies.DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 0.5, 1)
    assert inner in seams.strategy_attributes(outer).values()


def test_the_options_of_fedavg_are_its_attributes() -> None:
    strategy = FedAvg(weighted_by_key="size", arrayrecord_key="model")
    assert (strategy.weighted_by_key, strategy.arrayrecord_key) == ("size", "model")
    assert strategy.train_metrics_aggr_fn([], "size") == MetricRecord()


def test_replies_are_checked_as_fedavg_does_it() -> None:
    def main(grid: Any) -> None:
        strategy = fedavg()
        (reply,) = grid.send_and_receive(configured(strategy, grid))
        failed = Message(Error(code=0, reason="no"), reply_to=message(grid, Content()))
        assert seams.checked_replies(strategy, [failed, reply]) == [reply]
        assert seams.checked_replies(strategy, []) == []

    serve(main)


# The legacy API ----------------------------------------------------------------------------------


class Capturing:
    """A Grid that keeps what is sent to it."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
        self.sent += messages
        raise ConnectionError


def _capture(call: Callable[[Any], Any]) -> Message:
    grid: Any = Capturing()
    proxy: Any = grid_client_proxy.GridClientProxy(1, grid, 1)
    with pytest.raises(ConnectionError):
        call(proxy)
    (sent,) = grid.sent
    return sent


def _parameters() -> Any:
    return seams.ndarrays_to_parameters([np.ones(2, dtype=np.float32)])


def _legacy_fit(grid: Any, number: int) -> Message:
    return _capture(lambda proxy: proxy.fit(FitIns(_parameters(), {}), 10.0, number))


def _fit_res() -> FitRes:
    from flwr.common import Code, Status

    return FitRes(Status(Code.OK, ""), _parameters(), 7, {})


def test_the_records_of_legacy_messages() -> None:
    from flwr.common import Code, EvaluateIns, EvaluateRes, GetParametersRes, Status

    status = Status(Code.OK, "")

    def main(grid: Any) -> None:
        fit = _legacy_fit(grid, 1)
        score = _capture(lambda proxy: proxy.evaluate(EvaluateIns(_parameters(), {}), 10.0, 1))
        ask = _capture(lambda proxy: proxy.get_parameters(GetParametersIns({}), 10.0, 1))
        for sent in (fit, score):
            (name,) = sent.content.array_records
            assert seams.LEGACY_REQUESTS[sent.metadata.message_type] == name
        assert ask.metadata.message_type == seams.GET_PARAMETERS
        assert all(map(seams.is_legacy, (fit, score, ask)))
        assert not any(map(seams.is_legacy, configured(fedavg(), grid)))

    serve(main)
    fitted = legacy.fitres_to_recorddict(_fit_res(), keep_input=True)
    assert list(fitted.array_records) == [seams.LEGACY_REPLIES["train"]]
    asked = legacy.getparametersres_to_recorddict(GetParametersRes(status, _parameters()), True)
    assert list(asked.array_records) == [seams.LEGACY_REPLIES[seams.GET_PARAMETERS]]
    scored = legacy.evaluateres_to_recorddict(EvaluateRes(status, 0.5, 7, {"accuracy": 0.9}))
    assert dict(scored.config_records[seams.EVALUATE_METRICS]) == {"accuracy": 0.9}


def test_lists_of_legacy_strategies() -> None:
    lists = [np.ones(2), np.zeros((2, 2))]
    parameters: seams.Parameters = seams.ndarrays_to_parameters(lists)
    for mine, theirs in zip(lists, seams.parameters_to_ndarrays(parameters), strict=True):
        np.testing.assert_array_equal(mine, theirs)


# Secure aggregation ------------------------------------------------------------------------------


def test_the_names_of_secure_aggregation() -> None:
    key = secaggplus_constants.Key
    assert secaggplus_constants.RECORD_KEY_CONFIGS == seams.SECAGG_CONFIGS
    assert (key.STAGE, key.MASKED_PARAMETERS) == (seams.SECAGG_STAGE, seams.SECAGG_MASKED)


def test_the_last_stage_gives_the_sum_to_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    original = inspect.unwrap(SecAggPlusWorkflow.unmask_stage)
    assert list(inspect.signature(original).parameters) == ["self", "grid", "context", "state"]
    assert "context.strategy.aggregate_fit(" in inspect.getsource(original)
    monkeypatch.setattr(SecAggPlusWorkflow, "unmask_stage", original)
    seams.wrap_unmask_stage(lambda method: lambda *args: ("wrapped", method is original, *args))
    seams.wrap_unmask_stage(lambda method: lambda *args: None)
    stage: Any = SecAggPlusWorkflow.unmask_stage
    assert stage("self", "grid", "context", "state")[:2] == ("wrapped", True)


ASKING = """
import os, subprocess, sys
if sys.argv[1:2] != ["inner"]:
    subprocess.run([sys.executable, "-c", os.environ["ASKING"], "inner"], check=True)
else:
    from fedpara_plugins_flower import seams
    print(os.getppid(), seams.supernode_of_this_process(), seams.superlink_of_this_process())
"""


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="asks /proc, which Linux alone has"
)
@pytest.mark.parametrize("name", ["flower-supernode", "another"])
@pytest.mark.parametrize(("words", "link"), [(("--superlink", "a:1"), "a:1"), ((), "")])
def test_the_supernode_of_a_process(
    tmp_path: Path, name: str, words: tuple[str, ...], link: str
) -> None:
    """The process of a message is a child of it, or a child's child."""
    program = tmp_path / name
    program.write_text(ASKING)
    env = {**os.environ, "ASKING": ASKING}
    command = [sys.executable, str(program), *words]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    pid, _, answer = found.strip().partition(" ")
    assert answer == (str((int(pid), link)) if name == "flower-supernode" else "None")
    assert shutil.which("flower-supernode", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="asks /proc, which Linux alone has"
)
def test_the_superlink_of_a_process(tmp_path: Path) -> None:
    """The process of a run is a child of it, or a child's child."""
    program = tmp_path / "flower-superlink"
    program.write_text(ASKING)
    env = {**os.environ, "ASKING": ASKING}
    command = [sys.executable, str(program), "--insecure"]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    pid, supernode, superlink = found.split()
    assert supernode == "None"
    assert re.fullmatch(rf"{pid}-\d+", superlink)
    assert seams.superlink_of_this_process() == ""
    assert shutil.which("flower-superlink", path=str(Path(sys.executable).parent))
