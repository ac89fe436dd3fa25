"""The config of object-oriented world models (HOWM), and its entry in the Auto classes. Imports no torch, like AutoConfig."""

from __future__ import annotations

import functools
import importlib
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from hf_attn.errors import InvalidOption


class WorldModelConfig(PreTrainedConfig):
    """Slots, their binding to a library of objects, and how they move.

    Args:
        num_library_objects: N.
        num_scene_objects: K, objects in a scene.
        extra_slot: one slot more than objects, for the background.
        num_actions: A, of each object.
        slot_size: S.
        encoder: "cnn" makes slots from pictures; "slots": they are given in every call.
        image_size, num_channels, patch_size: of the pictures; a patch becomes one input of slot attention.
        encoder_channels: of the three stages of the CNN.
        decoder_channels: of the decoder.
        num_iterations: of slot attention.
        mlp_hidden_size: of slot attention.
        deterministic_slots: initial slots are drawn once for all, not anew in every call: slots are a function of the picture.
        embedding_dim: D, size of a slot's state.
        transition: "gnn", or "mlp", a baseline that is not equivariant.
        transition_hidden: width of the transition.
        aligned: the loss compares states in the order of the library; False: slot by slot, a baseline.
        pseudo_inverse: lift states with the pseudo-inverse of the binding.
        neg_binding: "own" lifts a negative with its own binding; "next" with that of the next state, as the released code.
        sigma, hinge: of the loss.
        kwargs: everything PreTrainedConfig takes.

    Raises:
        InvalidOption: a value outside its rule.
    """

    model_type = "howm"
    # what Trainer gathers in evaluation are the lifted states
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "predicted_states", "states", "next_states", "binding", "next_binding", "slots",
    ]  # fmt: skip

    num_library_objects: int = 10
    num_scene_objects: int = 5
    extra_slot: bool = True
    num_actions: int = 4
    slot_size: int = 64
    encoder: str = "cnn"
    image_size: int = 50
    num_channels: int = 3
    patch_size: int = 5
    encoder_channels: list[int] | tuple[int, ...] = (32, 32, 16)
    decoder_channels: int = 32
    num_iterations: int = 3
    mlp_hidden_size: int = 128
    deterministic_slots: bool = False
    embedding_dim: int = 4
    transition: str = "gnn"
    transition_hidden: int = 512
    aligned: bool = True
    pseudo_inverse: bool = False
    neg_binding: str = "own"
    sigma: float = 0.5
    hinge: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.encoder_channels = list(self.encoder_channels)
        self._check()
        register_world_model()

    @property
    def num_slots(self) -> int:
        """Slots of a scene, the extra one counted."""
        return self.num_scene_objects + int(self.extra_slot)

    def _check(self) -> None:
        choices = {"encoder": ("cnn", "slots"), "transition": ("gnn", "mlp"), "neg_binding": ("own", "next")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise self._refuse(name, f"must be one of {', '.join(map(repr, allowed))}")
        sizes = (
            "num_library_objects", "num_scene_objects", "num_actions", "slot_size", "image_size", "num_channels", "patch_size",
            "decoder_channels", "num_iterations", "mlp_hidden_size", "embedding_dim", "transition_hidden",
        )  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self._refuse(name, "must be an integer of at least 1")
        if self.num_scene_objects > self.num_library_objects:
            raise self._refuse("num_scene_objects", f"must be at most num_library_objects={self.num_library_objects}")
        if len(self.encoder_channels) != 3 or min(self.encoder_channels) < 1:
            raise self._refuse("encoder_channels", "must be three numbers of at least 1")
        if self.image_size % self.patch_size:
            raise self._refuse("image_size", f"must be a multiple of patch_size={self.patch_size}")
        for name in ("sigma", "hinge"):
            if not getattr(self, name) > 0:
                raise self._refuse(name, "must be above 0")

    def _refuse(self, name: str, rule: str) -> InvalidOption:
        return InvalidOption(f"WorldModelConfig: {name}={getattr(self, name)!r} {rule}.")


@functools.cache
def register_world_model() -> type[WorldModelConfig]:
    """Let the Auto classes know world models; their config class."""
    from transformers import AutoConfig, AutoModel

    models = importlib.import_module("hf_attn.models.world_model")
    AutoConfig.register(WorldModelConfig.model_type, WorldModelConfig, exist_ok=True)
    AutoModel.register(WorldModelConfig, models.WorldModel, exist_ok=True)
    return WorldModelConfig
