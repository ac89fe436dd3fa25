"""Pushes of a Trainer go through every check, in the foreground; a failure is told, and training goes on."""

import json
import logging
import os

import pytest
import torch
from faults import ALWAYS, REPO
from server import TOKEN
from small import BERT
from transformers import AutoModelForMaskedLM, BertForMaskedLM, TrainingArguments

import hf_attn
from hf_attn.errors import InvalidInput, PublishFailed, Unsupported
from hf_attn.hub.probe import answer, probe_inputs
from hf_attn.hub.trainer import PublishingTrainer
from hf_attn.recipes.checkpoints import checkpoints
from hf_attn.recipes.safe_trainer import SafeTrainer
from hf_attn.recipes.train import train

ROWS = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(8)]


def trainer_of(model, folder, kind=SafeTrainer, **changes):
    wishes = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "every_save", "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}  # fmt: skip
    arguments = TrainingArguments(
        str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{**wishes, **changes},
    )
    return kind(model, arguments, train_dataset=ROWS)


def equal(one, two):
    return all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("kind", [SafeTrainer, PublishingTrainer])
def test_every_checkpoint_is_published_and_training_is_what_it_was(kind, hub, model, tmp_path):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(model, tmp_path / "run", kind, hub_private_repo=True)
    # before training: the repository is there
    assert hub.titles(REPO) == ["initial commit"] and hub.repos[REPO].private
    trainer.train()
    steps = [f"Training in progress, step {step}" for step in (2, 4)]
    assert hub.titles(REPO) == ["initial commit", *steps]
    assert [path.name for path in checkpoints(tmp_path / "run")] == [
        "checkpoint-2",
        "checkpoint-4",
    ] or kind is PublishingTrainer
    files = hub.files(REPO)
    assert "manifest.json" in files and not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    assert equal(AutoModelForMaskedLM.from_pretrained(REPO), trainer.model)

    other = hf_attn.AttnBertForMaskedLM(model.config)
    other.load_state_dict(start)
    silent = trainer_of(other, tmp_path / "silent", kind, push_to_hub=False, hub_model_id=None)
    silent.train()
    assert equal(silent.model, trainer.model)
    assert TOKEN.encode() not in b"".join(request.body for request in hub.requests)


def test_push_to_hub_publishes_and_returns_the_commit(hub, model, tmp_path):
    trainer = trainer_of(model, tmp_path / "run", push_to_hub=False)
    commit = trainer.push_to_hub("Mine", private=True, revision="work")
    assert commit.oid == hub.repos[REPO].refs["work"] and commit.commit_message == "Mine" and hub.repos[REPO].private
    assert (tmp_path / "run" / "model.safetensors").is_file()
    for wish, error, message in (
        ({"token": TOKEN}, InvalidInput, "never from an argument"),
        ({"blocking": False}, Unsupported, "hides a failure"),
        ({"tags": ["x"]}, InvalidInput, r"push_to_hub\(tags=...\)"),
    ):
        with pytest.raises(error, match=message):
            trainer.push_to_hub(**wish)
    hub.fail("POST", "/commit/", 403)
    with torch.no_grad():
        model.cls.predictions.bias.add_(1)
    with pytest.raises(PublishFailed, match="403"):
        trainer.push_to_hub()


def test_strategy_end_publishes_what_is_saved_and_no_checkpoint(hub, model, tmp_path):
    trainer = trainer_of(model, tmp_path / "run", hub_strategy="end")
    trainer.train()
    assert hub.titles(REPO) == ["initial commit"]
    trainer.save_model()
    assert hub.titles(REPO) == ["initial commit", "Model save"]


def test_a_failed_push_is_told_and_the_next_one_makes_up_for_it(hub, model, tmp_path, caplog):
    trainer = trainer_of(model, tmp_path / "run")
    hub.fail("POST", "/commit/", 403)
    with caplog.at_level(logging.WARNING, "hf_attn.hub.trainer"):
        trainer.train()
    assert "checkpoint-2 was not published, and training goes on" in caplog.text and "403" in caplog.text
    assert hub.titles(REPO) == ["initial commit", "Training in progress, step 4"]


def test_a_failed_last_push_is_an_error_and_nothing_is_lost(hub, model, tmp_path):
    trainer = trainer_of(model, tmp_path / "run")
    hub.fail("POST", "/commit/", 403, ALWAYS)
    with pytest.raises(PublishFailed, match="403"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    # the model that must not be published stops at once: it will not get better
    trainer.processing_class = type("Leak", (), {"save_pretrained": lambda _, folder: os.link(tmp_path / "card", f"{folder}/README.md")})()  # fmt: skip
    (tmp_path / "card").write_text(f"login({TOKEN})")
    with pytest.raises(InvalidInput, match="README.md"):
        trainer.push_to_hub()


def test_what_cannot_be_pushed_is_refused_before_training(hub, model, tmp_path, monkeypatch):
    for wish, error, message in (
        ({"hub_token": TOKEN}, InvalidInput, "pickled"),
        ({"hub_model_id": None}, InvalidInput, "hub_model_id is missing"),
        ({"hub_model_id": "model"}, InvalidInput, "must name its owner"),
        ({"hub_strategy": "all_checkpoints"}, Unsupported, "as pickles"),
    ):
        with pytest.raises(error, match=message):
            trainer_of(model, tmp_path / "run", **wish)
    stock = BertForMaskedLM(type(model.config).stock_class(**BERT))
    with pytest.raises(InvalidInput, match="carries no attention"):
        trainer_of(stock, tmp_path / "run")
    assert not hub.repos
    hub.fail("POST", "/repos/create", 403)
    with pytest.raises(PublishFailed, match="creating the repository: .*403"):
        trainer_of(model, tmp_path / "run")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishFailed, match="no access token"):
        trainer_of(model, tmp_path / "run")


def test_a_model_trained_in_half_precision_is_published_in_its_own(hub, model, tmp_path):
    trainer = trainer_of(model, tmp_path / "run", bf16=True)
    trainer.train()
    loaded = AutoModelForMaskedLM.from_pretrained(REPO)
    assert loaded.dtype == torch.float32 and equal(loaded, trainer.accelerator.unwrap_model(trainer.model))
    inputs = probe_inputs(loaded)
    torch.testing.assert_close(answer(loaded, inputs), answer(trainer.model, inputs), rtol=0, atol=0)


RECIPE = {
    "family": "vit",
    "attn_implementation": "ripple",
    "config": {"image_size": 8, "patch_size": 2, "encoder_stride": 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "dataset": "digits",
    "max_examples": 40,
    "max_steps": 1,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "push_to_hub": True,
    "hub_model_id": REPO,
}  # fmt: skip


def test_a_recipe_publishes_its_model_with_its_card(hub, tmp_path):
    result = train({**RECIPE, "output_dir": str(tmp_path / "run"), "hub_private_repo": True})
    files = hub.files(REPO)
    assert result.published.commit == hub.repos[REPO].refs["main"] and result.published.commit in str(result)
    assert files["README.md"] == (result.plan.folder / "README.md").read_bytes() and REPO.encode() in files["README.md"]
    assert json.loads(files["manifest.json"])["files"] and hub.repos[REPO].private
    hub.fail("POST", "/commit/", 403, ALWAYS)
    with pytest.raises(PublishFailed, match=r"The trained model is in .*hub\. .*hf-attn publish .*hub --repo-id"):
        train({**RECIPE, "output_dir": str(tmp_path / "again"), "seed": 1})
    assert (tmp_path / "again" / "hub" / "model.safetensors").is_file()
