"""SSTA's losses: the invariants of its page on tensors, and refusals. `test_ssta_trainer` has those on models."""

import math

import pytest
import torch

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.recipes.ssta import attention_kl, head_importance, resize_attention, ssta_loss
from tests.helpers import agree, normal


def maps(*shape, seed=0):
    return (2 * normal(*shape, seed=seed)).softmax(dim=-1)


def arguments(tokens=5, **changes):
    """The tensors of `ssta_loss`, all of them requiring gradients."""
    given = {
        "logits": normal(3, 4, seed=1),
        "labels": torch.tensor([0, 3, 1]),
        "teacher_logits": normal(3, 4, seed=2),
        "student_attention": maps(3, 2, tokens, tokens, seed=3),
        "teacher_attention": maps(3, tokens, tokens, seed=4),
        "assistant_attention": maps(3, tokens, tokens, seed=5),
    }
    return {n: t.requires_grad_() if t.is_floating_point() else t for n, t in {**given, **changes}.items()}


def test_01_divergence_is_zero_for_equal_maps_not_negative_and_the_loop():
    target, student = maps(2, 4, 6), maps(2, 4, 6, seed=1)
    target[0, 0] = torch.tensor([0, 0, 1.0, 0, 0, 0])
    student[0, 1] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    agree(attention_kl(target, target), torch.tensor(0.0, dtype=torch.float64), 1e-12)
    total = 0.0
    for t_row, s_row in zip(target.reshape(-1, 6), student.reshape(-1, 6)):
        row = sum(float(t) * (math.log(t) - math.log(max(s, 1e-8))) for t, s in zip(t_row, s_row) if t > 0)
        assert row >= 0
        total += row
    agree(attention_kl(target, student), torch.tensor(total / 8, dtype=torch.float64), 1e-12)


def test_02_importance_is_the_slope_along_a_heads_weight():
    heads, values = maps(3, 4, 5, 5).requires_grad_(), normal(3, 4, 5, 2, seed=1)
    mask = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    mix = normal(40, 1, seed=2)

    def loss(weights):
        return ((weights @ values).transpose(1, 2).flatten(1) @ mix).tanh().square().sum()

    by_map = torch.autograd.grad(loss(heads), heads)[0]
    by_mask = torch.autograd.grad(loss(heads.detach() * mask[..., None, None]), mask)[0]
    agree(head_importance(heads.detach(), by_map), by_mask.abs().mean(dim=0))


def test_03_a_head_without_values_has_no_importance():
    heads, values = maps(3, 4, 5, 5).requires_grad_(), normal(3, 4, 5, 2, seed=1)
    values[:, 2] = 0
    gradient = torch.autograd.grad((heads @ values).square().sum(), heads)[0]
    importance = head_importance(heads.detach(), gradient)
    assert importance[2] == 0 and (importance[[0, 1, 3]] > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_04_without_weights_the_loss_is_cross_entropy(temperature):
    given = arguments()
    loss = ssta_loss(**given, alpha=0.0, temperature=temperature, lambda_teacher=0.0, lambda_assistant=0.0)
    assert loss == torch.nn.functional.cross_entropy(given["logits"], given["labels"])


@pytest.mark.parametrize("size", [2, 3, 6])
def test_05_resizing_keeps_rows_sums_and_equal_rows(size):
    attention = maps(2, 10, 10)
    assert resize_attention(attention, 3) is attention
    resized = resize_attention(attention, size)
    assert resized.shape == (2, 1 + size**2, 1 + size**2)
    agree(resized.sum(dim=-1), torch.ones_like(resized[..., 0]), 1e-12)
    equal = resize_attention(attention[:, :1].expand(-1, 10, -1), size)
    agree(equal, equal[:, :1].expand_as(equal), 1e-12)


def test_06_permuting_heads_permutes_their_importance():
    heads, gradient, order = maps(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1), torch.tensor([2, 0, 3, 1])
    agree(head_importance(heads[:, order], gradient[:, order]), head_importance(heads, gradient)[order], 1e-14)


def test_07_teacher_and_assistant_get_no_gradient():
    given = arguments()
    ssta_loss(**given).backward()
    for name, tensor in given.items():
        reached = tensor.grad is not None and bool(tensor.grad.any())
        assert reached == (name in ("logits", "student_attention")), name


@pytest.mark.parametrize("kept, weights", [(0, {"lambda_assistant": 0.0}), (1, {"lambda_teacher": 0.0})])
def test_08_each_student_head_learns_from_its_own_map_only(kept, weights):
    given = arguments()
    ssta_loss(**given, **weights).backward()
    gradient = given["student_attention"].grad
    assert gradient[:, kept].any() and not gradient[:, 1 - kept].any()


def test_hard_distillation_is_cross_entropy_to_the_teachers_class():
    given = arguments()
    got = ssta_loss(**given, alpha=1.0, kd="hard", temperature=7.0, lambda_teacher=0.0, lambda_assistant=0.0)
    assert got == torch.nn.functional.cross_entropy(given["logits"], given["teacher_logits"].argmax(-1))


def test_half_precision_is_computed_in_float32():
    target, student = (maps(2, 5, 5, seed=s).bfloat16() for s in (0, 1))
    # rounding to bfloat16 moves the sums of rows; exact binary fractions do not
    target[:], student[:] = torch.tensor([0.5, 0.25, 0.125, 0.125, 0]), torch.tensor([0.25, 0.25, 0.25, 0.125, 0.125])
    loss = attention_kl(target, student)
    assert loss.dtype == torch.float32
    agree(loss, attention_kl(target.float(), student.float()))


@pytest.mark.parametrize("name", ["student_attention", "teacher_attention", "assistant_attention"])
@pytest.mark.parametrize("change", [1.01, -1.0, float("nan")])
def test_maps_that_are_no_distributions_are_refused(name, change):
    given = arguments()
    given[name] = given[name].detach() * change
    with pytest.raises(InvalidInput, match="not a row-stochastic map"):
        ssta_loss(**given)


def test_negative_weights_that_sum_to_one_are_refused():
    given = torch.tensor([[[1.5, -0.5], [0.5, 0.5]]])
    with pytest.raises(InvalidInput, match="not a row-stochastic map"):
        attention_kl(given, given)


@pytest.mark.parametrize("tokens", [1, 9, 12])
def test_a_number_of_tokens_that_makes_no_grid_is_refused(tokens):
    with pytest.raises(InvalidInput, match=r"1 \+ g\*g"):
        resize_attention(maps(2, tokens, tokens), 2)


@pytest.mark.parametrize(
    "weights",
    [
        {"alpha": 1.5},
        {"temperature": 0.0},
        {"lambda_teacher": -1.0},
        {"lambda_assistant": float("nan")},
        {"kd": "none"},
    ],
)
def test_weights_outside_their_rule_are_refused(weights):
    with pytest.raises(InvalidOption, match=next(iter(weights))):
        ssta_loss(**arguments(), **weights)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InvalidInput, match="student_attention"):
        ssta_loss(**arguments(student_attention=maps(3, 1, 5, 5)))
    with pytest.raises(InvalidInput, match="teacher_logits"):
        ssta_loss(**arguments(teacher_logits=normal(3, 7)))
    with pytest.raises(InvalidInput, match="resize_attention"):
        ssta_loss(**arguments(teacher_attention=maps(3, 10, 10)))
    with pytest.raises(InvalidInput, match="attention_grad"):
        head_importance(maps(2, 3, 4, 4), normal(2, 3, 4, 5))
    with pytest.raises(InvalidOption, match="grid_size"):
        resize_attention(maps(2, 5, 5), 0)
