"""scripts/distill_ssta.py: the committed configuration trains a student, saves it, and refuses what it does not know."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from hf_attn.errors import InvalidOption

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "ssta" / "digits.yaml"
TINY = {
    "max_steps": 2, "max_examples": 8, "per_device_train_batch_size": 4, "warmup_steps": 0, "logging_steps": 1, "logging_strategy": "steps",
    "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True, "use_cpu": True,
    "config.hidden_size": 16, "config.intermediate_size": 16, "config.num_hidden_layers": 1,
}  # fmt: skip


@pytest.fixture
def distill(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import distill_ssta

    return distill_ssta.distill


@pytest.fixture
def models(tmp_path):
    sizes = {
        "image_size": 8, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16,
    }  # fmt: skip
    ViTForImageClassification(ViTConfig(**sizes, num_labels=10)).save_pretrained(tmp_path / "teacher")
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path / "assistant")
    return str(tmp_path / "teacher"), str(tmp_path / "assistant")


def test_the_committed_configuration_trains_and_saves(distill, models, tmp_path):
    metrics = distill(CONFIG, *models, {**TINY, "output_dir": str(tmp_path / "run")})
    assert 0 <= metrics["test_accuracy"] <= 1
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert student.config.num_labels == 10 and student.config.hidden_size == 16
    names = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert names["model_type"] == "attn_vit"
    assert (tmp_path / "run" / "model" / "preprocessor_config.json").is_file()


def test_an_unknown_field_is_refused_with_the_near_one(distill, models, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.read_text().replace("calibration_size", "calibration_sise"))
    with pytest.raises(InvalidOption, match="calibration_sise.*calibration_size"):
        distill(path, *models, {**TINY, "output_dir": str(tmp_path / "run")})
