"""Every class, function, signature and attribute of FedML that the plugin's engine touches.

FedML 0.9.6 is pinned; a failure here says which seam another release has moved.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import fedpara_plugins_fedml

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


def test_every_import_of_fedml_is_guarded_here() -> None:
    folder = Path(fedpara_plugins_fedml.__file__).parent
    pattern = re.compile(r"^\s*from (fedml[\w.]*) import (.+)$", re.M)
    imported = {
        f"{module}:{name.strip()}"
        for path in folder.rglob("*.py")
        for module, names in pattern.findall(path.read_text())
        for name in names.split(",")
    }
    guarded = {seam.partition(".__init__")[0] for seam in CALLS}
    unguarded = [
        each
        for each in sorted(imported)
        if not any(
            seam == each or seam.startswith((f"{each}.", f"{each.replace(':', '.')}:"))
            for seam in guarded
        )
    ]
    assert not unguarded


def test_the_launcher_finds_every_copy_of_the_runner() -> None:
    modules = [import_module(name) for name in HOLDERS]
    original = fedpara_plugins_fedml.FedMLRunner.__bases__[0]
    assert all(vars(module)["FedMLRunner"] is original for module in modules)
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
        "fedml.ml.aggregator.agg_operator": ('args.federated_optimizer == "FedAvg"',),
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
        "fedml.simulation.simulator": ('raise Exception("Exception")',),
        "fedml.core.dp.common.constants": ('NBAFL_DP = "nbafl"', 'DP_CLIP = "dp_clip"'),
    }.items():
        source = inspect.getsource(import_module(module))
        assert [word for word in words if word not in source] == []


def test_the_version_is_the_one_that_is_pinned() -> None:
    from importlib.metadata import version

    assert version("fedml") == fedpara_plugins_fedml.FEDML == "0.9.6"
