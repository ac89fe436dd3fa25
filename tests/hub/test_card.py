"""Model cards: metadata the Hub can read, the mechanism's equation, and equal bytes for equal runs."""

import dataclasses
from pathlib import Path

import pytest
import yaml

import hf_attn
from hf_attn.errors import InvalidInput
from hf_attn.hub.card import (
    CardFacts,
    Evaluation,
    Fidelity,
    Speed,
    eval_results,
    model_card,
    template_path,
)
from hf_attn.hub.card_check import check_card
from hf_attn.hub.families import attention_of, capability_rows
from hf_attn.recipes.data import DATASETS

SIZES = {"image_size": 8, "patch_size": 2, "encoder_stride": 2, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip


def facts(attention="ripple", options=None, **changes) -> CardFacts:
    config = hf_attn.AttnViTConfig(**SIZES, attn_implementation=attention, attention_options=options or {})
    config = hf_attn.AttnViTForImageClassification(config).config
    values = {
        "name": "vit-digits",
        "repo_id": None,
        "config": config,
        "parameters": 12345,
        "dataset": DATASETS["digits"],
        "split_sizes": {"train": 1257, "validation": 270, "test": 270},
        "split_seed": 0,
        "arguments": {"learning_rate": 0.001, "output_dir": "/home/someone/runs", "config": {"hidden_size": 16}},
        "metrics": {"validation_accuracy": 0.96, "test_accuracy": 0.95, "test_loss": 0.2},
        "best_checkpoint": True,
        "notes": "Read this.",
        "curve": "training_curve.png",
    }
    return CardFacts(**{**values, **changes})


def front_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_equal_facts_make_equal_bytes():
    assert str(model_card(facts())).encode() == str(model_card(facts())).encode()


def test_metadata():
    front = front_of(str(model_card(facts())))
    assert front["tags"] == ["hf_attn", "ripple"]
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "image-classification"
    assert front["metrics"] == ["accuracy"]
    (index,) = front["model-index"]
    assert index["name"] == "vit-digits"
    assert index["results"][0]["dataset"] == {"name": "scikit-learn digits", "type": "digits", "split": "test"}
    assert index["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.95}, {"type": "loss", "value": 0.2}]


@pytest.mark.parametrize("name", hf_attn.list_mechanisms())
def test_the_card_carries_the_registry_record(name):
    record = hf_attn.get_mechanism(name)
    options = record.example
    card = str(model_card(facts(name, options)))
    (mechanism,) = attention_of(facts(name, options).config)
    assert record.equation in card and record.paper in card and record.title in card
    assert f"`{name}` attention in all layers" in card
    for option, value in mechanism.options:
        assert f"| `{option}` | {value} |" in card
    for cell, value in mechanism.capabilities:
        assert f"| {cell} | {value} |" in card
    for mode in mechanism.derived:
        assert mode in card


def test_what_is_not_in_the_paper_is_marked():
    card = str(model_card(facts()))
    assert "Derived from the definition, not in the paper: CLS token." in card
    assert "Unverified: there is no official implementation" in card
    assert "Unverified" not in str(model_card(facts("softmax")))


def test_a_model_with_several_mechanisms_lists_each_with_its_layers():
    card = str(model_card(facts({"default": "softmax", "1-2": {"name": "ripple", "r_cap": 2}})))
    assert "`softmax` attention in all other layers, `ripple` attention in layers 1-2" in card
    assert "| `r_cap` | 2 |" in card
    assert front_of(card)["tags"] == ["hf_attn", "softmax", "ripple"]


def test_a_mechanism_in_two_places_is_one_tag():
    card = model_card(facts({"default": "softmax", "1": {"name": "ripple", "r_cap": 2}, "2": "ripple"}))
    assert front_of(str(card))["tags"] == ["hf_attn", "softmax", "ripple"]


def test_how_to_load_training_and_notes():
    card = str(model_card(facts(repo_id="someone/model")))
    assert 'AutoModelForImageClassification.from_pretrained("someone/model")' in card
    assert "pip install hf_attn" in card and "import hf_attn" in card
    assert "1257 train, 270 validation, 270 test" in card and "12,345 parameters" in card
    assert "| `learning_rate` | 0.001 |" in card and "| `config.hidden_size` | 16 |" in card
    assert "](training_curve.png)" in card and "- Read this." in card
    assert "/home/someone" not in card
    assert "training_curve" not in str(model_card(facts(curve=None)))


def test_a_number_that_is_none_is_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="test_accuracy"):
            model_card(facts(metrics={"test_accuracy": value}))


def test_a_model_without_mechanisms_is_refused():
    import transformers

    with pytest.raises(InvalidInput, match="carries no attention mechanisms"):
        model_card(facts(config=transformers.ViTConfig(**SIZES)))


def test_every_capability_has_a_row():
    capabilities = hf_attn.get_mechanism("ripple").capabilities
    assert len(capability_rows(capabilities)) == len(dataclasses.fields(capabilities))
    assert ("grid", "used") in capability_rows(capabilities) and ("cross", "no") in capability_rows(capabilities)


def test_the_template_is_found():
    assert template_path().name == "template.md.jinja"


EXTRA = {
    "dataset": None,
    "metrics": {},
    "curve": None,
    "base_model": "google-bert/bert-base-uncased",
    "license": "apache-2.0",
    "fidelity": Fidelity("the original", "20 sentences", (("mean cosine", "0.98"),), "fidelity.png"),
    "speed": Speed("2 CPU cores", "torch's own attention", "hf-attn bench rfa", ((512, 2.0, 4.0),)),
    "evaluations": (Evaluation("someone/bench", "test", "accuracy", 0.75, "zero-shot"),),
    "co2": {"emissions": 3.5, "source": "codecarbon", "training_type": "fine-tuning"},
}


def test_the_card_of_a_converted_model():
    known = facts(**EXTRA)
    known.config.architectures = ["AttnViTForImageClassification"]
    card = str(model_card(known))
    front = front_of(card)
    assert front["base_model"] == "google-bert/bert-base-uncased" and front["base_model_relation"] == "finetune"
    assert front["co2_eq_emissions"] == EXTRA["co2"] and front["pipeline_tag"] == "image-classification"
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.75}]
    assert "made from `google-bert/bert-base-uncased`" in card and "trained from scratch" not in card
    assert "| mean cosine | 0.98 |" in card and "](fidelity.png)" in card
    assert "| 512 | 2.00 | 4.00 | 0.50 |" in card and "Measured on 2 CPU cores with `hf-attn bench rfa`" in card
    assert "was not measured" not in card


