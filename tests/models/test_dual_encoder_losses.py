"""Losses of dual encoders: the invariants of their page, plain loops as references, and refusals."""

import math

import pytest
import torch

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.models.dual_encoder_losses import (
    LOSSES,
    m3se_loss,
    margin_mse_loss,
    mse_loss,
    onehot_loss,
    softmax_ce_loss,
)
from tests.helpers import agree, normal

QUERIES, DOCUMENTS = 4, 7
every_loss = pytest.mark.parametrize("name", LOSSES)


def case(seed=0):
    """Scores of student and teacher, and labels with one, two, three and no positives."""
    labels = torch.zeros(QUERIES, DOCUMENTS, dtype=torch.long)
    labels[0, 3] = labels[1, 0] = labels[1, 5] = 1
    labels[2, 1:4] = 1
    return 2 * normal(QUERIES, DOCUMENTS, seed=seed), 2 * normal(QUERIES, DOCUMENTS, seed=seed + 1), labels


def loop(name, s, t, labels, mask):
    """The definition, document by document, of one query."""
    real = [i for i in range(len(s)) if mask[i]]
    positive, negative = ([i for i in real if labels[i] == wanted] for wanted in (1, 0))
    s, t = s.tolist(), t.tolist()
    if name == "mse":
        return sum((t[i] - s[i]) ** 2 for i in real)
    if name == "softmax_ce":
        totals = [sum(math.exp(x[j]) for j in real) for x in (s, t)]
        return -sum(math.exp(t[i]) / totals[1] * math.log(math.exp(s[i]) / totals[0]) for i in real)
    if name == "onehot":
        others = sum(math.exp(s[j]) for j in negative)
        return -sum(math.log(math.exp(s[i]) / (math.exp(s[i]) + others)) for i in positive)
    if name == "margin_mse":
        return sum(((t[i] - t[j]) - (s[i] - s[j])) ** 2 for i in positive for j in negative)
    if not negative:
        return 0.0
    hard = max(negative, key=lambda j: t[j])
    matched = sum(((t[i] - t[hard]) - (s[i] - s[hard])) ** 2 for i in positive)
    return matched + sum(max(s[j] - s[hard], 0) ** 2 for j in negative)


@pytest.mark.parametrize("name", ["m3se", "margin_mse", "mse"])
def test_01_the_teachers_own_scores_cost_nothing(name):
    _, teacher, labels = case()
    assert LOSSES[name](teacher, teacher, labels).item() == 0


@pytest.mark.parametrize("name", ["m3se", "margin_mse", "softmax_ce"])
def test_02_a_shift_of_a_querys_scores_changes_nothing(name):
    student, teacher, labels = case()
    shift = 30 * normal(QUERIES, 1, seed=9)
    loss = LOSSES[name](student, teacher, labels)
    agree(LOSSES[name](student + shift, teacher, labels), loss, 1e-9)
    agree(LOSSES[name](student, teacher + shift, labels), loss, 1e-9)
    assert (mse_loss(student + shift, teacher, labels) - mse_loss(student, teacher, labels)).abs() > 1


def test_03_with_one_positive_and_one_negative_m3se_is_margin_mse():
    student, teacher, _ = case()
    pair, labels = (student[:, :2], teacher[:, :2]), torch.tensor([[0, 1]]).expand(QUERIES, -1)
    agree(m3se_loss(*pair, labels), margin_mse_loss(*pair, labels), 1e-12)


def test_04_other_negatives_may_fall_as_far_as_they_like():
    _, teacher, labels = case()
    hard = teacher.masked_fill(labels == 1, -math.inf).argmax(1, keepdim=True)
    others = (labels == 0).scatter(1, hard, False)
    student = teacher.where(~others, teacher.gather(1, hard) - 50)
    assert m3se_loss(student, teacher, labels).item() == 0
    assert margin_mse_loss(student, teacher, labels) > 1


def test_05_at_no_loss_the_teachers_best_positives_are_the_students():
    """From random scores, gradient descent to no loss ranks the positives first that the teacher ranks first."""
    student, teacher, labels = case()
    teacher = teacher + 8 * labels
    student = student.requires_grad_()
    optimizer = torch.optim.Adam([student], 0.1)
    for _ in range(1500):
        optimizer.zero_grad()
        loss = m3se_loss(student, teacher, labels)
        loss.backward()
        optimizer.step()
    assert loss < 1e-6
    lowest = student.masked_fill(labels == 0, math.inf).amin(1)
    highest = student.masked_fill(labels == 1, -math.inf).amax(1)
    assert (lowest > highest).all()


@every_loss
def test_06_the_order_of_documents_does_not_matter(name):
    student, teacher, labels = case()
    order = torch.randperm(DOCUMENTS, generator=torch.Generator().manual_seed(1))
    moved = LOSSES[name](student[:, order], teacher[:, order], labels[:, order])
    agree(moved, LOSSES[name](student, teacher, labels), 1e-12)


