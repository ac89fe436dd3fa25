"""Train dual encoders: from labels, and from the scores of a cross-encoder, which reads query and document together.

    teacher = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    CrossEncoderTrainer(teacher, args=..., data_collator=PairCollator(tokenizer), train_dataset=examples).train()
    model = DualEncoderModel.from_encoders(AutoModel.from_pretrained(folder), pooling="mean", distill_loss="m3se")
    collator = DualEncoderCollator(tokenizer, teacher=PairCollator(tokenizer))
    DualEncoderTrainer(model, teacher=teacher, args=..., data_collator=collator, train_dataset=examples).train()

Paper: Menon et al., ICML 2022 (see `hf_attn.models.dual_encoder`). Losses: `hf_attn.models.dual_encoder_losses`; what an
example is: `hf_attn.recipes.dual_encoder_data`; search and metrics: `hf_attn.recipes.retrieval`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.models.dual_encoder import DualEncoderModel
from hf_attn.models.dual_encoder_losses import (
    LOSSES,
    m3se_loss,
    margin_mse_loss,
    mse_loss,
    onehot_loss,
    softmax_ce_loss,
)
from hf_attn.recipes.dual_encoder_data import (
    DualEncoderCollator,
    PairCollator,
    encode,
    hard_negatives,
    pair_scores,
    teacher_scores,
)
from hf_attn.recipes.retrieval import mrr, ndcg, normalized_margin, recall, reciprocal_rank, search

__all__ = [
    "LOSSES",
    "CrossEncoderTrainer",
    "DualEncoderCollator",
    "DualEncoderTrainer",
    "PairCollator",
    "encode",
    "hard_negatives",
    "m3se_loss",
    "margin_mse_loss",
    "mrr",
    "mse_loss",
    "ndcg",
    "normalized_margin",
    "onehot_loss",
    "ranking_metrics",
    "recall",
    "retrieve",
    "search",
    "softmax_ce_loss",
    "teacher_scores",
]


class _RankingTrainer(Trainer):
    """What both trainers share: texts reach the collator, the loss is a mean over queries, metrics are of rankings."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments | None = None, **kwargs: Any):
        args = TrainingArguments() if args is None else args
        # the texts are columns that the model does not take
        args.remove_unused_columns = False
        if kwargs.get("data_collator") is None:
            raise InvalidInput(
                f"{type(self).__name__}: data_collator is missing. Give a DualEncoderCollator (a PairCollator for a "
                "cross-encoder), which holds the tokenizer."
            )
        kwargs.setdefault("compute_metrics", ranking_metrics)
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.label_names = ["labels"]


