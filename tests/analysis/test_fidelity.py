"""Fidelity: every number is what its definition says, padding never counts, and the models stay as they are."""

import copy
import json
import math

import pytest
import torch
from helpers import BERT, GPT2, VIT, inputs_of
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import hf_attn
from hf_attn import InvalidInput, InvalidOption, Unsupported
from hf_attn.analysis.fidelity import fidelity
from hf_attn.analysis.outputs import metric_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=99, num_key_value_heads=2, **SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(vocab_size=99, **SIZES)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    ),
}


def model_of(family: str = "bert", scale: float = 8.0):
    """A random model whose attention is far from uniform."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale if parameter.shape[0] < 99 else 1)
    return model


def layers_of(report):
    return report.lengths[0].layers


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", MODELS)
def test_a_model_is_faithful_to_itself_and_not_to_other_attention(family):
    model = model_of(family)
    batch = inputs_of(model)
    before = state(model)
    model.train()
    same = fidelity(model, model, [batch]).lengths[0]
    other = fidelity(model, {"default": {"name": "rfa", "num_features": 4}}, [batch]).lengths[0]
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model) in {type(make()) for make in MODELS.values()}, "the stock model is still a stock model"
    for layer in same.layers:
        assert layer.error < 1e-5 and max(layer.head_error) < 1e-5 and layer.hidden_error < 1e-5
        assert max(layer.divergence) < 1e-9 and max(layer.distance) < 1e-5
    assert same.embedding_worst > 1 - 1e-9
    for layer in other.layers:
        assert layer.mechanism == "rfa" and len(layer.head_error) == 4
        assert min(layer.head_error) > 1e-3 and min(layer.divergence) > 1e-4 and layer.hidden_error > 1e-3
    assert other.embedding_worst < 1 - 1e-6
    if same.logits:
        assert same.logits[0].top1 == 1 and abs(same.logits[0].divergence) < 1e-9
        assert other.logits[0].divergence > 1e-9


def test_the_error_is_local_to_layer_and_head():
    model = model_of()
    changed = copy.deepcopy(model)
    value = changed.bert.encoder.layer[0].attention.self.value
    with torch.no_grad():
        value.weight[8:16], value.bias[8:16] = 0, 0
    first, second = layers_of(fidelity(model, changed, [inputs_of(model)]))
    assert first.head_error == pytest.approx((0, 1, 0, 0), abs=1e-5)
    assert max(second.head_error) < 1e-5, "the second layer gets the input of the original"
    assert second.hidden_error > 0.01, "the hidden states are those of the changed model"
    assert max(first.distance) < 1e-5, "the rows do not depend on the values"


def test_numbers_are_those_of_the_definition():
    """By hand, from the queries, keys and values of the first layer."""
    model, batch = model_of("roberta"), {"input_ids": torch.randint(3, 90, (3, 12))}
    torch.manual_seed(5)
    spec = {"name": "rfa", "num_features": 8}
    converted = hf_attn.convert(copy.deepcopy(model), spec)
    first = layers_of(fidelity(model, converted, [batch]))[0]

    exact = copy.deepcopy(model).double()
    attention = exact.encoder.layer[0].attention.self
    with torch.no_grad():
        x = exact.embeddings(batch["input_ids"])
        q, k, v = (
            linear(x).view(3, 12, 4, 8).transpose(1, 2) for linear in (attention.query, attention.key, attention.value)
        )
        rows = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
        z = converted.encoder.layer[0].attention.self.mechanism.projection.double()
        phi = [
            ((8**-0.25) * x @ z.transpose(-1, -2) - 8**-0.5 / 2 * x.square().sum(-1, keepdim=True)).exp()
            for x in (q, k)
        ]
        scores = phi[0] @ phi[1].transpose(-1, -2)
        others = scores / scores.sum(-1, keepdim=True)
    wanted, got = rows @ v, others @ v
    error = (got - wanted).square().sum((0, 2, 3)).sqrt() / wanted.square().sum((0, 2, 3)).sqrt()
    assert first.head_error == pytest.approx(error.tolist(), rel=1e-4)
    assert first.error == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-4)
    divergence = (rows * (rows / others).log()).sum(-1).mean((0, 2))
    assert first.divergence == pytest.approx(divergence.tolist(), rel=1e-4)
    assert first.distance == pytest.approx(((rows - others).abs().sum(-1) / 2).mean((0, 2)).tolist(), rel=1e-4)


def test_logits_and_embeddings_are_those_of_the_models():
    model, batch = model_of("vit"), inputs_of(model_of("vit"))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.classifier.weight.copy_(model.classifier.weight.flip(0))
        changed.classifier.bias.copy_(model.classifier.bias.flip(0))
    found = fidelity(model, changed, [batch]).lengths[0]
    with torch.no_grad():
        a = model.double()(batch["pixel_values"].double()).logits
    b = a.flip(-1)
    logits = found.logits[0]
    assert logits.top1 == 0, "the classes are exchanged"
    assert logits.divergence == pytest.approx(float((a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()), rel=1e-4)  # fmt: skip
    assert logits.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b).mean()), rel=1e-4)
    assert found.embedding_cosine == pytest.approx(1)


def test_an_encoder_with_a_decoder_is_compared_by_the_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip
    model = BartModel(BartConfig(vocab_size=99, encoder_ffn_dim=64, decoder_ffn_dim=64, **sizes)).eval()
    ids = torch.randint(3, 90, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5]}
    found = fidelity(model, {"name": "rfa", "num_features": 4}, [batch]).lengths[0]
    assert len(found.layers) == 3 and min(layer.error for layer in found.layers) > 1e-3
    assert found.tokens == 10, "the decoder has no padding"
    assert all(layer.hidden_error is None for layer in found.layers)
    same = fidelity(model, model, [{**batch, "decoder_attention_mask": mask[:, :5]}]).lengths[0]
    assert same.tokens == 9 and max(layer.error for layer in same.layers) < 1e-5


def test_padding_that_cannot_be_located_is_refused():
    sizes = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
    model = Wav2Vec2Model(Wav2Vec2Config(**SIZES, **sizes, num_conv_pos_embedding_groups=4)).eval()
    batch = {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400, dtype=torch.long)}
    assert fidelity(model, model, [batch]).lengths[0].layers[1].error < 1e-5
    batch["attention_mask"][1, 200:] = 0
    with pytest.raises(Unsupported, match="does not say which of the hidden states"):
        fidelity(model, model, [batch])


@pytest.mark.parametrize("make", [BertModel, BertForMaskedLM, BertForQuestionAnswering])
def test_padding_never_counts(make):
    torch.manual_seed(0)
    model = make(BertConfig(**BERT)).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters() if make is BertModel else model.bert.encoder.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    ids = torch.randint(1, 90, (2, 7))
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in alone.items()}
    padded["input_ids"][:, 7:] = 5
    a, b = (fidelity(model, {"name": "rfa", "num_features": 4}, [batch]).lengths[0] for batch in (alone, padded))
    assert (a.length, b.length, a.tokens, b.tokens) == (7, 11, 14, 14)
    for x, y in zip(a.layers, b.layers):
        for field in ("error", "head_error", "divergence", "distance", "hidden_error"):
            assert getattr(x, field) == pytest.approx(getattr(y, field), rel=1e-4), field
    assert a.embedding_cosine == pytest.approx(b.embedding_cosine, rel=1e-6)
    for x, y in zip(a.logits, b.logits, strict=True):
        assert (x.top1, x.divergence) == pytest.approx((y.top1, y.divergence), rel=1e-4)
        assert x.name.startswith(("start", "end")) or x.cosine == pytest.approx(y.cosine, rel=1e-6)


def test_lengths_are_counted_apart_and_batches_of_one_length_together():
    model = model_of("gpt2")
    ids = torch.randint(1, 90, (4, 24))
    spec = {"name": "hypercube", "block_size": 2}
    batches = [{"input_ids": ids[:2, :16]}, {"input_ids": ids}, {"input_ids": ids[2:, :16]}]
    short, long = fidelity(model, spec, batches).lengths
    assert (short.length, short.examples, long.length, long.examples) == (16, 4, 24, 4)
    together = fidelity(model, spec, [{"input_ids": ids[:, :16]}]).lengths[0]
    assert short.layers[1].head_error == pytest.approx(together.layers[1].head_error, rel=1e-4)
    assert short.embedding_cosine == pytest.approx(together.embedding_cosine, rel=1e-6)
    assert short.logits[0].divergence == pytest.approx(together.logits[0].divergence, rel=1e-4)


def test_a_key_without_weight_makes_the_divergence_infinite():
    model, batch = model_of("roberta"), {"input_ids": torch.randint(3, 90, (1, 16))}
    report = fidelity(model, {"name": "hypercube", "block_size": 1}, [batch])
    layer = layers_of(report)[0]
    assert layer.divergence == (math.inf,) * 4 and 0 < min(layer.distance) <= max(layer.distance) < 1
    facts = json.loads(json.dumps(report.facts(), allow_nan=False))
    assert facts["lengths"][0]["layers"][0]["divergence"] == ["inf"] * 4
    assert layers_of(fidelity(model, {"name": "hypercube", "block_size": 1}, [batch], rows=False))[0].divergence is None
    assert layers_of(fidelity(model, "relu2", [batch]))[0].divergence is None, "its rows are no distributions"


def test_a_choice_by_layer():
    model = model_of()
    first, second = layers_of(fidelity(model, {"default": "softmax", "1": {"name": "rfa", "num_features": 4}}, [inputs_of(model)]))  # fmt: skip
    assert (first.mechanism, second.mechanism) == ("softmax", "rfa")
    assert first.error < 1e-5 < 0.01 < second.error


def test_precision_shows():
    model = model_of()
    batch = inputs_of(model)
    errors = [layers_of(fidelity(model, copy.deepcopy(model).to(dtype), [batch]))[0].error for dtype in (torch.float64, torch.float32, torch.bfloat16)]  # fmt: skip
    assert errors[0] < 1e-12 < 1e-9 < errors[1] < 1e-5 < 1e-4 < errors[2] < 0.1


def test_task_metrics():
    vit = model_of("vit")
    batch = inputs_of(vit)
    batch["labels"] = vit(**batch).logits.argmax(-1)
    found = fidelity(vit, {"name": "rfa", "num_features": 4}, [batch], metric_of("accuracy")).lengths[0]
    assert found.metric == (1, found.logits[0].top1)
    gpt2 = model_of("gpt2")
    ids = torch.randint(1, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    loss = gpt2(**batch, labels=ids.masked_fill(mask == 0, -100)).loss.item()
    assert fidelity(gpt2, gpt2, [batch], metric_of("next_token_loss")).lengths[0].metric == pytest.approx((loss, loss), rel=1e-5)  # fmt: skip
    with pytest.raises(InvalidInput, match="accuracy: it needs data with labels"):
        fidelity(gpt2, gpt2, [batch], metric_of("accuracy"))
    with pytest.raises(InvalidInput, match="next_token_loss: it needs token ids"):
        fidelity(vit, vit, [inputs_of(vit)], metric_of("next_token_loss"))
    with pytest.raises(InvalidOption, match="did you mean 'accuracy'"):
        metric_of("acuracy")


def test_what_cannot_be_compared_is_refused():
    model = model_of()
    with pytest.raises(InvalidInput, match="batches is empty"):
        fidelity(model, "rfa", [])
    deeper = BertModel(BertConfig(**{**BERT, "num_hidden_layers": 3}))
    with pytest.raises(InvalidInput, match="attention of different shapes"):
        fidelity(model, deeper, [inputs_of(model)])
    with pytest.raises(InvalidInput, match="different logits"):
        fidelity(model, BertModel(model.config), [inputs_of(model)])
    decoder = BertModel(BertConfig(**BERT, is_decoder=True, add_cross_attention=True))
    with pytest.raises(InvalidInput, match="crossattention.* was not run by the batch"):
        fidelity(decoder, "softmax", [inputs_of(decoder)])
    with pytest.raises(Unsupported, match="needs a 2-D token grid"):
        fidelity(model, "ripple", [inputs_of(model)])


def test_seeds_decide_the_draws_and_leave_no_trace():
    model = model_of()
    batch, spec = inputs_of(model), {"name": "rfa", "num_features": 4}
    before = torch.random.get_rng_state()
    a, b, c = (fidelity(model, spec, [batch], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert a == b != c


def test_table_and_picture(tmp_path):
    model = model_of()
    batch = inputs_of(model)
    report = fidelity(model, {"name": "hypercube", "block_size": 1}, [batch, {"input_ids": batch["input_ids"][:, :6]}])
    text = str(report)
    assert text.startswith("AttnBertForMaskedLM with hypercube (float32) against AttnBertForMaskedLM with softmax (float64)")  # fmt: skip
    assert f"{report.lengths[0].layers[1].error:.4f}" in text and " inf " in text
    assert len({len(line) for line in text.splitlines()[2:5]}) == 1
    for name in ("a.png", "b.png"):
        report.draw(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInput, match="the picture cannot be written"):
        report.draw(tmp_path / "nowhere" / "a.png")
