"""RFA: random feature attention, and the deterministic feature maps of its code base.

Paper: Peng et al., "Random Feature Attention", ICLR 2021, in the form of Zheng, Wang, Kong, "Linear Complexity
Randomized Self-attention Mechanism", ICML 2022 (section on RFA).

    out_n = sum_m <phi(q_n), phi(k_m)> v_m / sum_m <phi(q_n), phi(k_m)>
    log phi_f(x) = sqrt(s) <z_f, x> - s |x|^2 / 2        z_f standard normal, s the scaling

Shapes: query (B,H,N,D), key and value (B,H,M,D), directions z (H,F,D).
When to use: long sequences, causal decoding with a state of constant size.
When not: as a drop-in for a pretrained softmax model without training; long query and key vectors make the estimate
noisy (its variance grows like exp(s |q + k|^2)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_attn.capabilities import Capabilities
from hf_attn.errors import InvalidInput, Unsupported
from hf_attn.functional import (
    causal_linear_attention,
    draw_,
    linear_attention,
    linear_weights,
    log_elu1,
    log_positive,
    random_directions,
)
from hf_attn.module import AttentionModule, Call, State
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

RANDOM_MAPS = ("positive", "relu")


@dataclass(frozen=True)
class RfaOptions(Options):
    """Options of `rfa`.

    Attributes:
        feature_map: "positive" or "relu" (random features), "relu-only" or "elu1" (none).
        num_features: F, for the random maps.
        orthogonal: rows of the draw orthogonal in blocks of D.
        redraw: "fresh" draws anew in each training forward, "fixed" keeps the buffer, "learnable" trains it.
    """

    mechanism: ClassVar[str] = "rfa"

    feature_map: str = "positive"
    num_features: int = 64
    orthogonal: bool = True
    redraw: str = "fresh"

    def check(self) -> None:
        self.one_of("feature_map", *RANDOM_MAPS, "relu-only", "elu1")
        self.integer("num_features", 1)
        self.boolean("orthogonal")
        self.one_of("redraw", "fresh", "fixed", "learnable")


class RandomFeatureAttention(AttentionModule):
    """Random feature attention: softmax attention estimated by a kernel of random features, in linear time."""

    name = "rfa"
    options_class = RfaOptions
    extra_inputs = ("noise",)

    def __init__(self, num_heads: int, head_dim: int, options: RfaOptions):
        super().__init__(num_heads, head_dim, options)
        self.projection: Tensor
        if options.feature_map in RANDOM_MAPS:
            empty = torch.empty(num_heads, options.num_features, head_dim)
            if options.redraw == "learnable":
                self.projection = nn.Parameter(empty)
            else:
                self.register_buffer("projection", empty)

    @classmethod
    def describe(cls, options: RfaOptions) -> Capabilities:
        drawn = options.feature_map in RANDOM_MAPS
        when = {"fresh": "each training forward, and once at construction (saved) for evaluation",
                "fixed": "once at construction, saved", "learnable": "once at construction, then trained"}  # fmt: skip
        return Capabilities(
            causal=True,
            cross=True,
            packed=True,
            decode="constant state",
            learned=drawn and options.redraw == "learnable",
            random=f"feature directions: {when[options.redraw]}" if drawn else "",
            attention_weights=True,
            pays_from="512 (2-core CPU, float32, D = 64)",
        )

    def reset_parameters(self) -> None:
        if self.options.feature_map in RANDOM_MAPS:
            draw_(self.projection, self.directions(self.projection.device))

    def directions(self, device: torch.device) -> Tensor:
        """A new draw z (H,F,D) of unit scale."""
        return random_directions(
            self.num_heads, self.options.num_features, self.head_dim, self.options.orthogonal, device
        )

    def log_features(self, call: Call, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """log phi of the queries (B,H,N,F) and of the keys (B,H,M,F)."""
        options, noise = self.options, call.extra.get("noise")
        if options.feature_map == "elu1":
            return log_elu1(call.query), log_elu1(call.key)
        if options.feature_map == "relu-only":
            return (call.query.relu() + 0.1).log(), (call.key.relu() + 0.1).log()
        z = self.projection
        if noise is not None:
            z = noise
        elif self.training and options.redraw == "fresh" and not frozen:
            z = self.directions(call.query.device)
        z = z.to(call.query.dtype)
        if options.feature_map == "positive":
            return log_positive(call.query, z, call.scale), log_positive(call.key, z, call.scale)
        scale = (call.scale / options.num_features) ** 0.5
        return tuple((scale * (x @ z.transpose(-1, -2))).relu().add(1e-3).log() for x in (call.query, call.key))

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        call = super()._call(query, key, value, **arguments)
        noise = call.extra.get("noise")
        if noise is None:
            return call
        if self.options.feature_map not in RANDOM_MAPS:
            raise Unsupported(
                self.name,
                f"noise was given and feature_map={self.options.feature_map!r} has no random features",
                "Leave noise out",
            )
        if noise.shape != (self.num_heads, self.options.num_features, self.head_dim):
            raise InvalidInput(
                f"rfa: noise must be (H,F,D) = ({self.num_heads},{self.options.num_features},{self.head_dim}); got {tuple(noise.shape)}."
            )
        return call

    def weights(self, call: Call) -> Tensor:
        return linear_weights(*self.log_features(call), call.visible())

    def attend(self, call: Call) -> Tensor:
        if call.is_causal:
            return self.recurrent(call, None)[0]
        return linear_attention(*self.log_features(call), call.value, call.key_padding_mask)

    def recurrent(self, call: Call, state: State | None) -> tuple[Tensor, State]:
        log_query, log_key = self.log_features(call, frozen=state is not None)
        return causal_linear_attention(log_query, log_key, call.value, call.key_padding_mask, state)


register(
    Mechanism(
        name="rfa",
        title="Random feature attention",
        paper="Peng et al., ICLR 2021 (arXiv 2103.02143); Zheng, Wang, Kong, ICML 2022 (arXiv 2204.04667)",
        equation="out_n = sum_m <phi(q_n), phi(k_m)> v_m / sum_m <phi(q_n), phi(k_m)>,  log phi_f(x) = sqrt(s) <z_f, x> - s |x|^2 / 2",
        module_class=RandomFeatureAttention,
        example={"num_features": 32},
    )
)
