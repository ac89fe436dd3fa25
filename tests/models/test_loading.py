"""Loading a checkpoint brings back the class, the head and the mechanisms it was saved with."""

import pytest
import torch
from helpers import BERT
from transformers import AutoModel, BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

import hf_attn
from hf_attn import InvalidInput, Unsupported
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


@pytest.mark.parametrize("name", ["AttnBertModel", "GauModel"])
def test_nothing_is_ever_unpickled(name, tmp_path):
    config = {"AttnBertModel": hf_attn.AttnBertConfig, "GauModel": hf_attn.GauConfig}[name]
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16} if name == "AttnBertModel" else {"query_key_dim": 8}
    model = getattr(hf_attn, name)(config(**sizes))
    model.save_pretrained(tmp_path)
    assert type(type(model).from_pretrained(tmp_path, use_safetensors=None)) is type(model)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for auto in (AutoModel, type(model)):
        with pytest.raises(Unsupported, match="has no safetensors .* load it with a class of transformers"):
            auto.from_pretrained(tmp_path)
        with pytest.raises(Unsupported, match="use_safetensors=False would unpickle"):
            auto.from_pretrained(tmp_path, use_safetensors=False)


def test_a_stock_checkpoint_is_not_unpickled_either(tmp_path):
    model = BertModel(BertConfig(**BERT))
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match="no file named model.safetensors"):
        load(str(tmp_path))