def test_what_is_not_known_is_said_and_not_left_open():
    card = str(model_card(facts(**{**dict.fromkeys(EXTRA), "metrics": {}, "evaluations": ()})))
    front = front_of(card)
    assert not {"license", "base_model", "model-index", "metrics", "co2_eq_emissions"} & front.keys()
    assert "license is not known" in card and "was not measured" in card
    for heading in ("## Fidelity", "## Speed", "## Evaluation", "## Results"):
        assert heading not in card


def test_results_on_hub_datasets_go_into_their_own_file_as_well():
    ((path, text),) = eval_results(facts(**EXTRA)).items()
    assert path == ".eval_results/someone__bench.yaml"
    (entry,) = yaml.safe_load(text)
    assert entry["dataset"] == {"id": "someone/bench", "task_id": "test"} and entry["value"] == 0.75
    assert entry["notes"] == "accuracy, zero-shot"


def test_a_base_model_in_a_local_folder_stays_out_of_the_metadata():
    card = str(model_card(facts(**{**EXTRA, "base_model": "my model, not on the Hub"})))
    assert "base_model" not in front_of(card)


def test_the_committed_card_passes_its_own_rules():
    for path in sorted((Path(__file__).parents[2] / "model_cards").glob("*.md")):
        assert check_card(path.read_text(encoding="utf-8"))["tags"][0] == "hf_attn"
