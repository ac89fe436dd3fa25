"""Batches for dual encoders and their teachers, embeddings of texts, and hard negatives.

An example is a dict: "query" (a text), "documents" (texts), "labels" (1 for a positive, 0 for a negative, one for each
document) and, where there are any, "teacher_scores" (numbers, one for each document).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.models.dual_encoder import DualEncoderModel
from hf_attn.recipes.retrieval import search

Example = Mapping[str, Any]
NO_DOCUMENT = -100
"""Label of a place without a document."""


@dataclass
class PairCollator:
    """Batches for a cross-encoder: query and document in one sequence.

    Attributes:
        tokenizer: of the cross-encoder.
        max_length: tokens of a pair; the longer of both texts is cut.
        every_pair: each query with the documents of all queries of the batch, not only with its own.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 160
    every_pair: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The tokenizer's tensors (B*n,L), `labels` (B,n) and `doc_mask` (B,n)."""
        documents, labels, mask = _documents(examples)
        rows = [sum(documents, [])] * len(examples) if self.every_pair else documents
        queries = [example["query"] for example, row in zip(examples, rows, strict=True) for _ in row]
        pairs = self.tokenizer(
            queries, sum(rows, []), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return {**pairs, "labels": labels, "doc_mask": mask}


@dataclass
class DualEncoderCollator:
    """Batches for `DualEncoderModel`: documents of a query are padded to the largest number in the batch.

    Attributes:
        tokenizer: of the dual encoder.
        max_query_length, max_document_length: tokens, at which texts are cut.
        teacher: makes the batch of a cross-encoder that scores while the dual encoder trains, under names that begin
            with `teacher_`; None: examples bring their teacher_scores, or there are none.
    """

    tokenizer: PreTrainedTokenizerBase
    max_query_length: int = 32
    max_document_length: int = 128
    teacher: PairCollator | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        documents, labels, mask = _documents(examples)
        queries = _tokens(self.tokenizer, [example["query"] for example in examples], self.max_query_length)
        flat = _tokens(self.tokenizer, sum(documents, []), self.max_document_length)
        batch = {
            "query_input_ids": queries["input_ids"],
            "query_attention_mask": queries["attention_mask"],
            "doc_input_ids": flat["input_ids"].unflatten(0, mask.shape),
            "doc_attention_mask": flat["attention_mask"].unflatten(0, mask.shape),
            "doc_mask": mask,
            "labels": labels,
        }
        scored = ["teacher_scores" in example for example in examples]
        if any(scored) and self.teacher is None:
            if not all(scored):
                raise InvalidInput("some examples have teacher_scores and others have none; give them all, or none.")
            batch["teacher_scores"] = _padded([example["teacher_scores"] for example in examples], mask, 0.0)
        if self.teacher is not None:
            pairs = self.teacher(examples)
            batch |= {f"teacher_{n}": t for n, t in pairs.items() if n not in ("labels", "doc_mask")}
        return batch


def _documents(examples: Sequence[Example]) -> tuple[list[list[str]], Tensor, Tensor]:
    """Documents, padded with empty texts; labels (B,n); mask (B,n)."""
    for example in examples:
        if len(example["documents"]) != len(example["labels"]) or not len(example["documents"]):
            raise InvalidInput(
                f"query {example['query']!r:.60} has {len(example['documents'])} documents and {len(example['labels'])} labels; "
                "it needs at least one document, and a label for each."
            )
    count = max(len(example["documents"]) for example in examples)
    documents = [[*example["documents"], *[""] * (count - len(example["documents"]))] for example in examples]
    mask = torch.tensor([[i < len(example["documents"]) for i in range(count)] for example in examples])
    return documents, _padded([example["labels"] for example in examples], mask, NO_DOCUMENT), mask


def _padded(rows: Sequence[Sequence[Any]], mask: Tensor, filling: Any) -> Tensor:
    for row, real in zip(rows, mask.sum(1).tolist(), strict=True):
        if len(row) != real:
            raise InvalidInput(
                f"a query of {real} documents has {len(row)} labels or teacher_scores; give one for each."
            )
    return torch.tensor([[*row, *[filling] * (mask.shape[1] - len(row))] for row in rows])


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> Any:
    return tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt")


@torch.no_grad()
def encode(
    model: DualEncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    side: str,
    max_length: int = 128,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """(len texts, D) embeddings on the CPU, in evaluation mode; texts of about one length share a batch.

    Args:
        side: "query" or "document": which encoder.
        progress: show a bar.
    """
    encoders = {"query": model.encode_queries, "document": model.encode_documents}
    if side not in encoders:
        raise InvalidOption(f"encode: side={side!r} must be 'query' or 'document'.")
    if not texts:
        raise InvalidInput("encode: texts is empty; give at least one.")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts, training = [], model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=f"encode {side}", disable=not progress):
            chosen = [texts[i] for i in order[start : start + batch_size]]
            tokens = _tokens(tokenizer, chosen, max_length).to(model.device)
            parts.append(encoders[side](tokens["input_ids"], tokens["attention_mask"]).cpu())
    finally:
        model.train(training)
    embeddings = torch.cat(parts)
    return torch.empty_like(embeddings).index_copy(0, torch.tensor(order), embeddings)


@torch.no_grad()
def teacher_scores(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int = 160,
    batch_size: int = 8,
    progress: bool = False,
) -> list[list[float]]:
    """The column "teacher_scores" of `examples`: the logit of a cross-encoder for each document, in evaluation mode.

    Args:
        teacher: a sequence classifier of one class.
        batch_size: queries at once.
        progress: show a bar.
    """
    collate, training, found = PairCollator(tokenizer, max_length), teacher.training, []
    teacher.eval()
    try:
        for start in tqdm(range(0, len(examples), batch_size), desc="teacher", disable=not progress):
            batch = {n: t.to(teacher.device) for n, t in collate(examples[start : start + batch_size]).items()}
            mask = batch.pop("doc_mask")
            scores = pair_scores(teacher, batch, mask.shape)
            found += [row[real].tolist() for row, real in zip(scores, mask, strict=True)]
    finally:
        teacher.train(training)
    return found


def pair_scores(teacher: Any, batch: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The logits of a cross-encoder for the pairs in `batch`, in float32, in `shape` (B,n)."""
    logits = teacher(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    if logits.shape != (shape[0] * shape[1], 1):
        raise InvalidInput(
            f"the teacher returned logits {tuple(logits.shape)} for {shape[0] * shape[1]} pairs. "
            "It must be a sequence classifier with num_labels=1."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).view(*shape)


def hard_negatives(
    queries: Tensor, documents: Tensor, positives: Sequence[Sequence[int]], count: int, skip: int = 0
) -> list[list[int]]:
    """For each query the `count` documents with the highest scores that are none of its positives.

    Args:
        queries: (Q,D). documents: (n,D).
        positives: positions of each query's positives, which are never taken.
        count: negatives of a query; fewer where there are no more documents.
        skip: leave the first ones out: positives that nobody has marked are among them.
    """
    if len(positives) != len(queries) or count < 1 or skip < 0:
        raise InvalidInput(
            f"hard_negatives: positives must have an entry for each of {len(queries)} queries, got {len(positives)}; "
            f"count={count} must be at least 1 and skip={skip} at least 0."
        )
    most = count + skip + max(map(len, positives), default=0)
    found = search(queries, documents, k=most).indices.tolist()
    ranked = [[i for i in row if i not in set(own)] for row, own in zip(found, positives, strict=True)]
    return [row[skip : skip + count] for row in ranked]
