"""Parts of HOWM, an object-oriented world model whose slots are bound to a library of objects: functions and layers.

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
from collections.abc import Sequence

import torch
from torch import Tensor, nn
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
    _dimensions("slots", slots, 3)
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
    _dimensions("binding", binding, 3)
    _dimensions("actions", actions, 3)
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
    _dimensions("binding", binding, 3)
    _dimensions("states", states, 3)
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
    _dimensions("first", first, 3)
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


class SlotAttention(nn.Module):
    """Slots that compete for inputs; the initial ones are drawn around `slots_mu`, which is not trained.

    k, v = projections of LayerNorm(inputs), then `num_iterations` times

        att   = softmax over slots of k . q / sqrt(S), + eps, divided by its sum over the inputs
        slots = GRU(att^T v, slots);  slots += MLP(LayerNorm(slots))
    """

    slots_mu: Tensor
    slots_log_sigma: Tensor

    def __init__(
        self,
        input_size: int,
        slot_size: int,
        num_slots: int,
        num_iterations: int = 3,
        mlp_hidden_size: int = 128,
        eps: float = 1e-8,
    ):
        """Raises `InvalidInput` for sizes that are not positive."""
        super().__init__()
        _positive(
            input_size=input_size,
            slot_size=slot_size,
            num_slots=num_slots,
            num_iterations=num_iterations,
            mlp_hidden_size=mlp_hidden_size,
        )
        self.num_slots, self.num_iterations, self.eps = num_slots, num_iterations, eps
        self.norm_inputs, self.norm_slots = nn.LayerNorm(input_size), nn.LayerNorm(slot_size)
        self.norm_mlp = nn.LayerNorm(slot_size)
        self.project_q = nn.Linear(slot_size, slot_size, bias=False)
        self.project_k = nn.Linear(input_size, slot_size, bias=False)
        self.project_v = nn.Linear(input_size, slot_size, bias=False)
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.mlp = nn.Sequential(
            nn.Linear(slot_size, mlp_hidden_size), nn.ReLU(), nn.Linear(mlp_hidden_size, slot_size)
        )
        self.register_buffer("slots_mu", torch.empty(1, 1, slot_size))
        self.register_buffer("slots_log_sigma", torch.empty(1, 1, slot_size))
        nn.init.xavier_uniform_(self.slots_mu)
        nn.init.xavier_uniform_(self.slots_log_sigma)

    def forward(self, inputs: Tensor, slots: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """(B,K,S) slots.

        Args:
            inputs: (B,n,input_size).
            slots: (B,K,S) the initial slots; drawn where None, in evaluation too.
            generator: of the draw.

        Raises:
            InvalidInput: wrong shapes.
        """
        _dimensions("inputs", inputs, 3)
        batch, size = inputs.shape[0], self.slots_mu.shape[2]
        if inputs.shape[2] != self.norm_inputs.normalized_shape[0]:
            raise InvalidInput(f"inputs {tuple(inputs.shape)} must be (B, n, {self.norm_inputs.normalized_shape[0]}).")
        if slots is None:
            shape = (batch, self.num_slots, size)
            noise = torch.randn(shape, generator=generator, dtype=inputs.dtype, device=inputs.device)
            slots = self.slots_mu + self.slots_log_sigma.exp() * noise
        elif slots.shape != (batch, self.num_slots, size):
            raise InvalidInput(f"slots {tuple(slots.shape)} must be ({batch}, {self.num_slots}, {size}).")
        normed = self.norm_inputs(inputs)
        key, value = self.project_k(normed), self.project_v(normed)
        for _ in range(self.num_iterations):
            query = self.project_q(self.norm_slots(slots))
            logits = key @ query.transpose(1, 2) / math.sqrt(size)
            weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)) + self.eps
            weights = (weights / weights.sum(1, keepdim=True)).to(value.dtype)
            updates = weights.transpose(1, 2) @ value
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots


class TransitionGNN(nn.Module):
    """The change of every slot from its state, its action and messages from the others: equivariant to slot order."""

    def __init__(self, embedding_dim: int, action_dim: int, hidden_size: int = 512):
        """Raises `InvalidInput` for sizes that are not positive."""
        super().__init__()
        _positive(embedding_dim=embedding_dim, action_dim=action_dim, hidden_size=hidden_size)
        self.edge_mlp = _mlp(2 * embedding_dim, hidden_size, hidden_size)
        self.node_mlp = _mlp(embedding_dim + action_dim + hidden_size, hidden_size, embedding_dim)

    def forward(self, states: Tensor, actions: Tensor, slot_mask: Tensor | None = None) -> Tensor:
        """(B,K,D) changes from states (B,K,D) and actions (B,K,A).

        Args:
            slot_mask: (B,K) bool; False slots send no messages, and do not change.

        Raises:
            InvalidInput: wrong shapes.
        """
        _dimensions("states", states, 3)
        _dimensions("actions", actions, 3)
        batch, count, _ = states.shape
        if actions.shape[:2] != (batch, count):
            raise InvalidInput(
                f"actions {tuple(actions.shape)} must have a row for each slot of states {tuple(states.shape)}."
            )
        if slot_mask is not None and (slot_mask.shape != (batch, count) or slot_mask.dtype != torch.bool):
            raise InvalidInput(f"slot_mask {tuple(slot_mask.shape)} {slot_mask.dtype} must be bool ({batch}, {count}).")
        pairs = (batch, count, count, -1)
        edges = self.edge_mlp(torch.cat([states[:, :, None].expand(pairs), states[:, None].expand(pairs)], dim=-1))
        sends = ~torch.eye(count, dtype=torch.bool, device=states.device)
        if slot_mask is not None:
            sends = sends & slot_mask[:, None]
        messages = edges.masked_fill(~sends[..., None], 0).sum(2)
        change = self.node_mlp(torch.cat([states, actions, messages], dim=-1))
        return change if slot_mask is None else change.masked_fill(~slot_mask[..., None], 0)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.LayerNorm(hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


def _dimensions(name: str, tensor: Tensor, dimensions: int) -> None:
    if tensor.dim() != dimensions:
        raise InvalidInput(f"{name} {tuple(tensor.shape)} must have {dimensions} dimensions.")


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise InvalidInput(f"{name} {value} must be at least 1.")
