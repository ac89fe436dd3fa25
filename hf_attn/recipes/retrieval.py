"""Exact search among embeddings, and metrics of a ranking.

    found = search(queries, documents, k=10)      # indices (Q,10) and scores (Q,10), best first
    recall(found.indices, relevant, k=10)

Metrics take scores (B,n) and labels (B,n), 1 for a relevant document. Documents of equal score are ranked with irrelevant
ones first, so that a model that scores all alike gains nothing. A score of -inf marks padding, with label 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn.errors import InvalidInput


class Found(NamedTuple):
    """Results of a search, best first; of documents with equal scores, the first one comes first.

    Attributes:
        indices: (Q,k) int64 positions among the documents.
        scores: (Q,k) dot products, in float32 or wider.
    """

    indices: Tensor
    scores: Tensor


Searcher = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(queries (Q,D), k) -> indices (Q,k) and scores (Q,k), best first: what an index of another library has to do."""


@torch.no_grad()
def search(queries: Tensor, documents: Tensor | Searcher, k: int = 10, chunk: int = 4096) -> Found:
    """The `k` documents with the largest dot product for each query, exactly, without the whole matrix of scores.

    Args:
        queries: (Q,D).
        documents: (n,D); or a function that searches them, such as an approximate index:

            index = faiss.IndexFlatIP(dim)
            index.add(documents.numpy())
            search(queries, lambda q, k: tuple(map(torch.from_numpy, index.search(q.numpy(), k)[::-1])))

        k: documents a query; all of them if there are fewer.
        chunk: documents, and queries, scored at once: memory is about chunk^2 numbers.

    Raises:
        InvalidInput: shapes do not fit, k or chunk below 1, or embeddings that are not finite.
    """
    if queries.dim() != 2 or k < 1 or chunk < 1:
        raise InvalidInput(f"search: queries {tuple(queries.shape)} must be (Q,D), k={k} and chunk={chunk} at least 1.")
    if not isinstance(documents, Tensor):
        return _checked(Found(*documents(queries, k)), len(queries))
    if documents.dim() != 2 or not len(documents) or documents.shape[1] != queries.shape[1]:
        raise InvalidInput(
            f"search: documents {tuple(documents.shape)} must be (n, {queries.shape[1]}), n at least 1: "
            f"queries are {tuple(queries.shape)}."
        )
    if not bool(torch.isfinite(queries).all() and torch.isfinite(documents).all()):
        raise InvalidInput("search: queries and documents must be finite: other scores have no order.")
    dtype = torch.promote_types(torch.promote_types(queries.dtype, documents.dtype), torch.float32)
    parts = [_best(part.to(dtype), documents, k, chunk) for part in queries.split(chunk)]
    indices, scores = (torch.cat(part) for part in zip(*parts, strict=True))
    return Found(indices, scores)


def _best(queries: Tensor, documents: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    scores, indices = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(documents), chunk):
        new = queries @ documents[start : start + chunk].to(queries).T
        found = torch.arange(start, start + new.shape[1], device=new.device).expand(len(new), -1)
        # stable, and earlier documents stand first: equal scores keep the order of the documents
        scores, order = torch.cat([scores, new], 1).sort(dim=1, descending=True, stable=True)
        scores, indices = scores[:, :k], torch.cat([indices, found], 1).gather(1, order[:, :k])
    return indices, scores


def _checked(found: Found, queries: int) -> Found:
    for name, tensor in found._asdict().items():
        if tensor.dim() != 2 or len(tensor) != queries or tensor.shape != found.scores.shape:
            raise InvalidInput(f"search: the given function returned {name} {tuple(tensor.shape)}, not ({queries}, k).")
    return found


def recall(indices: Tensor, relevant: Sequence[Sequence[int]], k: int = 10) -> Tensor:
    """Mean over queries of the part of a query's relevant documents that is among its first `k` results.

    Args:
        indices: (Q, at least k), best first, without repetitions, as `search` returns them.
        relevant: for each query the positions of its relevant documents, at least one.
    """
    _check_results(indices, relevant, k)
    rows = zip(indices[:, :k].tolist(), map(set, relevant), strict=True)
    return torch.tensor([len(wanted.intersection(row)) / len(wanted) for row, wanted in rows]).mean()


