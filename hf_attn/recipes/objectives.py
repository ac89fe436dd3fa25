"""What a task minimises and measures, the same for every family and for any number of processes.

The losses are sums divided by the number of targets in the whole batch (all processes, all accumulated steps), so
equal batches give equal gradients however they are divided. Several models of transformers ignore that number, and
would weight a step with few targets like one with many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of what is not a target."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy over classes: of tokens, or of whole examples.

    Attributes:
        shift: logits at a position are about the next label, as in a causal language model.
        perplexity: measure it, too.
        smoothing: label smoothing while training.
    """

    shift: bool = False
    perplexity: bool = False
    smoothing: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics, the most telling one first."""
        return ("perplexity", "accuracy") if self.perplexity else ("accuracy",)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss, as Trainer's compute_loss_func."""
        logits, labels = self._aligned(outputs["logits"], labels)
        total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED, label_smoothing=self.smoothing)
        return total / _items(num_items_in_batch, labels)

    def sums(self, logits: Any, labels: Tensor) -> Tensor:
        """(B, 3): loss, hits and targets of every example, so that no logits are kept."""
        batch = len(labels)
        logits, labels = self._aligned(logits[0] if isinstance(logits, tuple) else logits, labels)
        loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        targets = labels != IGNORED
        hits = (logits.argmax(-1) == labels) & targets
        return torch.stack([part.double().view(batch, -1).sum(1) for part in (loss, hits, targets)], dim=1)

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Over all targets of the split, as Trainer's compute_metrics."""
        loss, hits, targets = (float(total) for total in prediction.predictions.astype("float64").sum(0))
        found = {"accuracy": hits / targets}
        if self.perplexity:
            # a model that has diverged has no perplexity worth a number
            found["perplexity"] = math.exp(min(loss / targets, 700.0))
        return found

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device)


@dataclass(frozen=True)
class PixelError:
    """Mean absolute error of the hidden pixels; the labels are the pixels, `IGNORED` where nothing is hidden."""

    smoothing: float = 0.0
    names: tuple[str, ...] = ("error",)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss, as Trainer's compute_loss_func."""
        hidden = labels != IGNORED
        total = ((outputs["reconstruction"].float() - labels).abs() * hidden).sum()
        return total / _items(num_items_in_batch, labels)

    def sums(self, logits: Any, labels: Tensor) -> Tensor:
        """(B, 2): error and hidden pixels of every example."""
        hidden = labels != IGNORED
        pixels = next(part for part in logits if part.shape == labels.shape) if isinstance(logits, tuple) else logits
        error = (pixels.float() - labels).abs() * hidden
        return torch.stack([part.double().flatten(1).sum(1) for part in (error, hidden)], dim=1)

    def metrics(self, prediction: Any) -> dict[str, float]:
        """Over all hidden pixels of the split, as Trainer's compute_metrics."""
        error, hidden = (float(total) for total in prediction.predictions.astype("float64").sum(0))
        return {"error": error / hidden}


def _items(number: Tensor | int | None, labels: Tensor) -> Tensor | int:
    return (labels != IGNORED).sum() if number is None else number
