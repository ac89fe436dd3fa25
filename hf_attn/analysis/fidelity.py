"""How well a model with other attention still computes what the original computes.

    report = fidelity(original, converted, batches)
    report = fidelity(original, "lara", batches)           # the original, with lara in place of its attention
    print(report)
    report.draw("fidelity.png")

The original runs in float64, the other model in its own dtype, both in evaluation mode; padding never counts, and every
length (tokens of a row) is measured apart.
Layer by layer, the other model's attention module gets the layer input of the original, so that an error is that
layer's own: |out - exact| / |exact| over the real tokens of a head, and the distance of the attention rows, in float64.
Hidden states, embeddings and logits are those of each model's own forward pass, where errors of earlier layers add up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_attn.analysis.fidelity_report import LayerFidelity, LengthFidelity, LogitsFidelity, Report
from hf_attn.analysis.outputs import Batch, Metric, embedding, hidden_states, logits, run, token_mask
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.models.recording import (
    Recorded,
    converted_copy,
    exact_copy,
    mechanisms,
    real_tokens,
    recording,
    replay,
    require_calls,
)
from hf_attn.models.wrapping import attention_modules, layer_names
from hf_attn.module import AttentionModule


def fidelity(
    reference: PreTrainedModel,
    candidate: PreTrainedModel | str | dict[str, Any],
    batches: Iterable[Batch],
    metric: Metric | None = None,
    rows: bool = True,
    seed: int = 0,
) -> Report:
    """Compare two models of the same shape, or a model with itself under other attention.

    Args:
        reference: the original: any model that `hf_attn.convert` accepts. It stays as it is.
        candidate: the other model, which stays as it is; or what `hf_attn.convert` takes, a mechanism or a choice by
            layer, to give to a copy of `reference`.
        batches: arguments of a forward pass. Those of equal length are counted together.
        metric: a task's metric, measured for both.
        rows: also compare attention rows, which takes the N x M definition of the mechanisms.
        seed: of the parameters and draws of the mechanisms, where `candidate` is not a model.

    Raises:
        InvalidInput: no batches, or models of different shapes.
        Unsupported: a model whose attention cannot be reached, or a mechanism that is not defined in it.
    """
    if reference.device.type == "mps":
        raise Unsupported(
            "fidelity", "the reference runs in float64, which MPS does not have", 'Move the models: .to("cpu")'
        )
    exact = exact_copy(reference).double().eval()
    if isinstance(candidate, PreTrainedModel):
        other = exact_copy(candidate).to(exact.device).eval()
    else:
        other = converted_copy(reference, candidate, seed).eval()
    if shape_of(exact) != shape_of(other):
        raise InvalidInput(
            f"fidelity: the models have attention of different shapes, {shape_of(exact)} and {shape_of(other)} "
            "(heads, head dimension of every module). Compare models that are converted from the same one."
        )
    sums: dict[int, Sums] = {}
    with torch.no_grad():
        for batch in tqdm(batches, desc="fidelity", unit="batch", disable=None, leave=False):
            measure(sums, exact, other, batch, metric, rows)
    if not sums:
        raise InvalidInput("fidelity: batches is empty; give at least one batch, such as the output of a tokenizer.")
    entries = tuple(sums[length].entry(length) for length in sorted(sums))
    return Report(title(exact), title(other), str(other.dtype).removeprefix("torch."), entries)


def title(model: PreTrainedModel) -> str:
    """The class of a model and the mechanisms of its layers."""
    return f"{type(model).__name__} with {', '.join(dict.fromkeys(layer_names(model)))}"


def shape_of(model: nn.Module) -> list[tuple[int, int]]:
    """Heads and head dimension of every attention module."""
    return [(mechanism.num_heads, mechanism.head_dim) for mechanism in mechanisms(model).values()]


def measure(
    sums: dict[int, Sums],
    exact: PreTrainedModel,
    other: PreTrainedModel,
    batch: Batch,
    metric: Metric | None,
    rows: bool,
) -> None:
    """Add one batch to the sums of its length."""
    with recording(exact) as calls:
        wanted = run(exact, batch)
    require_calls(calls)
    got = run(other, batch)
    originals, others, modules = mechanisms(exact), mechanisms(other), attention_modules(other)
    length = next(iter(calls.values())).tensors[0].shape[2]
    into = sums.setdefault(length, Sums([LayerSums(mechanism.name) for mechanism in others.values()]))
    for layer, (path, call), (their_path, module) in zip(into.layers, calls.items(), modules.items()):
        again, mask = replay(module, call), real_tokens(call)
        layer.outputs.add(call.output, again.output, mask[:, None, :, None], (0, 2, 3))
        if rows:
            layer.add_rows(rows_of(originals[path], call), rows_of(others[their_path], again), mask)

    exact_states, states = hidden_states(wanted), hidden_states(got)
    mask = token_mask(batch, got)
    if len(states) == len(modules) + 1:
        for layer, a, b in zip(into.layers, exact_states[1:], states[1:]):
            layer.hidden.add(a, b, mask[..., None])
    into.tokens += int(mask.sum())
    into.cosines.append(
        functional.cosine_similarity(embedding(exact_states[-1], mask), embedding(states[-1].double(), mask))
    )
    ours, theirs = logits(got, mask), logits(wanted, mask)
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        raise InvalidInput(
            f"fidelity: the models have different logits, {list(theirs)} and {list(ours)} or other numbers of classes. "
            "Compare models of one class with the same head."
        )
    for name, target in theirs.items():
        into.logits.setdefault(name, []).append(compare(target, ours[name].double()))
    if metric is not None:
        into.metrics.append(torch.stack([metric(outputs, batch).flatten().double() for outputs in (wanted, got)]))


def compare(exact: Tensor, got: Tensor) -> Tensor:
    """(3,rows): cosine, equal first choices, and KL divergence of logits (rows, classes)."""
    cosine = functional.cosine_similarity(exact, got)
    top1 = (exact.argmax(-1) == got.argmax(-1)).double()
    target = exact.log_softmax(-1)
    return torch.stack([cosine, top1, (target.exp() * (target - got.log_softmax(-1))).sum(-1)])


def rows_of(mechanism: AttentionModule, call: Recorded) -> Tensor | None:
    """(B,H,N,M) attention rows in float64; None where there are none that are distributions."""
    capabilities = mechanism.capabilities
    if not (capabilities.attention_weights and capabilities.convex):
        return None
    if call.tensors[0].dtype != torch.float64:
        # small weights vanish in float32, and their divergence would be infinite
        mechanism = copy.deepcopy(mechanism).double()
    arguments = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in (call.call or {}).items()
        if name != "dropout"
    }
    return mechanism.attention_weights(*(tensor.double() for tensor in call.tensors), **arguments)


class Squares:
    """Sums of |got - exact|^2 and |exact|^2."""

    def __init__(self) -> None:
        self.difference: Any = 0.0
        self.size: Any = 0.0

    def add(self, exact: Tensor, got: Tensor, mask: Tensor, over: tuple[int, ...] = (0, 1, 2)) -> None:
        """`mask` broadcasts; dimensions in `over` are summed."""
        self.difference = self.difference + (got.double() - exact).mul(mask).square().sum(over)
        self.size = self.size + exact.mul(mask).square().sum(over)

    @property
    def error(self) -> Tensor:
        """|got - exact| / |exact|."""
        return (self.difference / self.size).sqrt()


class LayerSums:
    """What is added up for one attention module."""

    def __init__(self, mechanism: str) -> None:
        self.mechanism = mechanism
        self.outputs, self.hidden = Squares(), Squares()
        self.rows = 0
        self.divergence: Any = 0.0
        self.distance: Any = 0.0

    def add_rows(self, exact: Tensor | None, got: Tensor | None, mask: Tensor) -> None:
        """Divergence and distance of attention rows; a key without exact weight counts nothing in the divergence."""
        if exact is None or got is None:
            return
        divergence = torch.where(exact > 0, exact * (exact.log() - got.log()), 0).sum(-1)
        distance = (exact - got).abs().sum(-1) / 2
        self.divergence = self.divergence + divergence.masked_fill(~mask[:, None], 0).sum((0, 2))
        self.distance = self.distance + distance.masked_fill(~mask[:, None], 0).sum((0, 2))
        self.rows += int(mask.sum())

    def entry(self, layer: int) -> LayerFidelity:
        outputs = self.outputs
        return LayerFidelity(
            layer=layer,
            mechanism=self.mechanism,
            error=float((outputs.difference.sum() / outputs.size.sum()).sqrt()),
            head_error=tuple(outputs.error.tolist()),
            divergence=tuple((self.divergence / self.rows).tolist()) if self.rows else None,
            distance=tuple((self.distance / self.rows).tolist()) if self.rows else None,
            hidden_error=float(self.hidden.error) if isinstance(self.hidden.size, Tensor) else None,
        )


class Sums:
    """What is added up for one length."""

    def __init__(self, layers: list[LayerSums]) -> None:
        self.layers = layers
        self.tokens = 0
        self.cosines: list[Tensor] = []
        self.logits: dict[str, list[Tensor]] = {}
        self.metrics: list[Tensor] = []

    def entry(self, length: int) -> LengthFidelity:
        cosines = torch.cat(self.cosines)
        metric = torch.cat(self.metrics, dim=1).mean(1).tolist() if self.metrics else None
        return LengthFidelity(
            length=length,
            examples=len(cosines),
            tokens=self.tokens,
            layers=tuple(layer.entry(index) for index, layer in enumerate(self.layers)),
            embedding_cosine=float(cosines.mean()),
            embedding_worst=float(cosines.min()),
            logits=tuple(
                LogitsFidelity(name, *torch.cat(found, dim=1).mean(1).tolist()) for name, found in self.logits.items()
            ),
            metric=None if metric is None else (metric[0], metric[1]),
        )
