"""Consistent classifiers: gates in a convolutional network, a ViT's CLS rows, training, refusals."""

import pytest
import torch
from helpers import VIT
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import hf_attn
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.models.dual_consistency import ConsistentClassifier, ConsistentViT, class_token_logits


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )  # fmt: skip


def wrapped(model=None, layers=("0", "2"), **options):
    return ConsistentClassifier(model or network(), layers, (4, 6), ((8, 8), (4, 4)), embed_dim=8, **options)


PIXELS, LABELS = torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 0])


def test_gates_of_a_convolutional_network():
    model = wrapped()
    out = model(PIXELS, labels=LABELS)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, LABELS) + out.consistency)
    assert [tuple(x.shape) for x in out.maps] == [(3, 8, 8), (3, 4, 4)]
    for probabilities in out.maps:
        torch.testing.assert_close(probabilities.sum((1, 2)), torch.ones(3))
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(gate.proj.weight.grad.any() for gate in model.attention) and model.consistency.witness[0].grad.any()
    first = nn.Sequential(*model.model[:1])(PIXELS)
    gated, _, _ = model.attention[0](first)
    second, _, _ = model.attention[1](model.model[1:3](gated))
    torch.testing.assert_close(out.logits, model.model[3:](second))
    assert not any(m._forward_hooks for m in model.modules()), "hooks go with the call"


def test_training_makes_the_maps_agree():
    model = wrapped(rescale=True, alpha=10.0)
    first = model(PIXELS, labels=LABELS).consistency
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(PIXELS, labels=LABELS).loss.backward()
        optimizer.step()
    assert model(PIXELS).consistency < 0.2 * first and model(PIXELS).loss is None


def vit(**changes):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**{**VIT, **changes})).eval()


@pytest.mark.parametrize("ours", [False, True])
def test_rows_of_the_class_token(ours):
    model = vit(attn_implementation="eager")
    model = hf_attn.convert(model, "softmax") if ours else model
    pixels = torch.rand(2, 3, 12, 12)
    consistent = ConsistentViT(model, alpha=1.0)
    out = consistent(pixels, labels=torch.tensor([0, 1]))
    plain = model(pixels, output_attentions=True)
    torch.testing.assert_close(out.logits, plain.logits)
    row = plain.attentions[1].mean(1)[:, 0, 1:]
    torch.testing.assert_close(out.maps[1].flatten(1), row / row.sum(1, keepdim=True))
    (gradient,) = torch.autograd.grad(out.consistency, consistent.consistency.witness[0])
    assert gradient.any()


def test_underflowed_weights_stay_finite():
    attention = torch.zeros(1, 1, 5, 5, requires_grad=True)
    logits = class_token_logits(attention, (2, 2))
    logits.sum().backward()
    assert logits.isfinite().all() and not attention.grad.any()


def test_refusals():
    with pytest.raises(InvalidOption, match="'7'.*Sequential"):
        wrapped(layers=("0", "7"))
    with pytest.raises(InvalidOption, match="different names"):
        wrapped(layers=("0", "0"))
    with pytest.raises(InvalidInput, match="'0' returned.*8,8"):
        wrapped()(torch.rand(1, 3, 16, 16))
    with pytest.raises(InvalidInput, match="ConsistentViT"):
        ConsistentClassifier(vit(), ("vit.layers.0", "vit.layers.1"), (32, 32), ((6, 6), (6, 6)), factor=1)(
            torch.rand(1, 3, 12, 12)
        )
    with pytest.raises(InvalidInput, match="N = 1"):
        class_token_logits(torch.rand(1, 1, 5, 5), (3, 2))
    with pytest.raises(Unsupported, match="ConsistentViT"):
        ConsistentViT(hf_attn.AttnBertModel(hf_attn.AttnBertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)))  # fmt: skip
