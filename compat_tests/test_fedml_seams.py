"""Every class, function, signature and attribute of FedML that the plugin touches.

FedML 0.9.6 is pinned; a failure here says what another release has changed. Each entry of
`fedpara_plugins_fedml.seams` has a test.
"""

from __future__ import annotations

import ast
import inspect
import logging
import queue
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

from fedml.core import Context
from fedml.cross_silo.server.message_define import MyMessage
from fedml.simulation.sp.fedavg.fedavg_api import FedAvgAPI

import fedpara_plugins_fedml
from fedpara_plugins_fedml import seams

FOLDER = Path(seams.__file__).parent

CALLS = {
    "fedml.runner:FedMLRunner.__init__": (
        "self, args, device, dataset, model, client_trainer, server_aggregator, algorithm_flow"
    ),
    "fedml.runner:FedMLRunner.run": "self",
    "fedml.ml.trainer.trainer_creator:create_model_trainer": "model, args",
    "fedml.ml.aggregator.aggregator_creator:create_server_aggregator": "model, args",
    "fedml.ml.trainer.my_model_trainer_classification:ModelTrainerCLS.train": (
        "self, train_data, device, args"
    ),
    "fedml.ml.trainer.my_model_trainer_nwp:ModelTrainerNWP.train": "self, train_data, device, args",
    "fedml.ml.trainer.my_model_trainer_tag_prediction:ModelTrainerTAGPred.train": (
        "self, train_data, device, args"
    ),
    "fedml.core.alg_frame.client_trainer:ClientTrainer.__init__": "self, model, args",
    "fedml.core.alg_frame.client_trainer:ClientTrainer.set_id": "self, trainer_id",
    "fedml.core.alg_frame.client_trainer:ClientTrainer.update_dataset": (
        "self, local_train_dataset, local_test_dataset, local_sample_number"
    ),
    "fedml.core.alg_frame.client_trainer:ClientTrainer.get_model_params": "self",
    "fedml.core.alg_frame.client_trainer:ClientTrainer.set_model_params": "self, model_parameters",
    "fedml.core.alg_frame.client_trainer:ClientTrainer.on_before_local_training": (
        "self, train_data, device, args"
    ),
    "fedml.core.alg_frame.client_trainer:ClientTrainer.train": "self, train_data, device, args",
    "fedml.core.alg_frame.client_trainer:ClientTrainer.on_after_local_training": (
        "self, train_data, device, args"
    ),
    "fedml.core.alg_frame.client_trainer:ClientTrainer.test": "self, test_data, device, args",
    "fedml.core.alg_frame.server_aggregator:ServerAggregator.set_id": "self, aggregator_id",
    "fedml.core.alg_frame.server_aggregator:ServerAggregator.get_model_params": "self",
    "fedml.core.alg_frame.server_aggregator:ServerAggregator.set_model_params": (
        "self, model_parameters"
    ),
    "fedml.core.alg_frame.server_aggregator:ServerAggregator.on_before_aggregation": (
        "self, raw_client_model_or_grad_list"
    ),
    "fedml.core.alg_frame.server_aggregator:ServerAggregator.aggregate": (
        "self, raw_client_model_or_grad_list"
    ),
    "fedml.core.alg_frame.server_aggregator:ServerAggregator.on_after_aggregation": (
        "self, aggregated_model_or_grad"
    ),
    "fedml.core.alg_frame.server_aggregator:ServerAggregator.test_all": (
        "self, train_data_local_dict, test_data_local_dict, device, args"
    ),
    "fedml.simulation.sp.fedavg.fedavg_api:FedAvgAPI._client_sampling": (
        "self, round_idx, client_num_in_total, client_num_per_round"
    ),
    "fedml.simulation.sp.fedavg.fedavg_api:FedAvgAPI._local_test_on_all_clients": "self, round_idx",
    "fedml.simulation.sp.fedavg.fedavg_api:FedAvgAPI._local_test_on_validation_set": (
        "self, round_idx"
    ),
    "fedml.simulation.sp.fedavg.fedavg_api:FedAvgAPI._generate_validation_set": (
        "self, num_samples"
    ),
    "fedml.core.dp.fedml_differential_privacy:FedMLDifferentialPrivacy.get_instance": "",
    "fedml.core.dp.fedml_differential_privacy:FedMLDifferentialPrivacy.is_local_dp_enabled": "self",
    "fedml.ml.engine.ml_engine_adapter:model_to_device": "args, model_obj, device",
    "fedml.core.distributed.fedml_comm_manager:FedMLCommManager.__init__": (
        "self, args, comm, rank, size, backend"
    ),
    "fedml.core:ClientTrainer": None,
    "fedml.core:Context": None,
    "fedml.core:ServerAggregator.assess_contribution": "self",
    "fedml.cross_silo.server.fedml_aggregator:FedMLAggregator.test_on_server_for_all_clients": (
        "self, round_idx"
    ),
    "fedml.cross_silo.server.fedml_aggregator:FedMLAggregator.assess_contribution": "self",
    "fedml.cross_silo.server.fedml_aggregator:FedMLAggregator.data_silo_selection": (
        "self, round_idx, client_num_in_total, client_num_per_round"
    ),
    "fedml.core.distributed.communication.message:Message": None,
    "fedml.cross_silo.server.message_define:MyMessage": None,
    "fedml.mlops:event": None,
    "fedml.mlops:log_sys_perf": None,
    "fedml.mlops:stop_sys_perf": "",
    "fedml:mlops": None,
    "fedml:FedMLRunner": None,
    "fedml.mlops:log_training_status": None,
    "fedml.mlops:log_aggregation_status": None,
    "fedml.mlops:log_round_info": "total_rounds, round_index",
    "fedml.mlops:log_training_finished_status": None,
    "fedml.mlops:log_aggregation_finished_status": None,
    "fedml.mlops:ClientConstants.MSG_MLOPS_CLIENT_STATUS_TRAINING": None,
    "fedml.mlops:ServerConstants.MSG_MLOPS_SERVER_STATUS_RUNNING": None,
}
"""What is called, and the names of its parameters; None where only its name counts."""

