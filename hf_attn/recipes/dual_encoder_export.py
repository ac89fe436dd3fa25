"""Dual encoders in sentence-transformers: a folder it loads, and the distillation losses for its trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.models.dual_encoder import DualEncoderModel
from hf_attn.models.dual_encoder_losses import LOSSES

POOLING = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
"""Our pooling -> the name in sentence-transformers' folders."""


def save_sentence_transformer(
    model: DualEncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    side: str | None = None,
    max_length: int = 128,
) -> None:
    """Write `folder` so that `SentenceTransformer(folder)` gives the embeddings of the model.

    Mechanisms of this package are found where it is imported before the folder is loaded. Scores are dot products,
    without `score_scale`, which does not change a ranking.

    Args:
        folder: new or empty.
        side: "query" or "document", for a model with an encoder for each; a folder holds one.
        max_length: tokens at which sentence-transformers cuts texts.

    Raises:
        InvalidInput: the folder holds something. InvalidOption: `side` is missing or wrong.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"folder={str(folder)!r} exists and is not an empty folder; give a new one.")
    if side not in ("query", "document") and not (side is None and model.config.shared_encoder):
        raise InvalidOption(f"save_sentence_transformer: side={side!r} must be 'query' or 'document'.")
    documents = side == "document" and not model.config.shared_encoder
    encoder: Any = model.document_encoder if documents else model.query_encoder
    projection = model.document_projection if documents else model.query_projection
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    width = encoder.config.hidden_size
    pooling = {name: mode == model.config.pooling for mode, name in POOLING.items()}
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "dot"})
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **pooling})
    if projection is not None:
        path = folder / f"{len(parts)}_Dense"
        facts = {"in_features": width, "out_features": projection.out_features, "bias": projection.bias is not None}
        _write(path / "config.json", {**facts, "activation_function": "torch.nn.modules.linear.Identity"})
        save_file(
            {f"linear.{n}": p.detach().contiguous() for n, p in projection.named_parameters()},
            path / "model.safetensors",
        )
        parts.append((path.name, "Dense"))
    if model.config.normalize:
        parts.append((f"{len(parts)}_Normalize", "Normalize"))
        (folder / parts[-1][0]).mkdir()
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    _write(folder / "modules.json", modules)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class SentenceDistillationLoss(nn.Module):
    """A distillation loss for SentenceTransformerTrainer.

    Columns of the data: the query, `num_positives` positives, then negatives; `label`: the teacher's scores of these
    documents, in this order.

    Args:
        model: a SentenceTransformer.
        distill_loss: a name of `hf_attn.models.dual_encoder_losses.LOSSES`.
        num_positives: columns after the query that hold positives.
        score_scale: factor of the dot product.
    """

    def __init__(self, model: nn.Module, distill_loss: str = "m3se", num_positives: int = 1, score_scale: float = 1.0):
        super().__init__()
        if distill_loss not in LOSSES:
            raise InvalidOption(
                f"SentenceDistillationLoss: distill_loss={distill_loss!r} must be one of {', '.join(LOSSES)}."
            )
        if num_positives < 1:
            raise InvalidOption(f"SentenceDistillationLoss: num_positives={num_positives} must be at least 1.")
        self.model, self.distill_loss = model, distill_loss
        self.num_positives, self.score_scale = num_positives, score_scale

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of B queries; `sentence_features` are the tokens of each column, `labels` (B,n)."""
        query, *documents = (self.model(dict(column))["sentence_embedding"] for column in sentence_features)
        scores = self.score_scale * torch.einsum("bd,bnd->bn", query, torch.stack(documents, dim=1))
        if labels.shape != scores.shape:
            raise InvalidInput(
                f"SentenceDistillationLoss: label {tuple(labels.shape)} must hold the teacher's score of each document, "
                f"{tuple(scores.shape)}."
            )
        positive = torch.arange(scores.shape[1], device=scores.device) < self.num_positives
        return LOSSES[self.distill_loss](scores, labels, positive.expand(scores.shape).long())

    def get_config_dict(self) -> dict[str, Any]:
        """What sentence-transformers writes into its model card."""
        return {
            "distill_loss": self.distill_loss,
            "num_positives": self.num_positives,
            "score_scale": self.score_scale,
        }
