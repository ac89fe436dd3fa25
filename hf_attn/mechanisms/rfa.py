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
from hf_attn.kernels.causal_features import causal_feature_attention
from hf_attn.kernels.random_features import random_feature_attention
from hf_attn.module import AttentionModule, Call, State
from hf_attn.options import Options
from hf_attn.registry import Mechanism, register

RANDOM_MAPS = ("positive", "relu")
OFFICIAL_EPSILON, OFFICIAL_FLOOR = 1e-4, 1e-2
"""What the official code adds to every feature, and the smallest value of its normaliser."""


@dataclass(frozen=True)
class RfaOptions(Options):
    """Options of `rfa`.

    Attributes:
        feature_map: "positive" or "relu" (random features), "relu-only" or "elu1" (none).
        num_features: F, for the random maps.
        orthogonal: rows of the draw orthogonal in blocks of D.
        redraw: "fresh" draws anew in each training forward, "fixed" keeps the buffer, "learnable" trains it.
        official_compat: the "positive" map with the official code's epsilon and clamped normaliser, for weights that
            were trained with them; rows then do not sum to one.
    """

    mechanism: ClassVar[str] = "rfa"

    feature_map: str = "positive"
    num_features: int = 64
    orthogonal: bool = True
    redraw: str = "fresh"
    official_compat: bool = False

    def check(self) -> None:
        self.one_of("feature_map", *RANDOM_MAPS, "relu-only", "elu1")
        self.integer("num_features", 1)
        self.boolean("orthogonal", "official_compat")
        self.one_of("redraw", "fresh", "fixed", "learnable")
        if self.official_compat and self.feature_map != "positive":
            rule = f"belongs to feature_map='positive', and feature_map={self.feature_map!r}"
            raise self.refuse("official_compat", rule, "Leave official_compat out.")


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
            causal=not options.official_compat,
            cross=True,
            packed=True,
            decode="none" if options.official_compat else "constant state",
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

    def z(self, call: Call) -> Tensor:
        """The directions (H,F,D) of this call: given, drawn for it, or the saved ones."""
        z = call.extra.get("noise")
        if z is not None:
            return z
        fresh = self.training and self.options.redraw == "fresh"
        return self.directions(call.query.device) if fresh else self.projection

    def log_features(self, call: Call, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log phi of the queries (B,H,N,F) and of the keys (B,H,M,F), by the directions z."""
        options = self.options
        if options.feature_map == "elu1":
            return log_elu1(call.query), log_elu1(call.key)
        if options.feature_map == "relu-only":
            return (call.query.relu() + 0.1).log(), (call.key.relu() + 0.1).log()
        z = (self.z(call) if z is None else z).to(call.query.dtype)
        if options.feature_map == "positive":
            return log_positive(call.query, z, call.scale), log_positive(call.key, z, call.scale)
        scale = (call.scale / options.num_features) ** 0.5
        return tuple((scale * (x @ z.transpose(-1, -2))).relu().add(1e-3).log() for x in (call.query, call.key))

    def summed_features(self, call: Call, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`log_features` for the efficient forms: what depends on the query alone cancels, and is not computed."""
        if self.options.feature_map != "positive":
            return self.log_features(call, z)
        z = (self.z(call) if z is None else z).to(call.query.dtype)
        return call.scale**0.5 * (call.query @ z.transpose(-1, -2)), log_positive(call.key, z, call.scale)

    def official_features(self, call: Call) -> tuple[Tensor, Tensor]:
        """phi of the official code, for queries (B,H,N,F) and keys (B,H,M,F); zero at padded keys."""
        z, mask = self.z(call).to(call.query.dtype), call.key_padding_mask
        hidden = None if mask is None else ~mask[:, None, :, None]
        return _official(call.query, z, call.scale, (-1,)), _official(call.key, z, call.scale, (-2, -1), hidden)

    def _call(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Call:
        if self.options.official_compat and arguments.get("is_causal"):
            raise Unsupported(
                self.name,
                "is_causal=True with official_compat=True: the epsilon is relative to the largest of all keys, so the "
                "future would leak",
                "Leave official_compat out",
            )
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
        if self.options.official_compat:
            phi_query, phi_key = self.official_features(call)
            scores = (phi_query[:, :, :, None] * phi_key[:, :, None]).sum(dim=-1)
            return scores / scores.sum(dim=-1, keepdim=True).clamp(min=OFFICIAL_FLOOR)
        return linear_weights(*self.log_features(call), call.visible())

    def attend(self, call: Call) -> Tensor:
        if self.options.feature_map == "positive" and not self.options.official_compat:
            return random_feature_attention(
                call.query, call.key, call.value, self.z(call), key_padding_mask=call.key_padding_mask,
                is_causal=call.is_causal, scaling=call.scale,
            )  # fmt: skip
        if call.is_causal:
            return causal_feature_attention(*self.log_features(call), call.value, call.key_padding_mask)
        if self.options.official_compat:
            phi_query, phi_key = self.official_features(call)
            mass = phi_query @ phi_key.sum(dim=2)[..., None]
            return phi_query @ (phi_key.transpose(-1, -2) @ call.value) / mass.clamp(min=OFFICIAL_FLOOR)
        return linear_attention(*self.log_features(call), call.value, call.key_padding_mask)

    def recurrent(self, call: Call, state: State | None) -> tuple[Tensor, State]:
        """A state is made of features, so it keeps directions that are not the saved ones for the steps to come."""
        z = None
        if self.options.feature_map in RANDOM_MAPS:
            if state is None or "noise" in call.extra:
                z = self.z(call)
            else:
                z = state.get("directions", self.projection)
        log_query, log_key = self.summed_features(call, z)
        out, new = causal_linear_attention(log_query, log_key, call.value, call.key_padding_mask, state)
        if z is not None and z is not self.projection:
            new["directions"] = z.expand(call.batch, -1, -1, -1)
        return out, new


def _official(x: Tensor, z: Tensor, scale: float, over: tuple[int, ...], hidden: Tensor | None = None) -> Tensor:
    """F**-0.5 exp(log phi(x) - top) + epsilon, top the largest sqrt(s) <z, x> `over` these dimensions."""
    projection = scale**0.5 * (x @ z.transpose(-1, -2))
    log_phi = projection - scale / 2 * x.square().sum(-1, keepdim=True)
    top = projection.detach()
    if hidden is not None:
        top, log_phi = top.masked_fill(hidden, float("-inf")), log_phi.masked_fill(hidden, float("-inf"))
    top = top.amax(dim=over, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0)
    phi = z.shape[-2] ** -0.5 * (log_phi - top).exp() + OFFICIAL_EPSILON
    return phi if hidden is None else phi.masked_fill(hidden, 0)


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