HOLDERS = (
    "fedml",
    "fedml.runner",
    "fedml.launch_simulation",
    "fedml.launch_cross_silo_horizontal",
    "fedml.launch_cross_silo_hi",
    "fedml.launch_cross_cloud",
    "fedml.launch_serving",
)


def found(seam: str) -> Any:
    module, _, path = seam.partition(":")
    thing: Any = import_module(module)
    for name in path.split("."):
        thing = (
            inspect.getattr_static(thing, name) if inspect.isclass(thing) else getattr(thing, name)
        )
    return thing.__func__ if isinstance(thing, staticmethod) else thing


@pytest.mark.parametrize("seam", CALLS)
def test_a_seam_is_where_it_was(seam: str) -> None:
    thing, wanted = found(seam), CALLS[seam]
    if wanted is not None:
        assert ", ".join(inspect.signature(thing).parameters) == wanted


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


def test_every_entry_says_what_it_stands_on() -> None:
    entries, text = _entries(), Path(seams.__file__).read_text()
    for name in seams.__all__:
        if name in entries:
            found = entries[name].lower()
            assert all(part in found for part in ("stands on", "not public")), name
        else:  # imported as it is, and described in a comment
            assert re.search(rf"^# .*`{name}`", text, re.M), name


def test_every_entry_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [name for name in seams.__all__ if f"seams.{name}" not in text] == []


def test_nothing_else_imports_what_is_not_documented() -> None:
    """FedML documents ``fedml`` itself and two classes of ``fedml.core`` that users subclass."""
    for path in FOLDER.rglob("*.py"):
        if path.name == "seams.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("fedml.")]
                assert not names, path
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedml":
                assert node.module == "fedml.core", path
                assert {alias.name for alias in node.names} <= {"ClientTrainer", "ServerAggregator"}


def test_every_import_of_seams_is_guarded_here() -> None:
    tree = ast.parse(Path(seams.__file__).read_text())
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module]
    found = {
        f"{node.module}:{alias.name}"
        for node in imports
        for alias in node.names
        if str(node.module).startswith("fedml")
    }
    guarded = {seam.partition(".__init__")[0] for seam in CALLS}
    unguarded = [
        each
        for each in sorted(found)
        if not any(
            seam == each or seam.startswith((f"{each}.", f"{each.replace(':', '.')}:"))
            for seam in guarded
        )
    ]
    assert len(found) > 10
    assert not unguarded


@pytest.mark.parametrize(
    "name", ["_client_sampling", "_stop_running", "q_receiver", "trpc_servicer", "is_running"]
)
def test_private_attributes_are_used_in_seams_alone(name: str) -> None:
    assert [path.name for path in FOLDER.rglob("*.py") if name in _names(path)] == ["seams.py"]


