"""Every mechanism learns: a small model tells eight examples apart, through nothing but its attention.

The token that is classified is the same in all examples, so what differs between them reaches it only by attention.
"""

import math

import pytest
import torch
from helpers import BERT, VIT, families_of
from torch import nn

import hf_attn

EXAMPLES, STEPS = 8, 50
SETTINGS = {"num_labels": EXAMPLES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}  # fmt: skip
"""Without dropout, and with larger weights than usual to start from: what is small learns faster so."""


def model_of(name: str) -> nn.Module:
    """A classifier with the mechanism: a BERT, or a ViT where it needs a grid."""
    # a grid is the model's, not the example's
    options = {key: value for key, value in hf_attn.get_mechanism(name).example.items() if key != "grid_size"}
    chosen = {"attn_implementation": name, "attention_options": options, **SETTINGS}
    torch.manual_seed(0)
    if "bert" in families_of(name):
        return hf_attn.AttnBertForSequenceClassification(hf_attn.AttnBertConfig(**BERT, **chosen))
    return hf_attn.AttnViTForImageClassification(hf_attn.AttnViTConfig(**VIT, **chosen))


def batch_of(model: nn.Module) -> dict[str, torch.Tensor]:
    generator, labels = torch.Generator().manual_seed(1), torch.arange(EXAMPLES)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.rand(EXAMPLES, 3, 12, 12, generator=generator) * 2 - 1, "labels": labels}
    tokens = torch.randint(1, 99, (EXAMPLES, 12), generator=generator)
    tokens[:, 0] = 1
    mask = torch.ones_like(tokens)
    mask[0, 9:] = mask[5, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def learned(model: nn.Module) -> tuple[float, int]:
    """Loss and right answers, in evaluation mode, after training on the one batch."""
    batch = batch_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        outputs = model.eval()(**batch)
    return outputs.loss.item(), int((outputs.logits.argmax(-1) == batch["labels"]).sum())


@pytest.mark.parametrize("name", hf_attn.list_mechanisms())
def test_a_small_batch_is_learned_by_heart(name):
    loss, right = learned(model_of(name))
    assert right == EXAMPLES and loss < 0.1, (loss, right)


@pytest.mark.parametrize("name", ["softmax", "ripple"])
def test_without_attention_there_is_nothing_to_learn_from(name):
    """The check above can fail: with the output of attention taken away, the loss is that of guessing."""
    model = model_of(name)
    layers = [module for module in model.modules() if isinstance(module, hf_attn.AttentionModule)]
    assert len(layers) == 2
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    loss, _ = learned(model)
    assert loss > math.log(EXAMPLES) - 0.01
