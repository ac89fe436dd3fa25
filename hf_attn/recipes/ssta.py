"""SSTA: the losses of head-level distillation, with a self-supervised model as teaching assistant.

Paper: Wu, Gao, Zhang, Lin, Xie, Sun, Li, "Self-supervised Models are Good Teaching Assistants for Vision Transformers",
ICML 2022 (PMLR 162). No official code exists: this is a re-implementation from the published description, and the choice
of heads, the divergence and the weights are readings of it.

A student learns from labels, from a teacher's logits, and from two attention maps: that of the most important head of the
supervised teacher, and that of the most important head of the self-supervised assistant.

    (1 - alpha) CE + alpha KD + lambda_teacher KL(teacher map, student map 0) + lambda_assistant KL(assistant map, student map 1)

`hf_attn.recipes.ssta_trainer` trains with it. Maps are (B,N,N), rows (queries) sum to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn.errors import InvalidInput, InvalidOption

KD = ("soft", "hard")
ROW_TOLERANCE = 1e-3
"""How far the sum of a map's row may be from 1."""


def head_importance(attention: Tensor, attention_grad: Tensor) -> Tensor:
    """(H): mean over the batch of |sum_ij P_ij dL/dP_ij|, the size of the loss's slope along a head's weight.

    Args:
        attention: (B,H,N,N) maps P of all heads.
        attention_grad: (B,H,N,N) gradient of L at P, where L is the sum of the losses of the examples.
    """
    if attention.dim() != 4 or attention.shape != attention_grad.shape:
        raise InvalidInput(
            "head_importance: attention and attention_grad must both be (B,H,N,N); got "
            f"{tuple(attention.shape)} and {tuple(attention_grad.shape)}."
        )
    attention, attention_grad = _float32(attention), _float32(attention_grad)
    return (attention * attention_grad).sum(dim=(-2, -1)).abs().mean(dim=0)


