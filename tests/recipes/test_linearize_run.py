"""One run from a folder to a folder: what is written, that it reloads, and the commands around it."""

import json

import pytest
import torch
from helpers import BERT
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, BertTokenizer
from typer.testing import CliRunner

import hf_attn
from hf_attn import InvalidInput
from hf_attn.cli import app
from hf_attn.recipes.linearize import LinearizeOptions
from hf_attn.recipes.linearize_run import check_reload, linearize_checkpoint
from hf_attn.recipes.train import ReloadMismatch

RFA = {"name": "rfa", "num_features": 8, "redraw": "learnable"}


@pytest.fixture
def source(tmp_path):
    """A small checkpoint with tokenizer and data."""
    words = [f"w{i}" for i in range(90)]
    folder = tmp_path / "source"
    folder.mkdir()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(words[i] for i in torch.randint(0, 90, (30,), generator=generator)) for _ in range(10)]
    (tmp_path / "data.txt").write_text("\n\n".join(texts))
    return folder


@pytest.fixture
def run(source, monkeypatch):
    """`hf-attn` beside the folder, with a wide terminal."""
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv("COLUMNS", "400")
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)], prog_name="hf-attn")


def test_the_folder_loads_and_says_how_it_came_about(source):
    output = source.parent / "out"
    options = LinearizeOptions(transfer_steps=2, distill_steps=2)
    result = linearize_checkpoint(
        str(source), RFA, output, options, str(source.parent / "data.txt"), (8, 16), examples=3
    )
    loaded = AutoModel.from_pretrained(output)
    assert type(loaded).__name__ == "AttnBertModel" and hf_attn.layer_names(loaded) == ["rfa", "rfa"]
    assert loaded.config.attention["default"] == RFA
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in result.model.state_dict().items())
    assert AutoTokenizer.from_pretrained(output)("w3 w4")["input_ids"] == [2, 8, 9, 3]
    facts = json.loads((output / "linearize.json").read_text())
    assert facts == json.loads(json.dumps(result.facts()))
    assert [entry["length"] for entry in facts["stages"]["before"]["lengths"]] == [8, 16]
    assert (output / "linearize.md").read_text() == f"{result}\n"
    assert (output / "linearize.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInput, match="is not an empty folder"):
        linearize_checkpoint(str(source), RFA, output)


def test_a_model_that_reloads_differently_is_not_passed_over(source):
    result = linearize_checkpoint(
        str(source), RFA, source.parent / "out", LinearizeOptions(1, 0), str(source.parent / "data.txt"), (8,)
    )
    batch = {"input_ids": torch.tensor([[2, 8, 9, 3]])}
    check_reload(result.model, source.parent / "out", batch)
    with torch.no_grad():
        result.model.encoder.layer[0].attention.self.mechanism.projection[0, 0, 0] += 1
    with pytest.raises(ReloadMismatch, match="other hidden states than the trained one"):
        check_reload(result.model, source.parent / "out", batch)


def test_it_works_inside_sentence_transformers(source):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    kind = "sentence_transformers.models"
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
               {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"}]  # fmt: skip
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    output = source.parent / "out"
    result = linearize_checkpoint(
        str(source), RFA, output, LinearizeOptions(2, 2), str(source.parent / "data.txt"), (8,)
    )
    model = SentenceTransformer(str(output), device="cpu")
    assert hf_attn.layer_names(model[0].auto_model) == ["rfa", "rfa"]
    found = torch.as_tensor(model.encode(["w3 w4 w5", "w7"]))
    batch = AutoTokenizer.from_pretrained(output)(["w3 w4 w5", "w7"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = result.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    torch.testing.assert_close(found, (hidden * mask).sum(1) / mask.sum(1), rtol=1e-4, atol=1e-5)


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


def test_a_masked_language_model_keeps_its_head(source):
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(source)
    output = source.parent / "out"
    result = linearize_checkpoint(
        str(source), RFA, output, LinearizeOptions(1, 1), str(source.parent / "data.txt"), (8,), examples=2
    )
    assert type(result.model).__name__ == "AttnBertForMaskedLM"
    assert [found.name for found in result.stages["before"].lengths[0].logits] == ["logits"]
