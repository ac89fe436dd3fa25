"""The committed configurations are valid and train; every mechanism trains in each family it is defined for."""

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import yaml

import hf_attn
from hf_attn.recipes.arguments import read
from hf_attn.recipes.families import build_model, check_model, configure
from hf_attn.recipes.train import make_trainer, prepare, train
from tests.helpers import families_of

ROOT = Path(__file__).parents[2]
EXPERIMENTS = {"world_model"}
"""Configurations that a script of their own reads, not `hf-attn train`."""
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in EXPERIMENTS)
TINY = {
    "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 64, "max_examples": 4, "warmup_steps": 0,
    "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "save_strategy": "steps",
    "samples": 1, "disable_tqdm": True,
}  # fmt: skip
SMALL = {
    "gau": {"config.hidden_size": 16, "config.num_hidden_layers": 1, "config.query_key_dim": 8},
    "bert": {"config.hidden_size": 16, "config.num_hidden_layers": 1, "config.num_attention_heads": 2, "config.intermediate_size": 16},
    "gpt2": {"config.n_embd": 16, "config.n_layer": 1, "config.n_head": 2},
    "vit": {"config.hidden_size": 16, "config.num_hidden_layers": 2, "config.num_attention_heads": 2, "config.intermediate_size": 16},
}  # fmt: skip
BASE = {"bert": "bert_softmax_mlm.yaml", "gpt2": "gpt2_softmax_lm.yaml", "vit": "vit_ripple_digits.yaml"}
"""Family -> the configuration that a mechanism is an override of."""


def overrides(family: str, data: str, folder: Path) -> dict:
    text = {"max_length": 36, "vocab_size": 300} if data == "pydoc" else {}
    generated = {"dataset_options.train_examples": 16, "dataset_options.held_out_examples": 8} if data in ("listops", "mqar") else {}  # fmt: skip
    return {**TINY, **SMALL[family], **text, **generated, "output_dir": str(folder)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_committed_configuration_trains(path, tmp_path):
    values = yaml.safe_load(path.read_text())
    result = train(path, overrides(values["family"], values["dataset"], tmp_path / "run"))
    assert result.reload_difference == 0 and all(map(math.isfinite, result.metrics.values()))


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
    """The recipe of a mechanism is the family's configuration with `attn_implementation` and its example options."""
    recipe, base = prepared_for(family, tmp_path_factory.getbasetemp() / family)
    example = hf_attn.get_mechanism(name).example
    # a grid is the model's, not the example's
    options = {key: value for key, value in example.items() if key != "grid_size"}
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
