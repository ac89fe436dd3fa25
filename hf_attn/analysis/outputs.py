"""What two models are compared by: their logits, hidden states and embeddings, at the positions that are no padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn.errors import InvalidInput, InvalidOption, Unsupported, near

Batch = Mapping[str, Tensor]
"""Arguments of a model's forward pass; `labels` are for metrics only."""
Metric = Callable[[Any, Batch], Tensor]
"""From a model's outputs and the batch to numbers whose mean is the metric, such as 1 for every right answer."""


def run(model: nn.Module, batch: Batch) -> Any:
    """The outputs of `model` with all hidden states, without a cache, on the model's device and in its dtype."""
    parameter = next(model.parameters())
    moved: dict[str, Any] = {
        name: tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in batch.items()
        if name != "labels"
    }
    if getattr(model.config, "use_cache", False):
        moved["use_cache"] = False
    return model(**moved, output_hidden_states=True, return_dict=True)


def hidden_states(outputs: Any) -> list[Tensor]:
    """(B,N,C) after the embeddings and after every layer; of the decoder, where there is one beside an encoder."""
    states = outputs.get("decoder_hidden_states") or outputs.get("hidden_states")
    if not states:
        raise Unsupported(type(outputs).__name__, "it holds no hidden states to compare", "Compare another model class")
    return [state.flatten(0, -3) for state in states]


def token_mask(batch: Batch, outputs: Any) -> Tensor:
    """(B,N) bool for the hidden states of `outputs`: True for a real token.

    Raises:
        Unsupported: there is padding, and the hidden states do not belong to the positions of the mask.
    """
    states = hidden_states(outputs)[-1]
    name = "decoder_attention_mask" if outputs.get("decoder_hidden_states") else "attention_mask"
    mask = batch.get(name)
    if mask is None or bool(mask.all()):
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    mask = mask.flatten(0, -2)
    if mask.shape != states.shape[:2]:
        raise Unsupported(
            type(outputs).__name__,
            f"{name} {tuple(mask.shape)} does not say which of the hidden states {tuple(states.shape)} are padding",
            "Use batches without padding",
        )
    return mask.to(states.device, torch.bool)


def embedding(states: Tensor, mask: Tensor) -> Tensor:
    """(B,C): the mean of the last hidden states over the real tokens."""
    weight = mask[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def logits(outputs: Any, mask: Tensor) -> dict[str, Tensor]:
    """Name -> (rows, classes) of every logits of a model: a row a real token, or an example.

    Logits over the tokens of a text (start and end of an answer) are very small at the padding. Fewer than two classes
    are no logits but a regression; they are left out.
    """
    found: dict[str, Tensor] = {}
    for name, value in outputs.items():
        if not name.endswith("logits") or not isinstance(value, Tensor):
            continue
        if value.shape == mask.shape and name != "logits":
            rows = value.masked_fill(~mask, torch.finfo(value.dtype).min)
        else:
            rows = value.flatten(0, -2)
            if value.dim() > 2 and rows.shape[0] == mask.numel():
                rows = rows[mask.flatten()]
        if rows.shape[-1] > 1:
            found[name] = rows
    return found


def accuracy(outputs: Any, batch: Batch) -> Tensor:
    """1 for every example or token whose largest logit is its label, 0 otherwise; labels of -100 are left out."""
    if "labels" not in batch or "logits" not in outputs:
        raise InvalidInput("metric accuracy: it needs data with labels and a model with logits.")
    labels = batch["labels"].to(outputs.logits.device)
    return (outputs.logits.argmax(-1) == labels)[labels != -100].double()


def next_token_loss(outputs: Any, batch: Batch) -> Tensor:
    """Cross-entropy (nats) of every real token after the first, given those before it: for causal language models."""
    ids = batch.get("input_ids")
    if ids is None or "logits" not in outputs or outputs.logits.shape[:-1] != ids.shape:
        raise InvalidInput(
            "metric next_token_loss: it needs token ids and a language model with a logit for each token."
        )
    ids, mask = ids.to(outputs.logits.device), token_mask(batch, outputs)
    losses = nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[mask[:, 1:]]


METRICS = {"accuracy": accuracy, "next_token_loss": next_token_loss}
"""Task metrics by name."""


def metric_of(name: str) -> Metric:
    """The metric called `name`; `InvalidOption` names the nearest one otherwise."""
    if name not in METRICS:
        raise InvalidOption(f"no metric is called {name!r}{near(name, METRICS)}. Known: {', '.join(METRICS)}.")
    return METRICS[name]
