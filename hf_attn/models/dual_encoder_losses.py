"""Losses that teach a dual encoder the scores of a better ranker.

Paper: Menon, Jayasumana, Rawat, Kim, Reddi, Kumar, "In defense of dual-encoders for neural ranking", ICML 2022
(PMLR 162:15376-15400). No official code exists; M3SE is its equation (4).

Each takes `(student_scores, teacher_scores, labels, mask=None, reduction="mean")`: scores (B,n) of n documents a query,
`labels` (B,n) 1 for a positive and 0 for a negative, `mask` (B,n) bool, True for a real document. A masked document takes
no part, whatever its scores are. The terms of a query are summed, then `reduction` is "mean", "sum" or "none" (B) over
the queries. Gradients reach the student's scores only; half precision is computed in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn.errors import InvalidInput, InvalidOption

REDUCTIONS = ("mean", "sum", "none")


def m3se_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    strict: bool = False,
) -> Tensor:
    """M3SE, multi-margin distillation.

        sum over positives i of ((t_i - t_j*) - (s_i - s_j*))^2  +  sum over negatives j of relu(s_j - s_j*)^2

    j* is the teacher's highest negative, the first of equal ones. The margins to it are matched; the other negatives only
    have to stay below it.

    Args:
        strict: refuse a query without a negative, whose loss is 0 with a warning otherwise.
    """
    student, teacher, positive, negative = _checked(student_scores, teacher_scores, labels, mask, reduction)
    _check_negatives("m3se_loss", negative, strict)
    hardest = teacher.masked_fill(~negative, -torch.inf).argmax(dim=1, keepdim=True)
    margin = (teacher - teacher.gather(1, hardest)) - (student - student.gather(1, hardest))
    above = (student - student.gather(1, hardest)).relu()
    matched = (margin.square() * positive).sum(1) + (above.square() * negative).sum(1)
    # without a negative, j* is no document
    return _reduce(matched.masked_fill(~negative.any(1), 0), reduction)


def margin_mse_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    strict: bool = False,
) -> Tensor:
    """Margin MSE (Hofstaetter et al. 2020): sum over pairs (i positive, j negative) of ((t_i - t_j) - (s_i - s_j))^2.

    Computed without the pairs: with e = t - s, the sum is |N| SS(e on P) + |P| SS(e on N) + |P||N| (mean_P e - mean_N e)^2,
    where SS is the sum of squares around the mean.

    Args:
        strict: refuse a query without a negative, whose loss is 0 with a warning otherwise.
    """
    student, teacher, positive, negative = _checked(student_scores, teacher_scores, labels, mask, reduction)
    _check_negatives("margin_mse_loss", negative, strict)
    error = teacher - student
    count, mean, squares = zip(*(_moments(error, group) for group in (positive, negative)), strict=True)
    pairs = count[1] * squares[0] + count[0] * squares[1] + count[0] * count[1] * (mean[0] - mean[1]).square()
    return _reduce(pairs, reduction)


def mse_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Sum over documents of (t - s)^2."""
    student, teacher, positive, negative = _checked(student_scores, teacher_scores, labels, mask, reduction)
    return _reduce(((teacher - student).square() * (positive | negative)).sum(1), reduction)


def softmax_ce_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the softmaxes over the documents: -sum softmax(t) log softmax(s)."""
    student, teacher, positive, negative = _checked(student_scores, teacher_scores, labels, mask, reduction)
    real = positive | negative
    logs, targets = (_fill(x, real).log_softmax(1) for x in (student, teacher))
    return _reduce(-(targets.exp() * logs).masked_fill(~real, 0).sum(1), reduction)


def onehot_loss(
    student_scores: Tensor,
    teacher_scores: Tensor | None,
    labels: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy to the labels: -sum over positives i of log(e^s_i / (e^s_i + sum over negatives e^s_j)).

    `teacher_scores` are not used.
    """
    student, _, positive, negative = _checked(student_scores, None, labels, mask, reduction)
    others = _fill(student, negative).logsumexp(1, keepdim=True)
    terms = functional.softplus(others - student)
    return _reduce((terms * (positive & negative.any(1, keepdim=True))).sum(1), reduction)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "m3se": m3se_loss,
    "margin_mse": margin_mse_loss,
    "mse": mse_loss,
    "softmax_ce": softmax_ce_loss,
    "onehot": onehot_loss,
}
"""Name of a loss, as in `DualEncoderConfig.distill_loss`, -> function."""


def _checked(
    student: Tensor, teacher: Tensor | None, labels: Tensor, mask: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's and teacher's scores, 0 at masked documents, and which documents are positives and negatives."""
    if reduction not in REDUCTIONS:
        raise InvalidOption(f"reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}.")
    if student.dim() != 2 or 0 in student.shape or not student.is_floating_point():
        raise InvalidInput(
            f"student_scores {tuple(student.shape)} {student.dtype} must be floating-point scores (B, n), "
            "with at least one query and one document."
        )
    teacher = student.detach() if teacher is None else teacher.detach()
    mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    for name, tensor in (("teacher_scores", teacher), ("labels", labels), ("mask", mask)):
        if tensor.shape != student.shape:
            raise InvalidInput(
                f"{name} {tuple(tensor.shape)} must have the shape of the scores, {tuple(student.shape)}."
            )
    if mask.dtype != torch.bool or labels.is_floating_point() or labels.is_complex():
        raise InvalidInput(f"labels must be int64 or bool and mask bool; got {labels.dtype} and {mask.dtype}.")
    # a check of values cannot be traced
    if not torch.compiler.is_compiling() and not ((labels == 0) | (labels == 1) | ~mask).all():
        raise InvalidInput("labels must be 1 (positive) or 0 (negative) at real documents; leave others out with mask.")
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = (x.to(dtype).masked_fill(~mask, 0) for x in (student, teacher))
    return student, teacher, (labels == 1) & mask, (labels == 0) & mask


def _check_negatives(name: str, negative: Tensor, strict: bool) -> None:
    if torch.compiler.is_compiling():
        return
    without = int((~negative.any(1)).sum())
    if without and strict:
        raise InvalidInput(
            f"{name}: {without} of {len(negative)} queries have no negative document. Add some, or pass strict=False."
        )
    if without:
        warnings.warn(
            f"{name}: {without} of {len(negative)} queries have no negative document; their loss is 0.", stacklevel=3
        )


def _moments(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B) number, mean (0 of none) and sum of squares around the mean, of the values (B,n) where `group` is True."""
    count = group.sum(1).to(values.dtype)
    mean = (values * group).sum(1) / count.clamp(min=1)
    return count, mean, ((values - mean[:, None]).square() * group).sum(1)


def _fill(scores: Tensor, kept: Tensor) -> Tensor:
    # the lowest finite number, not -inf: rows without documents stay finite, and so do their gradients
    return scores.masked_fill(~kept, torch.finfo(scores.dtype).min)


def _reduce(per_query: Tensor, reduction: str) -> Tensor:
    return per_query if reduction == "none" else per_query.mean() if reduction == "mean" else per_query.sum()
