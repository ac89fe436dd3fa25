"""`accelerate launch scripts/train.py`: two processes train as one does, replicated and sharded (FSDP2), on CPU cores."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_attn.recipes.train import train

ROOT = Path(__file__).parents[2]
ACCELERATE = ROOT / "configs" / "accelerate"
FAMILIES = {
    "gpt2": {
        "family": "gpt2",
        "task": "text-generation",
        "attn_implementation": "rfa",
        "config": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
    "bert": {
        "family": "bert",
        "task": "fill-mask",
        "config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    },
}  # fmt: skip
HALF = {"per_device_train_batch_size": 4}
"""Two processes see together what one sees."""
TRAINING = {
    "dataset": "pydoc",
    "max_examples": 4,
    "max_length": 24,
    "vocab_size": 300,
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 2,
    "samples": 1,
    "dataloader_pin_memory": False,
    "report_to": "none",
}


def losses_of(launcher: str, folder: Path, **changes) -> list[float]:
    """Losses of every step of a launched run."""
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TRAINING, "output_dir": str(folder / "run"), **changes}))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={ACCELERATE / launcher}.yaml", str(ROOT / "scripts/train.py"), str(path)],
        capture_output=True, text=True, check=False, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("hf-attn publish") == 1, "only the first process packs and prints"
    return logged(folder)


def logged(folder: Path) -> list[float]:
    state = json.loads((folder / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Called with a family: losses of every step, and the weights, of one process."""

    @functools.cache
    def run(family: str):
        folder = tmp_path_factory.mktemp(f"alone-{family}")
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({**TRAINING, "output_dir": str(folder / "run"), **FAMILIES[family]}))
        result = train(path, {"disable_tqdm": True})
        return logged(folder), load_file(result.model_dir / "model.safetensors")

    return run


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Losses and folder of a sharded run of GPT-2, which keeps a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    return losses_of("fsdp2", folder, **FAMILIES["gpt2"], **HALF), folder


def equal_to_one_process(losses: list[float], folder: Path, expected: list[float], weights: dict) -> None:
    assert len(losses) == 4 and losses[0] != losses[-1]
    assert losses == pytest.approx(expected, rel=0, abs=1e-6)
    saved = load_file(folder / "run" / "model" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        assert value.shape == saved[name].shape and (value - saved[name]).abs().max() < 1e-4, name


def test_two_processes_train_as_one(alone, tmp_path):
    losses = losses_of("two_cpu", tmp_path / "two", **FAMILIES["bert"], **HALF)
    equal_to_one_process(losses, tmp_path / "two", *alone("bert"))


def test_two_sharded_processes_train_as_one(alone, sharded):
    equal_to_one_process(*sharded, *alone("gpt2"))


def test_a_model_with_tied_embeddings_and_bias_is_sharded(alone, tmp_path):
    losses = losses_of("fsdp2", tmp_path / "two", **FAMILIES["bert"], **HALF)
    equal_to_one_process(losses, tmp_path / "two", *alone("bert"))


def test_a_sharded_run_resumes_and_its_model_loads(sharded, tmp_path):
    whole, folder = sharded
    checkpoint = str(folder / "run" / "checkpoint-2")
    resumed = losses_of("fsdp2", tmp_path / "two", **FAMILIES["gpt2"], **HALF, resume_from_checkpoint=checkpoint)
    assert resumed == whole
    first, second = (load_file(path / "run" / "model" / "model.safetensors") for path in (folder, tmp_path / "two"))
    assert all(value.equal(second[name]) for name, value in first.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "run" / "model")
    assert model.config.attention["default"]["name"] == "rfa"


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem == "one_cpu" else 2)
    if "zero" in path.stem:
        assert config.distributed_type == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == int(path.stem[-1])
