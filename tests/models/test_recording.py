"""Recording and replaying calls of attention modules."""

import copy

import pytest
import torch
from helpers import BERT, GPT2, inputs_of
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import hf_attn
from hf_attn import Unsupported
from hf_attn.models.recording import exact_copy, mechanisms, real_tokens, recording, replay
from hf_attn.models.wrapping import attention_modules


@pytest.fixture
def model():
    torch.manual_seed(0)
    return exact_copy(BertModel(BertConfig(**BERT))).eval()


def test_a_recorded_call_is_what_the_mechanism_got_and_gave(model):
    batch = inputs_of(model)
    with torch.no_grad(), recording(model) as calls:
        model(**batch)
    assert list(calls) == [f"encoder.layer.{i}.attention.self" for i in range(2)] == list(mechanisms(model))
    for path, call in calls.items():
        assert call.output.shape == (2, 4, 10, 8)
        assert torch.equal(mechanisms(model)[path](*call.tensors, **call.call), call.output)
        assert torch.equal(real_tokens(call), batch["attention_mask"].bool())
    again = dict(calls)
    model(**{"input_ids": batch["input_ids"][:, :4]})
    assert calls == again, "nothing is recorded afterwards"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(ZeroDivisionError), recording(model):
        raise ZeroDivisionError
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_replay_computes_the_same_in_another_model_and_dtype(model):
    with torch.no_grad(), recording(model) as calls:
        model(**inputs_of(model))
    other = copy.deepcopy(model).double()
    path = "encoder.layer.1.attention.self"
    again = replay(attention_modules(other)[path], calls[path])
    assert again.output.dtype == torch.float64 and again.output.requires_grad
    torch.testing.assert_close(again.output.float(), calls[path].output)
    again.output.sum().backward()
    assert other.encoder.layer[1].attention.self.query.weight.grad is not None
    assert other.encoder.layer[0].attention.self.query.weight.grad is None


def test_replay_leaves_the_cache_alone():
    model = exact_copy(GPT2LMHeadModel(GPT2Config(**GPT2))).eval()
    with torch.no_grad(), recording(model) as calls:
        cache = model(**inputs_of(model), use_cache=True).past_key_values
        for path, module in attention_modules(model).items():
            torch.testing.assert_close(replay(module, calls[path]).output, calls[path].output)
    assert cache.get_seq_length() == 10


def test_a_stock_model_is_copied_and_a_model_without_attention_refused():
    stock = BertModel(BertConfig(**BERT))
    assert type(exact_copy(stock)).__name__ == "AttnBertModel" and type(stock) is BertModel
    with pytest.raises(Unsupported, match="carries no mechanisms"), recording(stock):
        pass
    linear = hf_attn.convert(stock, "rfa")
    assert hf_attn.layer_names(exact_copy(linear)) == ["rfa", "rfa"], "other attention stays what it is"
