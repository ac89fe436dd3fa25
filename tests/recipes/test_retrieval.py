"""Exact search and ranking metrics against plain loops."""

import math

import pytest
import torch

from hf_attn.errors import InvalidInput
from hf_attn.recipes.retrieval import mrr, ndcg, normalized_margin, recall, reciprocal_rank, search
from tests.helpers import agree, normal


def exact(queries, documents, k):
    scores = queries @ documents.T
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return indices[:, :k], values[:, :k]


@pytest.mark.parametrize("chunk", [1, 4, 7, 50, 1000])
def test_search_is_the_sorted_matrix_of_scores(chunk):
    queries, documents = normal(9, 5), normal(50, 5, seed=1)
    found = search(queries, documents, k=6, chunk=chunk)
    indices, scores = exact(queries, documents, 6)
    assert torch.equal(found.indices, indices)
    agree(found.scores, scores)


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_equal_scores_keep_the_order_of_the_documents(chunk):
    documents = normal(3, 4).repeat(4, 1)
    found = search(normal(5, 4, seed=2), documents, k=8, chunk=chunk)
    for row in found.indices.tolist():
        assert row[:4] == sorted(row[:4]) and len({i % 3 for i in row[:4]}) == 1


def test_there_may_be_fewer_documents_than_asked_for():
    found = search(normal(2, 3), normal(4, 3, seed=1), k=10)
    assert found.indices.shape == (2, 4) and [sorted(row) for row in found.indices.tolist()] == [[0, 1, 2, 3]] * 2


def test_search_in_half_precision_scores_in_float32():
    queries, documents = normal(3, 8).half(), normal(20, 8, seed=1).half()
    found = search(queries, documents, k=3)
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.indices, exact(queries.float(), documents.float(), 3)[0])


def test_search_takes_another_index():
    class Index:
        """The interface of faiss: scores first, NumPy."""

        def search(self, queries, k):
            indices, scores = exact(torch.from_numpy(queries), normal(20, 4, seed=1), k)
            return scores.numpy(), indices.numpy()

    found = search(normal(3, 4), lambda q, k: tuple(map(torch.from_numpy, Index().search(q.numpy(), k)[::-1])), k=5)
    plain = search(normal(3, 4), normal(20, 4, seed=1), k=5)
    assert torch.equal(found.indices, plain.indices)
    with pytest.raises(InvalidInput, match="returned"):
        search(normal(3, 4), lambda q, k: (torch.zeros(2, k), torch.zeros(2, k)))


def test_results_are_judged_by_their_relevant_documents():
    indices = torch.tensor([[4, 2, 9], [7, 8, 1], [0, 5, 3]])
    relevant = [[2], [7, 6], [9]]
    agree(recall(indices, relevant, 3), torch.tensor((1 + 0.5 + 0) / 3))
    agree(recall(indices, relevant, 1), torch.tensor((0 + 0.5 + 0) / 3))
    agree(reciprocal_rank(indices, relevant, 3), torch.tensor((0.5 + 1 + 0) / 3))


def loop_ranks(scores, labels):
    """Places of the relevant documents, equal irrelevant ones before them."""
    for row, wanted in zip(scores.tolist(), labels.tolist()):
        order = sorted(range(len(row)), key=lambda i: (-row[i], wanted[i]))
        yield [place for place, i in enumerate(order, 1) if wanted[i]]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_metrics_are_the_loop(k):
    scores = normal(40, 8).mul(2).round()  # with ties
    labels = (normal(40, 8, seed=1) > 0.8).long()
    ranks = list(loop_ranks(scores, labels))
    assert any(not r for r in ranks) and any(len(r) > 2 for r in ranks)
    expected = sum(1 / r[0] if r and r[0] <= k else 0 for r in ranks) / 40
    agree(mrr(scores, labels, k), torch.tensor(expected, dtype=torch.float64))
    gains = [
        sum(1 / math.log2(p + 1) for p in r if p <= k) / sum(1 / math.log2(p + 1) for p in range(1, min(len(r), k) + 1))
        for r in ranks
        if r
    ]
    agree(ndcg(scores, labels, k), torch.tensor(sum(gains) / 40, dtype=torch.float64))


def test_a_collapsed_model_gains_nothing_by_ties():
    labels = torch.zeros(3, 20, dtype=torch.long)
    labels[:, 0] = 1
    assert mrr(torch.zeros(3, 20), labels) == 0


def test_padding_does_not_change_metrics():
    scores, labels = normal(6, 5), (normal(6, 5, seed=1) > 0).long()
    labels[:, 0], labels[:, 1] = 1, 0
    padded = torch.cat([scores, torch.full((6, 3), -math.inf)], 1)
    more = torch.cat([labels, torch.zeros(6, 3, dtype=torch.long)], 1)
    for metric in (mrr, ndcg, normalized_margin):
        agree(metric(padded, more), metric(scores, labels))


def test_normalized_margin():
    scores = torch.tensor([[3.0, 1.0, -4.0, 2.0], [1.0, 2.0, 0.5, 0.0], [1.0, 2.0, 3.0, 4.0]])
    labels = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    margin = normalized_margin(scores, labels)
    agree(margin[:2], torch.tensor([0.0, 0.5]))
    assert margin[2].isnan()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: search(normal(3, 4), normal(5, 3)), "documents"),
        (lambda: search(normal(3, 4), normal(0, 4)), "n at least 1"),
        (lambda: search(normal(3, 4), normal(5, 4), k=0), "k=0"),
        (lambda: search(normal(3, 4) / 0, normal(5, 4)), "finite"),
        (lambda: mrr(torch.zeros(2, 3), torch.zeros(2, 4)), "labels"),
        (lambda: mrr(torch.zeros(2, 3), torch.full((2, 3), 2)), "labels must be"),
        (lambda: mrr(torch.full((2, 3), math.nan), torch.zeros(2, 3)), "finite"),
        (lambda: mrr(torch.full((2, 3), -math.inf), torch.ones(2, 3)), "padding"),
        (lambda: mrr(torch.zeros(2, 3), torch.zeros(2, 3), k=0), "k=0"),
        (lambda: recall(torch.zeros(2, 3), [[1], []]), "at least one document"),
        (lambda: recall(torch.zeros(2, 3), [[1], [2]], k=4), "k=4"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()