@every_loss
def test_07_padded_documents_count_as_removed(name):
    student, teacher, labels = case()
    kept = LOSSES[name](student, teacher, labels, reduction="none")
    padding = torch.full((QUERIES, 2), math.nan, dtype=torch.float64)
    padded = [torch.cat([scores, padding], 1).requires_grad_() for scores in (student, teacher)]
    more = torch.cat([labels, torch.tensor([[1, 0]]).expand(QUERIES, -1)], 1)
    mask = torch.arange(DOCUMENTS + 2).expand(QUERIES, -1) < DOCUMENTS
    loss = LOSSES[name](*padded, more, mask, reduction="none")
    agree(loss, kept, 1e-12)
    loss.sum().backward()
    assert torch.isfinite(padded[0].grad).all() and not padded[0].grad[:, DOCUMENTS:].any()


@every_loss
def test_08_gradients(name):
    student, teacher, labels = case()
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[1, 2] = mask[3, 6] = False
    assert torch.autograd.gradcheck(
        lambda s: LOSSES[name](s, teacher.requires_grad_(), labels, mask, reduction="none"), student.requires_grad_()
    )
    LOSSES[name](student, teacher, labels, mask).backward()
    assert teacher.grad is None, "the teacher is not trained"


@every_loss
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_09_a_batch_is_the_loop(name, reduction):
    student, teacher, labels = case()
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 3] = mask[2, 6] = mask[3, 1] = False
    rows = [loop(name, s, t, y, m) for s, t, y, m in zip(student, teacher, labels, mask)]
    expected = torch.tensor(rows, dtype=torch.float64)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    agree(LOSSES[name](student, teacher, labels, mask, reduction), expected, 1e-12)


def test_10_a_dual_encoder_of_the_rank_of_the_scores_is_exact():
    scores = normal(30, 12, seed=1) @ normal(12, 40, seed=2)
    u, values, v = torch.linalg.svd(scores, full_matrices=False)
    embedded = {dim: ((u[:, :dim] * values[:dim]), v[:dim].T) for dim in (12, 5)}
    agree(embedded[12][0] @ embedded[12][1].T, scores)
    error = torch.linalg.norm(scores - embedded[5][0] @ embedded[5][1].T)
    agree(error, values[5:].square().sum().sqrt())
    # and no other one of that dimension found by descent is better
    query, document = (normal(n, 5, seed=n).requires_grad_() for n in (30, 40))
    optimizer = torch.optim.Adam([query, document], 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        found = torch.linalg.norm(scores - query @ document.T)
        found.backward()
        optimizer.step()
    assert error - 1e-9 <= found < 1.05 * error


def test_onehot_at_a_low_temperature_compares_with_the_hardest_negative():
    student, _, labels = case()
    student, labels = student[:1], labels[:1]
    hardest = student.masked_fill(labels == 1, -math.inf).amax()
    limit = (hardest - student[labels == 1]).relu().sum()
    agree(onehot_loss(student / 1e-4, None, labels) * 1e-4, limit, 1e-3)


@pytest.mark.parametrize("loss", [m3se_loss, margin_mse_loss])
def test_a_query_without_negatives_is_warned_about_or_refused(loss):
    student, teacher, labels = case()
    labels[0] = 1
    student.requires_grad_()
    with pytest.warns(UserWarning, match="1 of 4 queries have no negative document"):
        found = loss(student, teacher, labels, reduction="none")
    assert found[0] == 0 and found[1] > 0
    found.sum().backward()
    assert torch.isfinite(student.grad).all() and not student.grad[0].any()
    with pytest.raises(InvalidInput, match="no negative document"):
        loss(student, teacher, labels, strict=True)


@every_loss
@pytest.mark.filterwarnings("ignore:.*no negative")
def test_queries_without_positives_or_documents(name):
    student, teacher, labels = case()
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0] = False
    student.requires_grad_()
    found = LOSSES[name](student, teacher, labels, mask, reduction="none")
    assert found[0] == 0 and torch.isfinite(found).all()
    assert (found[3] == 0) == (name in ("margin_mse", "onehot"))
    found.sum().backward()
    assert torch.isfinite(student.grad).all()


@every_loss
def test_half_precision_is_computed_in_float32(name):
    student, teacher, labels = case()
    student, teacher = (10 * x.bfloat16() for x in (student, teacher))
    loss = LOSSES[name](student, teacher, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](student.double(), teacher.double(), labels).float())


@every_loss
def test_large_scores_stay_finite(name):
    student, teacher, labels = case()
    student = (1e4 * student.float()).requires_grad_()
    loss = LOSSES[name](student, 1e4 * teacher.float(), labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@every_loss
def test_losses_compile_whole(name):
    student, teacher, labels = case()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="eager")
    agree(compiled(student, teacher, labels), LOSSES[name](student, teacher, labels))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reduction": "avg"}, "reduction"),
        ({"student_scores": torch.zeros(3)}, "student_scores"),
        ({"student_scores": torch.zeros(0, 7)}, "at least one query"),
        ({"teacher_scores": torch.zeros(4, 6)}, "teacher_scores"),
        ({"labels": torch.zeros(4, 7)}, "labels must be int64"),
        ({"labels": torch.full((4, 7), -100)}, "leave others out with mask"),
        ({"mask": torch.ones(4, 7)}, "mask bool"),
        ({"mask": torch.ones(4, 1, dtype=torch.bool)}, "mask"),
    ],
)
def test_refusals(changes, message):
    student, teacher, labels = case()
    given = {"student_scores": student, "teacher_scores": teacher, "labels": labels, **changes}
    with pytest.raises((InvalidInput, InvalidOption), match=message):
        softmax_ce_loss(**given)
