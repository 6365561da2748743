"""The task of the cells as a FedML project: the same data in the same order as on Flower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from harness.oracles.task import TEST, TrainingTask

__all__ = ["TaskLoader", "task_dataset", "task_keys"]


class TaskLoader:
    """A client's batches, in the order that belongs to the round which the arguments name."""

    def __init__(self, task: TrainingTask, client: int, args: Any) -> None:
        self.task, self.client, self.args = task, client, args

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.task.batches(self.client, self.args.round_idx + 1)


def task_dataset(task: TrainingTask) -> Callable[[Any], list[Any]]:
    """Return a function from arguments to FedML's eight entries, all held-out images at the end."""

    def made(args: Any) -> list[Any]:
        clients = range(task.clients)
        sizes = {client: task.size(client) for client in clients}
        train = {client: TaskLoader(task, client, args) for client in clients}
        test = {client: [task.held_out(client)] for client in clients}
        return [sum(sizes.values()), TEST, [], [task.test_data()], sizes, train, test, 10]

    return made


def task_keys(task: TrainingTask) -> dict[str, Any]:
    """Return the YAML's keys of a task; the batches of all epochs come as one epoch."""
    return {
        "client_num_in_total": task.clients,
        "client_num_per_round": task.clients,
        "comm_round": task.rounds,
        "learning_rate": task.lr,
        "epochs": 1,
        "round_idx": 0,
        "frequency_of_the_test": 100,
    }
