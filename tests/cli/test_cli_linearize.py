"""`hf-attn linearize` and `hf-attn fidelity`, one after the other, as a user runs them."""

import json

import pytest
from helpers import text_checkpoint
from typer.testing import CliRunner

from hf_attn.cli import app


@pytest.fixture
def source(tmp_path):
    """A small checkpoint with tokenizer and data."""
    return text_checkpoint(tmp_path)


@pytest.fixture
def run(source, monkeypatch):
    """`hf-attn` beside the folder, with a wide terminal."""
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv("COLUMNS", "400")
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)], prog_name="hf-attn")


def test_the_commands_as_a_user_types_them(run, source):
    done = run(
        "linearize", "--model", source, "--to", "lara", "-o", "num_landmarks=4", "--data", "data.txt", "--steps", 2,
        "--lengths", "8,16", "--examples", 2, "--output", "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "after distillation" in done.stdout and "2 + 2 steps" in done.stdout and "saved in out" in done.stderr

    done = run("fidelity", source, "out", "--data", "data.txt", "--lengths", "8,16", "--output", "report")
    assert done.exit_code == 0, done.output
    assert "AttnBertModel with lara (float32) against AttnBertModel with softmax (float64)" in done.stdout
    files = source.parent / "report"
    assert sorted(path.name for path in files.iterdir()) == ["fidelity.json", "fidelity.md", "fidelity.png"]

    asked = ("--data", "data.txt", "--lengths", "8", "--json")
    done = run("fidelity", source, "--to", "{default: softmax, 1: rfa}", *asked)
    assert done.exit_code == 0, done.output
    layers = json.loads(done.stdout)["lengths"][0]["layers"]
    assert [layer["mechanism"] for layer in layers] == ["softmax", "rfa"]
    assert layers[0]["error"] < 1e-5 < layers[1]["error"]
    facts = json.loads((files / "fidelity.json").read_text())
    assert facts["lengths"][0]["layers"][1]["mechanism"] == "lara"


def test_errors_of_the_commands(run, source):
    for arguments, message in (
        (["fidelity", source, "--to", "lora"], "no attention mechanism is called 'lora'"),
        (["fidelity", source, "--to", "rfa", "--lengths", "8", "--data", "none.txt"], "data='none.txt' is no file"),
        (["fidelity", source, "nowhere"], "model='nowhere' cannot be loaded"),
        (["fidelity", source, "--to", "rfa", "--metric", "acuracy"], "no metric is called 'acuracy'"),
        (["linearize", "--model", source, "--to", "mra", "--output", "o", "--data", "data.txt", "--lengths", "8"], "linearize, mra: attention transfer trains"),
        (["linearize", "--model", source, "--to", "rfa", "--output", source, "--lengths", "8"], f"output={str(source)!r} exists and is not an empty"),
    ):  # fmt: skip
        done = run(*arguments)
        assert done.exit_code == 1 and done.stderr.splitlines()[-1].startswith(f"error: {message}"), done.output
    for arguments in (["fidelity", source], ["fidelity", source, source, "--to", "rfa"], ["fidelity", source, "--to", "rfa", "--lengths", "a"],
                      ["fidelity", source, source, "-o", "a=1"], ["linearize", "--model", source], ["fidelity", source, "--to", "{"]):  # fmt: skip
        assert run(*arguments).exit_code == 2, arguments
