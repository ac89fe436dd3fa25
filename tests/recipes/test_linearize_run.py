"""One run from a folder to a folder: what is written, and that it reloads."""

import json

import pytest
import torch
from helpers import BERT, text_checkpoint
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

import hf_attn
from hf_attn import InvalidInput
from hf_attn.recipes.linearize import LinearizeOptions
from hf_attn.recipes.linearize_run import check_reload, linearize_checkpoint
from hf_attn.recipes.train import ReloadMismatch

RFA = {"name": "rfa", "num_features": 8, "redraw": "learnable"}


@pytest.fixture
def source(tmp_path):
    """A small checkpoint with tokenizer and data."""
    return text_checkpoint(tmp_path)


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


def test_a_masked_language_model_keeps_its_head(source):
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(source)
    output = source.parent / "out"
    result = linearize_checkpoint(
        str(source), RFA, output, LinearizeOptions(1, 1), str(source.parent / "data.txt"), (8,), examples=2
    )
    assert type(result.model).__name__ == "AttnBertForMaskedLM"
    assert [found.name for found in result.stages["before"].lengths[0].logits] == ["logits"]
