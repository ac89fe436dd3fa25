"""Image classifiers whose attention maps at several layers agree: consistency as a second loss.

Paper: Ron, Hazan, ICML 2022 (arXiv 2206.02761); the loss and its parts are in `hf_attn.mechanisms.dual_consistency`.

    loss = cross-entropy + alpha sum over neighbouring layers KL(coarse marginal || fine marginal)

`ConsistentClassifier` gates feature maps of a convolutional classifier by additive attention, as published.
`ConsistentViT` adds no gates to a ViT: it ties the attention rows of its CLS token, layer by layer (an extension). Gates
would do little there: the LayerNorm before the next attention takes out the scale of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.mechanisms.dual_consistency import AdditiveAttention2d, DualConsistency
from hf_attn.models.wrapping import token_grid


@dataclass
class ConsistentOutput(ModelOutput):
    """What a consistent classifier returns.

    Attributes:
        loss: task and consistency together, where labels were given.
        logits: (B, classes).
        consistency: the weighted consistency loss.
        maps: probabilities (B, rows, columns) of every layer, the explanation.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    consistency: Tensor | None = None
    maps: tuple[Tensor, ...] | None = None


class ConsistentClassifier(nn.Module):
    """Gates the outputs of some layers of a classifier by additive attention, and ties the maps.

    Args:
        model: returns logits (B, classes), or an output with `logits`. Train it without attention first.
        layers: names of sub-modules, finest map first; each returns a map (B,C,h,w).
        channels: C of every layer.
        sizes: (rows, columns) of every layer's map.
        factor: of the sizes of neighbours.
        embed_dim: E of the scorers.
        rescale: a uniform map leaves the features as they are; not in the paper, which shrinks them by h*w.
        mode, alpha, detach_targets: as in `DualConsistency`.

    Raises:
        InvalidOption: a layer that does not exist, or lists of different lengths.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        factor: int = 2,
        embed_dim: int = 512,
        rescale: bool = False,
        mode: str = "learned",
        alpha: float = 10.0,
        detach_targets: bool = False,
    ):
        super().__init__()
        known = dict(model.named_modules())
        missing = [name for name in layers if name not in known]
        if missing:
            raise InvalidOption(
                f"ConsistentClassifier: layers names {missing[0]!r}, which {type(model).__name__} does not have; "
                "its sub-modules are listed by named_modules()."
            )
        if not len(layers) == len(channels) == len(sizes) or len(set(layers)) < len(layers):
            raise InvalidOption(
                f"ConsistentClassifier: layers={list(layers)} must be different names, with one entry each in "
                f"channels={list(channels)} and sizes={list(sizes)}."
            )
        self.model, self.layers = model, list(layers)
        self.attention = nn.ModuleList(AdditiveAttention2d(c, embed_dim, rescale) for c in channels)
        self.consistency = DualConsistency(list(sizes), factor, mode, alpha, detach_targets)

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> ConsistentOutput:
        """The arguments of the model; `labels` (B) int64 stay here."""
        found: dict[str, list[Tensor]] = {}
        handles = [
            self.model.get_submodule(name).register_forward_hook(self._hook(name, gate, size, found))
            for name, gate, size in zip(self.layers, self.attention, self.consistency.sizes, strict=True)
        ]
        try:
            output = self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        unused = [name for name in self.layers if name not in found]
        if unused:
            raise InvalidInput(f"ConsistentClassifier: layer {unused[0]!r} took no part in the model's forward pass.")
        consistency = self.consistency([found[name][1] for name in self.layers])
        logits = output if isinstance(output, Tensor) else output.logits
        return _output(logits, labels, consistency, tuple(found[name][0] for name in self.layers))

    @staticmethod
    def _hook(name: str, gate: nn.Module, size: tuple[int, int], found: dict[str, list[Tensor]]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor) or output.dim() != 4 or tuple(output.shape[2:]) != size:
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise InvalidInput(
                    f"ConsistentClassifier: layer {name!r} returned {shape}; it must return one map (B,C,{size[0]},{size[1]}), "
                    "as sizes says. Use ConsistentViT for a ViT."
                )
            gated, *found[name] = gate(output)
            return gated

        return hook


class ConsistentViT(nn.Module):
    """Ties the attention rows of a ViT's CLS token, mean over heads and renormalised over the patches.

    Args:
        model: a ViT classifier that can return attention weights; all its layers take part.
        mode, alpha, detach_targets: as in `DualConsistency`.

    Raises:
        Unsupported: no patch grid, or no token before it.
    """

    def __init__(
        self, model: PreTrainedModel, mode: str = "learned", alpha: float = 10.0, detach_targets: bool = False
    ):
        super().__init__()
        grid, prefix = token_grid(model)
        if grid is None or prefix < 1:
            raise Unsupported(
                f"ConsistentViT, {type(model).__name__}",
                f"its patch grid is {grid}, with {prefix} tokens before it, and the first of these must be a CLS token",
                "Use ConsistentClassifier",
            )
        self.model, self.grid, self.prefix = model, grid, prefix
        sizes = [grid] * model.config.num_hidden_layers
        self.consistency = DualConsistency(sizes, 1, mode, alpha, detach_targets)

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> ConsistentOutput:
        """The arguments of the model; `labels` (B) int64 stay here."""
        output = self.model(*args, output_attentions=True, **kwargs)
        logits = [class_token_logits(weights, self.grid, self.prefix) for weights in output.attentions]
        maps = tuple(x.flatten(1).softmax(dim=1).view_as(x) for x in logits)
        return _output(output.logits, labels, self.consistency(logits), maps)


def class_token_logits(attention: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 1) -> Tensor:
    """(B, rows, columns) logarithm of the first token's weights (B,H,N,N) on the patches, mean over the heads.

    Weights that underflowed to zero count as the least positive number, and pass no gradient.
    """
    if attention.dim() != 4 or attention.shape[3] != num_prefix_tokens + grid[0] * grid[1]:
        raise InvalidInput(
            f"class_token_logits: attention must be (B,H,N,N) with N = {num_prefix_tokens} + {grid[0]} * {grid[1]}; "
            f"got {tuple(attention.shape)}."
        )
    row = (
        attention[:, :, 0, num_prefix_tokens:].float()
        if attention.element_size() < 4
        else attention[:, :, 0, num_prefix_tokens:]
    )
    return row.mean(dim=1).clamp(min=torch.finfo(row.dtype).tiny).log().unflatten(1, grid)


def _output(logits: Tensor, labels: Tensor | None, consistency: Tensor, maps: tuple[Tensor, ...]) -> ConsistentOutput:
    loss = None if labels is None else functional.cross_entropy(logits, labels) + consistency
    return ConsistentOutput(loss=loss, logits=logits, consistency=consistency, maps=maps)
