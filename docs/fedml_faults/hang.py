"""A training that raises, which leaves others waiting for ever: three real processes over TRPC.

``python hang.py`` starts the processes on loopback, waits for the error of client 1, and checks 20
seconds later which are still running. It takes about a minute and ends every process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from small import CPU, Fault, dataset, one_weight, report

CONFIG = """
common_args: {{training_type: cross_silo, scenario: horizontal, random_seed: 0, using_mlops: false}}
data_args: {{dataset: digits}}
train_args: {{federated_optimizer: FedAvg, client_id_list: null, client_num_in_total: 2,
  client_num_per_round: 2, comm_round: 2, epochs: 1, batch_size: 4, client_optimizer: sgd,
  learning_rate: 0.1, weight_decay: 0.0, frequency_of_the_test: 1, worker_num: 2}}
device_args: {{using_gpu: false}}
comm_args: {{backend: TRPC, trpc_master_config_path: {csv}, enable_cuda_rpc: false}}
tracking_args: {{enable_tracking: false, enable_wandb: false}}
"""
SAID = "a batch of the wrong shape"
PORT = 29581


def one_exception_hangs_all() -> Fault:
    """Let client 1 raise: FedML's managers catch nothing and have no deadline (`cross_silo.py`)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trpc.csv").write_text(f"address,port\n127.0.0.1,{PORT}\n")
        (folder / "c.yaml").write_text(CONFIG.format(csv=folder / "trpc.csv"))
        environment = {**os.environ, "FEDML_ENV_VERSION": "local", "HOME": name}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--cf", str(folder / "c.yaml"), "--rank", str(rank),
                 "--role", "client" if rank else "server"],
                env=environment,
                stdout=(folder / f"{rank}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank in range(3)
        ]  # fmt: skip
        try:
            raised = _within(180, lambda: SAID in (folder / "1.log").read_text())
            time.sleep(20)
            waiting = [rank for rank in (0, 2) if processes[rank].poll() is None]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return Fault(
        f"client 1 raised: {raised}; 20 s later still waiting (0 server, 2 client 2): {waiting}",
        "the round goes on without client 1, or all end with the reason",
        raised and bool(waiting),
    )


def _within(seconds: float, what: Any) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(1)
    return False


def _party() -> None:
    """Run one of the three processes."""
    import fedml
    from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

    args = fedml.init(check_env=False, should_init_logs=False)
    model = one_weight()

    class Raises(ModelTrainerCLS):  # type: ignore[misc]
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            if args.rank == 1:
                raise ValueError(SAID)
            super().train(train_data, device, args)

    runner = fedml.FedMLRunner(args, CPU, dataset(), model, Raises(model, args))
    runner.run()  # returns at once; TRPC's threads keep the process until the run is over


REPRODUCTIONS = (one_exception_hangs_all,)

if __name__ == "__main__":
    if "--cf" in sys.argv:
        _party()
    else:
        report(*REPRODUCTIONS)
