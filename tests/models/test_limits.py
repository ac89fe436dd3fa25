"""A stranger's config: typed errors before anything is allocated, whatever stands in it."""

import contextlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

import hf_attn
from hf_attn.errors import HfAttnError, InvalidOption
from hf_attn.models.limits import SIZES, check_stored

BERT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}  # fmt: skip


def stored(**changes) -> dict:
    config = hf_attn.AttnBertConfig(**BERT, attn_implementation="rfa", attention_options={"num_features": 8})
    return {**json.loads(config.to_json_string(use_diff=False)), **changes}


def entry(**options) -> dict:
    return {"attention": {"default": {"name": "rfa", **options}}}


def test_a_good_config_passes():
    config = hf_attn.AttnBertConfig.from_dict(stored())
    assert config.attention["default"]["num_features"] == 8
    check_stored({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10**9}, "hidden_size=1000000000 must be an integer from 0 to"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers=2 must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_attention_heads": [2]}, "num_attention_heads"),
        ({"hidden_size": 65536, "num_hidden_layers": 1024, "intermediate_size": 2**20}, "about .* parameters"),
        ({"hidden_dropout_prob": "high"}, "AttnBertConfig cannot be made of it"),
        ({"attention": 3}, "must be a mechanism's name or a dict"),
        ({"attention": {"default": {"name": "nothing"}}}, "no attention mechanism is called 'nothing'"),
        ({"attention": {"default": {"name": "../../rfa"}}}, "no attention mechanism is called"),
        ({"attention": {"9" * 5000: "rfa"}}, "no layer range"),
        ({"attention": {str(i): "rfa" for i in range(2000)}}, "2000 entries"),
        (entry(num_features=10**15), "must be a number of at most"),
        (entry(num_features=float("nan")), "must be a number of at most"),
        (entry(num_features=[1] * 5000), "list of 5000 entries"),
        (entry(feature_map="x" * 300), "text of 300 characters"),
        (entry(evil=1), "unknown option 'evil'"),
        ({"a": [[[[[[[[[[[[[[1]]]]]]]]]]]]]]}, "not that deep"),
        ({"a": "x" * (1 << 21)}, "longer than a config"),
    ],
)
def test_hostile_configs_are_refused_with_a_name(change, message):
    with pytest.raises(HfAttnError, match=message):
        hf_attn.AttnBertConfig.from_dict(stored(**change))
    with pytest.raises(HfAttnError, match=message):
        AutoConfig.for_model("attn_bert").from_dict(stored(**change))


def test_a_config_that_is_no_object_is_refused():
    for value in ([], "x", None, 3):
        with pytest.raises(InvalidOption, match="must be a JSON object"):
            check_stored(value)


@pytest.mark.parametrize("where", ["new", "convert", "switch"])
def test_options_that_would_take_gigabytes_are_refused_before_they_do(where):
    options = {"num_features": 1 << 24}
    config = hf_attn.AttnBertConfig(
        **{**BERT, "num_hidden_layers": 6, "hidden_size": 64}, attn_implementation="softmax"
    )
    message = r"would take \d+\.\d GiB, more than 4\.0 GiB"
    with Real(), pytest.raises(InvalidOption, match=message):
        if where == "new":
            config.attention = {"default": {"name": "rfa", **options}}
            hf_attn.AttnBertModel(config)
        elif where == "convert":
            hf_attn.convert(hf_attn.AttnBertModel(config), "rfa", **options)
        else:
            hf_attn.AttnBertModel(config).set_attn_implementation("rfa", attention_options=options)


class Real(TorchDispatchMode):
    """Refuses large tensors that are not on the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, torch.Tensor) or out.device.type == "meta" or out.numel() < 10**7
        return out


NASTY = st.one_of(
    st.sampled_from(
        [None, True, False, -1, 0, 1, 2, 3, 2.5, float("nan"), float("inf"), 1e308, 2**31, 2**63, 10**30, -(2**40)]
    ),
    st.sampled_from(["", "x", "rfa", "../../etc/passwd", "\x00", "9" * 50, "default", "cuda:9", "float8"]),
    st.sampled_from([[], [[]], {}, [1, "a"], {"name": 3}, {"name": "rfa", "num_features": "many"}, {"0": "bert"}]),
)
KEYS = sorted({*stored(), *SIZES, "auto_map", "architectures", "dtype", "attn_implementation", "attention_options"})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.dictionaries(st.sampled_from(KEYS), NASTY, max_size=4), options=st.dictionaries(st.text(max_size=12), NASTY, max_size=2), name=st.sampled_from(["rfa", "lara", "hypercube", "eva", "mra", "x", ""]))  # fmt: skip
def test_fuzzed_configs_give_a_config_or_a_typed_error(changes, options, name):
    changes.setdefault("attention", {"default": {**options, "name": name}})
    try:
        config = hf_attn.AttnBertConfig.from_dict(stored(**changes))
    except HfAttnError:
        return
    assert config.attention["default"]["name"] in hf_attn.list_mechanisms()


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(hf_attn.list_mechanisms()), data=st.data())
def test_fuzzed_options_give_a_model_or_a_typed_error(name, data):
    names = hf_attn.get_mechanism(name).options_class.names() or ["none"]
    options = data.draw(st.dictionaries(st.sampled_from(names), NASTY, max_size=2))
    config = hf_attn.AttnBertConfig(**BERT)
    try:
        loaded = hf_attn.AttnBertConfig.from_dict({**stored(), "attention": {"default": {**options, "name": name}}})
        config.attention = loaded.attention
        with torch.device("meta"):
            hf_attn.AttnBertModel(config)
    except HfAttnError:
        pass


OWN = {
    "gau": hf_attn.GauConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, query_key_dim=8),
    "aa_resnet": hf_attn.AAResNetConfig.wide(10, 1, image_size=8, num_attention_heads=2, min_head_key_dim=2),
}


@pytest.mark.parametrize("name", OWN)
def test_fuzzed_configs_of_other_families_give_a_config_or_a_typed_error(name):
    good = json.loads(OWN[name].to_json_string(use_diff=False))

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(changes=st.dictionaries(st.sampled_from(sorted({*good, *SIZES, "auto_map"})), NASTY, max_size=4))
    def check(changes):
        try:
            config = type(OWN[name]).from_dict({**good, **changes})
        except HfAttnError:
            return
        assert type(config) is type(OWN[name])

    assert type(OWN[name]).from_dict(good).to_dict() == OWN[name].to_dict()
    check()
    # a number where a list belongs, and the other way round
    for key in {*good, *SIZES}:
        for value in (3, [3], [3, None]):
            with contextlib.suppress(HfAttnError):
                type(OWN[name]).from_dict({**good, key: value})


@pytest.mark.parametrize(
    ("name", "change"),
    [("gau", {"hidden_size": 2**16, "expansion": 256, "num_hidden_layers": 4}), ("aa_resnet", {"hidden_sizes": [2**16], "depths": [2**10]})],
)  # fmt: skip
def test_sizes_that_are_too_much_together_are_refused(name, change):
    good = json.loads(OWN[name].to_json_string(use_diff=False))
    with pytest.raises(InvalidOption, match="parameters, more than"):
        type(OWN[name]).from_dict({**good, **change})
