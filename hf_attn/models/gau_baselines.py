"""The transformers that the gated attention units are compared with: Transformer++ and MC-TFM++, as one block.

Paper: Hua, Dai, Liu, Le, "Transformer Quality in Linear Time", ICML 2022.

    x + W_o attention(norm(x))         multi-head, rotary positions; softmax (Transformer++) or mixed chunks (MC-TFM++)
    x + W_d (silu(g) * h),  g, h = norm(x) W_g        gated-linear feed-forward layer

The details of MC-TFM++ were not available. Choices: each head has local softmax attention and the linear part on copies
of its rotated queries and keys, scaled and shifted by learned numbers. The gate is SiLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_attn.kernels.linear import linear
from hf_attn.models.gau_config import GauConfig
from hf_attn.models.gau_layers import Rotation, UnitState, make_norm, rotate, rotation_of
from hf_attn.module import State
from hf_attn.registry import build


@dataclass
class BlockState(UnitState):
    """Keys and values (B,H,t,D) of all tokens so far with their mask (B,t), or the state of the mechanism."""

    tokens: int = 0
    key: Tensor | None = None
    value: Tensor | None = None
    real: Tensor | None = None
    inner: State | None = None

    def map(self, function: Any) -> BlockState:
        super().map(function)
        if self.inner is not None:
            self.inner = {name: function(tensor) for name, tensor in self.inner.items()}
        return self


class TransformerBlock(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward layer, called like a gated attention unit.

    Args:
        config: with block="transformer".
    """

    def __init__(self, config: GauConfig):
        super().__init__()
        # both are filled in by the config
        dim, self.heads, wide = config.hidden_size, config.num_attention_heads or 1, config.intermediate_size or 1
        self.head_dim, self.theta = dim // self.heads, config.rope_theta
        self.use_rope = config.use_rope
        self.dropout, self.attention_dropout = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        self.attention_norm = make_norm(config.norm_type, dim, config.norm_eps)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=config.use_bias)
        self.attention_out = nn.Linear(dim, dim, bias=config.use_bias)
        self.feed_forward_norm = make_norm(config.norm_type, dim, config.norm_eps)
        self.gate_up = nn.Linear(dim, 2 * wide, bias=config.use_bias)
        self.down = nn.Linear(wide, dim, bias=config.use_bias)
        options: dict[str, Any] = {}
        if config.attention == "mixed_chunk":
            options = {"chunk_size": config.chunk_size, "offset_scale": True}
        name = "mixed_chunk" if config.attention == "mixed_chunk" else "softmax"
        self.mechanism = build(name, num_heads=self.heads, head_dim=self.head_dim, **options)

    def forward(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        past_state: BlockState | None = None,
        use_cache: bool = False,
        rotation: Rotation | None = None,
    ) -> Any:
        """(B,N,d) -> (B,N,d), or with `use_cache` that and the state. Arguments of `GatedUnit.forward`."""
        first = past_state.tokens if past_state is not None else 0
        query, key, value = self._heads(hidden_states, first, rotation)
        is_causal = is_causal or use_cache or past_state is not None
        out, state = self._attend(query, key, value, key_padding_mask, is_causal, past_state, use_cache)
        out = linear(self.attention_out, out.transpose(1, 2).flatten(2))
        x = hidden_states + functional.dropout(out, self.dropout, self.training)
        gate, up = linear(self.gate_up, self.feed_forward_norm(x)).chunk(2, dim=-1)
        out = linear(self.down, functional.silu(gate) * up)
        y = x + functional.dropout(out, self.dropout, self.training)
        return (y, state) if use_cache else y

    def _heads(self, x: Tensor, first: int, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """Query, key and value (B,H,N,D), rotated."""
        projected = linear(self.query_key_value, self.attention_norm(x)).unflatten(-1, (3, self.heads, self.head_dim))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        if self.use_rope:
            rotation = self.rotation(first, x.shape[1], x) if rotation is None else rotation
            query, key = rotate(query, rotation), rotate(key, rotation)
        return query, key, value

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, causal: bool, past: Any, use_cache: bool
    ) -> tuple[Tensor, BlockState | None]:
        tokens = query.shape[2] + (past.tokens if past is not None else 0)
        call: dict[str, Any] = {"key_padding_mask": real}
        if self.mechanism.capabilities.dropout and self.training:
            call["dropout"] = self.attention_dropout
        if self.mechanism.capabilities.keeps_state and use_cache:
            out, inner = self.mechanism.step(query, key, value, None if past is None else past.inner, **call)
            return out, BlockState(tokens=tokens, inner=inner)
        if past is not None:
            key, value = torch.cat((past.key, key), dim=2), torch.cat((past.value, value), dim=2)
            if past.real is not None:
                call["key_padding_mask"] = real = functional.pad(past.real, (0, query.shape[2]), value=True)
        out = self.mechanism(query, key, value, is_causal=causal, **call)
        return out, BlockState(tokens=tokens, key=key, value=value, real=real) if use_cache else None

    def rotation(self, first: int, count: int, like: Tensor) -> Rotation:
        """`rotation_of` positions for one head."""
        return rotation_of(first, count, self.head_dim, self.theta, like)

    def attention_weights(
        self, hidden_states: Tensor, key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B,H,N,N) weights of a call."""
        query, key, value = self._heads(hidden_states, 0, None)
        call = {"key_padding_mask": key_padding_mask, "is_causal": is_causal}
        return self.mechanism.attention_weights(query, key, value, **call)
