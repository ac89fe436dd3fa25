"""Linearising: each stage trains what it says, nothing else, and brings the model closer to the original."""

import copy
import json

import pytest
import torch
from helpers import BERT, GPT2, VIT, inputs_of
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import hf_attn
from hf_attn import InvalidInput, InvalidOption, Unsupported
from hf_attn.models.loading import load
from hf_attn.recipes.linearize import Diverged, LinearizeOptions, linearize

FAMILIES = {
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "bert-embeddings": lambda: BertModel(BertConfig(**BERT)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)),
}  # fmt: skip
LARA = {"name": "lara", "num_landmarks": 4}
RFA = {"name": "rfa", "num_features": 8, "redraw": "learnable"}


def model_of(family: str = "bert-embeddings", scale: float = 6.0):
    """A random model whose attention is far from uniform."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ("attn" in name or "attention" in name):
                parameter.mul_(scale)
    return model


def changed(before: dict, model) -> set[str]:
    """Names of parameters and buffers that differ from `before`."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def options(transfer: int = 0, distill: int = 0, **others) -> LinearizeOptions:
    return LinearizeOptions(transfer_steps=transfer, distill_steps=distill, **others)


def start(model, attention, seed: int = 0) -> dict:
    """The state of the converted model before any training."""
    return linearize(model, attention, [], options(seed=seed)).model.state_dict()


def test_transfer_trains_the_mechanisms_alone():
    model = model_of()
    batch = inputs_of(model)
    result = linearize(model, LARA, [batch], options(transfer=30, transfer_rate=1e-2), [batch])
    names = changed(start(model, LARA), result.model)
    assert names == {name for name, _ in result.model.named_parameters() if ".mechanism." in name} and names
    assert len(result.transfer_losses) == 30 and not result.distill_losses
    assert result.transfer_losses[-1] < 0.9 * result.transfer_losses[0]
    assert result.stages["after transfer"].error < result.stages["before"].error
    errors = [layer.error for layer in result.stages["before"].lengths[0].layers]
    assert result.transfer_losses[0] == pytest.approx(sum(error**2 for error in errors) / len(errors), rel=1e-3)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama"])
def test_transfer_with_projections_trains_what_makes_queries_keys_and_values(family):
    model = model_of(family)
    spec = {"name": "hypercube", "block_size": 1}
    result = linearize(model, spec, [inputs_of(model)], options(transfer=2, train_projections=True))
    kinds = {".".join(name.split(".")[-2:]) for name in changed(start(model, spec), result.model)}
    weights = {
        "bert": {"query.weight", "query.bias", "key.weight", "value.weight", "value.bias"},
        "vit": {"q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias"},
        "gpt2": {"c_attn.weight", "c_attn.bias"},
        "llama": {"q_proj.weight", "k_proj.weight", "v_proj.weight"},
    }[family]
    # a bias of the keys adds the same to all scores of a query: its gradient is rounding
    assert weights <= kinds <= weights | {"key.bias", "k_proj.bias"}


def test_layers_learn_apart_from_each_other(monkeypatch):
    # so small that every gradient is clipped
    monkeypatch.setattr("hf_attn.recipes.linearize.CLIP", 1e-3)
    model = model_of()
    arguments = [inputs_of(model)], options(transfer=5, train_projections=True)
    both = linearize(model, {"name": "hypercube", "block_size": 1}, *arguments).model
    last = linearize(model, {"default": "softmax", "1": {"name": "hypercube", "block_size": 1}}, *arguments).model
    ours, theirs = both.state_dict(), last.state_dict()
    for name in ours:
        same = torch.equal(ours[name], theirs[name])
        if "layer.0.attention.self.query" in name or "layer.0.attention.self.value" in name:
            assert not same, name
        elif "layer.0.attention.self.key" not in name:
            assert same, name


