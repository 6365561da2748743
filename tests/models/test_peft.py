"""Adapters of PEFT, the real library: over converted layers, and inside of a model to convert."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConversionError
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.models.adapters import why_adapter

peft = pytest.importorskip("peft", reason="needs peft: tox run -e core-models")


class Net(nn.Module):
    """Layers of the kinds that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(60, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.body = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 32)

    def forward(self, x):
        hidden = self.conv(self.words(x).mT).mT
        return self.head(self.norm(torch.relu(self.body(hidden))))


BODY = {"target_modules": ["body"]}
RANDOM = {"init_lora_weights": False, **BODY}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(**RANDOM),
    "lora of several": lambda: peft.LoraConfig(
        init_lora_weights=False, target_modules=["words", "conv", "body"]
    ),
    "rslora": lambda: peft.LoraConfig(use_rslora=True, **RANDOM),
    "dora": lambda: peft.LoraConfig(use_dora=True, **RANDOM),
    "dora conv": lambda: peft.LoraConfig(
        use_dora=True, init_lora_weights=False, target_modules=["conv"]
    ),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **RANDOM),
    "loha": lambda: peft.LoHaConfig(init_weights=False, **BODY),
    "loha conv": lambda: peft.LoHaConfig(init_weights=False, target_modules=["conv"]),
    "lokr": lambda: peft.LoKrConfig(init_weights=False, **BODY),
    "ia3": lambda: peft.IA3Config(init_ia3_weights=False, feedforward_modules=[], **BODY),
    "ia3 inputs": lambda: peft.IA3Config(
        init_ia3_weights=False, feedforward_modules=["body"], **BODY
    ),
    "vera": lambda: peft.VeraConfig(init_weights=False, **BODY),
    "oft": lambda: peft.OFTConfig(init_weights=False, oft_block_size=8, **BODY),
    "hra": lambda: peft.HRAConfig(init_weights=False, **BODY),
    "fourierft": lambda: peft.FourierFTConfig(init_weights=False, n_frequency=50, **BODY),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "tokens": lambda: peft.TrainableTokensConfig(
        init_weights=False, target_modules=["words"], token_indices=[1, 2]
    ),
    "saved head": lambda: peft.LoraConfig(modules_to_save=["head"], **RANDOM),
    "saved words": lambda: peft.LoraConfig(modules_to_save=["words"], **RANDOM),
}
OVER = [name for name in ADAPTERS if name != "adalora"]
"""Adapters over converted layers. AdaLoRA's sets ``requires_grad`` of a weight: torch refuses."""

ALIKE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapted(model, config):
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).eval()


def converted(method="fedpara"):
    torch.manual_seed(0)
    return fedpara.convert(Net(), method=method, gamma=0.3, min_size=0).eval()


def inputs():
    return torch.arange(35).reshape(5, 7)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


# Adapters over converted layers


@pytest.mark.parametrize("name", OVER)
def test_an_adapter_over_converted_layers_computes_what_it_does_over_dense_ones(name):
    base = converted()
    over_dense = adapted(fedpara.to_dense(base), ADAPTERS[name]())
    over_converted = adapted(base, ADAPTERS[name]())
    trained = peft.get_peft_model_state_dict(over_dense)
    # PEFT copies a converted layer whole, with its factors.
    if "saved" not in name:
        peft.set_peft_model_state_dict(over_converted, trained)
    torch.testing.assert_close(over_converted(inputs()), over_dense(inputs()), **ALIKE)


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("name", [name for name in OVER if name != "norms"])
def test_a_merge_is_refused_and_changes_nothing(name, merge):
    model = adapted(converted(), ADAPTERS[name]())
    expected, before = model(inputs()).detach(), state(model)
    with pytest.raises(ConversionError, match=r"weight is composed.*to_dense\(\)"):
        MERGES[merge](model)
    if "saved" not in name:  # PEFT puts such a layer in place before it comes to the others
        assert state(model).keys() == before.keys()
        torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=0)
    merged = fedpara.to_dense(model).merge_and_unload()
    assert not any(isinstance(layer, FactorisedLayer) for layer in merged.modules())
    torch.testing.assert_close(merged(inputs()), expected, **ALIKE)


def test_a_refused_merge_of_some_dense_layers_computes_the_same():
    base = fedpara.convert(Net(), gamma=0.3, min_size=0, exclude=["words", "body"]).eval()
    config = ADAPTERS["lora of several"]
    model = adapted(base, config())
    expected = model(inputs()).detach()
    with pytest.raises(ConversionError, match="weight is composed"):
        model.merge_and_unload()
    torch.testing.assert_close(model(inputs()), expected, **ALIKE)
    torch.testing.assert_close(
        fedpara.to_dense(model).merge_and_unload()(inputs()), expected, **ALIKE
    )