def _names(path: Path) -> set[str]:
    """The attributes that a file reads, by name or by ``getattr``."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {str(node.value) for node in nodes if isinstance(node, ast.Constant)}


def test_the_old_name_of_the_settings_warns() -> None:
    with pytest.warns(DeprecationWarning, match="FedMLSettings"):
        old = fedpara_plugins_fedml.Settings
    assert old is fedpara_plugins_fedml.FedMLSettings


# The runner, trainers and aggregators ------------------------------------------------------------


def test_an_unknown_optimizer_of_fedml_s_own() -> None:
    source = inspect.getsource(import_module("fedml.simulation.simulator"))
    assert f'raise Exception("{seams.OPTIMIZER_ERROR[0]}")' in source


def test_the_logger_that_fedml_puts_in_the_place_of_the_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = inspect.getsource(import_module("fedml.core.mlops.mlops_runtime_log"))
    assert "logging.root = self.logger" in source
    replaced = logging.Logger("a-path-of-fedml")
    monkeypatch.setattr(logging, "root", replaced)
    assert seams.replaced_root_logger() is replaced
    monkeypatch.undo()
    assert seams.replaced_root_logger() in (None, logging.root)


def test_the_default_trainers() -> None:
    for dataset, kind in {
        "mnist": "ModelTrainerCLS",
        "fed_shakespeare": "ModelTrainerNWP",
        "stackoverflow_nwp": "ModelTrainerNWP",
        "stackoverflow_lr": "ModelTrainerTAGPred",
    }.items():
        trainer = seams.create_model_trainer(nn.Linear(2, 2), SimpleNamespace(dataset=dataset))
        assert type(trainer).__name__ == kind
        assert seams.is_default_trainer(trainer)

    class Own(type(trainer)):  # type: ignore[misc]
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            """Another one."""

    assert not seams.is_default_trainer(Own(nn.Linear(2, 2), SimpleNamespace()))


def test_the_assessment_of_an_aggregator() -> None:
    made = seams.create_server_aggregator(nn.Linear(2, 2), SimpleNamespace(dataset="mnist"))
    assert not seams.assesses_contribution(made)

    class Own(type(made)):  # type: ignore[misc]
        def assess_contribution(self) -> None:
            """Another one."""

    assert seams.assesses_contribution(Own(nn.Linear(2, 2), SimpleNamespace()))
    source = inspect.getsource(seams.FedMLAggregator)
    assert "self.aggregator.assess_contribution()" in source


def test_fedml_averages_under_fedavg_s_name() -> None:
    source = inspect.getsource(import_module("fedml.ml.aggregator.agg_operator"))
    assert 'args.federated_optimizer == "FedAvg"' in source
    args = SimpleNamespace(federated_optimizer="SCAFFOLD")
    with seams.averaging(args):
        assert args.federated_optimizer == "FedAvg"
    assert args.federated_optimizer == "SCAFFOLD"


def test_what_assessments_read() -> None:
    seams.note_silos([3, 1])
    seams.note_client_models([(2.0, {"w": 1})])
    context = Context()
    assert context.get(Context.KEY_CLIENT_ID_LIST_IN_THIS_ROUND) == [3, 1]
    assert context.get(Context.KEY_CLIENT_MODEL_LIST) == [(2.0, {"w": 1})]
    assert not seams.local_dp_is_on()


def test_where_a_model_is_put() -> None:
    layer = nn.Linear(2, 2)
    args = SimpleNamespace(ml_engine="torch")
    seams.model_to_device(args, layer, torch.device("cpu"))
    assert layer.weight.device.type == "cpu"


# Sampling, tests and progress --------------------------------------------------------------------


def test_the_samples_of_a_round() -> None:
    for draw in (seams.sample_clients, seams.sample_silos):
        assert draw(0, 3, 3) == [0, 1, 2]
        drawn = draw(1, 10, 4)
        assert drawn == draw(1, 10, 4)
        assert len(set(drawn)) == 4
        assert set(drawn) < set(range(10))
        assert all(type(index) is int for index in drawn)


class CountingClient:
    """Counts what FedML's test asks of a client."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def update_local_dataset(self, *data: Any) -> None:
        self.asked.append(data)

    def local_test(self, use_test_data: bool) -> dict[str, float]:
        self.asked.append(use_test_data)
        names = ("correct", "loss", "total", "precision", "recall")
        return {f"test_{name}": 1.0 for name in names}


