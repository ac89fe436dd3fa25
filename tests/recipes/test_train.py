"""The training recipe: a tiny run end to end, its determinism, and everything it refuses before it starts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_attn.errors import InvalidInput, InvalidOption, UnknownMechanism, Unsupported
from hf_attn.hub.check import PROBE
from hf_attn.hub.pack import verify
from hf_attn.recipes.arguments import parse_overrides, read
from hf_attn.recipes.data import DATASETS, digits, to_pixels
from hf_attn.recipes.train import ReloadMismatch, check_model, check_reload, train

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "vit_ripple_digits.yaml"
TINY = {
    "family": "vit",
    "attn_implementation": "ripple",
    "config": {"image_size": 8, "patch_size": 2, "encoder_stride": 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "dataset": "digits",
    "max_examples": 40,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 20,
    "learning_rate": 1e-3,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "dataloader_pin_memory": False,
    "report_to": "none",
}  # fmt: skip


def written(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output_dir": str(folder / "run"), **changes}))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(written(tmp_path_factory.mktemp("run")))


def test_everything_a_model_needs_is_saved(run):
    files = {path.name for path in run.model_dir.iterdir()}
    expected = {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "training_curve.png",
        PROBE,
    }
    assert files == expected
    assert {path.name for path in run.plan.folder.iterdir()} == expected | {"manifest.json", "modeling_hf_attn.py"}
    picture = (run.model_dir / "training_curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000


def test_the_packed_folder_reloads_to_the_same_numbers(run):
    assert run.reload_difference == 0
    verify(run.plan.folder)
    saved, packed = (AutoModelForImageClassification.from_pretrained(f) for f in (run.model_dir, run.plan.folder))
    assert packed.config.attention["default"]["name"] == "ripple"
    assert packed.config.id2label == {i: str(i) for i in range(10)}
    pixels = torch.rand(3, 3, 8, 8)
    assert torch.equal(saved.eval()(pixels).logits, packed.eval()(pixels).logits)
    processor = AutoImageProcessor.from_pretrained(run.plan.folder)
    image = digits()["test"][0]["image"]
    assert processor([image], return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 8)


def test_the_card_states_the_metrics_of_the_run(run):
    card = (run.model_dir / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    accuracy = front["model-index"][0]["results"][0]["metrics"][0]
    assert accuracy == {"type": "accuracy", "value": round(run.metrics["test_accuracy"], 4)}
    assert str(run.model_dir.parent) not in card
    assert f"{run.metrics['validation_accuracy']:.4f}" in card


def test_the_printed_result_names_the_upload_command(run):
    text = str(run)
    assert f"hf-attn publish {run.plan.folder} --repo-id ORG/run" in text
    assert "model.safetensors" in text and "test accuracy" in text


def test_equal_seeds_make_equal_files_and_other_seeds_do_not(run, tmp_path):
    again = train(written(tmp_path))
    assert json.loads((run.plan.folder / "manifest.json").read_text()) == json.loads(
        (again.plan.folder / "manifest.json").read_text()
    )
    other = train(written(tmp_path), {"seed": 7, "output_dir": str(tmp_path / "other")})
    first, second = (load_file(r.model_dir / "model.safetensors") for r in (run, other))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_model_that_reloads_differently_is_refused(run):
    model = AutoModelForImageClassification.from_pretrained(run.model_dir).eval()
    raw = digits()["test"]
    data = to_pixels(digits(), AutoImageProcessor.from_pretrained(run.model_dir), 8)["test"]
    assert check_reload(model, run.model_dir, raw, data, 8) == 0
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    with pytest.raises(ReloadMismatch, match="Do not publish"):
        check_reload(model, run.model_dir, raw, data, 8)


def test_accelerate_launches_the_script(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu", str(ROOT / "scripts/train.py")]  # fmt: skip
    done = subprocess.run(
        [*command, str(written(tmp_path)), "--config.hidden_size=8", "--num-train-epochs=2"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--repo-id ORG/run" in done.stdout
    assert "2/2" not in done.stdout and "4/4" in done.stderr, "the progress bar counts 2 epochs of 2 steps"
    config = json.loads((tmp_path / "run" / "hub" / "config.json").read_text())
    assert config["hidden_size"] == 8


def test_two_processes_train_the_same_model_as_one(tmp_path):
    changes = {"load_best_model_at_end": False, "optim": "sgd", "learning_rate": 0.1}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    train(written(one, **changes))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "scripts/train.py")]  # fmt: skip
    done = subprocess.run(
        [*command, str(written(two, **changes)), "--per-device-train-batch-size=10"],
        capture_output=True, text=True, cwd=tmp_path, check=False, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hf-attn publish") == 1, "only the first process packs and prints"
    first, second = (load_file(folder / "run" / "model" / "model.safetensors") for folder in (one, two))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learning_rat": 1}, InvalidOption, "did you mean 'learning_rate'"),
        ({"attn_implementaton": "ripple"}, InvalidOption, "did you mean 'attn_implementation'"),
        ({"attn_implementation": "riple"}, UnknownMechanism, "did you mean 'ripple'"),
        ({"attention_options": {"r_cup": 2}}, InvalidOption, "did you mean 'r_cap'"),
        ({"attention_options": {"r_cap": -2}}, InvalidOption, "r_cap=-2"),
        ({"config": {"hiden_size": 8}}, InvalidOption, "did you mean 'hidden_size'"),
        ({"config": {"hidden_size": "wide"}}, InvalidOption, "hidden_size"),
        ({"config": {**TINY["config"], "num_attention_heads": 0}}, InvalidOption, "no model can be built"),
        ({"config": {**TINY["config"], "num_channels": 1}}, InvalidOption, "num_channels=1"),
        ({"family": "vot"}, InvalidOption, "did you mean 'vit'"),
        ({"dataset": "digit"}, InvalidOption, "did you mean 'digits'"),
        ({"dataset": ""}, InvalidOption, "Known: digits"),
        ({"hub_token": "anything"}, InvalidOption, "training_args.bin"),
        ({"push_to_hub": True}, InvalidInput, "hub_model_id is missing"),
        ({"push_to_hub": True, "hub_model_id": "model"}, InvalidInput, "must name its owner"),
        ({"push_to_hub": True, "hub_model_id": "a/b", "hub_strategy": "checkpoint"}, Unsupported, "as pickles"),
        ({"learning_rate": "fast"}, InvalidOption, "must be of type float"),
        ({"num_train_epochs": True}, InvalidOption, "must be of type float"),
        ({"lr_scheduler_type": "cosin"}, InvalidOption, "cosin"),
        ({"resume_from_checkpoint": "nowhere/checkpoint-1"}, InvalidInput, "is not a folder"),
        ({"output_dir": ""}, InvalidInput, "output_dir is missing"),
        ({"output_dir": "/dev/null/run"}, InvalidInput, "cannot be made"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_before_any_work(changes, error, message, tmp_path, monkeypatch):
    def loads(seed):
        pytest.fail("data was loaded before the configuration was checked")

    monkeypatch.setitem(DATASETS, "digits", dataclasses.replace(DATASETS["digits"], load=loads))
    with pytest.raises(error, match=message):
        train(written(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_configuration_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InvalidInput, match="there is no configuration file"):
        train(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    for text, message in (("- a\n- b\n", "must hold keys and values"), ("a: [", "not valid YAML")):
        path.write_text(text)
        with pytest.raises(InvalidInput, match=message):
            train(path)


def test_overrides_reach_into_dicts_and_numbers_may_be_written_as_text(tmp_path):
    words = ["--learning_rate=2e-4", "--attention-options.r_cap=2", "--config.hidden_size=32", "--max_steps=3"]
    recipe = read(written(tmp_path), parse_overrides(words))
    assert recipe.training.learning_rate == 2e-4 and recipe.training.max_steps == 3
    assert recipe.model.attention_options == {"r_cap": 2}
    assert recipe.model.config == {**TINY["config"], "hidden_size": 32}
    with pytest.raises(InvalidOption, match="must look like"):
        parse_overrides(["learning_rate"])


def test_without_scikit_learn_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(Unsupported, match=r"pip install \"hf_attn\[examples\]\""):
        digits()


def test_splits_are_stratified_disjoint_and_fixed():
    data = digits()
    assert {name: len(split) for name, split in data.items()} == {"train": 1257, "validation": 270, "test": 270}
    assert data["train"].features["labels"].names == [str(i) for i in range(10)]
    for name in ("validation", "test"):
        counts = torch.bincount(torch.tensor(data[name]["labels"]))
        assert counts.min() >= 25 and counts.max() <= 29
    assert digits()["test"]["labels"] == data["test"]["labels"] != digits(1)["test"]["labels"]


def test_pixels_follow_the_processor_in_one_process():
    from transformers import ViTImageProcessorPil

    raw = digits()
    for size in (8, 4):
        processor = ViTImageProcessorPil(
            size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        pixels = to_pixels(raw, processor, 4)["train"][0]["pixel_values"]
        assert pixels.shape == (3, size, size) and pixels.min() >= -1 and pixels.max() <= 1


def test_the_quickstart_recipe_is_valid_and_its_card_is_current():
    recipe = read(RECIPE)
    check_model(recipe.model)
    card = (ROOT / "model_cards" / "vit-ripple-digits.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] >= 0.93
    for name in ("learning_rate", "num_train_epochs", "seed", "config.hidden_size"):
        value = recipe.given["config"]["hidden_size"] if "." in name else recipe.given[name]
        assert f"| `{name}` | {value:g} |" in card