def test_an_adapter_of_dense_layers_is_merged_beside_converted_ones():
    model = adapted(converted("pfedpara"), ADAPTERS["norms"]())
    expected = model(inputs()).detach()
    torch.testing.assert_close(model.merge_and_unload()(inputs()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OVER)
def test_an_adapter_is_taken_away_again(name):
    base = converted()
    expected, before = base(inputs()).detach(), state(base)
    model = adapted(base, ADAPTERS[name]()).unload()
    assert state(model).keys() == before.keys()
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    torch.testing.assert_close(model(inputs()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_writes_to_the_base_is_refused(start):
    base = converted()
    before = state(base)
    with pytest.raises(ConversionError, match="weight is composed"):
        peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=start, **BODY))
    assert all(
        torch.equal(value, base.state_dict()[k]) for k, value in before.items() if k in state(base)
    )


def test_an_adapter_of_attention_is_refused():
    layer = nn.MultiheadAttention(32, 4)
    model = fedpara.convert(nn.ModuleDict({"attention": layer}), gamma=0.3, min_size=0)
    with pytest.raises(ConversionError, match=r"in_proj_weight.*cannot be removed.*to_dense\(\)"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["attention"]))


# Adapters inside of a model to convert


def trained(model):
    """Let everything be trained: what is frozen stays dense for that reason."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_stay_dense_and_peft_saves_them_as_ever(name):
    model = trained(adapted(Net(), ADAPTERS[name]()))
    saved = peft.get_peft_model_state_dict(model)
    found = fedpara.convert(copy.deepcopy(model), method="fedpara", gamma=0.3, min_size=0)
    again = peft.get_peft_model_state_dict(found)
    assert again.keys() == saved.keys()
    torch.testing.assert_close(again, saved, rtol=0, atol=0)
    factorised = [n for n, layer in found.named_modules() if isinstance(layer, FactorisedLayer)]
    allowed = ("words", "conv", "body", "head")
    for place in factorised:
        short = place.removeprefix("base_model.model.").replace("token_adapter.", "")
        assert short in {*allowed, *(f"{a}.base_layer" for a in allowed),
                         *(f"{a}.original_module" for a in allowed)}, place  # fmt: skip
    assert len(factorised) == 4


@pytest.mark.parametrize(
    ("name", "place", "reason"),
    [
        ("lora", "body.lora_A.default", "a part of an adapter (lora_A)"),
        ("dora", "body.lora_B.default", "a part of an adapter (lora_B)"),
        ("lora of several", "conv.lora_B.default", "a part of an adapter (lora_B)"),
        ("norms", "norm.ln_tuning_layers.default", "a part of an adapter (ln_tuning_layers)"),
        ("saved head", "head.modules_to_save.default", "PEFT trains and saves as a whole"),
        ("saved words", "words.modules_to_save.default", "PEFT trains and saves as a whole"),
    ],
)
def test_the_report_gives_the_reason(name, place, reason):
    model = trained(adapted(Net(), ADAPTERS[name]()))
    found = fedpara.convert(model, method="fedpara", gamma=0.3, min_size=0)
    notes = {row.name: row.note for row in fedpara.report(found).rows}
    assert reason in notes[f"base_model.model.{place}"]


def test_include_names_a_saved_layer_all_the_same():
    model = adapted(Net(), ADAPTERS["saved head"]())
    found = fedpara.convert(model, gamma=0.3, min_size=0, include=["*.head.modules_to_save.*"])
    head = found.get_submodule("base_model.model.head.modules_to_save.default")
    assert isinstance(head, FactorisedLayer)


def test_every_tuner_of_this_peft_is_known():
    """A new one belongs into the list of `fedpara_plugins.models.adapters`."""
    prompts = {"CPT", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"}
    other_names = {"POLY": "poly_router", "SHADOW": "shadow_down", "PVERA": "pvera_"}
    other_names["XLORA"] = "internal_xlora_classifier"
    known = {"CARTRIDGE", *prompts}  # the prompt encoder's, whose test follows
    for kind, prefix in peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if kind.name not in known:
            part = other_names.get(kind.name, f"{prefix}A")
            assert why_adapter(f"body.{part}.default", nn.Linear(2, 2)), (kind, prefix)


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
def test_prompts_stay_dense(kind):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 60}
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes)
    )
    task = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**task),
        "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=64, **task),
        "prefix": lambda: peft.PrefixTuningConfig(prefix_projection=True, **task),
    }[kind]()
    model = trained(peft.get_peft_model(base, config))
    saved = peft.get_peft_model_state_dict(model)
    twice = ["*.embed_tokens"]  # PEFT keeps it under a second name
    found = fedpara.convert(model, method="fedpara", gamma=0.3, min_size=0, exclude=twice)
    torch.testing.assert_close(peft.get_peft_model_state_dict(found), saved, rtol=0, atol=0)
    factorised = {n for n, layer in found.named_modules() if isinstance(layer, FactorisedLayer)}
    assert factorised
    assert not [n for n in factorised if "prompt" in n]
