"""Mime, single process, against algorithm 1 of arXiv 2008.03606."""

from __future__ import annotations

from typing import Any

import torch
from small import CPU, Fault, arguments, dataset, loader, one_weight, report
from torch import Tensor, nn

KEYS = {"server_optimizer": "sgd", "server_momentum": 0.9, "momentum": 0.9, "mimelite": True}


def _gradient_at(values: Tensor, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the gradient of the mean loss over the data."""
    w = values.clone().requires_grad_()
    losses = [nn.functional.cross_entropy(x @ w.T, y) for x, y in data]  # equally large batches
    (gradient,) = torch.autograd.grad(sum(losses) / len(losses), [w])
    return gradient


def full_gradient_is_taken_too_late() -> Fault:
    """Compare the client's full gradient with the gradients at x and at y.

    `train()` in `ml/trainer/mime_trainer.py` computes it after the client's steps, at the client's
    own model y.
    """
    from fedml.ml.trainer.mime_trainer import MimeModelTrainer

    args = arguments("Mime", **{**KEYS, "momentum": 0.0})
    model, data = one_weight(), loader(0)
    told = MimeModelTrainer(model, args).train(data, CPU, args, {}, {"weight": {}})["weight"]
    at_x = _gradient_at(torch.zeros(2, 2), data)
    at_y = _gradient_at(model.weight.detach(), data)
    off = float((told - at_x).abs().max())
    return Fault(
        f"the reported gradient differs from that at the server's x by {off:.3f}, and from that at "
        f"the client's y by {float((told - at_y).abs().max()):.0e}",
        "the gradient at x",
        off > 1e-4,
    )


def full_gradient_is_a_sum_and_clipped() -> Fault:
    """Compare the full gradient over 20 batches with their mean gradient.

    The same function adds up the batches' mean gradients without dividing by their number, and then
    clips the sum to a norm of 1, which the paper does not.
    """
    from fedml.ml.trainer.mime_trainer import MimeModelTrainer

    args = arguments("Mime", **{**KEYS, "momentum": 0.0}, learning_rate=0.0)
    data = loader(0, batches=20)
    told = MimeModelTrainer(one_weight(), args).train(data, CPU, args, {}, {"weight": {}})
    right = _gradient_at(torch.zeros(2, 2), data)
    ratio = float(told["weight"].norm() / right.norm())
    return Fault(
        f"over 20 batches, at rate 0, the reported gradient is {ratio:.1f} times the mean "
        f"gradient, and its norm {float(told['weight'].norm()):.3f}",
        "the mean gradient",
        abs(ratio - 1) > 1e-3,
    )


def correction_is_a_round_old() -> Fault:
    """Measure how far the model moves in the first round.

    `simulation/sp/mime/mime_trainer.py` corrects by the gradients that the last round's clients
    reported. They are zeros in the first round, so every corrected step is exactly 0 at first.
    """
    from fedml.simulation.sp.mime.mime_trainer import MimeTrainer

    args = arguments("Mime", **{**KEYS, "mimelite": False, "momentum": 0.0}, server_lr=0.0)
    model = one_weight()
    MimeTrainer(dataset(), model, CPU, args).train()
    moved = float(model.weight.detach().abs().max())
    data = dataset()[5]
    right = (_gradient_at(torch.zeros(2, 2), data[0] + data[1])).abs().max()
    return Fault(
        f"two clients, one step of rate 1 each, the first round: the model moves by {moved:g}",
        f"g(y) - g(x) + c = c, the mean gradient at x: by {float(right):.3f}",
        abs(moved - float(right)) > 1e-4,
    )


def server_takes_a_step_of_its_own() -> Fault:
    """Run the server with clients of rate 0.

    After averaging, the server of the same file steps its optimizer on the averaged model. The
    paper's server only updates the statistics.
    """
    from fedml.simulation.sp.mime.mime_trainer import MimeTrainer

    model = one_weight()
    args = arguments("Mime", **{**KEYS, "momentum": 0.0}, learning_rate=0.0)
    MimeTrainer(dataset(), model, CPU, args).train()
    moved = float(model.weight.detach().abs().max())
    return Fault(
        f"with clients of rate 0 the model moves by {moved:.3f}",
        "x is the clients' mean, which has not moved: 0",
        moved > 0,
    )


def adaptive_server_raises() -> Fault:
    """Set `server_optimizer` to Adam: no optimizer without a momentum can be constructed."""
    from fedml.simulation.sp.mime.mime_trainer import MimeTrainer

    args = arguments("Mime", **{**KEYS, "server_optimizer": "adam"})
    try:
        MimeTrainer(dataset(), one_weight(), CPU, args)
    except TypeError as error:
        return Fault(f"server_optimizer: adam: TypeError: {error}", "MimeAdam", True)
    return Fault("server_optimizer: adam is accepted", "MimeAdam", False)


def buffers_raise() -> Fault:
    """Train a model with BatchNorm: the averaging looks up buffers by name in the gradients."""
    from fedml.simulation.sp.mime.mime_trainer import MimeTrainer

    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    try:
        MimeTrainer(dataset(), model, CPU, arguments("Mime", **KEYS)).train()
    except KeyError as error:
        return Fault(f"a model with BatchNorm: KeyError: {error}", "buffers are averaged", True)
    return Fault("a model with BatchNorm trains", "buffers are averaged", False)


def only_client_0_is_tested() -> Fault:
    """Record which clients are tested: `_local_test_on_all_clients` has its loop commented out."""
    from fedml.simulation.sp.mime.mime_trainer import MimeTrainer

    data = dataset()
    api = MimeTrainer(data, one_weight(), CPU, arguments("Mime", **KEYS))
    tested: list[Any] = []
    own = api.model_trainer.test

    def test(loader: Any, device: Any, args: Any) -> Any:
        tested.extend(client for client in range(2) if loader is data[6][client])
        return own(loader, device, args)

    api.model_trainer.test = test
    api.train()
    return Fault(
        f"the accuracy reported is that on the test data of clients {tested}",
        "of all clients: [0, 1]",
        tested != [0, 1],
    )


REPRODUCTIONS = (
    full_gradient_is_taken_too_late,
    full_gradient_is_a_sum_and_clipped,
    correction_is_a_round_old,
    server_takes_a_step_of_its_own,
    adaptive_server_raises,
    buffers_raise,
    only_client_0_is_tested,
)

if __name__ == "__main__":
    report(*REPRODUCTIONS)
