"""Parts of a state: which part a record is, by names and shapes, and the spec of the part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import MismatchError, ModelSpec
from fedpara_plugins.models.state_parts import find_part, possible_names, shapes_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(48, 40), nn.LayerNorm(40))
        self.heads = nn.Module()
        self.heads.head = nn.Linear(40, 40)
        self.adapter = nn.Module()
        self.adapter.lora_A = nn.ModuleDict({"default": nn.Linear(40, 4, bias=False)})
        self.adapter.modules_to_save = nn.ModuleDict({"default": nn.Linear(40, 3)})


def converted(method: str = "fedpara", **options):
    torch.manual_seed(0)
    return fedpara.convert(Net(), method=method, gamma=0.3, min_size=256, **options)


def part_in(model, tensors):
    spec = ModelSpec.of(model)
    return find_part([(spec, shapes_of(model.state_dict()))], shapes_of(tensors))


def test_names_of_the_state_are_a_part_in_the_records_order() -> None:
    model = converted()
    names = [name for name in reversed(list(model.state_dict())) if name.startswith("heads")]
    part = part_in(model, {name: model.state_dict()[name] for name in names})
    assert part is not None
    assert part.spec.keys == tuple(names)
    assert list(part.spec.weights) == ["heads.head.weight"]


def test_the_state_of_a_module_is_a_part_without_its_prefix() -> None:
    model = converted()
    inside = model.heads.state_dict()
    part = part_in(model, inside)
    assert part is not None
    assert part.names == {name: f"heads.{name}" for name in inside}
    assert list(part.spec.weights) == ["head.weight"]
    whole = ModelSpec.of(model).dense_state(model.state_dict())
    torch.testing.assert_close(
        part.spec.dense_state(inside)["head.weight"], whole["heads.head.weight"]
    )


def test_shapes_tell_which_module_a_state_is_of() -> None:
    model = converted("none")
    part = part_in(model, model.body[0].state_dict())
    assert part is not None
    assert set(part.names.values()) == {"body.0.weight", "body.0.bias"}


def test_modules_of_one_form_cannot_be_told_apart() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    assert part_in(model, model["a"].state_dict()) is None


def test_names_of_an_adapter_lack_the_adapters_name() -> None:
    model = converted("none")
    state = model.state_dict()
    sent = {
        "adapter.lora_A.weight": state["adapter.lora_A.default.weight"],
        "adapter.weight": state["adapter.modules_to_save.default.weight"],
        "adapter.bias": state["adapter.modules_to_save.default.bias"],
    }
    part = part_in(model, sent)
    assert part is not None
    assert list(part.names.values()) == [
        "adapter.lora_A.default.weight",
        "adapter.modules_to_save.default.weight",
        "adapter.modules_to_save.default.bias",
    ]


def test_names_of_another_model_are_no_part() -> None:
    assert part_in(converted(), {"elsewhere.weight": torch.zeros(3)}) is None


def test_other_shapes_are_no_part_of_a_module() -> None:
    model = converted("none")
    assert part_in(model, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}) is None


def test_private_names_stay_private_under_their_other_names() -> None:
    model = converted("pfedpara")
    inside = model.heads.state_dict()
    part = part_in(model, inside)
    assert part is not None
    assert part.spec.private_keys == {"head.x2", "head.y2"}


def test_a_private_tensor_by_pattern_keeps_its_description() -> None:
    model = converted("none", private="heads.head.bias")
    part = part_in(model, model.heads.state_dict())
    assert part is not None
    assert set(part.spec.own) == {"head.bias"}
    assert torch.equal(part.spec.held["head.bias"], model.heads.head.bias)


def test_shared_factors_alone_are_a_factorised_weight() -> None:
    model = converted("pfedpara")
    shared = {k: v for k, v in model.heads.state_dict().items() if k not in ("head.x2", "head.y2")}
    part = part_in(model, shared)
    assert part is not None
    assert list(part.spec.weights) == ["head.weight"]
    assert part.spec.keys == tuple(shared)


def test_a_private_factor_without_the_shared_ones_is_refused() -> None:
    model = converted("pfedpara")
    state = model.state_dict()
    with pytest.raises(MismatchError, match="all factors of a weight or none"):
        part_in(model, {"heads.head.x2": state["heads.head.x2"]})


def test_an_unknown_shape_fits_any() -> None:
    spec = ModelSpec.of(converted("none"))
    found = list(possible_names(spec, {}, {"weight": None, "bias": None}))
    assert len(found) == 4  # two linear layers, a norm, an adapter's copy


def test_modules_of_two_models_cannot_be_told_apart() -> None:
    models = [nn.ModuleDict({name: nn.Linear(3, 3)}) for name in "ab"]
    known = [(ModelSpec.of(net), shapes_of(net.state_dict())) for net in models]
    inside = shapes_of(models[0]["a"].state_dict())
    assert find_part(known, inside) is None
    assert find_part(known[:1], inside) is not None
    whole = find_part(known, shapes_of(models[1].state_dict()))
    assert whole is not None
    assert set(whole.names) == {"b.weight", "b.bias"}
