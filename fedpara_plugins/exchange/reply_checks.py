"""Checks of one decoded record of a reply against what the server has sent.

Each takes one tensor, or one layer, at a time, so that a check needs next to no memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.exchange.records import State, cast, in_pieces
from fedpara_plugins.factors.fast.form import is_known
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.models.adapter_ranks import rank_conflict
from fedpara_plugins.models.infinities import check_finite, remedy_for, without_nan
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.stages.checks import all_finite
from fedpara_plugins.stages.dtypes import REAL_DTYPES

__all__ = ["check_composed", "check_first", "check_own", "check_side", "in_sent_dtypes"]

BLOCK = 2**20
"""Most bytes of a composed weight at a time, unless a single row has more."""

MORE_TENSORS = 256
"""Tensors that a record of an app's own may have beyond those of the model that was sent."""

INTEGERS = frozenset(
    {torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.uint8, torch.uint16, torch.uint32, torch.uint64}
)


def in_sent_dtypes(answer: State, sent: Mapping[str, Tensor]) -> State:
    """Return what a client answers, in the dtypes and the order that were sent.

    Args:
        answer: tensors of a model, all of whose names were sent; emptied, so that each is freed
            when it has been cast.
        sent: the same names among others.

    Raises:
        MismatchError: a shape differs, or a dtype cannot be cast to the one that was sent.
        PayloadError: a value is NaN or infinite where the one that was sent is not, or becomes so
            by the cast, or is out of the range of an integer dtype.
    """
    found = {}
    for name, before in sent.items():
        if name not in answer:
            continue
        value = answer.pop(name)
        _check_shape(name, value, before)
        _check_castable(name, value.dtype, before.dtype)
        if value.dtype != before.dtype and before.dtype in INTEGERS:
            _check_range(name, value, before.dtype)
        found[name] = cast(value, before.dtype)
        if not _finite(found[name]):
            _refuse_new_infinities(name, found[name], before)
    return found


def check_side(
    record: str, tensors: Mapping[str, Tensor], sent: Mapping[str, Tensor], names: Collection[str]
) -> None:
    """Raise unless a record beside the model has tensors like those of the model.

    Args:
        record: its name.
        tensors: by name.
        sent: the model.
        names: those of the model's names that are shared.

    Raises:
        MismatchError: another name, shape or kind of dtype.
        PayloadError: NaN or infinity, also after a cast to the model's dtype.
    """
    known = frozenset(names)
    for name, value in tensors.items():
        if name not in known:
            raise MismatchError(
                f"record {record!r} holds {name[:80]!r}, which is no shared name of the model"
            )
        _check_shape(name, value, sent[name])
        if value.dtype not in REAL_DTYPES:
            raise MismatchError(
                f"record {record!r} holds {name!r} of {value.dtype}, expected a floating-point "
                f"dtype of 16 bits and more"
            )
        check_finite({name: value})
        if sent[name].dtype in REAL_DTYPES:
            check_finite({name: cast(value, sent[name].dtype)})


def check_own(
    record: str, tensors: Mapping[str, Tensor], *, like: int, private: Collection[str]
) -> None:
    """Raise unless a record of an app's own is bounded and finite, and holds nothing private.

    Args:
        record: its name.
        tensors: by name.
        like: number of tensors of the model that was sent.
        private: names that never leave a client.

    Raises:
        PayloadError: too many tensors, a private name, NaN or infinity.
    """
    if len(tensors) > like + MORE_TENSORS:
        raise PayloadError(
            f"record {record[:80]!r} holds {len(tensors)} tensors, at most {like + MORE_TENSORS} "
            f"are taken"
        )
    if held := next((name for name in tensors if name in private), None):
        raise MismatchError(
            f"record {record[:80]!r} holds {held!r}, which is private: it stays on the client"
        )
    for name, value in tensors.items():
        if not _finite(value):
            raise PayloadError(
                f"tensor {name[:80]!r} of record {record[:80]!r} holds NaN or infinite values"
            )


def check_composed(spec: ModelSpec, state: State, sent: State) -> None:
    """Raise if factors, all of them finite, compose to a weight that is not.

    Private factors count as zero, as everywhere on a server.

    Args:
        spec: of the model.
        state: shared tensors of it; a weight of which some are missing is passed over.
        sent: the same of what was sent. Where its weight is not finite, the client's need not be.

    Raises:
        PayloadError: names the weight.
    """
    private = spec.private_keys
    for weight, plan in spec.weights.items():
        keys = spec.factor_keys(weight)
        if not all(key in private or key in state for key in keys.values()):
            continue
        mine = _factors(plan, keys, state, private)
        if _surely_finite(plan, mine):
            continue
        theirs = _factors(plan, keys, sent, private)
        blocks = zip(_blocks(plan, mine), _blocks(plan, theirs), strict=True)
        for new, old in blocks:
            if bad := int((~torch.isfinite(new) & torch.isfinite(old)).sum()):
                raise PayloadError(
                    f"the factors of {weight!r} are finite, and compose to a weight with {bad} "
                    f"and more NaN or infinite values in {new.dtype}: training has diverged. "
                    f"{remedy_for()}"
                )


