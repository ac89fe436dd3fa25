"""The committed configurations are valid and train; every mechanism trains in each family it is defined for."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest
import yaml

import hf_attn
from hf_attn.errors import InvalidOption, UnknownMechanism
from hf_attn.recipes.arguments import parse_overrides, read
from hf_attn.recipes.data_hub import source_of
from hf_attn.recipes.families import build_model, check_model, configure
from hf_attn.recipes.tasks import task_named
from hf_attn.recipes.train import make_trainer, prepare, train
from tests.helpers import families_of

ROOT = Path(__file__).parents[2]
EXPERIMENTS = {"world_model"}
"""Configurations that a script of their own reads, not `hf-attn train`."""
CONFIGS = [
    path
    for folder in ("configs", "configs/mechanisms")
    for path in sorted((ROOT / folder).glob("*.yaml"))
    if path.stem not in EXPERIMENTS
]
TINY = {
    "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 64, "max_examples": 4, "warmup_steps": 0,
    "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "save_strategy": "steps",
    "samples": 1, "disable_tqdm": True,
}  # fmt: skip
SMALL = {
    "gau": {"config.hidden_size": 16, "config.num_hidden_layers": 1, "config.query_key_dim": 8},
    "bert": {"config.hidden_size": 16, "config.num_hidden_layers": 1, "config.num_attention_heads": 2, "config.intermediate_size": 16},
    "gpt2": {"config.n_embd": 16, "config.n_layer": 1, "config.n_head": 2},
    "vit": {"config.hidden_size": 16, "config.num_hidden_layers": 4, "config.num_attention_heads": 2, "config.intermediate_size": 16},
}  # fmt: skip
BASE = {"bert": "bert_softmax_mlm.yaml", "gpt2": "mechanisms/lm.yaml", "vit": "mechanisms/digits.yaml"}
"""Family -> the configuration that a mechanism is an override of."""
LISTED = [
    (family, name) for family in ("gpt2", "vit") for name in hf_attn.list_mechanisms() if family in families_of(name)
]
"""Family and mechanism of every recipe in configs/mechanisms."""


def overrides(family: str, data: str, folder: Path) -> dict:
    text = {"max_length": 36, "vocab_size": 300} if data == "pydoc" else {}
    generated = {"dataset_options.train_examples": 16, "dataset_options.held_out_examples": 8} if data in ("listops", "mqar") else {}  # fmt: skip
    return {**TINY, **SMALL[family], **text, **generated, "output_dir": str(folder)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_committed_configuration_trains(path, tmp_path):
    values = yaml.safe_load(path.read_text())
    result = train(path, overrides(values["family"], values["dataset"], tmp_path / "run"))
    assert result.reload_difference == 0 and all(map(math.isfinite, result.metrics.values()))


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.startswith("gau")], ids=lambda path: path.stem)
def test_the_overrides_in_the_comments_make_models_of_that_size(path):
    def parameters(words):
        config = hf_attn.GauConfig(**read(path, parse_overrides(words)).model.config, vocab_size=99)
        return sum(p.numel() for p in hf_attn.GauModel(config).parameters())

    comments = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    found = re.findall(r"(--config\S*=)(?:'([^']*)'|(\w+))", comments)
    assert len(found) == 2
    for key, quoted, bare in found:
        assert 0.9 < parameters([f"{key}{quoted or bare}"]) / parameters([]) < 1.1


@functools.cache
def prepared_for(family: str, folder: Path):
    """Recipe and data of a family, shared by its mechanisms."""
    path = ROOT / "configs" / BASE[family]
    changes = {
        **overrides(family, yaml.safe_load(path.read_text())["dataset"], folder),
        "max_steps": 3, "logging_strategy": "steps", "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
    }  # fmt: skip
    recipe = read(path, changes)
    return recipe, prepare(recipe)


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name in hf_attn.list_mechanisms() for family in families_of(name)]
)
def test_every_mechanism_trains_as_an_override(name, family, tmp_path_factory):
    """The recipe of a mechanism is the family's configuration with `attn_implementation`; its options are the file's, or
    the example's where the file lists none."""
    recipe, base = prepared_for(family, tmp_path_factory.getbasetemp() / family)
    options = hf_attn.get_mechanism(name).example
    if (family, name) in LISTED:
        options = read(ROOT / "configs" / BASE[family], {"attn_implementation": name}).model.attention_options
    arguments = dataclasses.replace(recipe.model, attn_implementation=name, attention_options=options)
    check_model(arguments, base.task)
    fields = {
        key: getattr(base.setting.config, key, None)
        for key in ("vocab_size", "max_position_embeddings", "pad_token_id")
    }
    model = build_model(arguments, configure(arguments, base.setting.labels, fields), base.task)
    trainer = make_trainer(recipe, dataclasses.replace(base, model=model))
    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    moved = {key for key, value in model.named_parameters() if not value.equal(before[key])}
    # in the last layer of a ViT, what belongs to the queries of patches has no gradient: only [CLS] is classified
    own = {key for key in before if ".mechanism." in key and "layers.1" not in key}
    assert not own or own & moved, "training leaves the mechanism's parameters alone"
    assert len(moved - own) > 5


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_every_mechanism_of_a_family_is_listed(family):
    """A newly registered mechanism must be added to the files that say what it needs."""
    listed = yaml.safe_load((ROOT / "configs" / BASE[family]).read_text())["mechanisms"]
    assert sorted(listed) == sorted(name for of, name in LISTED if of == family)


