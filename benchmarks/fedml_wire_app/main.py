"""A FedML project that trains VGG16 for a few steps a round, for `fedml_wire_bytes.py`."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import fedml
import torch
from fedml.core import ClientTrainer
from torch import nn
from torch.nn.functional import cross_entropy

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "wire_app")]

from vgg16_update import vgg16  # noqa: E402
from wire_app.data import held_out, training  # noqa: E402

STEPS, BATCH, RATE = 4, 16, 0.02


class Trainer(ClientTrainer):  # type: ignore[misc]
    """Takes steps on images that differ from round to round."""

    def get_model_params(self) -> Any:
        """Return the parameters as FedML's own trainer does."""
        return self.model.cpu().state_dict()

    def set_model_params(self, model_parameters: Any) -> None:
        """Load the parameters as FedML's own trainer does."""
        self.model.load_state_dict(model_parameters)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        """Train briefly on real data."""
        images, labels = train_data
        draw = torch.Generator().manual_seed(1000 * (args.round_idx + 1) + self.id)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.model.train()
        for _ in range(STEPS):
            chosen = torch.randint(len(images), (BATCH,), generator=draw)
            optimizer.zero_grad()
            cross_entropy(self.model(images[chosen]), labels[chosen]).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()


def main() -> None:
    """Run one process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    args = fedml.init(check_env=False, should_init_logs=False)
    if os.environ.get("FEDPARA_PLUGIN") == "off":
        runner = fedml.FedMLRunner
    else:
        from fedpara_plugins_fedml import FedMLRunner as runner  # noqa: N813
    clients = args.client_num_in_total
    train = {client: training(client, clients) for client in range(clients)}
    sizes = {client: len(labels) for client, (_, labels) in train.items()}
    tested = [held_out(0)]
    dataset = [
        sum(sizes.values()), 32, tested, tested, sizes, train, dict.fromkeys(train, tested), 10,
    ]  # fmt: skip
    torch.set_num_threads(1)
    model = vgg16()
    runner(args, torch.device("cpu"), dataset, model, Trainer(model, args)).run()


if __name__ == "__main__":
    main()
