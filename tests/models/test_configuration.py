"""Choosing mechanisms: the constructor, from_pretrained, per layer, switching, and what is refused when."""

import json

import pytest
import torch
import transformers
from helpers import BERT, GPT2, VIT, inputs_of
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

import hf_attn
from hf_attn import InvalidOption, UnknownMechanism, Unsupported
from hf_attn.models.spec import canonical, per_layer


def test_the_constructor_takes_a_name_and_options():
    config = hf_attn.AttnBertConfig(**BERT, attn_implementation="rfa", attention_options={"num_features": 16})
    assert config.attention == {"default": {"name": "rfa", "num_features": 16}}
    assert config.attention_options == {"num_features": 16}
    assert config._attn_implementation == "rfa"
    model = hf_attn.AttnBertModel(config)
    assert hf_attn.layer_names(model) == ["rfa", "rfa"]
    assert model.encoder.layer[0].attention.self.mechanism.projection.shape == (4, 16, 8)


def test_softmax_is_what_a_config_without_a_choice_has():
    config = hf_attn.AttnBertConfig(**BERT)
    assert config.attention == {"default": {"name": "softmax"}}
    assert hf_attn.layer_names(hf_attn.AttnBertModel(config)) == ["softmax", "softmax"]


def test_transformers_names_of_exact_attention_are_understood():
    config = hf_attn.AttnBertConfig(**BERT, attn_implementation="eager")
    assert config.attention == {"default": {"name": "softmax", "backend": "math"}}


def test_per_layer_choice_is_saved_and_restored(tmp_path):
    model = hf_attn.AttnBertForMaskedLM(
        hf_attn.AttnBertConfig(
            **BERT, attn_implementation={"default": "softmax", "1": {"name": "rfa", "num_features": 8}}
        )
    ).eval()
    assert hf_attn.layer_names(model) == ["softmax", "rfa"]
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "attn_bert"
    assert stored["attention"] == {"default": {"name": "softmax"}, "1": {"name": "rfa", "num_features": 8}}
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert hf_attn.layer_names(loaded) == ["softmax", "rfa"]
    with torch.no_grad():
        assert torch.equal(loaded(**inputs_of(model)).logits, model(**inputs_of(model)).logits)


def test_naming_a_checkpoints_own_mechanism_keeps_its_options(tmp_path):
    config = hf_attn.AttnBertConfig(**BERT, attn_implementation="rfa", attention_options={"num_features": 16})
    hf_attn.AttnBertForMaskedLM(config).save_pretrained(tmp_path)
    again = hf_attn.AttnBertForMaskedLM.from_pretrained(tmp_path, attn_implementation="rfa")
    assert again.config.attention["default"] == {"name": "rfa", "num_features": 16}
    switched = hf_attn.AttnBertForMaskedLM.from_pretrained(tmp_path, attn_implementation="softmax")
    assert hf_attn.layer_names(switched) == ["softmax", "softmax"]


def test_a_stock_config_is_taken_too():
    model = hf_attn.AttnBertModel(BertConfig(**BERT, attn_implementation="rfa"))
    assert hf_attn.layer_names(model) == ["rfa", "rfa"]


def test_options_that_the_family_fills_in_are_stored(tmp_path):
    config = hf_attn.AttnViTConfig(**VIT, attn_implementation="ripple")
    model = hf_attn.AttnViTForImageClassification(config)
    assert model.config.attention["default"] == {"name": "ripple", "r_cap": 5}
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention["default"]["r_cap"] == 5


