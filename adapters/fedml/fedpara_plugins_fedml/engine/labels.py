"""A client's label counts, for the option ``label_prior``, from its training data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpara_plugins import ConfigError, set_label_counts
from fedpara_plugins.training import lacks_label_counts

__all__ = ["count_once"]


def count_once(model: nn.Module, train_data: Any) -> None:
    """Tell a client's model its label counts, unless it has them from an earlier round.

    A pass over the data, which leaves all random states as they were, so that training sees the
    same order as without.

    Args:
        model: with the client's own state loaded.
        train_data: batches, a pair of inputs and class indices each.

    Raises:
        ConfigError: the batches are no such pairs.
    """
    if not lacks_label_counts(model):
        return
    with _random_states_kept():
        try:
            labels = torch.cat([_labels(batch) for batch in train_data])
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ConfigError(
                f"fedpara_label_prior: the training data are no batches of (inputs, class indices) "
                f"({error}). Call fedpara_plugins.set_label_counts(self.model, labels) in your "
                f"ClientTrainer's on_before_local_training, or leave the option out"
            ) from error
    set_label_counts(model, labels)


def _labels(batch: Any) -> Tensor:
    labels = torch.as_tensor(batch[1]).flatten()
    if not torch.equal(labels, labels.long()):  # FedML's attack on labels makes floats of them
        raise TypeError(f"labels are {labels.dtype}")
    return labels.long().cpu()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Keep all three random states, from any of which transforms of a data set draw."""
    state, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)
    np.random.set_state(numbers)
