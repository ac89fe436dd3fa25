"""register, get, list, build: the records validate themselves, and unknown names meet their neighbours."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import hf_attn
from hf_attn import AttentionModule, Capabilities, InvalidOption, Mechanism, Options, UnknownMechanism, registry

every = pytest.mark.parametrize("name", hf_attn.list_mechanisms())


@dataclasses.dataclass(frozen=True)
class MeanOptions(Options):
    mechanism: ClassVar[str] = "mean_of_values"
    power: float = 1.0

    def check(self) -> None:
        self.number("power", 0, 2)


class Mean(AttentionModule):
    """Every query gets the mean of the visible values."""

    name = "mean_of_values"
    options_class = MeanOptions

    @classmethod
    def describe(cls, options):
        return Capabilities(attention_weights=True, cross=True)

    def weights(self, call):
        visible = call.visible()
        shape = (call.batch, self.num_heads, call.queries, call.keys)
        seen = (
            torch.ones(shape, dtype=call.query.dtype) if visible is None else visible.expand(shape).to(call.query.dtype)
        )
        return seen / seen.sum(-1, keepdim=True).clamp(min=1)

    def attend(self, call):
        return self.define(call)


RECORD = Mechanism("mean_of_values", "Mean", "none", "out_n = mean_m v_m", Mean, {})


@pytest.fixture
def mean():
    yield hf_attn.register(RECORD)
    registry._MECHANISMS.pop("mean_of_values")


def test_a_mechanism_of_ones_own_works_everywhere_at_once(mean):
    assert "mean_of_values" in hf_attn.list_mechanisms()
    module = hf_attn.build("mean_of_values", num_heads=2, head_dim=4)
    value = torch.randn(1, 2, 6, 4)
    out = module(value, value, value)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(value))
    assert "mean_of_values" in AttentionInterface() and "mean_of_values" in AttentionMaskInterface()
    config = hf_attn.AttnBertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9, attn_implementation="mean_of_values")  # fmt: skip
    assert hf_attn.layer_names(hf_attn.AttnBertModel(config)) == ["mean_of_values"]


@every
def test_one_call_registers_the_function_and_its_mask(name):
    assert name in AttentionInterface() and name in AttentionMaskInterface()


@every
def test_records_say_what_they_must(name):
    record = hf_attn.get_mechanism(name)
    assert record.name == name and record.title and record.paper and record.equation
    assert record.summary.endswith(".") and len(record.summary) < 140
    assert record.options_class.parse(**record.example) == record.options_class(**record.example)
    assert record.naive is record.module_class.naive


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "Mean"}, "lower case"),
        ({"name": "mean_"}, "lower case"),
        ({"name": "softmax"}, "registered already"),
        ({"name": "other_name"}, "must both be 'other_name'"),
        ({"module_class": torch.nn.Linear}, "AttentionModule"),
        ({"equation": ""}, "equation"),
        ({"example": {"pover": 1.0}}, "did you mean 'power'"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change, words):
    before = hf_attn.list_mechanisms()
    with pytest.raises(InvalidOption, match=words):
        hf_attn.register(dataclasses.replace(RECORD, **change))
    assert hf_attn.list_mechanisms() == before


def test_an_unknown_name_gives_the_near_match_and_the_list():
    with pytest.raises(UnknownMechanism, match=r"'sofmax' \(did you mean 'softmax'\?\)\. Registered: softmax, rfa"):
        hf_attn.build("sofmax", num_heads=1, head_dim=4)
    assert issubclass(UnknownMechanism, ValueError)


@pytest.mark.parametrize(
    "arguments",
    [{"num_heads": 0, "head_dim": 4}, {"num_heads": 2, "head_dim": 2.5}, {"num_heads": True, "head_dim": 4}],
)
def test_sizes_are_checked(arguments):
    with pytest.raises(InvalidOption, match="must be an integer of at least 1"):
        hf_attn.build("softmax", **arguments)


@every
def test_unknown_options_are_refused(name):
    with pytest.raises(InvalidOption, match=f"{name}.*'no_such_option'"):
        hf_attn.build(name, num_heads=2, head_dim=8, no_such_option=1)


@every
def test_options_are_frozen_plain_and_documented(name):
    options = hf_attn.get_mechanism(name).options_class
    instance = options.parse(**hf_attn.get_mechanism(name).example)
    for field in dataclasses.fields(options):
        assert field.default is not dataclasses.MISSING, "every option has a default"
        assert f"{field.name}:" in options.__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        instance.anything = 1


def test_public_names_are_all_importable():
    for name in hf_attn.__all__:
        assert getattr(hf_attn, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        hf_attn.nothing  # noqa: B018