def _view(client: CountingClient, **more: Any) -> SimpleNamespace:
    args = SimpleNamespace(
        client_num_in_total=2, enable_wandb=False, dataset="stackoverflow_lr", ci=0
    )
    clients = {0: ["train 0"], 1: ["train 1"]}
    return SimpleNamespace(
        args=args,
        client_list=[client],
        train_data_local_dict=clients,
        test_data_local_dict={0: ["test 0"], 1: None},
        train_data_local_num_dict={0: 1, 1: 1},
        test_global=SimpleNamespace(dataset=[1, 2, 3], batch_size=1),
        val_global=None,
        **more,
    )


def test_the_test_on_all_clients() -> None:
    client = CountingClient()
    seams.evaluate_clients(_view(client), 0)
    assert client.asked == [(0, ["train 0"], ["test 0"], 1), False, True]


def test_the_test_on_the_validation_set(monkeypatch: pytest.MonkeyPatch) -> None:
    client, drawn = CountingClient(), []
    view = _view(client, _generate_validation_set=lambda: drawn.append(1))
    seams.evaluate_validation_set(view, 0)
    assert drawn == [1]
    assert client.asked[0][0] == 0
    assert client.asked[-1] is True
    source = inspect.getsource(FedAvgAPI._generate_validation_set)
    assert "self.test_global.dataset" in source
    asked: list[Any] = []
    monkeypatch.setattr(FedAvgAPI, "_generate_validation_set", asked.append)
    seams.generate_validation_set(view)
    assert asked == [view]


def test_the_marks_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[Any] = []
    monkeypatch.setattr(seams.mlops, "log_training_status", marks.append)
    monkeypatch.setattr(seams.mlops, "log_aggregation_status", marks.append)
    seams.client_status_training()
    seams.server_status_running()
    assert marks == ["TRAINING", "RUNNING"]


# Messages and communication managers -------------------------------------------------------------


def test_the_types_of_fedml_s_messages() -> None:
    types = {v for k, v in vars(MyMessage).items() if k.startswith("MSG_TYPE_")}
    assert types - {seams.READY} == set(seams.FEDML_TYPES)
    assert (seams.READY, seams.ONLINE, seams.CHECK, seams.FEDML_FINISH) == (0, 5, 6, 7)
    client = import_module("fedml.cross_silo.client.message_define").MyMessage
    assert {v for k, v in vars(client).items() if k.startswith("MSG_TYPE_")} <= types
    assert seams.ONLINE_STATUS == {"client_status": "ONLINE"}
    manager = import_module("fedml.cross_silo.server.fedml_server_manager").FedMLServerManager
    source = inspect.getsource(manager.handle_message_client_status_update)
    assert "MSG_ARG_KEY_CLIENT_STATUS" in source
    assert seams.ONLINE_STATUS["client_status"] == manager.ONLINE_STATUS_FLAG


def test_listeners_survive_what_cannot_be_read() -> None:
    """MQTT's manager passes on who sent it; other managers have no such method."""
    module = "fedml.core.distributed.communication.mqtt_s3.mqtt_s3_multi_clients_comm_manager"
    manager = vars(import_module(module))["MqttS3MultiClientsCommManager"]
    assert "self._on_message_impl(" in inspect.getsource(manager._on_message)
    assert callable(manager._notify)
    passed: list[Any] = []

    def failing(message: Any) -> None:
        raise KeyError("the store has no such object")

    client = SimpleNamespace(suppress_exceptions=False)
    made = SimpleNamespace(
        _on_message_impl=failing, _notify=passed.append, mqtt_mgr=SimpleNamespace(_client=client)
    )
    seams.guard_listeners(made, logging.getLogger("fedpara.fedml"))
    made._on_message_impl(SimpleNamespace(payload=b'{"sender": 2, "receiver": 0}'))
    made._on_message_impl(SimpleNamespace(payload=b"no JSON"))
    assert passed == [{"msg_type": "not read by FedML", "sender": 2, "receiver": 0}]
    assert client.suppress_exceptions
    seams.guard_listeners(SimpleNamespace(), logging.getLogger("fedpara.fedml"))


def test_a_message() -> None:
    message = seams.Message(9001, 1, 0)
    message.add_params(seams.MODEL_KEY, b"model")
    assert (message.get_type(), message.get_sender_id(), message.get_receiver_id()) == (9001, 1, 0)
    assert message.get(seams.MODEL_KEY) == message.get_params()["model_params"] == b"model"


