"""Checkpoints are whole or named as broken, and a resumed run ends with the weights of an unbroken one."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_attn
from hf_attn.errors import Unsupported
from hf_attn.recipes.arguments import read
from hf_attn.recipes.checkpoints import (
    MANIFEST,
    STATE,
    BrokenCheckpoint,
    CheckpointNotSaved,
    checkpoints,
    newest_valid,
    quarantine,
    rotate,
    verify,
    write_manifest,
)
from hf_attn.recipes.safe_trainer import SafeTrainer
from hf_attn.recipes.train import make_trainer, prepare

ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}  # fmt: skip
DRAWS = {
    "rfa": {"num_features": 8, "redraw": "fresh"},
    "randomized": {},
    "lara": {},
}
"""Mechanisms that draw in every training step -> options."""


class Stop(Exception):
    """What a test ends a run with."""


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def stop():
    raise Stop


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def tokens(seed):
    ids = torch.randint(3, 32, (20, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def trainer_of(run, mechanism="rfa", kind=SafeTrainer, at=None, **changes):
    """3 epochs of 5 steps, a checkpoint every 2 steps."""
    transformers.set_seed(3)
    config = hf_attn.AttnBertConfig(**SIZES, attn_implementation=mechanism, attention_options=DRAWS.get(mechanism, {}))
    settings = {
        "output_dir": str(run), "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2,
        "save_strategy": "steps", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "eval_strategy": "epoch",
    }  # fmt: skip
    model = hf_attn.AttnBertForMaskedLM(config)
    arguments = TrainingArguments(**{**settings, **changes})
    callbacks = [At(*at)] if at else []
    return kind(model, arguments, train_dataset=tokens(0), eval_dataset=tokens(1), callbacks=callbacks)


def trained(run, resume=True, **settings):
    trainer = trainer_of(run, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def interrupted(run, step, **settings):
    """A run that dies at the end of a step, before anything is saved there."""
    with pytest.raises(Stop):
        trainer_of(run, at=(step, stop), **settings).train(resume_from_checkpoint=True)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Final weights of a mechanism, and the folder of the run."""
    known = {}

    def of(mechanism):
        if mechanism not in known:
            run = tmp_path_factory.mktemp(mechanism)
            known[mechanism] = trained(run, mechanism=mechanism), run
        return known[mechanism]

    return of


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as Trainer lays it out, with its manifest."""
    return checkpoint(tmp_path, 4)


def checkpoint(run, step):
    from safetensors.torch import save_file

    path = run / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    save_file({"weight": torch.ones(4)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "inner/shard.pt"):
        torch.save({"state": torch.ones(4)}, path / name)
    for name in (STATE, "config.json"):
        (path / name).write_text('{"global_step": 4}')
    write_manifest(path)
    return path


# --- manifest ---------------------------------------------------------------------------------------------------------

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "inner/shard.pt", STATE, "config.json"]  # fmt: skip


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": (Path.unlink, "cannot be read"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "bytes instead of"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes instead of"),
    "flipped bit": (flip, "another sha256"),
}


def test_the_manifest_lists_every_file(folder):
    verify(folder)
    entries = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted(entry["path"] for entry in entries) == sorted(FILES)
    assert all(len(entry["sha256"]) == 64 and entry["size"] == (folder / entry["path"]).stat().st_size for entry in entries)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_quarantined_and_named(folder, name, damage, caplog):
    older = checkpoint(folder.parent, 2)
    act, message = DAMAGE[damage]
    act(folder / name)
    assert newest_valid(folder.parent) == older
    moved = folder.parent / "broken" / "checkpoint-4"
    assert moved.is_dir() and not folder.exists()
    assert name in caplog.text and message in caplog.text and str(moved) in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no manifest.json"),
        ("", "cannot be read"),
        ('{"files": [', "cannot be read"),
        ("[]", "cannot be read"),
        ('{"files": [{"name": "x"}]}', "cannot be read"),
        ('{"files": []}', "does not list trainer_state.json"),
    ],
)
def test_a_damaged_manifest_is_quarantined_and_named(folder, text, message, caplog):
    older = checkpoint(folder.parent, 2)
    (folder / MANIFEST).unlink() if text is None else (folder / MANIFEST).write_text(text)
    assert newest_valid(folder.parent) == older
    assert message in caplog.text and not folder.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", STATE])
def test_a_file_without_its_end_gets_no_manifest(folder, name):
    (folder / MANIFEST).unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    with pytest.raises(BrokenCheckpoint, match=f"{name} was not written completely"):
        write_manifest(folder)
    assert not (folder / MANIFEST).exists()


def test_the_newest_valid_one_is_taken_by_its_number(tmp_path):
    assert newest_valid(tmp_path) is None and newest_valid(tmp_path / "none") is None
    for step in (9, 10, 2):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert newest_valid(tmp_path).name == "checkpoint-10"


def test_an_older_broken_one_stays_where_it_is(tmp_path):
    older, newer = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    flip(older / "optimizer.pt")
    assert newest_valid(tmp_path) == newer and older.exists()


def test_where_all_are_broken_that_is_an_error_once(tmp_path):
    for step in (2, 4):
        (checkpoint(tmp_path, step) / "optimizer.pt").unlink()
    with pytest.raises(BrokenCheckpoint, match=r"(?s)no checkpoint in .* is whole.*checkpoint-4.*checkpoint-2.*from the beginning"):  # fmt: skip
        newest_valid(tmp_path)
    assert newest_valid(tmp_path) is None


def test_quarantine_overwrites_nothing(tmp_path):
    names = [quarantine(checkpoint(tmp_path, 4)).name for _ in range(3)]
    assert names == ["checkpoint-4", "checkpoint-4-2", "checkpoint-4-3"]
    assert len(list((tmp_path / "broken").iterdir())) == 3


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8, 90]),
        (3, None, [4, 6, 8]),
        (1, None, [8]),
        (1, 2, [2, 8]),
        (2, 8, [6, 8]),
        (3, 2, [2, 6, 8]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, left):
    """90 is left from another run: it goes first."""
    for step in (2, 4, 6, 8, 90):
        checkpoint(tmp_path, step)
    rotate(tmp_path / "checkpoint-8", limit, str(tmp_path / f"checkpoint-{best}") if best else None)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", DRAWS)
@pytest.mark.parametrize("step", [1, 8, 11])
def test_a_resumed_run_equals_an_unbroken_one(mechanism, step, unbroken, tmp_path):
    """Steps before the first checkpoint, in the second epoch, and one after the end of the second (step 10, a checkpoint)."""
    interrupted(tmp_path, step, mechanism=mechanism)
    assert equal(trained(tmp_path, mechanism=mechanism), unbroken(mechanism)[0])


def test_the_draws_of_the_resumed_run_matter(unbroken, tmp_path):
    """Without the saved random state, the run ends elsewhere: the comparison can fail."""
    interrupted(tmp_path, 8)
    trainer = trainer_of(tmp_path)
    trainer._load_rng_state = lambda checkpoint: None
    trainer.train(resume_from_checkpoint=True)
    assert not equal(trainer.model.state_dict(), unbroken("rfa")[0])


def test_a_complete_run_resumes_to_itself(tmp_path):
    """max_steps within an epoch: Trainer would train one step more."""
    settings = {"max_steps": 8}
    done = trained(tmp_path, **settings)
    assert [path.name for path in checkpoints(tmp_path)][-1] == "checkpoint-8"
    assert equal(trained(tmp_path, **settings), done)


@pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 1}], ids=str)
def test_other_settings_resume_to_the_same_weights(settings, tmp_path):
    expected = trained(tmp_path / "unbroken", save_steps=1, **settings)
    interrupted(tmp_path / "run", 5, save_steps=1, **settings)
    assert equal(trained(tmp_path / "run", save_steps=1, **settings), expected)


def test_the_best_model_is_found_again(tmp_path):
    best = {"load_best_model_at_end": True, "save_strategy": "epoch", "metric_for_best_model": "loss", "save_total_limit": 1}  # fmt: skip
    expected = trained(tmp_path / "unbroken", **best)
    run = tmp_path / "run"
    interrupted(run, 12, **best)
    state = json.loads((checkpoints(run)[-1] / STATE).read_text())
    assert Path(state["best_model_checkpoint"]) in checkpoints(run)
    trainer = trainer_of(run, **best)
    trainer.train(resume_from_checkpoint=True)
    assert equal(trainer.model.state_dict(), expected)
    flip(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        trainer._load_best_model()


def test_a_broken_checkpoint_is_passed_over(unbroken, tmp_path, caplog):
    interrupted(tmp_path, 9)
    flip(tmp_path / "checkpoint-8" / "rng_state.pth")
    assert equal(trained(tmp_path), unbroken("rfa")[0])
    assert "rng_state.pth" in caplog.text and (tmp_path / "broken" / "checkpoint-8").is_dir()


def test_a_broken_checkpoint_asked_for_by_name_is_an_error(tmp_path):
    interrupted(tmp_path, 5)
    path = tmp_path / "checkpoint-4"
    flip(path / "optimizer.pt")
    with pytest.raises(BrokenCheckpoint, match=r"optimizer\.pt"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(path))
    assert path.is_dir()


def test_starting_over_beside_old_checkpoints_is_said(tmp_path, caplog):
    interrupted(tmp_path, 3)
    trained(tmp_path, resume=None, max_steps=1)
    assert "holds checkpoint-2 of another run" in caplog.text


def test_what_a_kill_left_is_removed(unbroken, tmp_path):
    (tmp_path / "partial" / "checkpoint-6").mkdir(parents=True)
    assert equal(trained(tmp_path), unbroken("rfa")[0])
    assert not (tmp_path / "partial").exists()


def test_a_saved_folder_is_what_trainer_saves(tmp_path, unbroken):
    trained(tmp_path, resume=None, kind=Trainer, max_steps=2)
    ours, theirs = unbroken("rfa")[1] / "checkpoint-2", tmp_path / "checkpoint-2"
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()} | {MANIFEST}


# --- a full disk ------------------------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITES = {
    "weights": (transformers.PreTrainedModel, "save_pretrained", full),
    "optimizer": (Trainer, "_save_optimizer_and_scheduler", full),
    "random state": (torch, "save", full),
    "state": (transformers.TrainerState, "save_to_json", full),
    "manifest": (Path, "write_text", full),
    "flush": (os, "fsync", full),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_leaves_the_old_checkpoint(write, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, at=(3, lambda: monkeypatch.setattr(*WRITES[write])))
    with pytest.raises(CheckpointNotSaved, match=r"checkpoint-4 could not be saved: .*No space left.*checkpoint-2 is untouched.*Make room"):  # fmt: skip
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    verify(tmp_path / "checkpoint-2")


@pytest.mark.parametrize(
    "error", [RuntimeError("unexpected pos 28480 vs 28372"), SafetensorError("os error 28")], ids=repr
)
def test_other_words_for_a_full_disk(error, tmp_path, monkeypatch):
    """What torch and safetensors raise there is no OSError."""

    def fail(*args, **kwargs):
        raise error

    trainer = trainer_of(tmp_path, at=(3, lambda: monkeypatch.setattr(torch, "save", fail)))
    with pytest.raises(CheckpointNotSaved, match=r"checkpoint-2 is untouched. \d+ bytes were free"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 5, 6])
def test_sigterm_saves_and_exits(step, unbroken, tmp_path):
    """Within an epoch, at its end (its evaluation comes first), and where a checkpoint is due anyway."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        trainer_of(tmp_path, at=(step, terminate)).train()
    assert exit.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert newest_valid(tmp_path).name == f"checkpoint-{step}"
    assert equal(trained(tmp_path), unbroken("rfa")[0])