def reciprocal_rank(indices: Tensor, relevant: Sequence[Sequence[int]], k: int = 10) -> Tensor:
    """MRR@k of results: mean over queries of 1 / rank of the first relevant one among the first `k`, 0 without one."""
    _check_results(indices, relevant, k)
    rows = zip(indices[:, :k].tolist(), map(set, relevant), strict=True)
    ranks = [next((1 / rank for rank, found in enumerate(row, 1) if found in wanted), 0.0) for row, wanted in rows]
    return torch.tensor(ranks).mean()


def mrr(scores: Tensor, labels: Tensor, k: int = 10) -> Tensor:
    """MRR@k: mean over queries of 1 / rank of the first relevant document among the `k` highest, 0 without one."""
    ranked = _ranked(scores, labels, k)
    rank = ranked.to(torch.int8).argmax(1) + 1
    return (ranked.any(1).to(_wide(scores)) / rank).mean()


def ndcg(scores: Tensor, labels: Tensor, k: int = 10) -> Tensor:
    """nDCG@k with gains 0 and 1: mean over queries, 0 for a query without a relevant document."""
    ranked = _ranked(scores, labels, k)
    discount = 1 / torch.arange(2, ranked.shape[1] + 2, device=scores.device, dtype=_wide(scores)).log2()
    best = discount.cumsum(0)[(labels == 1).sum(1).clamp(1, ranked.shape[1]) - 1]
    return ((ranked * discount).sum(1) / best).mean()


def normalized_margin(scores: Tensor, labels: Tensor) -> Tensor:
    """(B): (mean score of the positives - largest score of a negative) / largest absolute score.

    NaN for a query without a positive or without a negative, and where all scores are 0.
    """
    _check_scores(scores, labels)
    real = scores != -math.inf
    positive, negative = (labels == 1) & real, (labels == 0) & real
    kept = scores.to(_wide(scores)).masked_fill(~real, 0)
    mean = (kept * positive).sum(1) / positive.sum(1)
    hardest = kept.masked_fill(~negative, -math.inf).amax(1)
    margin = (mean - hardest) / kept.abs().amax(1)
    return margin.masked_fill(~negative.any(1), math.nan)


def _ranked(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """(B, min(k,n)) bool: the relevance of the documents from the highest score down."""
    _check_scores(scores, labels)
    if k < 1:
        raise InvalidInput(f"k={k} must be at least 1.")
    relevant, order = (labels == 1).sort(dim=1, stable=True)
    return relevant.gather(1, scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices)[:, :k]


def _wide(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _check_scores(scores: Tensor, labels: Tensor) -> None:
    if scores.dim() != 2 or 0 in scores.shape or scores.shape != labels.shape:
        raise InvalidInput(
            f"scores {tuple(scores.shape)} and labels {tuple(labels.shape)} must be alike, (B, n), and not empty."
        )
    if not ((labels == 0) | (labels == 1)).all():
        raise InvalidInput("labels must be 1 (relevant) or 0.")
    if bool((scores.isnan() | (scores == math.inf)).any()) or bool(((scores == -math.inf) & (labels == 1)).any()):
        raise InvalidInput("scores must be finite; -inf marks padding, whose label is 0.")


def _check_results(indices: Tensor, relevant: Sequence[Sequence[int]], k: int) -> None:
    if indices.dim() != 2 or len(indices) != len(relevant) or not len(relevant) or not all(map(len, relevant)):
        raise InvalidInput(
            f"indices {tuple(indices.shape)} must be (Q, k), and relevant name at least one document for each of "
            f"{len(relevant)} queries."
        )
    if not 1 <= k <= indices.shape[1]:
        raise InvalidInput(f"k={k} must be from 1 to {indices.shape[1]}, the results of a query.")
