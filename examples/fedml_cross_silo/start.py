"""Start a server and its clients on this machine, over one of FedML's transports.

    python examples/fedml_cross_silo/start.py TRPC
    python examples/fedml_cross_silo/start.py MPI
    python examples/fedml_cross_silo/start.py GRPC
    python examples/fedml_cross_silo/start.py MQTT_S3
    python examples/fedml_cross_silo/start.py GRPC --plugin fedpara_method=fedpara fedpara_gamma=0.3

The last one switches the plugin on, without an edit of ``main.py``. Everything listens on loopback
and ends by itself; what does not end in time is ended by its id. MPI needs ``mpirun``
(openmpi-bin) and mpi4py, GRPC grpcio, MQTT_S3 ``mosquitto`` and ``moto_server`` (of ``pip install
"moto[s3,server]"``, best in an environment of its own; name it with ``MOTO_SERVER``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
BACKENDS = ("TRPC", "MPI", "GRPC", "MQTT_S3")
BUCKET = "fedml"


def main() -> int:
    """Read the command line, run everything, print how each process ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("--plugin", nargs="*", metavar="KEY=VALUE", help="keys of fedpara_args")
    parser.add_argument("--args", nargs="*", default=[], metavar="KEY=VALUE", help="of train_args")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300, help="time limit")
    parser.add_argument("--folder", type=Path, help="for logs and configuration; a fresh one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fedml-cross-silo-"))
    plugin = None if options.plugin is None else _values(options.plugin)
    with ExitStack() as stack:
        sections = comm_sections(options.backend, folder, options.clients)
        if options.backend == "MQTT_S3":
            stack.enter_context(broker_and_store(sections["comm_args"], folder))
        config = write_config(
            folder / "fedml_config.yaml",
            clients=options.clients,
            sections=sections,
            train=_values(options.args),
            plugin=plugin,
        )
        codes = run(options.backend, config, options.clients, options.seconds, plugin is not None)
    for name, code in codes.items():
        print(f"{name} ended with {'a time-out' if code is None else code}")
    print(f"logs: {folder}")
    return 0 if all(code == 0 for code in codes.values()) else 1


def write_config(
    path: Path,
    *,
    clients: int,
    sections: Mapping[str, Mapping[str, Any]],
    train: Mapping[str, Any],
    plugin: Mapping[str, Any] | None,
) -> Path:
    """The project's configuration with some sections changed."""
    content = yaml.safe_load((HERE / "fedml_config.yaml").read_text(encoding="utf-8"))
    numbers = {"client_num_in_total": clients, "client_num_per_round": clients}
    content["train_args"] |= numbers | dict(train)
    content["device_args"]["worker_num"] = clients
    for name, section in sections.items():
        content[name] |= section
    if plugin:
        content["fedpara_args"] = dict(plugin)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def comm_sections(backend: str, folder: Path, clients: int) -> dict[str, dict[str, Any]]:
    """What a transport needs in the configuration; writes its files into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    comm: dict[str, Any] = {"backend": backend}
    if backend == "TRPC":
        table = folder / "trpc.csv"
        table.write_text(f"master_ip,master_port\n127.0.0.1,{free_ports(1)[0]}\n", "utf-8")
        comm |= {"trpc_master_config_path": str(table), "enable_cuda_rpc": False}
    if backend == "GRPC":
        table = folder / "grpc.csv"
        rows = [f"{i},{i},127.0.0.1,{port}" for i, port in enumerate(free_ports(clients + 1))]
        table.write_text(
            "\n".join(["eid,rank,grpc_server_ip,grpc_server_port", *rows, ""]), "utf-8"
        )
        comm["grpc_ipconfig_path"] = str(table)
    if backend == "MQTT_S3":
        broker, store = free_ports(2)
        comm["customized_training_mqtt_config"] = {
            "BROKER_HOST": "127.0.0.1",
            "BROKER_PORT": broker,
            "MQTT_USER": "x",
            "MQTT_PWD": "x",
            "MQTT_KEEPALIVE": 180,
        }
        comm["customized_training_s3_config"] = {
            "BUCKET_NAME": BUCKET,
            "CN_S3_AKI": "test",
            "CN_S3_SAK": "test",
            "CN_REGION_NAME": "us-east-1",
            "CN_S3_ENDPOINT": f"http://127.0.0.1:{store}",
        }
    return {"comm_args": comm}


def program(config: Path, plugin: bool) -> list[str]:
    """The command of one process, without its rank."""
    launcher = ["-m", "fedpara_plugins_fedml"] if plugin else []
    return [sys.executable, *launcher, str(HERE / "main.py"), "--cf", str(config)]


def run(
    backend: str, config: Path, clients: int, seconds: float, plugin: bool
) -> dict[str, int | None]:
    """Start all processes, wait for their ends; exit codes by name, None for one that went on."""
    folder, command = config.parent, program(config, plugin)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        if backend == "MPI":
            processes["mpirun"] = start("mpirun", mpirun(clients + 1) + command, folder, stack)
        else:
            for rank in range(clients + 1):
                role = ["server", "client"][rank > 0]
                name = "server" if rank == 0 else f"client {rank}"
                words = [*command, "--rank", str(rank), "--role", role]
                processes[name] = start(name, words, folder, stack)
                if rank == 0 and backend == "GRPC":
                    wait_for_port(grpc_port(folder, 0), processes[name], seconds)
        deadline = time.monotonic() + seconds
        return {name: _end(each, deadline) for name, each in processes.items()}


def mpirun(processes: int) -> list[str]:
    """Open MPI's launcher on this machine alone, with more processes than cores if need be."""
    words = ["mpirun", "--oversubscribe", "--mca", "btl", "self,vader", "-np", str(processes)]
    return [*words, *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]