def test_fedml_s_base_of_managers() -> None:
    source = inspect.getsource(seams.FedMLCommManager)
    for words in (
        "self.message_handler_dict[msg_type]",
        "self.register_message_receive_handlers()",
        "self.com_manager.handle_receive_message()",
        "self.com_manager.send_message(message)",
        "self._init_manager()",
    ):
        assert words in source


COMMUNICATION = "fedml.core.distributed.communication"


def _source(module: str) -> str:
    """The text of a module that may need a package that is not installed."""
    found = find_spec(f"{COMMUNICATION}.{module}")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).read_text()


def test_the_queues_of_transports() -> None:
    servicers = {"grpc": "grpc.grpc_comm_manager", "trpc": "trpc.trpc_comm_manager"}
    for name, module in servicers.items():
        source = _source(module)
        assert f"self.{name}_servicer.message_q.qsize() > 0" in source
        assert f"self.{name}_servicer.message_q.get()" in source
        assert "while self.is_running:" in source
    source = _source("mpi.com_manager")
    for words in (
        "self.q_receiver.qsize() > 0",
        "while not self._stop_running:",
        "self._server_receive_thread = MPIReceiveThread(",
        "self._client_receive_thread = MPIReceiveThread(",
    ):
        assert words in source
    assert "self.q.put(msg)" in _source("mpi.mpi_receive_thread")


def test_a_queue_is_replaced_and_a_loop_is_stopped() -> None:
    old: queue.Queue[Any] = queue.Queue()
    new: queue.Queue[Any] = queue.Queue()
    thread = SimpleNamespace(q=old)
    mpi = SimpleNamespace(
        q_receiver=old,
        _server_receive_thread=thread,
        _client_receive_thread=None,
        _stop_running=False,
    )
    seams.replace_queue(mpi, lambda _: new)
    assert mpi.q_receiver is thread.q is new
    assert seams.receiving_threads(mpi) == [thread]
    seams.stop_loop(mpi, "MPI")
    assert mpi._stop_running
    trpc = SimpleNamespace(trpc_servicer=SimpleNamespace(message_q=old), is_running=True)
    seams.replace_queue(trpc, lambda _: new)
    assert trpc.trpc_servicer.message_q is new
    seams.stop_loop(trpc, "TRPC")
    assert not trpc.is_running
    seams.replace_queue(SimpleNamespace(), lambda _: new)  # MQTT polls no queue


# Everything else ---------------------------------------------------------------------------------


def test_the_launcher_finds_every_copy_of_the_runner() -> None:
    modules = [import_module(name) for name in HOLDERS]
    original = fedpara_plugins_fedml.FedMLRunner.__bases__[0]
    assert all(vars(module)["FedMLRunner"] is original for module in modules)
    assert set(modules) <= set(seams.modules_with_runner(original))
    from fedpara_plugins_fedml.launcher import replace_runner

    replace_runner()
    try:
        for module in modules:
            assert vars(module)["FedMLRunner"] is fedpara_plugins_fedml.FedMLRunner
    finally:
        for module in modules:
            vars(module)["FedMLRunner"] = original


def test_what_is_read_of_its_objects() -> None:
    """Attributes, not methods: these are found in the sources."""
    for module, words in {
        "fedml.core.alg_frame.client_trainer": (
            "self.local_train_dataset =",
            "self.model =",
            "self.id =",
        ),
        "fedml.core.alg_frame.server_aggregator": ("self.model =", "self.args ="),
        "fedml.simulation.sp.fedavg.fedavg_api": (
            "self.client_list[0]",
            "client.update_local_dataset(",
            "client.local_test(False)",
            "client.local_test(True)",
            "self.train_data_local_dict[client_idx]",
            "self.test_data_local_dict[client_idx] is None",
            "self.train_data_local_num_dict[client_idx]",
            '["test_total"]',
            '["test_correct"]',
            '["test_loss"]',
        ),
        "fedml.core.dp.common.constants": ('NBAFL_DP = "nbafl"', 'DP_CLIP = "dp_clip"'),
    }.items():
        source = inspect.getsource(import_module(module))
        assert [word for word in words if word not in source] == []


def test_the_version_is_the_one_that_is_pinned() -> None:
    from importlib.metadata import version

    assert version("fedml") == fedpara_plugins_fedml.FEDML == "0.9.6"
