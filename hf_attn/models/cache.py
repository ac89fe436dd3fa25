"""The decoding state of a mechanism inside transformers' `Cache`.

A mechanism that decodes with a state of its own (`Capabilities.keeps_state`) needs no keys and values of the past. Its
layer of the model's cache is replaced by a `StateLayer`, which hands new keys and values straight through and keeps
the mechanism's state; `Cache` and `generate` go on as they are (length, beam reordering, batch selection, reset).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

from hf_attn.errors import Unsupported
from hf_attn.module import State


class StateLayer(CacheLayerMixin):
    """One layer's state: tensors whose first dimension is the batch, and the number of tokens they stand for."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.state: State | None = None
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens and hand them through; the attention call takes them into `state`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    # the name of `get_max_length` before transformers 5.20
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.state, self.cumulative_length, self.is_initialized = None, 0, False

    def _map(self, function: Any) -> None:
        if self.state is not None:
            self.state = {name: function(tensor) for name, tensor in self.state.items()}

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise Unsupported(
                "decoding state",
                f"crop({tokens_to_remove}): tokens cannot be taken out of it again",
                "Use a mechanism with a full cache (softmax) for assisted or speculative decoding",
            )

    def memory(self) -> int:
        """Bytes the state takes."""
        return sum(t.numel() * t.element_size() for t in (self.state or {}).values())


def state_layer(
    cache: Cache | EncoderDecoderCache,
    layer_idx: int | None,
    mechanism: str,
    layer_class: type[StateLayer] = StateLayer,
) -> StateLayer:
    """The `StateLayer` of `layer_idx` in `cache`, put in place of an untouched dynamic layer at the first call.

    `layer_class` is the kind to put there.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if layer_idx is None:
        raise Unsupported(
            mechanism,
            "the attention module has no layer_idx, so its part of the cache is unknown",
            "Pass use_cache=False",
        )
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, StateLayer):
        return layer
    if type(layer) is not DynamicLayer or layer.get_seq_length():
        holds = "already holds keys and values" if type(layer) is DynamicLayer else f"is a {type(layer).__name__}"
        raise Unsupported(
            mechanism,
            f"layer {layer_idx} of the cache {holds}, and {mechanism} keeps a state of its own instead",
            "Start from an empty DynamicCache (cache_implementation=None)",
        )
    cache.layers[layer_idx] = created = layer_class()
    return created


def cache_memory(cache: Cache) -> int:
    """Bytes held by all layers of a cache, keys and values or states."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            total += layer.memory()
        else:
            held = (getattr(layer, "keys", None), getattr(layer, "values", None))
            total += sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
    return total