@pytest.mark.parametrize(("family", "name"), LISTED)
def test_what_is_listed_for_a_mechanism_fits_the_model(family, name):
    path = ROOT / "configs" / BASE[family]
    entry = yaml.safe_load(path.read_text())["mechanisms"][name]
    recipe = read(path, {"attn_implementation": name})
    assert recipe.name == f"{path.stem}-{name}" and recipe.model.attn_implementation == name
    assert recipe.model.attention_options == entry.get("attention_options", {})
    check_model(recipe.model, task_named(recipe.data.task or source_of(recipe.data).task))


BY_MECHANISM = {
    "attn_implementation": "softmax",
    "learning_rate": 1e-3,
    "mechanisms": {"lara": {"learning_rate": 2e-3, "attention_options": {"num_landmarks": 4}}, "rfa": {}},
    "output_dir": "runs/small-{mechanism}",
}


def test_an_entry_comes_on_top_of_the_file_and_an_override_on_top_of_both():
    plain, lara = read(BY_MECHANISM), read(BY_MECHANISM, {"attn_implementation": "lara"})
    assert (plain.name, plain.training.learning_rate, plain.model.attention_options) == ("small-softmax", 1e-3, {})
    assert (lara.name, lara.training.learning_rate) == ("small-lara", 2e-3)
    assert lara.model.attention_options == {"num_landmarks": 4} and "mechanisms" not in lara.given
    changes = {"attn_implementation": "lara", "learning_rate": 3e-3, "attention_options.mis_type": "mis-bh"}
    over = read(BY_MECHANISM, changes)
    assert over.training.learning_rate == 3e-3
    assert over.model.attention_options == {"num_landmarks": 4, "mis_type": "mis-bh"}
    assert BY_MECHANISM["mechanisms"]["lara"]["attention_options"] == {"num_landmarks": 4}


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"larra": {}}, UnknownMechanism, "lara"),
        ({"lara": {"learning_rat": 1}}, InvalidOption, "learning_rate"),
        ({"lara": "wide"}, InvalidOption, "mechanisms must map names"),
        (["lara"], InvalidOption, "mechanisms must map names"),
        ({"lara": {"attn_implementation": "rfa"}}, InvalidOption, "lara must not set attn_implementation"),
    ],
)
def test_entries_that_cannot_be_used_are_refused(table, error, message):
    with pytest.raises(error, match=message):
        read({**BY_MECHANISM, "mechanisms": table}, {"attn_implementation": "lara"})