def start(
    name: str, command: Sequence[str], folder: Path, stack: ExitStack
) -> subprocess.Popen[bytes]:
    """One process, its output in a log; ended by its id when the stack unwinds."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    quiet = {"HOME": str(home), "FEDML_ENV_VERSION": "local", "OMP_NUM_THREADS": "1"}
    log = stack.enter_context((folder / f"{name.replace(' ', '-')}.log").open("wb"))
    process = subprocess.Popen(
        list(command),
        cwd=HERE,
        env={**os.environ, **quiet, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    stack.callback(_stop, process)
    return process


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until a process listens: a gRPC client that is earlier than its server ends at once."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as each:
            if each.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)


def grpc_port(folder: Path, rank: int) -> int:
    """The port of a rank in the table that `comm_sections` wrote."""
    rows = (folder / "grpc.csv").read_text("utf-8").split()
    return int(rows[1 + rank].rpartition(",")[2])


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface on which nobody listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def broker_and_store(comm: Mapping[str, Any], folder: Path) -> ExitStack:
    """mosquitto, and moto with the bucket in it, on the ports of the configuration."""
    import boto3  # FedML's own dependency

    mqtt, s3 = comm["customized_training_mqtt_config"], comm["customized_training_s3_config"]
    broker, store = mqtt["BROKER_PORT"], int(s3["CN_S3_ENDPOINT"].rpartition(":")[2])
    rules = folder / "mosquitto.conf"
    rules.write_text(f"listener {broker} 127.0.0.1\nallow_anonymous true\n", "utf-8")
    moto = os.environ.get("MOTO_SERVER") or shutil.which("moto_server") or "moto_server"
    mosquitto = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin") or "mosquitto"
    stack = ExitStack()
    with ExitStack() as failing:
        failing.push(stack)
        first = start("mosquitto", [mosquitto, "-c", str(rules)], folder, stack)
        second = start("moto", [moto, "-H", "127.0.0.1", "-p", str(store)], folder, stack)
        wait_for_port(broker, first, 60)
        wait_for_port(store, second, 60)
        boto3.client(
            "s3",
            endpoint_url=s3["CN_S3_ENDPOINT"],
            aws_access_key_id=s3["CN_S3_AKI"],
            aws_secret_access_key=s3["CN_S3_SAK"],
            region_name=s3["CN_REGION_NAME"],
        ).create_bucket(Bucket=BUCKET)
        failing.pop_all()
    return stack


def _end(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        if _end(process, time.monotonic() + 10) is None:
            process.kill()
            process.wait()


def _values(words: Sequence[str]) -> dict[str, Any]:
    """``a=1 b=text`` as a mapping; values as YAML reads them."""
    return {key: yaml.safe_load(value) for key, _, value in (w.partition("=") for w in words)}


if __name__ == "__main__":
    sys.exit(main())