def check_first(spec: ModelSpec, tensors: State) -> None:
    """Raise unless the first weights of a run fit the description that came with them.

    Nothing is composed, because nothing but the description bounds the size of a weight.

    Args:
        spec: the description.
        tensors: by name.

    Raises:
        MismatchError: a private name, or a factor of another shape.
        PayloadError: NaN, or infinity in a factor or, by a bound, in a weight. Other infinities
            are the model's own.
    """
    for name, value in tensors.items():
        if name in spec.private_keys:
            raise MismatchError(f"the first weights hold {name!r}, which is private")
        if not _finite(value):
            check_finite({name: value}, without_nan({name: value}))
    for name, shape in spec.shared_shapes().items():
        if name not in tensors or tensors[name].shape != shape:
            raise MismatchError(f"the first weights do not fit their own description: {name!r}")
    for weight, plan in spec.weights.items():
        mine = _factors(plan, spec.factor_keys(weight), tensors, spec.private_keys)
        if is_known(plan.method) and not _surely_finite(plan, mine):
            raise PayloadError(f"the factors of {weight!r} are too large to be composed")


# One tensor


def _check_shape(name: str, value: Tensor, sent: Tensor) -> None:
    """Raise for a tensor of another shape, which no average accepts: the round would end."""
    if value.shape != sent.shape:
        if ranks := rank_conflict(name, value.shape, sent.shape):
            raise MismatchError(
                f"the client answers with an adapter of rank {ranks[0]}, this server sent one of "
                f"rank {ranks[1]} (the first tensor is {name!r}): factors of different ranks have "
                f"no average; build adapters of the same rank on both sides"
            )
        raise MismatchError(
            f"the client answers with {name!r} of shape {tuple(value.shape)}, this server sent "
            f"it with shape {tuple(sent.shape)}; build the same model on both sides"
        )


def _check_castable(name: str, dtype: torch.dtype, sent: torch.dtype) -> None:
    numbers = REAL_DTYPES | INTEGERS
    castable = dtype == sent or (dtype in numbers and sent in numbers)
    if not (castable or (dtype.is_complex and sent.is_complex)):
        raise MismatchError(
            f"the client answers with {name!r} of {dtype}, this server sent it as {sent}, and the "
            f"one does not cast to the other; build the same model on both sides"
        )


def _check_range(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raise for values that an integer dtype cannot hold; torch would wrap them around."""
    if not value.numel():
        return
    check_finite({name: value})
    if value.is_floating_point():
        low, high = map(int, torch.aminmax(value.detach()))
    else:
        numbers = value.numpy()  # torch has no minimum for its larger unsigned integers
        low, high = int(numbers.min()), int(numbers.max())
    bounds = torch.iinfo(dtype)
    if low < bounds.min or high > bounds.max:
        raise PayloadError(
            f"the client answers with {name!r} from {low} to {high}, beyond the range of {dtype}, "
            f"as which this server sent it"
        )


def _finite(value: Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    if value.is_complex():
        return all_finite(torch.view_as_real(value))
    if value.is_floating_point():
        return all_finite(value if value.element_size() > 1 else value.float())  # float8
    return True


def _refuse_new_infinities(name: str, value: Tensor, sent: Tensor) -> None:
    """Raise unless NaN and infinite values stand where the same ones were sent (in a mask, say)."""
    for new, old in in_pieces(value, sent):
        if new.is_floating_point() and new.element_size() == 1:
            new, old = new.float(), old.float()
        same = (new == old) | (torch.isnan(new) & torch.isnan(old))
        if not bool((torch.isfinite(new) | same).all()):
            check_finite({name: value}, {name: sent})


# One weight


def _factors(
    plan: WeightPlan, keys: Mapping[str, str], state: State, private: Collection[str]
) -> State:
    like = next(state[key] for key in keys.values() if key not in private)
    return {
        name: like.new_zeros(plan.factor_shape(name)) if key in private else state[key]
        for name, key in keys.items()
    }


def _surely_finite(plan: WeightPlan, factors: State) -> bool:
    """Return whether all entries, and all values on the way to them, are within the dtype's range.

    The methods of the paper are sums of products. With each factor's largest absolute value, and 1
    where it is smaller, one product bounds all of them, whatever is multiplied first.
    """
    if not is_known(plan.method):
        return False
    terms = plan.rank ** (2 if plan.kernel else 1)  # of each entry of an operand
    bound = max(1.0, plan.outer)
    for gain in plan.gains:
        bound *= 2.0 * terms * max(1.0, gain)  # pFedPara adds 1 to an operand
    for value in factors.values():
        if value.numel():
            bound *= max(1.0, *map(abs, map(float, torch.aminmax(value))))
    dtype = next(iter(factors.values())).dtype
    return bound < torch.finfo(dtype).max / 4  # a quarter, for roundings


def _blocks(plan: WeightPlan, factors: State) -> Iterator[Tensor]:
    """Yield the composed weight, some rows at a time."""
    size = next(iter(factors.values())).element_size()
    rows = max(1, BLOCK // (size * prod(plan.shape[1:])))
    for first in range(0, plan.shape[0], rows):
        part = {n: v[first : first + rows] if n[0] == "x" else v for n, v in factors.items()}
        yield plan.compose_rows(part).detach()
