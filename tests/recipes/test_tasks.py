"""Every task trains, reloads and shows predictions; every family and data source reaches a model."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.recipes.arguments import read
from hf_attn.recipes.tasks import TASKS
from hf_attn.recipes.train import make_trainer, prepare, train

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2}
GAU = {"hidden_size": 16, "num_hidden_layers": 2, "query_key_dim": 8}
VIT = {"image_size": 8, "patch_size": 2, "encoder_stride": 2, **BERT}
MQAR = {"dataset": "mqar", "dataset_options": {"train_examples": 40, "held_out_examples": 8, "length": 16, "num_pairs": 2, "vocab_size": 32}}  # fmt: skip
LISTOPS = {"dataset": "listops", "dataset_options": {"train_examples": 40, "held_out_examples": 8}}
PYDOC = {"dataset": "pydoc", "max_length": 24, "vocab_size": 300}
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "max_examples": 12,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "samples": 2,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": "none",
}


def written(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TRAINING, "output_dir": str(folder / "run"), **changes}))
    return path


def tagged(folder: Path) -> Path:
    """A file of words with a tag each: numbers or not."""
    path = folder / "words.jsonl"
    rows = [{"words": ["on", str(i), "of", str(2 * i)], "ner_tags": [0, 1, 0, 1]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CASES = {
    "fill-mask": {"family": "bert", "config": BERT, **PYDOC},
    "fill-mask mqar": {"family": "bert", "config": BERT, **MQAR, "task": "fill-mask"},
    "text-generation": {"family": "gpt2", "config": GPT2, "task": "text-generation", **PYDOC},
    "text-generation mqar": {"family": "gpt2", "config": GPT2, **MQAR},
    "text-classification": {"family": "bert", "config": BERT, **LISTOPS},
    "text-classification gpt2": {"family": "gpt2", "config": GPT2, **LISTOPS},
    "fill-mask gau": {"family": "gau", "config": GAU, **PYDOC},
    "text-generation gau": {"family": "gau", "config": GAU, **PYDOC},
    "image-classification gau": {
        "family": "gau",
        "config": {**GAU, "image_size": 8, "patch_size": 2},
        "dataset": "digits",
    },
    "token-classification": {"family": "bert", "config": BERT, "vocab_size": 300},
    "image-classification": {"family": "vit", "config": VIT, "dataset": "digits"},
    "masked-image-modeling": {"family": "vit", "config": VIT, "dataset": "photos"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_task_trains_reloads_and_shows_predictions(case, tmp_path):
    recipe = {"task": case.split()[0], **CASES[case]}
    if case == "token-classification":
        recipe["dataset"] = str(tagged(tmp_path))
    result = train(written(tmp_path, **recipe))
    task = TASKS[recipe["task"]]
    assert result.reload_difference == 0
    for split in ("validation", "test"):
        assert {f"{split}_{name}" for name in (*task.objective.names, "loss")} <= set(result.metrics)
    assert len(result.samples) == 2
    card = (result.model_dir / "README.md").read_text()
    assert "### Predictions" in card and task.auto_class in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == task.pipeline
    assert str(tmp_path) not in card
    for sample in result.samples:
        assert sample.predicted in str(result)
    assert (result.model_dir / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (result.plan.folder / "manifest.json").is_file() and result.published is None
    if not task.images:
        assert AutoTokenizer.from_pretrained(result.model_dir).pad_token == "[PAD]"


def test_the_table_covers_the_six_tasks():
    assert list(TASKS) == [
        "fill-mask", "text-generation", "text-classification", "token-classification", "image-classification",
        "masked-image-modeling",
    ]  # fmt: skip


def test_a_family_without_a_file_of_its_own_trains(tmp_path):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}  # fmt: skip
    result = train(written(tmp_path, task="text-generation", family="llama", attn_implementation="rfa", config=config, **PYDOC))  # fmt: skip
    stored = json.loads((result.model_dir / "config.json").read_text())
    assert stored["model_type"] == "attn_llama" and stored["attention"]["default"]["name"] == "rfa"


def test_training_goes_on_from_a_checkpoint_with_another_mechanism(tmp_path):
    first = train(written(tmp_path, family="bert", config=BERT, **PYDOC))
    changes = {"model": str(first.model_dir), "dataset": "pydoc", "max_length": 24}
    second = train(written(tmp_path, output_dir=str(tmp_path / "second"), attn_implementation="rfa", attention_options={"num_features": 4}, **changes))  # fmt: skip
    stored = json.loads((second.model_dir / "config.json").read_text())
    assert stored["attention"]["default"]["name"] == "rfa" and stored["attention"]["default"]["num_features"] == 4
    assert "from the checkpoint model" in (second.model_dir / "README.md").read_text()
    # another task on the same checkpoint, which keeps its mechanism; the head is new
    third = train(
        written(tmp_path, output_dir=str(tmp_path / "third"), model=str(second.model_dir), max_length=24, **LISTOPS)
    )
    stored = json.loads((third.model_dir / "config.json").read_text())
    assert stored["attention"]["default"]["name"] == "rfa" and len(stored["id2label"]) == 10
    assert stored["architectures"] == ["AttnBertForSequenceClassification"]


def test_a_stock_checkpoint_is_converted(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from hf_attn.recipes.tokenizer import train_tokenizer

    folder = tmp_path / "stock"
    tokenizer = train_tokenizer(["some text"], vocab_size=270)
    BertForMaskedLM(BertConfig(**BERT, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = train(written(tmp_path, model=str(folder), dataset="pydoc", max_length=24, attn_implementation="mra", attention_options={"block_size": 4}))  # fmt: skip
    stored = json.loads((result.model_dir / "config.json").read_text())
    assert stored["model_type"] == "attn_bert" and stored["attention"]["default"]["name"] == "mra"


def test_label_smoothing_reaches_the_loss(tmp_path):
    changes = {"family": "bert", "config": {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, **PYDOC, "max_steps": 1}  # fmt: skip
    plain, smooth = (
        train(written(tmp_path, label_smoothing_factor=factor, output_dir=str(tmp_path / str(factor)), **changes))
        for factor in (0.0, 0.5)
    )
    # measured without smoothing of the trained model's own numbers, so the losses differ by what was learnt and smoothed
    assert smooth.metrics["test_loss"] != plain.metrics["test_loss"]
    assert prepare(read(written(tmp_path, label_smoothing_factor=0.5, **changes))).task.objective.smoothing == 0.5


def test_gradient_accumulation_changes_no_step(tmp_path):
    """Four accumulated batches of one give the step of one batch of four, also where targets are unevenly spread."""
    calm = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    losses = []
    for batch, steps in ((4, 1), (1, 4)):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 3}
        recipe = read(written(tmp_path, family="bert", config=calm, **LISTOPS, task="text-classification", **changes))
        trainer = make_trainer(recipe, prepare(recipe))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True, "use_cpu": True}, {"gradient_checkpointing": True}, {"torch_compile": True, "torch_compile_backend": "eager"}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_trainer_options_pass_through(changes, tmp_path):
    result = train(written(tmp_path, family="bert", config=BERT, **PYDOC, **changes))
    assert result.reload_difference == 0 and result.metrics["test_perplexity"] < 400


def test_gradient_checkpointing_changes_no_gradient_of_a_random_mechanism(tmp_path):
    losses = []
    for on in (False, True):
        recipe = read(written(tmp_path, family="bert", config=BERT, attn_implementation="rfa", **PYDOC, gradient_checkpointing=on, max_steps=3))  # fmt: skip
        trainer = make_trainer(recipe, prepare(recipe))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "fill-masc"}, InvalidOption, "did you mean 'fill-mask'"),
        ({"family": "vit", "config": {}}, Unsupported, "Families for it: bert"),
        ({"family": "gpt2", "config": {}}, Unsupported, "AutoModelForMaskedLM has no model of type 'attn_gpt2'"),
        ({"dataset": "digits"}, InvalidInput, "columns text"),
        ({"dataset": "nowhere/data.csv"}, InvalidInput, "no such file or folder"),
        ({"dataset": "pydok"}, InvalidOption, "did you mean 'pydoc'"),
        ({"dataset_options": {"seed": 1}}, InvalidOption, "pydoc has no option 'seed'"),
        ({"columns": {"txt": "a"}}, InvalidOption, "did you mean 'text'"),
        ({"streaming": True}, Unsupported, "cannot be streamed"),
        ({"model": "nowhere/model", "config": {}}, InvalidInput, "cannot be loaded"),
        ({"model": "nowhere/model"}, InvalidOption, "has its own"),
        ({"config": {**BERT, "vocab_size": 10}}, InvalidOption, "config.vocab_size=10"),
        ({"config": {**BERT, "max_position_embeddings": 8}}, InvalidOption, "Set max_length: 8"),
        ({"attn_implementation": "ripple"}, Unsupported, "ripple"),
        ({"family": "gau", "attn_implementation": "rfa", "config": GAU}, Unsupported, "has attention of its own"),
        ({"tokenizer": "nowhere/tokenizer"}, InvalidInput, "no tokenizer can be loaded"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_refused_before_training(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(written(tmp_path, **{"task": "fill-mask", "family": "bert", "config": BERT, **PYDOC, **changes}))


def test_samples_can_be_left_out(tmp_path):
    result = train(written(tmp_path, family="bert", config=BERT, **PYDOC, samples=0))
    assert result.samples == () and "### Predictions" not in (result.model_dir / "README.md").read_text()


def test_a_recipe_may_be_a_dict(tmp_path):
    values = {**TRAINING, "family": "bert", "config": BERT, **PYDOC, "output_dir": str(tmp_path / "run")}
    recipe = read(values, {"config.hidden_size": 8})
    assert recipe.model.config["hidden_size"] == 8 and values["config"]["hidden_size"] == 16
    with pytest.raises(InvalidOption, match="the recipe: unknown key 'familie' .did you mean 'family'"):
        read({**values, "familie": "bert"})
