"""Models of Hugging Face transformers, built from a small config with random weights."""

import pytest
import torch

import fedpara_plugins as fedpara
from fedpara_plugins.layers import FactorisedLayer

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: `tox run -e core-models`"
)

TOKENS = torch.randint(3, 150, (4, 12), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 4,
}


def bert():
    config = transformers.BertConfig(vocab_size=150, max_position_embeddings=40, **SIZES)
    return transformers.BertForSequenceClassification(config)


def bert_mlm():
    config = transformers.BertConfig(vocab_size=150, max_position_embeddings=40, **SIZES)
    return transformers.BertForMaskedLM(config)


def gpt2():
    sizes = {"n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=150, bos_token_id=1, eos_token_id=2, **sizes, **dropout
    )
    return transformers.GPT2LMHeadModel(config)


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)
    )


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.003)


def labelled(**inputs):
    return {
        "output": lambda model: model(**inputs).logits,
        "loss": lambda model: model(**inputs, labels=LABELS).loss,
        "optimizer": adam,
    }


LANGUAGE = {
    "output": lambda model: model(TOKENS).logits,
    "loss": lambda model: model(TOKENS, labels=TOKENS).loss,
    "optimizer": adam,
}


def factorised(model):
    return {type(m).__name__ for m in model.modules() if isinstance(m, FactorisedLayer)}


def notes(model):
    return {row.name: row.note for row in fedpara.report(model).rows}


def test_bert(journey):
    padded = TOKENS.clone()
    padded[:, 9:] = 0
    model = journey(bert, **labelled(input_ids=padded, attention_mask=(padded > 0).long()))
    assert factorised(model) == {"FactorisedEmbedding", "FactorisedLinear"}
    table = model.bert.embeddings.word_embeddings
    assert table.padding_idx == 0
    assert not table.weight[0].any()


def test_bert_with_a_tied_head(journey):
    model = journey(bert_mlm, **LANGUAGE)
    head, table = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
    assert head.weight is table.weight
    assert notes(model)["bert.embeddings.word_embeddings"].endswith("cls.predictions.decoder")


def test_gpt2(journey):
    model = journey(gpt2, **LANGUAGE)
    assert factorised(model) == {"FactorisedEmbedding", "FactorisedConv1D"}
    assert sum(type(m).__name__ == "FactorisedConv1D" for m in model.modules()) == 8
    assert model.lm_head.weight is model.transformer.wte.weight
    assert notes(model)["transformer.wte"] == "dense: tied to lm_head"
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompt = TOKENS[:1, :5]
    expected = fedpara.to_dense(model).generate(prompt, **greedy)
    assert torch.equal(model.generate(prompt, **greedy), expected)


def test_vit(journey):
    model = journey(vit, **labelled(pixel_values=IMAGES))
    assert factorised(model) == {"FactorisedLinear"}
    assert "smaller side is 3" in notes(model)["vit.embeddings.patch_embeddings.projection"]


def test_the_dense_model_is_saved_and_loaded_the_usual_way(tmp_path):
    model = fedpara.convert(gpt2(), method="fedpara").eval()
    fedpara.to_dense(model).save_pretrained(tmp_path)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
