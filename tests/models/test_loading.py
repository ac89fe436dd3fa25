"""Loading a checkpoint brings back the class, the head and the mechanisms it was saved with."""

import pytest
import torch
from helpers import BERT
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

import hf_attn
from hf_attn import InvalidInput
from hf_attn.models.loading import load


@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: BertForMaskedLM(BertConfig(**BERT)),
        lambda: BertModel(BertConfig(**BERT)),
        lambda: LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)),
    ],
    ids=["bert-mlm", "bert", "llama"],
)  # fmt: skip
def test_the_class_and_the_weights_come_back(make, converted, tmp_path):
    model = make()
    if converted:
        hf_attn.convert(model, "rfa")
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert type(loaded) is type(model) and not loaded.training
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert load(str(tmp_path), torch.bfloat16).dtype == torch.bfloat16


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be loaded"):
        load(str(tmp_path / "nowhere"))
