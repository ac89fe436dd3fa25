"""Dual encoders trained by distillation: losses and metrics."""

from __future__ import annotations

from hf_attn.models.dual_encoder_losses import (
    LOSSES,
    m3se_loss,
    margin_mse_loss,
    mse_loss,
    onehot_loss,
    softmax_ce_loss,
)
from hf_attn.recipes.retrieval import mrr, ndcg, normalized_margin

__all__ = [
    "LOSSES",
    "m3se_loss",
    "margin_mse_loss",
    "mrr",
    "mse_loss",
    "ndcg",
    "normalized_margin",
    "onehot_loss",
    "softmax_ce_loss",
]
