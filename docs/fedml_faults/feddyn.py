"""FedDyn, single process, against algorithm 1 of arXiv 2111.04263."""

from __future__ import annotations

from collections import OrderedDict

import torch
from small import CPU, Fault, arguments, dataset, loader, one_weight, report, weight
from torch import Tensor


def _trained(alpha: float, dual: float, steps: int = 3) -> Tensor:
    """Return a client's weights after some steps of rate 0.1, from ones."""
    from fedml.ml.trainer.feddyn_trainer import FedDynModelTrainer

    args = arguments("FedDyn", feddyn_alpha=alpha, learning_rate=0.1)
    model = one_weight()
    torch.nn.init.ones_(model.weight)
    trainer = FedDynModelTrainer(model, args)
    trainer.train(loader(0, steps), CPU, args, {"weight": torch.full((2, 2), dual)})
    return model.weight.detach().clone()


def penalties_have_no_gradient() -> Fault:
    """Compare trainings with different alphas and duals.

    `ml/trainer/feddyn_trainer.py` computes both penalties from `param.data`, which autograd does
    not see: the clients do plain FedAvg. Repair: `param` in place of `param.data`.
    """
    plain = _trained(alpha=1e-9, dual=0.0)
    pulled = _trained(alpha=5.0, dual=0.0)
    pushed = _trained(alpha=5.0, dual=10.0)
    same = torch.equal(plain, pulled) and torch.equal(plain, pushed)
    return Fault(
        f"three steps give the same weights for alpha 0 and 5 and for duals of 0 and 10: {same}",
        "the steps follow grad L(y) - dual + alpha (y - x)",
        same,
    )


def linear_penalty_is_scaled() -> Fault:
    """Read the linear term from the loss that the trainer logs, since it has no gradient.

    The same file weights the linear term <dual, y> by alpha / 2; the paper has no factor there.
    """
    import logging

    from fedml.ml.trainer.feddyn_trainer import FedDynModelTrainer

    losses = []
    for dual in (0.0, 1.0):
        args = arguments("FedDyn", feddyn_alpha=0.1, learning_rate=0.1)
        model = one_weight()
        torch.nn.init.ones_(model.weight)
        trainer = FedDynModelTrainer(model, args)
        lines: list[str] = []
        watch = logging.Handler()
        watch.emit = lambda record, lines=lines: lines.append(record.getMessage())  # type: ignore[method-assign]
        root = logging.getLogger()
        level, off = root.level, logging.root.manager.disable
        logging.disable(logging.NOTSET)
        root.setLevel(logging.INFO)
        root.addHandler(watch)
        try:
            trainer.train(loader(0), CPU, args, {"weight": torch.full((2, 2), dual)})
        finally:
            root.removeHandler(watch)
            root.setLevel(level)
            logging.disable(off)
        losses.append(float(lines[-1].split("Loss: ")[1]))
    term = losses[0] - losses[1]
    return Fault(
        f"four weights of 1 and duals of 1 with alpha 0.1 lower the loss by {term:.3f}",
        "by <dual, y> = 4",
        abs(term - 4) > 1e-3,
    )


def server_does_not_divide_by_alpha() -> Fault:
    """Run the server's step with copies of the weights.

    `simulation/sp/feddyn/feddyn_trainer.py` subtracts h where the paper subtracts h / alpha. The
    right line is there as a comment.
    """
    from fedml.simulation.sp.feddyn.feddyn_trainer import FedDynTrainer

    model = one_weight()
    alpha = 0.1
    api = FedDynTrainer(dataset(), model, CPU, arguments("FedDyn", feddyn_alpha=alpha))
    start = OrderedDict((k, v.clone()) for k, v in model.state_dict().items())
    left = iter([1.0, 3.0])

    def train(data: object, device: object, args: object, dual: object) -> object:
        with torch.no_grad():
            model.weight.copy_(torch.full((2, 2), next(left)))
        return dual

    api.model_trainer.train = train
    # Copies exclude the live tensors of aliasing.py.
    own = api.model_trainer.get_model_params
    calls = iter(range(100))

    def get() -> OrderedDict[str, Tensor]:
        # The server calls this first, each client after its training, and the server last, for x.
        values = start if next(calls) == 3 else own()
        return OrderedDict((k, v.clone()) for k, v in values.items())

    api.model_trainer.get_model_params = get
    api.train()
    got = weight(model)
    return Fault(
        f"clients that come from 0 to 1 and 3 with alpha {alpha} give {got:g}, with copies and the "
        f"right x",
        f"h = -{alpha} (1 + 3) / 2, so mean - h / alpha = 2 + 2 = 4",
        abs(got - 4) > 1e-5,
    )


def duals_belong_to_places() -> Fault:
    """Record which dual each client finds with `initialize_all_clients: false`.

    A dual (SCAFFOLD: a variate) then belongs to a place in the round and not to a client: the
    client that is drawn into that place gets it.
    """
    from fedml.simulation.sp.feddyn.feddyn_trainer import FedDynTrainer

    args = arguments(
        "FedDyn",
        feddyn_alpha=1.0,
        initialize_all_clients=False,
        client_num_per_round=1,
        comm_round=4,
        frequency_of_the_test=100,
    )
    api = FedDynTrainer(dataset(), one_weight(), CPU, args)
    clients: list[int] = []
    seen: list[float] = []

    def train(data: object, device: object, args: object, dual: dict[str, Tensor]) -> object:
        clients.append(api.client_list[0].client_idx)
        seen.append(float(dual["weight"].max()))
        return {"weight": dual["weight"] + 1}

    api.model_trainer.train = train
    api.train()
    right = [float(clients[:place].count(client)) for place, client in enumerate(clients)]
    return Fault(
        f"clients {[int(c) for c in clients]} in turn, each of which adds 1 to its dual, find "
        f"{[int(v) for v in seen]} in it",
        f"{[int(v) for v in right]}: how often that client was there before",
        seen != right,
    )


def frozen_parameters_are_unfrozen() -> Fault:
    """Train a frozen weight: the trainer sets `requires_grad = True` on every parameter."""
    from fedml.ml.trainer.feddyn_trainer import FedDynModelTrainer

    args = arguments("FedDyn", feddyn_alpha=1.0)
    model = one_weight()
    next(model.parameters()).requires_grad_(False)
    FedDynModelTrainer(model, args).train(loader(0), CPU, args, {"weight": torch.zeros(2, 2)})
    moved = bool(next(model.parameters()).detach().any())
    return Fault(
        f"a frozen weight was trained: {moved}", "what the user has frozen stays as it is", moved
    )


REPRODUCTIONS = (
    penalties_have_no_gradient,
    linear_penalty_is_scaled,
    server_does_not_divide_by_alpha,
    duals_belong_to_places,
    frozen_parameters_are_unfrozen,
)

if __name__ == "__main__":
    report(*REPRODUCTIONS)