def test_distillation_trains_everything_but_the_input_embeddings():
    model = model_of("bert")
    result = linearize(model, RFA, [inputs_of(model)], options(distill=3))
    names = changed(start(model, RFA), result.model)
    everything = {name for name, _ in result.model.named_parameters()}
    assert "bert.embeddings.word_embeddings.weight" not in names
    assert {n for n in everything - names if "word_embeddings" not in n and "key.bias" not in n} == set()


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_lora_trains_the_attention_modules_and_is_merged(family, tmp_path):
    pytest.importorskip("peft")
    model = model_of(family)
    batch = inputs_of(model)
    result = linearize(model, RFA, [batch], options(distill=3, lora_rank=2, distill_rate=1e-2))
    before = start(model, RFA)
    names = changed(before, result.model)
    assert list(result.model.state_dict()) == list(before), "no adapter is left"
    assert names and all("attention" in name or ".attn." in name for name in names)
    assert {".mechanism." in name for name in names} == {True, False} and not any(
        name.endswith("bias") for name in names
    )
    for name in names:
        if ".mechanism." not in name:
            update = result.model.state_dict()[name] - before[name]
            assert torch.linalg.matrix_rank(update, atol=1e-5) <= 2
    result.model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(str(tmp_path))(**batch).logits, result.model(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linearised_model_is_closer_and_reloads_equal(family, tmp_path):
    model = model_of(family)
    before = copy.deepcopy(model.state_dict())
    batch = inputs_of(model)
    result = linearize(model, RFA, [batch], options(20, 30, train_projections=True, distill_rate=1e-3), [batch])
    assert list(result.stages) == ["before", "after transfer", "after distillation"]
    first, middle, last = (report.lengths[0] for report in result.stages.values())
    assert middle.error < first.error
    assert last.layers[-1].hidden_error < first.layers[-1].hidden_error
    assert last.embedding_cosine > first.embedding_cosine
    assert result.distill_losses[-1] < result.distill_losses[0]
    assert not changed(before, model) and type(model).__name__ in type(result.model).__name__, "the original stays"
    assert not result.model.training and all(parameter.requires_grad for parameter in result.model.parameters())

    result.model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(load(str(tmp_path)))
    assert hf_attn.layer_names(loaded) == ["rfa", "rfa"] and type(loaded) is type(result.model)
    with torch.no_grad():
        for ours, theirs in zip(result.model(**batch).values(), loaded(**batch).values()):
            if isinstance(ours, torch.Tensor):
                assert torch.equal(ours, theirs)
    assert hf_attn.layer_names(AutoModel.from_pretrained(tmp_path)) == ["rfa", "rfa"]


def test_padding_teaches_nothing():
    model = model_of()
    ids = torch.randint(1, 90, (2, 6))
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in alone.items()}
    a, b = (linearize(model, RFA, [batch], options(3, 3, train_projections=True)) for batch in (alone, padded))
    assert a.transfer_losses == pytest.approx(b.transfer_losses, rel=1e-4)
    assert a.distill_losses == pytest.approx(b.distill_losses, rel=1e-3)


def test_a_seed_decides_everything_and_leaves_no_trace():
    model = model_of()
    batches = [{"input_ids": torch.randint(1, 90, (2, 8))} for _ in range(3)]
    before = torch.random.get_rng_state()
    a, b, c = (linearize(model, RFA, batches, options(4, 4, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert (a.transfer_losses, a.distill_losses) == (b.transfer_losses, b.distill_losses)
    assert not changed(a.model.state_dict(), b.model) and changed(a.model.state_dict(), c.model)


def test_frozen_parameters_are_frozen_again():
    model = model_of()
    model.pooler.requires_grad_(False)
    result = linearize(model, RFA, [inputs_of(model)], options(1, 1))
    assert {n for n, p in result.model.named_parameters() if not p.requires_grad} == {"pooler.dense.weight", "pooler.dense.bias"}  # fmt: skip


def test_report_table_and_picture(tmp_path):
    model = model_of("bert")
    batch = inputs_of(model)
    result = linearize(model, RFA, [batch], options(2, 2), [batch, {"input_ids": batch["input_ids"][:, :5]}])
    rows = [line for line in str(result).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 * 2 and len({len(row) for row in rows}) == 1 and "logits top-1" in rows[0]
    assert "2 + 2 steps" in str(result)
    facts = json.loads(json.dumps(result.facts(), allow_nan=False))
    assert facts["attention"]["default"]["name"] == "rfa" and len(facts["transfer_losses"]) == 2
    assert list(facts["stages"]) == ["before", "after transfer", "after distillation"]
    result.draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInput, match="the picture cannot be written"):
        result.draw(tmp_path / "nowhere" / "a.png")


def test_what_makes_no_sense_is_refused_before_anything_is_done(monkeypatch):
    model = model_of()
    batch = inputs_of(model)
    with pytest.raises(Unsupported, match="linearize, hypercube: attention transfer trains the parameters"):
        linearize(model, "hypercube", [batch])
    linearize(model, "hypercube", [batch], options(distill=1))
    with pytest.raises(InvalidInput, match="batches is empty"):
        linearize(model, LARA, [])
    with pytest.raises(InvalidInput, match="what every layer has already"):
        linearize(model, "softmax", [batch])
    with pytest.raises(Unsupported, match="causal"):
        linearize(model_of("gpt2"), "lara", [inputs_of(model_of("gpt2"))])
    for wrong in ({"transfer_steps": -1}, {"lora_rank": 1.5}, {"distill_rate": float("nan")}, {"hidden_weight": -1}):
        with pytest.raises(InvalidOption, match=f"linearize: {next(iter(wrong))}"):
            LinearizeOptions(**wrong)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="peft is not installed"):
        linearize(model, LARA, [batch], options(1, 1, lora_rank=2))
    assert type(model) is BertModel


def test_a_diverging_run_stops():
    model = model_of()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(Diverged, match="Use a smaller learning rate"):
        linearize(model, RFA, [inputs_of(model)], options(distill=2))