def test_switching_in_place_keeps_the_weights():
    model = hf_attn.AttnBertForMaskedLM(hf_attn.AttnBertConfig(**BERT, attn_implementation="rfa")).eval()
    with torch.no_grad():
        before = model(**inputs_of(model)).logits
        model.set_attn_implementation("softmax")
        assert hf_attn.layer_names(model) == ["softmax"] * 2
        exact = model(**inputs_of(model)).logits
        stock = BertForMaskedLM(BertConfig(**BERT)).eval()
        stock.load_state_dict(model.state_dict())
        torch.testing.assert_close(exact, stock(**inputs_of(stock)).logits, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(before, exact)
    model.set_attn_implementation("rfa", attention_options={"num_features": 4})
    assert model.config.attention == {"default": {"name": "rfa", "num_features": 4}}


@pytest.mark.parametrize(
    "family, mechanism, options, error, words",
    [
        ("bert", "ripple", {}, Unsupported, "2-D token grid"),
        ("gpt2", "ripple", {}, Unsupported, "causal"),
        ("bert", "rifa", {}, UnknownMechanism, "did you mean 'rfa'"),
        ("bert", "rfa", {"num_feature": 4}, InvalidOption, "did you mean 'num_features'"),
        ("bert", "rfa", {"num_features": 0}, InvalidOption, "num_features=0"),
        ("vit", "ripple", {"r_cap": -1}, InvalidOption, "r_cap=-1"),
    ],
)
def test_what_cannot_be_is_refused_at_construction_and_at_load(family, mechanism, options, error, words, tmp_path):
    name = {"bert": "AttnBertForMaskedLM", "vit": "AttnViTForImageClassification", "gpt2": "AttnGPT2LMHeadModel"}[
        family
    ]
    cls, sizes = getattr(hf_attn, name), {"bert": BERT, "vit": VIT, "gpt2": GPT2}[family]
    with pytest.raises(error, match=words):
        cls(cls.config_class(**sizes, attn_implementation=mechanism, attention_options=options))
    stock = getattr(transformers, name.removeprefix("Attn"))
    stock(stock.config_class(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(error, match=words):
        cls.from_pretrained(tmp_path, attn_implementation=mechanism, attention_options=options)
    assert issubclass(error, ValueError)


def test_an_unknown_name_lists_what_is_registered():
    with pytest.raises(UnknownMechanism, match="Registered: softmax, rfa"):
        hf_attn.get_mechanism("softmaxx")


def test_cross_attention_of_a_mechanism_without_it_is_refused_at_construction():
    config = hf_attn.AttnBertConfig(
        **BERT,
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="ripple",
        attention_options={"allow_1d": True, "r_cap": 3},
    )
    with pytest.raises(Unsupported, match="cross-attention"):
        hf_attn.AttnBertModel(config)


@pytest.mark.parametrize(
    "attention, words",
    [
        ({"default": "softmax", "x": "rfa"}, "'x'"),
        ({"default": 3}, "entry 3"),
        ({"default": {"num_features": 3}}, "'name'"),
        (7, "got 7"),
        ({"default": {"name": "rfa", "nose": 1}}, "'nose'"),
    ],
)
def test_malformed_choices(attention, words):
    with pytest.raises(InvalidOption, match=words):
        canonical(attention)


def test_layers_by_range():
    spec = canonical({"default": "softmax", "1-2,5": "rfa"})
    assert [e["name"] for e in per_layer(spec, 6)] == ["softmax", "rfa", "rfa", "softmax", "softmax", "rfa"]
    with pytest.raises(InvalidOption, match="layers 0 to 3"):
        per_layer(spec, 4)
    with pytest.raises(InvalidOption, match="layer 2 twice"):
        per_layer(canonical({"default": "softmax", "1-2": "rfa", "2-3": "rfa"}), 6)


def test_plain_transformers_refuses_our_checkpoints(tmp_path):
    """A converted checkpoint cannot be run as softmax by mistake: its model type is our own."""
    hf_attn.AttnBertForMaskedLM(hf_attn.AttnBertConfig(**BERT, attn_implementation="rfa")).save_pretrained(tmp_path)
    import subprocess
    import sys

    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "attn_bert" in done.stderr


def test_a_config_survives_json_copy_and_diff():
    config = hf_attn.AttnGPT2Config(**GPT2, attn_implementation="rfa")
    again = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.attention == config.attention and again.n_embd == config.n_embd
    assert json.loads(config.to_json_string())["attention"] == {"default": {"name": "rfa"}}