def test_sigterm_after_the_last_step_is_passed_on(tmp_path):
    got = []
    before = signal.signal(signal.SIGTERM, lambda *args: got.append("passed on"))
    try:
        trainer = trainer_of(tmp_path, max_steps=1)
        trainer.callback_handler.on_train_end = lambda *args: terminate()
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == ["passed on"]


@pytest.mark.parametrize(("processes", "name"), [(1, "kill_resume"), (2, "kill_resume_two")])
def test_killed_processes_resume_to_the_same_weights(processes, name, tmp_path):
    """The experiments of docs/benchmarks/kill_resume.md and kill_resume_two.md, with one kill."""
    command = [sys.executable, str(ROOT / "scripts/kill_resume.py"), "--points=1", f"--epochs={1 + processes}", f"--processes={processes}", f"--output={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 1 runs are equal" in done.stdout
    assert "| 1 | " in (tmp_path / f"{name}.md").read_text()


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPE = {
    "family": "bert", "attn_implementation": "rfa", "task": "fill-mask", "dataset": "pydoc", "max_length": 24, "vocab_size": 300,
    "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}, "max_examples": 12,
    "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2, "save_strategy": "steps",
    "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "resume_from_checkpoint": True,
}  # fmt: skip


def recipe_trainer(folder):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "run")}))
    recipe = read(path)
    prepared = prepare(recipe)
    masked = prepared.data["train"]
    # one text is many blocks
    masked.data = masked.data.select(range(12))
    return make_trainer(recipe, prepared), recipe.training.resume_from_checkpoint


def test_a_recipe_resumes_with_other_masks_in_every_epoch(tmp_path):
    """fill-mask hides other tokens in every epoch."""
    finals = []
    for name, step in (("unbroken", None), ("broken", 5)):
        folder = tmp_path / name
        folder.mkdir()
        if step:
            trainer, resume = recipe_trainer(folder)
            trainer.add_callback(At(step, stop))
            with pytest.raises(Stop):
                trainer.train(resume_from_checkpoint=resume)
        trainer, resume = recipe_trainer(folder)
        assert resume is True
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 9
        finals.append(trainer.model.state_dict())
    assert equal(*finals)


def test_another_way_of_saving_on_sigterm_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, enable_jit_checkpoint=True)
    with pytest.raises(Unsupported, match="enable_jit_checkpoint=True"):
        SafeTrainer(torch.nn.Linear(1, 1), arguments)
