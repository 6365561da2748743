"""An ordinary FedML project, dense: a small network on digits.

`start.py` in this folder starts a server and its clients over one of FedML's transports; by hand it
is ``python main.py --cf fedml_config.yaml --rank 0 --role server``, and a client for each rank.
"""

import digits
import fedml
from fedml import FedMLRunner
from torch import nn


class Net(nn.Module):
    """Two convolutions and two linear layers for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(512, 64)
        self.head = nn.Linear(64, digits.CLASSES)

    def forward(self, images):  # noqa: ANN001, ANN201
        """Logits [n, 10] of images [n, 1, 8, 8]."""
        return self.head(nn.functional.relu(self.hidden(self.features(images))))


if __name__ == "__main__":
    args = fedml.init(check_env=False, should_init_logs=False)
    device = fedml.device.get_device(args)
    dataset = digits.load(args.client_num_in_total, args.batch_size)
    FedMLRunner(args, device, dataset, Net()).run()
