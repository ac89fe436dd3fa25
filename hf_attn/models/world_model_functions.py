"""HOWM, an object-oriented world model whose slots are bound to a library of objects: what it computes, as functions.

Paper: Zhao, Kong, Walters, Wong, "Toward Compositional Generalization in Object-Oriented World Modeling", ICML 2022
(arXiv 2204.13661).

A scene shows K of the N objects of a library, in slots whose order is arbitrary. Action attention binds objects to slots,

    M = softmax over slots of (key of object n) . (W_q slot_k) / sqrt(S)          (N,K), rows sum to 1
    U = (M + eps)^T W_v LayerNorm(actions)                                        an action for each slot

a graph network moves the slots, and losses compare states in the order of the library, M z (N,D), where two scenes with
other slot orders agree. Negative states are lifted with their own binding; the official code takes that of the positive
next state, and calls it unsure.

Shapes: B batch, N library objects, K slots, S slot size, D state size, A actions. Weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hf_attn.errors import InvalidInput


def bind_slots(slots: Tensor, query_weight: Tensor, key_weight: Tensor, slot_mask: Tensor | None = None) -> Tensor:
    """The binding M (B,N,K): for every library object a distribution over the slots.

    Args:
        slots: (B,K,S).
        query_weight: (F,S).
        key_weight: (F,N), a key for every object: objects are one-hot.
        slot_mask: (B,K) bool; False slots get 0. An example without slots gets 0 everywhere.

    Raises:
        InvalidInput: wrong shapes.
    """
    check_dimensions("slots", slots, 3)
    batch, count, size = slots.shape
    if query_weight.dim() != 2 or query_weight.shape[1] != size:
        raise InvalidInput(f"query_weight {tuple(query_weight.shape)} must be (F, {size}): slots have size {size}.")
    if key_weight.dim() != 2 or key_weight.shape[0] != query_weight.shape[0]:
        raise InvalidInput(f"key_weight {tuple(key_weight.shape)} must be ({query_weight.shape[0]}, N).")
    logits = key_weight.T @ (slots @ query_weight.T).transpose(1, 2) / math.sqrt(size)
    if slot_mask is None:
        return logits.softmax(-1)
    if slot_mask.shape != (batch, count) or slot_mask.dtype != torch.bool:
        raise InvalidInput(f"slot_mask {tuple(slot_mask.shape)} {slot_mask.dtype} must be bool ({batch}, {count}).")
    visible = slot_mask[:, None]
    # the lowest finite number, not -inf: rows without slots stay finite
    masked = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    return masked.softmax(-1).masked_fill(~visible, 0)


def slot_actions(
    binding: Tensor, actions: Tensor, value_weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = 1e-8
) -> Tensor:
    """U (B,K,A'): the actions of the objects, summed into their slots.

    Args:
        binding: (B,N,K).
        actions: (B,N,A), one-hot in the row of the object that acts, zero elsewhere.
        value_weight: (A',A).
        norm_weight, norm_bias: (A) of the LayerNorm over actions.
        eps: added to the binding.

    Raises:
        InvalidInput: wrong shapes.
    """
    check_dimensions("binding", binding, 3)
    check_dimensions("actions", actions, 3)
    if actions.shape[:2] != binding.shape[:2]:
        raise InvalidInput(
            f"actions {tuple(actions.shape)} must have a row for each object of binding {tuple(binding.shape)}."
        )
    width = actions.shape[2]
    for name, weight in {"norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        if weight.shape != (width,):
            raise InvalidInput(f"{name} {tuple(weight.shape)} must be ({width},): there are {width} actions.")
    if value_weight.dim() != 2 or value_weight.shape[1] != width:
        raise InvalidInput(f"value_weight {tuple(value_weight.shape)} must be (A', {width}).")
    values = functional.layer_norm(actions, (width,), norm_weight, norm_bias) @ value_weight.T
    return (binding + eps).transpose(1, 2) @ values


def lift(binding: Tensor, states: Tensor, pseudo_inverse: bool = False) -> Tensor:
    """(B,N,D): the states (B,K,D) of the slots in the order of the library, M z; or (pinv M)^T z.

    Raises:
        InvalidInput: wrong shapes.
    """
    check_dimensions("binding", binding, 3)
    check_dimensions("states", states, 3)
    if states.shape[:2] != (binding.shape[0], binding.shape[2]):
        raise InvalidInput(
            f"states {tuple(states.shape)} must have a row for each slot of binding {tuple(binding.shape)}."
        )
    if not pseudo_inverse:
        return binding @ states
    wide = binding.to(torch.promote_types(binding.dtype, torch.float32))
    return torch.linalg.pinv(wide).transpose(1, 2).to(states.dtype) @ states


def state_energy(first: Tensor, second: Tensor, sigma: float = 0.5) -> Tensor:
    """(B): 1 / (2 sigma^2) times the mean over objects of the squared distance, for states (B,N,D).

    Raises:
        InvalidInput: different shapes, or sigma that is not positive.
    """
    check_dimensions("first", first, 3)
    if first.shape != second.shape:
        raise InvalidInput(f"second {tuple(second.shape)} must have the shape of first {tuple(first.shape)}.")
    if not sigma > 0:
        raise InvalidInput(f"sigma {sigma} must be above 0.")
    return (first - second).square().sum(2).mean(1) / (2 * sigma**2)


def aligned_loss(
    states: Tensor,
    predicted: Tensor,
    next_states: Tensor,
    negative_states: Tensor,
    binding: Tensor,
    next_binding: Tensor,
    negative_binding: Tensor,
    hinge: float = 1.0,
    sigma: float = 0.5,
    pseudo_inverse: bool = False,
) -> Tensor:
    """The contrastive loss in the order of the library; no gradient to the bindings.

        mean E(M predicted, M' next) + mean relu(hinge - E(M states, M_neg negative))

    Args:
        states, predicted, next_states, negative_states: (B,K,D); `predicted` in the slot order of `states`.
        binding: (B,N,K) of `states` and `predicted`.
        next_binding, negative_binding: (B,N,K) of the other two.
        hinge: the energy from which negatives cost nothing.
        sigma: of `state_energy`.
        pseudo_inverse: of `lift`.

    Raises:
        InvalidInput: wrong shapes, or sigma that is not positive.
    """
    lifted = [
        lift(bound.detach(), state, pseudo_inverse)
        for bound, state in (
            (binding, predicted),
            (next_binding, next_states),
            (binding, states),
            (negative_binding, negative_states),
        )
    ]
    positive = state_energy(lifted[0], lifted[1], sigma)
    negative = state_energy(lifted[2], lifted[3], sigma)
    return positive.mean() + (hinge - negative).relu().mean()


def ranking_metrics(predicted: Tensor, target: Tensor, ks: Sequence[int] = (1, 5, 10)) -> tuple[Tensor, Tensor]:
    """Mean reciprocal rank, and for every k the share of ranks up to k (len ks).

    The rank of a prediction is its place among all predictions by distance to its target, from 1; it comes first among
    equally near ones.

    Args:
        predicted, target: (n, ...), flattened.

    Raises:
        InvalidInput: different shapes, no predictions, numbers that are not finite, or a k below 1.
    """
    if predicted.shape != target.shape or predicted.dim() < 2 or 0 in predicted.shape:
        raise InvalidInput(
            f"predicted {tuple(predicted.shape)} and target {tuple(target.shape)} must be alike, (n, ...)."
        )
    if not ks or min(ks) < 1:
        raise InvalidInput(f"ks {tuple(ks)} must be numbers of at least 1.")
    if not bool(torch.isfinite(predicted).all() and torch.isfinite(target).all()):
        raise InvalidInput("predicted and target must be finite: a distance that is no number has no rank.")
    flat = [tensor.flatten(1).to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (target, predicted)]
    # not by matrix products: a distance must not depend on rounding, or the true one loses ties
    distance = torch.cdist(*flat, compute_mode="donot_use_mm_for_euclid_dist")
    rank = 1 + (distance < distance.diagonal()[:, None]).sum(1)
    hits = torch.stack([(rank <= k).to(distance.dtype).mean() for k in ks])
    return (1 / rank.to(distance.dtype)).mean(), hits


def equivariance_error(
    transition: Callable[[Tensor, Tensor], Tensor], states: Tensor, actions: Tensor, orders: Tensor
) -> tuple[Tensor, Tensor]:
    """Largest and mean |T(Pz, PU) - P T(z, U)|: 0 where a transition T does not care which slot is which.

    The paper names this error without a formula; this one is ours.

    Args:
        transition: T, from states and actions to changes.
        states, actions: (B,K,D) and (B,K,A).
        orders: (P,K) int64, permutations of the slots.

    Raises:
        InvalidInput: an order is no permutation of K slots.
    """
    check_dimensions("states", states, 3)
    count = states.shape[1]
    if orders.dim() != 2 or not torch.equal(orders.sort(1).values, torch.arange(count).to(orders).expand_as(orders)):
        raise InvalidInput(f"orders must be rows of permutations of the {count} slots.")
    expected = transition(states, actions)
    errors = [(transition(states[:, p], actions[:, p]) - expected[:, p]).abs() for p in orders]
    return torch.stack([e.max() for e in errors]).max(), torch.stack([e.mean() for e in errors]).mean()


def action_rows(actions: Tensor, num_objects: int, num_actions: int) -> Tensor:
    """(..., N, A) one-hot actions from numbers (...), num_actions * object + action of the object.

    Raises:
        InvalidInput: not int64, or a number out of range.
    """
    if actions.dtype != torch.int64:
        raise InvalidInput(f"actions must be int64 numbers; they are {actions.dtype}.")
    limit = num_objects * num_actions
    if actions.numel() and not bool(((actions >= 0) & (actions < limit)).all()):
        raise InvalidInput(f"actions must be numbers from 0 to {limit - 1}: {num_objects} objects, {num_actions} each.")
    return functional.one_hot(actions, limit).unflatten(-1, (num_objects, num_actions)).float()


def check_dimensions(name: str, tensor: Tensor, dimensions: int) -> None:
    """Raise `InvalidInput` unless `tensor` has so many dimensions."""
    if tensor.dim() != dimensions:
        raise InvalidInput(f"{name} {tuple(tensor.shape)} must have {dimensions} dimensions.")
