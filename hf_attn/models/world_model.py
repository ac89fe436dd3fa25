"""HOWM, an object-oriented world model whose slots are bound to a library of objects.

Paper: Zhao, Kong, Walters, Wong, "Toward Compositional Generalization in Object-Oriented World Modeling", ICML 2022
(arXiv 2204.13661).

    slots          from frozen slot attention, or given                 (B,K,S), in an order of their own
    M, U           binding of objects to slots, and the slots' actions  (B,N,K), (B,K,A)
    z' = z + T(z, U),  z = Linear(slots)                                (B,K,D)
    loss           compares M z', in the order of the library, with M_next z_next, and M z with negatives

Training has two stages: `SlotAttentionModel` on pictures, then `WorldModel.from_representation` on transitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from hf_attn.errors import InvalidInput
from hf_attn.models.world_model_config import WorldModelConfig
from hf_attn.models.world_model_functions import (
    action_rows,
    aligned_loss,
    bind_slots,
    check_dimensions,
    equivariance_error,
    lift,
    ranking_metrics,
    slot_actions,
    state_energy,
)
from hf_attn.models.world_model_layers import ActionAttention, SlotAttention, TransitionGNN, TransitionMLP
from hf_attn.models.world_model_slots import SlotAttentionModel, SlotAttentionOutput, WorldModelPreTrainedModel

__all__ = [
    "ActionAttention", "Scene", "SlotAttention", "SlotAttentionModel", "SlotAttentionOutput", "TransitionGNN",
    "TransitionMLP", "WorldModel", "WorldModelConfig", "WorldModelOutput", "WorldModelRollout", "action_rows", "aligned_loss",
    "bind_slots", "equivariance_error", "lift", "ranking_metrics", "slot_actions", "state_energy",
]  # fmt: skip


@dataclass
class WorldModelOutput(ModelOutput):
    """One step.

    Attributes:
        loss: where next and negative observations were given.
        predicted_objects: (B,N,D) the prediction, lifted (aligned=False: (B,K,D), as it is).
        next_objects: (B,N,D) the next observation, lifted, where it was given.
        predicted_states: (B,K,D), in the order of `slots`.
        states, next_states: (B,K,D).
        binding, next_binding: (B,N,K).
        slots: (B,K,S).
    """

    loss: Tensor | None = None
    predicted_objects: Tensor | None = None
    next_objects: Tensor | None = None
    predicted_states: Tensor | None = None
    states: Tensor | None = None
    next_states: Tensor | None = None
    binding: Tensor | None = None
    next_binding: Tensor | None = None
    slots: Tensor | None = None


@dataclass
class WorldModelRollout(ModelOutput):
    """T steps.

    Attributes:
        predicted_objects: (B,T,N,D) lifted predictions after 1 to T actions (aligned=False: (B,T,K,D)).
        predicted_states: (B,T,K,D), in the order of the first slots.
        binding: (B,N,K) of the first observation, which all actions were bound with.
    """

    predicted_objects: Tensor | None = None
    predicted_states: Tensor | None = None
    binding: Tensor | None = None


class Scene(NamedTuple):
    """An observation: slots (B,K,S), which of them are real (B,K), their binding (B,N,K) and their states (B,K,D)."""

    slots: Tensor
    mask: Tensor | None
    binding: Tensor
    states: Tensor


class WorldModel(WorldModelPreTrainedModel):
    """Predicts the states of a scene's objects after actions.

    Args:
        config: a WorldModelConfig.

    The representation (`encoder="cnn"`) is frozen: it never has gradients, and always computes as in evaluation.
    """

    def __init__(self, config: WorldModelConfig):
        super().__init__(config)
        size, dim, actions = config.slot_size, config.embedding_dim, config.num_actions
        if config.encoder == "cnn":
            self.representation = SlotAttentionModel(config)
        self.action_attention = ActionAttention(config.num_library_objects, size, actions)
        self.embedding = nn.Linear(size, dim)
        if config.transition == "gnn":
            self.transition: nn.Module = TransitionGNN(dim, actions, config.transition_hidden)
        else:
            self.transition = TransitionMLP(dim, actions, config.num_slots, config.transition_hidden)
        self.post_init()
        self.train(self.training)

    @classmethod
    def from_representation(cls, representation: SlotAttentionModel, **fields: Any) -> WorldModel:
        """A new world model that sees with a trained `SlotAttentionModel`; `fields` of the config that differ."""
        config = WorldModelConfig(**{**representation.config.to_dict(), **fields})
        model = cls(config)
        model.representation.load_state_dict(representation.state_dict())
        return model.to(representation.device)

    def train(self, mode: bool = True) -> WorldModel:
        """As of every module; the representation stays in evaluation, and frozen (loading makes its weights trainable)."""
        super().train(mode)
        if self.config.encoder == "cnn":
            self.representation.eval().requires_grad_(False)
        return self

    def observe(
        self,
        pixel_values: Tensor | None = None,
        slots: Tensor | None = None,
        slot_mask: Tensor | None = None,
        identities: Tensor | None = None,
        name: str = "",
    ) -> Scene:
        """Bind and embed an observation.

        Args:
            pixel_values: (B,C,H,H), or
            slots: (B,K,S).
            slot_mask: (B,K) bool, True = real.
            identities: see `ActionAttention.bind`.
            name: of the observation, for messages.

        Raises:
            InvalidInput: not one of pixel_values and slots, or wrong shapes.
        """
        if (pixel_values is None) == (slots is None):
            raise InvalidInput(f"WorldModel: give one of {name}pixel_values and {name}slots.")
        if slots is None:
            if self.config.encoder != "cnn":
                raise InvalidInput(f"WorldModel: encoder='slots' sees no {name}pixel_values. Give {name}slots.")
            with torch.no_grad():
                slots = self.representation(pixel_values, return_loss=False).slots
        check_dimensions(f"{name}slots", slots, 3)
        if slots.shape[2] != self.config.slot_size:
            raise InvalidInput(f"{name}slots {tuple(slots.shape)} must be (B, K, {self.config.slot_size}).")
        slots = slots.to(self.embedding.weight.dtype)
        binding = self.action_attention.bind(slots, slot_mask, identities)
        return Scene(slots, slot_mask, binding, self.embedding(slots))

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        actions: Tensor | None = None,
        next_pixel_values: Tensor | None = None,
        negative_pixel_values: Tensor | None = None,
        slots: Tensor | None = None,
        next_slots: Tensor | None = None,
        negative_slots: Tensor | None = None,
        slot_mask: Tensor | None = None,
        next_slot_mask: Tensor | None = None,
        negative_slot_mask: Tensor | None = None,
        object_mask: Tensor | None = None,
        negative_object_mask: Tensor | None = None,
        identities: Tensor | None = None,
        **kwargs: Any,
    ) -> WorldModelOutput:
        """One step, and its loss where the next and a negative observation are given.

        Args:
            pixel_values, next_pixel_values, negative_pixel_values: (B,C,H,H) pictures; or their slots:
            slots, next_slots, negative_slots: (B,K,S).
            actions: (B,N,A), one-hot in the row of the object that acts, zero elsewhere (`action_rows` makes them).
            slot_mask, next_slot_mask, negative_slot_mask: (B,K) bool, True = real.
            object_mask: (B,N) bool, the objects of the scene; rows of others do not count in the loss. None: all count.
            negative_object_mask: (B,N) bool of the negatives.
            identities: see `ActionAttention.bind`.
            kwargs: return_dict.

        Raises:
            InvalidInput: an observation or the actions are missing or have wrong shapes.
        """
        if actions is None:
            raise InvalidInput("WorldModel: actions are missing.")
        if negative_object_mask is not None and self.config.neg_binding == "next":
            raise InvalidInput("WorldModel: negative_object_mask has no use with neg_binding='next'. Leave it out.")
        now = self.observe(pixel_values, slots, slot_mask, identities)
        predicted = now.states + self._change(now, actions)
        frame = self._frame(now, object_mask)
        out = WorldModelOutput(
            predicted_objects=self._lift(frame, predicted), predicted_states=predicted, states=now.states,
            binding=now.binding.detach(), slots=now.slots,
        )  # fmt: skip
        wants_loss = negative_pixel_values is not None or negative_slots is not None
        if next_pixel_values is None and next_slots is None:
            if wants_loss:
                raise InvalidInput(
                    "WorldModel: negatives without a next observation. Give next_pixel_values or next_slots."
                )
            return out
        then = self.observe(next_pixel_values, next_slots, next_slot_mask, identities, "next_")
        next_frame = self._frame(then, object_mask)
        out.next_objects, out.next_states = self._lift(next_frame, then.states), then.states
        out.next_binding = then.binding.detach()
        if wants_loss:
            other = self.observe(negative_pixel_values, negative_slots, negative_slot_mask, identities, "negative_")
            own = self.config.neg_binding == "own"
            other_frame = self._frame(other, negative_object_mask) if own else next_frame
            out.loss = aligned_loss(
                now.states, predicted, then.states, other.states, frame, next_frame, other_frame,
                self.config.hinge, self.config.sigma, self.config.pseudo_inverse,
            )  # fmt: skip
        return out

    def predict(
        self,
        pixel_values: Tensor | None = None,
        actions: Tensor | None = None,
        slots: Tensor | None = None,
        slot_mask: Tensor | None = None,
        identities: Tensor | None = None,
        hard: bool = False,
    ) -> WorldModelRollout:
        """T steps from one observation, which binds all their actions.

        Args:
            pixel_values, slots, slot_mask, identities: of the first observation.
            actions: (B,T,N,A).
            hard: bind each object to one slot alone, the one with the largest weight.

        Raises:
            InvalidInput: as `forward`.
        """
        if actions is None or actions.dim() != 4 or not actions.shape[1]:
            shape = None if actions is None else tuple(actions.shape)
            raise InvalidInput(f"WorldModel.predict: actions {shape} must be (B,T,N,A), with T of at least 1.")
        scene = self.observe(pixel_values, slots, slot_mask, identities)
        if hard:
            scene = scene._replace(binding=hard_binding(scene.binding))
        states, frame = [scene.states], self._frame(scene, None)
        for action in actions.unbind(1):
            states.append(states[-1] + self._change(scene._replace(states=states[-1]), action))
        objects = torch.stack([self._lift(frame, state) for state in states[1:]], dim=1)
        return WorldModelRollout(objects, torch.stack(states[1:], dim=1), scene.binding.detach())

    def lift_scene(self, scene: Scene, hard: bool = False) -> Tensor:
        """(B,N,D): an observation in the order of the library, what predictions are compared with."""
        scene = scene._replace(binding=hard_binding(scene.binding)) if hard else scene
        return self._lift(self._frame(scene, None), scene.states)

    def _change(self, scene: Scene, actions: Tensor) -> Tensor:
        actions = self.action_attention(scene.binding, actions.to(scene.states.dtype))
        return self.transition(scene.states, actions, scene.mask)

    def _frame(self, scene: Scene, object_mask: Tensor | None) -> Tensor:
        """What states are lifted with: the binding; without alignment, each slot to itself."""
        if not self.config.aligned:
            if object_mask is not None:
                raise InvalidInput("WorldModel: object masks have no use with aligned=False. Leave them out.")
            real = torch.ones_like(scene.states[..., 0]) if scene.mask is None else scene.mask.to(scene.states.dtype)
            return torch.diag_embed(real)
        binding = scene.binding.detach()
        if object_mask is None:
            return binding
        if object_mask.shape != binding.shape[:2] or object_mask.dtype != torch.bool:
            raise InvalidInput(
                f"object_mask {tuple(object_mask.shape)} {object_mask.dtype} must be bool {tuple(binding.shape[:2])}."
            )
        return binding.masked_fill(~object_mask[..., None], 0)

    def _lift(self, frame: Tensor, states: Tensor) -> Tensor:
        return lift(frame, states, self.config.pseudo_inverse)


def hard_binding(binding: Tensor) -> Tensor:
    """One-hot rows: each object in the slot with its largest weight; rows of zeros stay zeros."""
    chosen = functional.one_hot(binding.argmax(-1), binding.shape[-1]).to(binding.dtype)
    return chosen.masked_fill(~(binding > 0).any(-1, keepdim=True), 0)
