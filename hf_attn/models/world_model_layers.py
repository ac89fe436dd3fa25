"""The layers of HOWM, an object-oriented world model: slot attention, action attention, and two transitions.

Paper: Zhao, Kong, Walters, Wong, ICML 2022 (arXiv 2204.13661); slot attention is that of Locatello et al., NeurIPS 2020.
Functions and notation: `hf_attn.models.world_model_functions`.

Shapes: B batch, N library objects, K slots, S slot size, D state size, A actions. Weights are (out, in).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_attn.errors import InvalidInput
from hf_attn.models.world_model_functions import bind_slots, check_dimensions, slot_actions


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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw mean and log standard deviation of the initial slots: Xavier, and then fixed."""
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
        check_dimensions("inputs", inputs, 3)
        batch, size = inputs.shape[0], self.slots_mu.shape[2]
        if inputs.shape[2] != self.norm_inputs.normalized_shape[0]:
            raise InvalidInput(f"inputs {tuple(inputs.shape)} must be (B, n, {self.norm_inputs.normalized_shape[0]}).")
        if slots is None:
            shape = (batch, self.num_slots, size)
            noise = torch.randn(shape, generator=generator, dtype=inputs.dtype, device=inputs.device)
            slots = self.initial_slots(noise)
        elif slots.shape != (batch, self.num_slots, size):
            raise InvalidInput(f"slots {tuple(slots.shape)} must be ({batch}, {self.num_slots}, {size}).")
        normed = self.norm_inputs(inputs)
        key, value = self.project_k(normed), self.project_v(normed)
        for _ in range(self.num_iterations):
            weights = self._competition(key, slots) + self.eps
            weights = (weights / weights.sum(1, keepdim=True)).to(value.dtype)
            updates = weights.transpose(1, 2) @ value
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots

    def initial_slots(self, noise: Tensor) -> Tensor:
        """Initial slots from standard normal `noise` (..., K, S)."""
        return self.slots_mu + self.slots_log_sigma.exp() * noise

    def weights(self, inputs: Tensor, slots: Tensor) -> Tensor:
        """(B,n,K): how each input is shared out among given slots; rows sum to 1."""
        return self._competition(self.project_k(self.norm_inputs(inputs)), slots).to(slots.dtype)

    def _competition(self, key: Tensor, slots: Tensor) -> Tensor:
        query = self.project_q(self.norm_slots(slots))
        logits = key @ query.transpose(1, 2) / math.sqrt(slots.shape[2])
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class ActionAttention(nn.Module):
    """Binds the objects of a library to slots, and brings their actions there."""

    def __init__(self, num_objects: int, slot_size: int, num_actions: int):
        """Raises `InvalidInput` for sizes that are not positive."""
        super().__init__()
        _positive(num_objects=num_objects, slot_size=slot_size, num_actions=num_actions)
        self.project_q = nn.Linear(slot_size, num_objects, bias=False)
        self.project_k = nn.Linear(num_objects, num_objects, bias=False)
        self.project_v = nn.Linear(num_actions, num_actions, bias=False)
        self.norm_actions = nn.LayerNorm(num_actions)

    def bind(self, slots: Tensor, slot_mask: Tensor | None = None, identities: Tensor | None = None) -> Tensor:
        """M (B,N,K), with gradients.

        Args:
            slots: (B,K,S).
            slot_mask: (B,K) bool; False slots get 0.
            identities: (N', N) what each object is, for a library of other objects; None: the N objects, one-hot.

        Raises:
            InvalidInput: wrong shapes.
        """
        key = self.project_k.weight
        if identities is not None:
            check_dimensions("identities", identities, 2)
            if identities.shape[1] != key.shape[1]:
                raise InvalidInput(f"identities {tuple(identities.shape)} must be (N', {key.shape[1]}).")
            key = key @ identities.to(key.dtype).T
        return bind_slots(slots, self.project_q.weight, key, slot_mask)

    def forward(self, binding: Tensor, actions: Tensor) -> Tensor:
        """U (B,K,A) of a binding (B,N,K) and actions (B,N,A)."""
        norm = self.norm_actions
        return slot_actions(binding, actions, self.project_v.weight, norm.weight, norm.bias)


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
        _check_slots(states, actions, slot_mask)
        batch, count, _ = states.shape
        pairs = (batch, count, count, -1)
        edges = self.edge_mlp(torch.cat([states[:, :, None].expand(pairs), states[:, None].expand(pairs)], dim=-1))
        sends = ~torch.eye(count, dtype=torch.bool, device=states.device)
        if slot_mask is not None:
            sends = sends & slot_mask[:, None]
        messages = edges.masked_fill(~sends[..., None], 0).sum(2)
        change = self.node_mlp(torch.cat([states, actions, messages], dim=-1))
        return change if slot_mask is None else change.masked_fill(~slot_mask[..., None], 0)


class TransitionMLP(nn.Module):
    """The change of all slots from all states and actions at once: a baseline that knows slots by their place."""

    def __init__(self, embedding_dim: int, action_dim: int, num_slots: int, hidden_size: int = 512):
        """Raises `InvalidInput` for sizes that are not positive."""
        super().__init__()
        _positive(embedding_dim=embedding_dim, action_dim=action_dim, num_slots=num_slots, hidden_size=hidden_size)
        self.num_slots = num_slots
        self.mlp = _mlp(num_slots * (embedding_dim + action_dim), hidden_size, num_slots * embedding_dim)

    def forward(self, states: Tensor, actions: Tensor, slot_mask: Tensor | None = None) -> Tensor:
        """As `TransitionGNN.forward`; masked slots are zeros, and do not change.

        Raises:
            InvalidInput: wrong shapes, or another number of slots.
        """
        _check_slots(states, actions, slot_mask)
        if states.shape[1] != self.num_slots:
            raise InvalidInput(f"states {tuple(states.shape)} must have num_slots={self.num_slots} slots.")
        inputs = torch.cat([states, actions], dim=-1)
        if slot_mask is not None:
            inputs = inputs.masked_fill(~slot_mask[..., None], 0)
        change = self.mlp(inputs.flatten(1)).view_as(states)
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


def _check_slots(states: Tensor, actions: Tensor, slot_mask: Tensor | None) -> None:
    check_dimensions("states", states, 3)
    check_dimensions("actions", actions, 3)
    shape = tuple(states.shape[:2])
    if actions.shape[:2] != shape:
        raise InvalidInput(
            f"actions {tuple(actions.shape)} must have a row for each slot of states {tuple(states.shape)}."
        )
    if slot_mask is not None and (slot_mask.shape != shape or slot_mask.dtype != torch.bool):
        raise InvalidInput(f"slot_mask {tuple(slot_mask.shape)} {slot_mask.dtype} must be bool {shape}.")


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise InvalidInput(f"{name} {value} must be at least 1.")
