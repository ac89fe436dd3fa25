"""`hf-attn spectrum`, as a user runs it."""

import json

import pytest
from helpers import text_checkpoint
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner

import hf_attn
from hf_attn.cli import app


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    return lambda *arguments: CliRunner().invoke(app, ["spectrum", *map(str, arguments)], prog_name="hf-attn")


@pytest.fixture
def vit(tmp_path):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=16, num_labels=3))
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return hf_attn.convert(model, "softmax"), tmp_path / "vit"


@pytest.mark.parametrize("kernel", ["key", "gram"])
def test_a_text_model(run, tmp_path, kernel):
    source = text_checkpoint(tmp_path)
    asked = ("--data", "data.txt", "--length", 8, "--steps", 20, "--functions", 2, "--kernel", kernel)
    done = run(source, *asked, "--examples", 1, "--output", "s.png")
    assert done.exit_code == 0, done.output
    assert "eigenvalue" in done.stdout and "cosine" in done.stdout and "picture: s.png" in done.stderr
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_the_tangent_kernel_of_an_image_classifier(run, vit):
    model, folder = vit
    model.save_pretrained(folder)
    asked = ("--kernel", "ntk", "--label", 1, "--probes", 8, "--examples", 6, "--functions", 2, "--steps", 20)
    done = run(folder, *asked, "--json", "--no-exact")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["function"] for row in rows] == [1, 2] and "exact" not in rows[0] and rows[0]["eigenvalue"] > 0


def test_what_is_refused(run, vit, tmp_path):
    assert "must be one of key" in run("x", "--kernel", "keys").output
    assert "--label belongs" in run("x", "--label", 1).output
    source = text_checkpoint(tmp_path)
    wrong = run(source, "--data", "data.txt", "--length", 8, "--kernel", "ntk")
    assert wrong.exit_code and "tokens are no points" in wrong.output
    model, folder = vit
    hf_attn.convert(model, "deformable").save_pretrained(folder)
    wrong = run(folder, "--kernel", "ntk", "--examples", 2, "--probes", 1)
    assert wrong.exit_code and "no forward-mode derivative" in wrong.output
