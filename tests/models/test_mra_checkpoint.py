"""transformers' MRA models as attn_bert models: every weight, and the same outputs as with its kernel.

The kernel is replaced by the same calls in plain torch (`mra_substitute`); without one transformers returns zeros.
"""

import inspect

import pytest
import torch
from mra_substitute import Substitute
from transformers import AutoModelForMaskedLM, MraConfig, MraForMaskedLM, MraForSequenceClassification, MraModel
from transformers.models.mra import modeling_mra

import hf_attn
from hf_attn import InvalidInput, Unsupported
from hf_attn.models.mra_checkpoint import bert_state_dict, from_mra, mra_options

SIZE = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 256, "block_per_row": 3, "initializer_range": 0.3}  # fmt: skip


def stock(cls=MraForMaskedLM, **changes):
    torch.manual_seed(5)
    model = cls(MraConfig(**{**SIZE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "LayerNorm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))  # no bias stays zero, unseen
    return model


READS_ITS_MASK = "is_floating_point" in inspect.getsource(modeling_mra.MraSelfAttention.forward)
"""transformers 5.17 builds a boolean mask and reads it as an additive one; 5.23 reads what it builds."""


def convert(model):
    return from_mra(model.config, model.state_dict())


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(modeling_mra, "mra_cuda_kernel", Substitute())


def batch(length=256, padded=0):
    # one mask for all rows: transformers gives the heads of one row the masks of others
    mask = torch.ones(2, length, dtype=torch.long)
    mask[:, length - padded :] = 0
    return {"input_ids": torch.randint(3, 90, (2, length)), "attention_mask": mask}


@pytest.mark.parametrize("changes", [{}, {"approx_mode": "sparse"}, {"num_attention_heads": 4}, {"block_per_row": 8},
    {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 3}, {"type_vocab_size": 2, "hidden_act": "relu"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("padded", [0, 70])
def test_the_outputs_are_those_of_transformers_with_its_kernel(changes, padded, kernel):
    if padded and not READS_ITS_MASK:
        pytest.skip("this transformers divides its own mask by 10000 and hides nothing: it is no reference for padding")
    theirs = stock(**changes)
    ours, inputs = convert(theirs), batch(padded=padded)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True)
        got = ours(**inputs, output_hidden_states=True)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=1e-3, atol=1e-3)
    other = ours.set_attn_implementation("softmax") or ours
    with torch.no_grad():
        difference = (other(**inputs).logits - got.logits)[real].abs().max()
    exact = changes.get("block_per_row") == 8
    assert difference < 1e-3 if exact else difference > 0.1, "a budget of every block is softmax, and no other"


def test_an_input_shorter_than_the_table_keeps_the_budget(kernel):
    """24 of 64 blocks at 256 tokens; at 160 transformers still takes 24, of 25."""
    theirs, inputs = stock(), batch(160)
    with torch.no_grad():
        expected, got = theirs(**inputs).logits, convert(theirs)(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_where_transformers_fails_the_model_works(kernel):
    theirs = stock(block_per_row=8)
    ours = convert(theirs)
    for length in (96, 100):
        with pytest.raises((RuntimeError, ValueError)):
            theirs(**batch(length))
        assert torch.isfinite(ours(**batch(length)).logits).all()


def test_without_a_kernel_transformers_returns_zeros():
    theirs, inputs = stock(), batch()
    attention = theirs.mra.encoder.layer[0].attention.self
    assert not attention(torch.randn(2, 256, 64), inputs["attention_mask"])[0].any()
    assert (convert(theirs)(**inputs).logits - theirs(**inputs).logits).abs().max() > 0.1


@pytest.mark.parametrize("cls", [MraForMaskedLM, MraModel])
def test_every_weight_is_mapped_once(cls):
    theirs = stock(cls, num_attention_heads=4)
    ours, source = convert(theirs).state_dict(), theirs.state_dict()
    assert len(ours) == len(source) - 1, "all but position_ids"
    for name, tensor in source.items():
        mapped = ours.get(name.replace("mra.", "bert.", 1))
        if name.endswith("embeddings.position_ids"):
            assert mapped is None
        elif name.endswith("position_embeddings.weight"):
            assert torch.equal(mapped, tensor[2:])
        elif ".self.query." in name:
            torch.testing.assert_close(mapped, tensor * 0.5**0.5)
        else:
            assert torch.equal(mapped, tensor), name


def test_embeddings_and_head_are_bit_for_bit_the_same():
    theirs = stock()
    ours, ids = convert(theirs), batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(ours.bert.embeddings(ids), theirs.mra.embeddings(ids))
        hidden = torch.randn(2, 7, 64)
        assert torch.equal(ours.cls(hidden), theirs.cls(hidden))


def test_the_base_model_has_no_pooler():
    theirs = stock(MraModel)
    ours = convert(theirs)
    assert type(ours) is hf_attn.AttnBertModel and ours.pooler is None
    masked_lm = MraForMaskedLM(theirs.config)
    masked_lm.mra.load_state_dict(theirs.state_dict())
    inputs = batch()
    with torch.no_grad():
        expected = convert(masked_lm.eval()).bert(**inputs).last_hidden_state
        torch.testing.assert_close(ours(**inputs).last_hidden_state, expected, rtol=0, atol=0)


def test_tied_weights_that_a_file_leaves_out_are_filled_in():
    theirs = stock()
    whole = theirs.state_dict()
    for gone in (("decoder.weight", "decoder.bias"), ("decoder.weight", "bias")):
        part = {n: t for n, t in whole.items() if n.removeprefix("cls.predictions.") not in gone}
        assert len(part) == len(whole) - 2
        ours = from_mra(theirs.config, part)
        for name, tensor in convert(theirs).state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor)
        assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
        assert ours.cls.predictions.decoder.bias is ours.cls.predictions.bias


def test_an_untied_decoder_stays_its_own():
    theirs = stock(tie_word_embeddings=False)
    ours = convert(theirs)
    assert torch.equal(ours.cls.predictions.decoder.weight, theirs.cls.predictions.decoder.weight)
    assert not torch.equal(ours.cls.predictions.decoder.weight, ours.bert.embeddings.word_embeddings.weight)


def test_saved_and_loaded_it_is_an_attn_bert_checkpoint(tmp_path):
    ours = convert(stock()).double()
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is hf_attn.AttnBertForMaskedLM and hf_attn.layer_names(loaded) == ["mra", "mra"]
    inputs = batch(100)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, ours(**inputs).logits)


def test_options_and_config_follow_the_mra_config():
    options = mra_options(MraConfig())
    assert options == {"block_size": 32, "num_blocks": 64, "mode": "full", "prior_first": 0, "prior_diag": 0}
    assert mra_options(MraConfig(block_per_row=99))["num_blocks"] == 256
    config = convert(stock(pad_token_id=3)).config
    assert config.attention["default"] == {"name": "mra", **mra_options(MraConfig(**SIZE))}
    assert config.pad_token_id == 3 and config.layer_norm_eps == 1e-5 and config.attention_probs_dropout_prob == 0


def test_half_precision_weights_stay_so():
    theirs = stock().bfloat16()
    assert {p.dtype for p in convert(theirs).parameters()} == {torch.bfloat16}


def test_another_head_or_other_positions_are_refused():
    theirs = stock(MraForSequenceClassification)
    with pytest.raises(Unsupported, match=r"from_mra.*classifier.*mra\.state_dict"):
        convert(theirs)
    assert convert(theirs.mra)
    weights = stock().state_dict()
    weights["mra.embeddings.position_ids"] = weights["mra.embeddings.position_ids"] - 2
    with pytest.raises(Unsupported, match="from_mra.*position_ids"):
        from_mra(MraConfig(**SIZE), weights)


def test_weights_that_do_not_fit_are_named():
    theirs = stock()
    whole = theirs.state_dict()
    name = "mra.encoder.layer.1.output.dense.weight"
    with pytest.raises(InvalidInput, match=r"from_mra: 1 weights are missing.*bert\.encoder\.layer\.1\.output"):
        from_mra(theirs.config, {n: t for n, t in whole.items() if n != name})
    with pytest.raises(InvalidInput, match="from_mra: 1 weights are left over.*bert.extra"):
        from_mra(theirs.config, {**whole, "mra.extra": whole[name]})
    with pytest.raises(InvalidInput, match="from_mra: 1 weights are of another shape.*layer.1.output"):
        from_mra(theirs.config, {**whole, name: whole[name][:-1]})
    assert "bert.embeddings.position_ids" not in bert_state_dict(theirs.config, whole)
