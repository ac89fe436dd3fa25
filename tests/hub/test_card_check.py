"""The rules of a card's metadata: what the Hub takes passes, what it would refuse or misread is named here."""

import pytest

from hf_attn.errors import InvalidInput
from hf_attn.hub.card_check import check_card


def card(*lines: str) -> str:
    return "\n".join(["---", *lines, "---", "", "# A model"])


GOOD = [
    "library_name: transformers",
    "license: apache-2.0",
    "base_model: google-bert/bert-base-uncased",
    "base_model_relation: finetune",
    "tags: [hf_attn, rfa]",
    "datasets: [squad, someone/data]",
    "co2_eq_emissions: {emissions: 12.5, source: codecarbon}",
    "model-index: [{name: x, results: [{task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: accuracy, value: 0.5}]}]}]",
]


def test_good_metadata_passes():
    assert check_card(card(*GOOD))["license"] == "apache-2.0"
    assert check_card("# no metadata") == {} == check_card("---\n---\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("license: Apache 2.0", "license is 'Apache 2.0'"),
        ("license: other", "needs a license_name"),
        ("pipeline_tag: [1]", "pipeline_tag"),
        ("tags: [a, a]", "twice"),
        ("tags: [1]", "must hold texts"),
        ("datasets: ['../etc']", "ids of the Hub"),
        ("base_model: /home/me/model", "ids of the Hub"),
        ("base_model_relation: finetune", "with a base_model"),
        ("base_model: a/b\nbase_model_relation: child", "must be one of adapter, finetune"),
        ("co2_eq_emissions: {emissions: -1}", "grams of CO2"),
        ("co2_eq_emissions: some", "grams of CO2"),
        ("score: .nan", "not a finite number"),
        ("model-index: [{name: x, results: [{metrics: [{value: .inf}]}]}]", "not a finite number"),
        ("model-index: [{name: x}]", "model-index does not have"),
        ("model-index: 3", "model-index does not have"),
        ("a: [", "not valid YAML"),
        ("- a", "must be a mapping"),
    ],
)
def test_bad_metadata_is_named(line, message):
    with pytest.raises(InvalidInput, match=message.replace("[", r"\[")):
        check_card(card(line))


def test_metadata_without_an_end_is_named():
    with pytest.raises(InvalidInput, match="no closing line"):
        check_card("---\nlicense: mit\n")