def attention_kl(target: Tensor, student: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean over batch and rows of sum_j T (log T - log max(S, eps)), in nats; a weight T = 0 contributes 0.

    Args:
        target: (B,N,M) maps T to imitate; no gradient.
        student: (B,N,M) maps S.
        eps: smallest weight of the student that counts as such.

    Raises:
        InvalidInput: the shapes differ, or a map is not row-stochastic.
    """
    if target.dim() != 3 or target.shape != student.shape:
        raise InvalidInput(
            f"attention_kl: target and student must both be (B,N,M); got {tuple(target.shape)} and {tuple(student.shape)}. "
            "Bring maps of other grids to the student's with resize_attention."
        )
    if not eps > 0:
        raise InvalidOption(f"attention_kl: eps={eps!r} must be positive.")
    check_rows(target, "target")
    check_rows(student, "student")
    target, student = _float32(target.detach()), _float32(student)
    return (torch.xlogy(target, target) - target * student.clamp(min=eps).log()).sum(dim=-1).mean()


def resize_attention(attention: Tensor, grid_size: int) -> Tensor:
    """(B,1+g*g,1+g*g) -> (B,1+n*n,1+n*n) maps on a grid of n = `grid_size`: one prefix token, patches in raster order.

    The key axis is resized bilinearly and multiplied by g*g/(n*n), which about keeps the weight on the patches; then the
    query axis is resized; then rows are divided by their sum.

    Raises:
        InvalidInput: the number of tokens is not 1 + a square, or a map is not row-stochastic.
    """
    tokens = attention.shape[-1]
    side = math.isqrt(max(tokens - 1, 0))
    if attention.dim() != 3 or attention.shape[1] != tokens or tokens < 2 or side * side != tokens - 1:
        raise InvalidInput(
            f"resize_attention: attention must be (B,N,N) with N = 1 + g*g tokens; got {tuple(attention.shape)}. "
            "Drop further prefix tokens first."
        )
    if isinstance(grid_size, bool) or not isinstance(grid_size, int) or grid_size < 1:
        raise InvalidOption(f"resize_attention: grid_size={grid_size!r} must be a whole number of at least 1.")
    check_rows(attention, "attention")
    if grid_size == side:
        return attention
    maps = _float32(attention)
    keys = _resize(maps[..., 1:], side, grid_size) * (side / grid_size) ** 2
    maps = torch.cat([maps[..., :1], keys], dim=-1)
    queries = _resize(maps[:, 1:].transpose(1, 2), side, grid_size).transpose(1, 2)
    maps = torch.cat([maps[:, :1], queries], dim=1)
    return (maps / maps.sum(dim=-1, keepdim=True)).to(attention.dtype)


def ssta_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    student_attention: Tensor,
    teacher_attention: Tensor,
    assistant_attention: Tensor,
    alpha: float = 0.5,
    temperature: float = 1.0,
    lambda_teacher: float = 1.0,
    lambda_assistant: float = 1.0,
    kd: str = "soft",
) -> Tensor:
    """The loss of the module's docstring; no gradient to the teacher's and the assistant's tensors.

    Args:
        logits, teacher_logits: (B,C).
        labels: (B) int64.
        student_attention: (B,2,N,N), the map for the teacher and the map for the assistant.
        teacher_attention, assistant_attention: (B,N,N).
        alpha: weight of the teacher's logits, 0 to 1; the labels have the rest.
        temperature: of the soft distillation; its loss is multiplied by the square.
        lambda_teacher, lambda_assistant: weights of the maps.
        kd: "soft" (divergence of the logits) or "hard" (cross-entropy to the teacher's class; no temperature).

    Raises:
        InvalidInput: shapes do not fit, or a map is not row-stochastic.
        InvalidOption: a weight or `kd` is outside its rule.
    """
    check_weights(alpha, temperature, lambda_teacher, lambda_assistant, kd)
    terms = ssta_terms(
        logits, labels, teacher_logits, student_attention, teacher_attention, assistant_attention, temperature, kd
    )
    return weighted(terms, alpha, lambda_teacher, lambda_assistant)


def ssta_terms(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    student_attention: Tensor,
    teacher_attention: Tensor,
    assistant_attention: Tensor,
    temperature: float = 1.0,
    kd: str = "soft",
) -> dict[str, Tensor]:
    """The four terms without their weights: "ce", "kd", "teacher_head", "assistant_head". Arguments of `ssta_loss`."""
    if student_attention.dim() != 4 or student_attention.shape[1] != 2:
        raise InvalidInput(
            f"ssta_loss: student_attention must be (B,2,N,N), a map for each of the two; got {tuple(student_attention.shape)}."
        )
    if logits.shape != teacher_logits.shape:
        raise InvalidInput(
            f"ssta_loss: logits {tuple(logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} must have one shape, "
            "(B,C): teacher and student know the same classes."
        )
    return {
        "ce": functional.cross_entropy(logits, labels),
        "kd": logit_distillation(logits, teacher_logits.detach(), temperature, kd),
        "teacher_head": attention_kl(teacher_attention, student_attention[:, 0]),
        "assistant_head": attention_kl(assistant_attention, student_attention[:, 1]),
    }


def weighted(terms: dict[str, Tensor], alpha: float, lambda_teacher: float, lambda_assistant: float) -> Tensor:
    """The sum of `ssta_terms` with their weights."""
    weights = {"ce": 1 - alpha, "kd": alpha, "teacher_head": lambda_teacher, "assistant_head": lambda_assistant}
    # a sum without the terms of weight 0: cross-entropy alone is cross-entropy, whatever the other terms are
    used = [weight * terms[name] for name, weight in weights.items() if weight]
    return torch.stack(used).sum() if used else 0 * terms["ce"]


def logit_distillation(logits: Tensor, teacher_logits: Tensor, temperature: float, kd: str) -> Tensor:
    """The teacher's logits as a loss: soft, temperature^2 KL(teacher || student), or hard, the teacher's class."""
    if kd == "hard":
        return functional.cross_entropy(logits, teacher_logits.argmax(dim=-1))
    student, teacher = ((x / temperature).log_softmax(dim=-1) for x in (logits, teacher_logits))
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def check_weights(alpha: float, temperature: float, lambda_teacher: float, lambda_assistant: float, kd: str) -> None:
    """Raise `InvalidOption` for a weight outside its rule."""
    if not 0 <= alpha <= 1:
        raise InvalidOption(f"ssta: alpha={alpha!r} must be from 0 (labels alone) to 1 (the teacher's logits alone).")
    if not 0 < temperature < math.inf:
        raise InvalidOption(f"ssta: temperature={temperature!r} must be a positive number.")
    for name, value in (("lambda_teacher", lambda_teacher), ("lambda_assistant", lambda_assistant)):
        if not 0 <= value < math.inf:
            raise InvalidOption(f"ssta: {name}={value!r} must be a number of at least 0.")
    if kd not in KD:
        raise InvalidOption(f"ssta: kd={kd!r} must be one of {', '.join(KD)}.")


def check_rows(attention: Tensor, name: str) -> None:
    """Raise `InvalidInput` unless the rows of a map are distributions: no negative weight, sum 1."""
    rows = _float32(attention.detach())
    off = (rows.sum(dim=-1) - 1).abs().max().item() if rows.numel() else 0.0
    # written so that a NaN fails
    if not (off <= ROW_TOLERANCE and (rows.numel() == 0 or rows.min().item() >= -ROW_TOLERANCE)):
        raise InvalidInput(
            f"ssta: {name} is not a row-stochastic map: weights must not be negative, and rows must sum to 1 within "
            f"{ROW_TOLERANCE:g} (largest deviation {off:.3g}). Use attention whose weights are probabilities, such as softmax."
        )


def _resize(values: Tensor, side: int, size: int) -> Tensor:
    """(B,C,side*side) -> (B,C,size*size), bilinear."""
    grid = values.unflatten(-1, (side, side))
    return functional.interpolate(grid, size=(size, size), mode="bilinear", align_corners=False).flatten(-2)


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype.itemsize < 4 else value