class DualEncoderTrainer(_RankingTrainer):
    """Trainer for `DualEncoderModel`: the loss is the config's; evaluation is by the one-hot loss and `ranking_metrics`.

    Args:
        model: the student.
        teacher: a sequence classifier of one class that scores the batches, in evaluation mode and without gradients;
            `data_collator.teacher` makes its inputs. None: the examples bring their scores, or the loss needs none.
        kwargs: of Trainer; `data_collator` is a DualEncoderCollator.

    Raises:
        InvalidInput, Unsupported: the parts do not fit together.
    """

    def __init__(self, model: DualEncoderModel, *, teacher: PreTrainedModel | None = None, **kwargs: Any):
        collator = kwargs.get("data_collator")
        if not isinstance(model, DualEncoderModel):
            raise Unsupported(
                "DualEncoderTrainer",
                f"a {type(model).__name__} is no DualEncoderModel",
                "Use DualEncoderModel.from_encoders",
            )
        pairs = getattr(collator, "teacher", None)
        if (teacher is None) != (pairs is None):
            raise InvalidInput(
                "DualEncoderTrainer: teacher and data_collator.teacher belong together: the model that scores, and the "
                "PairCollator that makes its inputs. Give both or none."
            )
        if teacher is not None and teacher.config.num_labels != 1:
            raise InvalidInput(f"DualEncoderTrainer: the teacher has num_labels={teacher.config.num_labels}, not 1.")
        if pairs is not None and pairs.every_pair and not model.config.in_batch_negatives:
            raise InvalidOption(
                "DualEncoderTrainer: the teacher scores every pair of a batch, and the model's config has "
                "in_batch_negatives=False. Set it, or every_pair=False."
            )
        super().__init__(model, **kwargs)
        self.teacher: Any = None
        if teacher is not None:
            self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        own = {n: t for n, t in inputs.items() if not n.startswith("teacher_")}
        if not model.training:
            labels = own.pop("labels")
            outputs = model(**own)
            loss = onehot_loss(outputs.scores, None, labels, own["doc_mask"])
            return (loss, outputs) if return_outputs else loss
        if self.teacher is not None:
            collator: Any = self.data_collator
            pairs = {n.removeprefix("teacher_"): t for n, t in inputs.items() if n.startswith("teacher_")}
            queries, count = own["doc_mask"].shape
            width = queries * count if collator.teacher.every_pair else count
            with torch.no_grad():
                own["teacher_scores"] = pair_scores(self.teacher, pairs, (queries, width))
        elif "teacher_scores" in inputs:
            own["teacher_scores"] = inputs["teacher_scores"]
        outputs = model(**own)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class CrossEncoderTrainer(_RankingTrainer):
    """Trainer for a teacher: a sequence classifier of one class, by the one-hot loss over each query's documents.

    Args:
        model: such as `AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)`.
        kwargs: of Trainer; `data_collator` is a PairCollator.
    """

    def __init__(self, model: PreTrainedModel, **kwargs: Any):
        if model.config.num_labels != 1:
            raise InvalidInput(
                f"CrossEncoderTrainer: the model has num_labels={model.config.num_labels}; it must be 1."
            )
        if getattr(kwargs.get("data_collator"), "every_pair", False):
            raise InvalidOption("CrossEncoderTrainer: every_pair=True is for teachers that score; set it to False.")
        super().__init__(model, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mask = inputs["doc_mask"]
        pairs = {n: t for n, t in inputs.items() if n != "doc_mask"}
        scores = pair_scores(model, pairs, mask.shape)
        loss = onehot_loss(scores, None, inputs["labels"], mask)
        return (loss, {"loss": loss, "scores": scores.masked_fill(~mask, -math.inf)}) if return_outputs else loss


def ranking_metrics(prediction: Any) -> dict[str, float]:
    """`compute_metrics` of both trainers: mrr@10, ndcg@10 and the mean normalized margin, of the listed documents."""
    labels = torch.as_tensor(prediction.label_ids)
    scores = prediction.predictions
    scores = torch.as_tensor(scores[0] if isinstance(scores, tuple) else scores)
    real = (labels == 0) | (labels == 1)
    scores, labels = scores.masked_fill(~real, -math.inf), labels.masked_fill(~real, 0)
    margin = normalized_margin(scores, labels).nanmean()
    return {
        "mrr@10": mrr(scores, labels).item(),
        "ndcg@10": ndcg(scores, labels).item(),
        "normalized_margin": margin.item(),
    }


def retrieve(
    model: DualEncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str],
    documents: Sequence[str],
    relevant: Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 10),
    max_query_length: int = 32,
    max_document_length: int = 128,
    progress: bool = False,
) -> dict[str, float]:
    """mrr@10 and recall@k of an exact search among all documents.

    Args:
        relevant: for each query the positions of its relevant documents, at least one.
        ks: of the recalls.
    """
    asked = encode(model, tokenizer, queries, "query", max_query_length, progress=progress)
    held = encode(model, tokenizer, documents, "document", max_document_length, progress=progress)
    most = min(max(*ks, 10), len(documents))
    indices = search(asked, held, k=most).indices
    found = {"mrr@10": reciprocal_rank(indices, relevant, min(10, most)).item()}
    return found | {f"recall@{k}": recall(indices, relevant, min(k, most)).item() for k in ks}
